"""What training/prior.py trains: one of three priors, its objective and data."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingest.embedding.statistics import EmbedStatistics
from ingest.shards import load_snapshot
from models.clip import FrozenClip
from models.diffusion.samplers import ddim
from models.networks.packing import CaptionPacking, PackedTokens, token_lengths
from models.networks.transformer import trimmed_length
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import PackedText, PriorSampling, PriorText, vector_of
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.scores import prior_scorecard
from models.tokenizers import token_mask, tokenizer
from models.weights import EMA_NAME, load_weights
from training.config import PriorRunConfig
from training.data.dataloader import Batch, first_batches
from training.data.datasets import ColumnDataset, EmbedDataset, captions_of
from training.data.inputs import (
    clip_of,
    encoder_of,
    gathered,
    mixed,
    pin_snapshots,
    pin_statistics,
    start_from,
)
from training.engine.precision import device_of_run
from training.loop import Task
from training.tasks.networks import encoder_sizes, prior_model

MAX_VALIDATED = 512  # held-out captions, the first ones: a scorecard takes seconds
VALIDATED_AT_ONCE = 128
VALIDATION_SAMPLING = PriorSampling(sampler=ddim(eta=1.0))


def build_prior(config: PriorRunConfig) -> Task:
    """Return the task of training a prior; the frozen text tower stays outside the engine."""
    if config.prior == "regression" and config.train.most_micro_batches > 1:
        raise ValueError(
            f"train.micro_batch_size: found {config.train.batch.micro_batch_size}, expected 0: the "
            "regression prior contrasts all samples of a step with each other"
        )
    encoder = encoder_of(config.embeds, config.clip)
    sizes = encoder_sizes(config.embeds)
    statistics = pin_statistics(config.run, config.embeds, config.data.weights)
    config = with_codes(with_length(config, encoder), statistics)
    model: Any = prior_model(config, sizes)
    set_statistics(model, statistics, whiten=config.whiten)
    export = {
        "kind": f"{config.prior}_prior",
        "model": dataclasses.asdict(getattr(config, config.prior)),
        "encoder_id": encoder.encoder_id,
        "clip": clip_of(config.embeds, config.clip),
        **sizes,
    }
    # with the statistics by which those weights scale embeddings
    start_from(model, config.init, config.run, export)
    own_tokens = getattr(config, config.prior).text_tokens
    return Task(
        model=model,
        objective=partial(prior_objective, encoder, bool(own_tokens)),
        build_dataset=partial(prior_dataset, config),
        collate=partial(pack_captions, model.pack, bool(own_tokens)),
        export=export,
        encoder=encoder,
        validate=partial(validate_prior, config, encoder, sizes) if config.validation else None,
    )


def with_length(config: PriorRunConfig, encoder: FrozenClip) -> PriorRunConfig:
    """Return the configuration of a prior that draws embeddings as long as the encoder's are.

    Raises ValueError where the prior can only draw such of unit norm.
    """
    if config.prior == "diffusion":
        sizes = dataclasses.replace(config.diffusion, unit_norm=encoder.unit_norm)
        return dataclasses.replace(config, diffusion=sizes)
    if not encoder.unit_norm:
        raise ValueError(
            f"prior: found {config.prior} for embeddings that keep their length, expected "
            "diffusion: the others draw embeddings of unit norm"
        )
    return config


def with_codes(config: PriorRunConfig, statistics: EmbedStatistics) -> PriorRunConfig:
    """Return the configuration with as many codes as hold the wanted share of the variance."""
    sizes = config.autoregressive
    if config.prior != "autoregressive" or sizes.num_codes:
        return config
    sizes = dataclasses.replace(sizes, num_codes=statistics.num_components(sizes.energy))
    return dataclasses.replace(config, autoregressive=sizes)


def set_statistics(model: nn.Module, statistics: EmbedStatistics, *, whiten: bool) -> None:
    """Tell a prior the moments of its embeddings."""
    mean = torch.from_numpy(statistics.mean)
    if isinstance(model, AutoregressivePrior):
        basis, eigenvalues = statistics.basis, statistics.eigenvalues
        model.codes.set(mean, torch.from_numpy(basis.copy()), torch.from_numpy(eigenvalues.copy()))
    elif isinstance(model, (DiffusionPrior, RegressionPrior)):
        if whiten:
            model.scale.set(mean, torch.from_numpy(statistics.std))
        model.scale.set_spectrum(torch.from_numpy(statistics.covariance))
        if isinstance(model, DiffusionPrior) and model.token_scale is not None:
            if whiten:
                mean = torch.from_numpy(statistics.token_mean)
                model.token_scale.set(mean, torch.from_numpy(statistics.token_std))
            model.token_scale.set_spectrum(torch.from_numpy(statistics.token_covariance))


def pack_captions(
    pack: Callable[[Tensor, Tensor], CaptionPacking], own_tokens: bool, batch: Batch
) -> Batch:
    """Return a batch with its captions packed for a prior, by its `pack`."""
    tokens = batch["caption_tokens" if own_tokens else "tokens"]
    packing = pack(token_lengths(token_mask(tokens)), batch.keys)
    return dataclasses.replace(batch, captions=PackedTokens.of(tokens, packing))


def prior_text(encoder: FrozenClip, batch: Batch, own_tokens: bool) -> PriorText:
    """Return the text that conditions a prior, of a batch's captions, padded."""
    if own_tokens:
        tokens = batch["caption_tokens"]
        text = tokens = tokens[:, : trimmed_length(token_mask(tokens))]
    else:
        tokens = encoder.trimmed(batch["tokens"])
        _, text = encoder.on(batch.keys.device).encode_text(tokens)
    return PriorText(text_embed=batch["text_embed"], text=text, token_mask=token_mask(tokens))


def packed_text(encoder: FrozenClip, batch: Batch, own_tokens: bool) -> PackedText:
    """Return the text that conditions a prior in training, of a batch from `pack_captions`."""
    assert batch.captions is not None
    text, packing = batch.captions.tokens, batch.captions.packing
    if not own_tokens:
        encoder.on(text.device)
        if encoder.packs_text:
            text = encoder.encode_packed(text, packing.text)  # [S, W]
        else:
            _, states = encoder.encode_text(encoder.trimmed(batch["tokens"]))
            text = states[packing.text.sequence, packing.text.position]
    return PackedText(text_embed=batch["text_embed"], text=text, packing=packing)


def prior_objective(
    encoder: FrozenClip, own_tokens: bool, model: Any, batch: Batch
) -> dict[str, Tensor]:
    """Return the losses of a prior on a batch from `pack_captions`."""
    text = packed_text(encoder, batch, own_tokens)
    if isinstance(model, RegressionPrior):  # contrasts with every worker's captions
        return model.losses(batch.keys, batch["image_embed"], text, gathered)
    return model.losses(batch.keys, batch["image_embed"], text)


def validate_prior(
    config: PriorRunConfig, encoder: FrozenClip, sizes: dict[str, int], folder: Path
) -> dict[str, float]:
    """Return the scorecard of a checkpoint's averaged weights on held-out captions."""
    encoder_of(config.validation, config.clip)
    model: Any = load_weights(prior_model(config, sizes), folder / EMA_NAME)
    device = device_of_run(config.train.workers.device)
    model.to(device)
    tokens = getattr(config, config.prior).text_tokens
    snapshots = [load_snapshot(root) for root in config.validation]
    reader = mixed([EmbedDataset(one, _tokenize(tokens)) for one in snapshots], ())
    count = min(MAX_VALIDATED, sum(one.num_samples for one in snapshots))
    drawn, image, text, captions = [], [], [], captions_of(snapshots, count)
    for batch in first_batches(reader, count, VALIDATED_AT_ONCE, device):
        conditions = prior_text(encoder, batch, bool(tokens))
        z = model.sample(batch.keys, conditions, VALIDATION_SAMPLING)
        drawn.append(vector_of(z).cpu())
        image.append(batch["image_embed"].cpu())
        text.append(batch["text_embed"].cpu())
    return prior_scorecard(torch.cat(drawn), torch.cat(image), torch.cat(text), captions)


def _tokenize(own_tokens: int) -> Callable | None:
    return tokenizer(own_tokens) if own_tokens else None


def prior_dataset(config: PriorRunConfig) -> ColumnDataset:
    """Read embeddings and tokens."""
    tokenize = _tokenize(getattr(config, config.prior).text_tokens)
    snapshots = pin_snapshots(config.run, "embeds", config.embeds)
    captions = config.data.caption_weights()
    tokens = config.prior == "diffusion" and config.diffusion.image_tokens > 1
    readers = [EmbedDataset(snapshot, tokenize, captions, tokens) for snapshot in snapshots]
    return mixed(readers, config.data.weights)
