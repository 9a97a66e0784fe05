"""The networks that are trained, without their data: quick to import, for --dry-run and plans."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ingest.shards import read_manifest
from ingest.store.storage import storage_of
from models.configs import ClipConfig
from models.decoder import Decoder
from models.diffusion.losses import require_weights
from models.priors.autoregressive import AutoregressivePrior
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.upsampler import Upsampler
from training.config import DecoderRunConfig, PriorRunConfig

MIN_CROP = 16
VOCAB_SIZE = ClipConfig().vocab_size
PRIORS: dict[str, type[nn.Module]] = {
    "diffusion": DiffusionPrior,
    "autoregressive": AutoregressivePrior,
    "regression": RegressionPrior,
}


def encoder_sizes(embeds: Sequence[str]) -> dict[str, int]:
    """Return embed_dim, text_width and context_length of the encoder that made `embeds`.

    Where there are no embeddings yet, a default CLIP's, with a message: a dry run needs no data.
    """
    names = ("embed_dim", "text_width", "context_length")
    if storage_of(embeds[0]).size("_manifest.json") is not None:
        manifest = read_manifest(embeds[0])
        return {name: manifest[name] for name in names}
    print(f"# {embeds[0]}: absent; sizes of a default CLIP are assumed")
    return {name: getattr(ClipConfig(), name) for name in names}


def prior_model(config: PriorRunConfig, sizes: dict[str, int] | None = None) -> nn.Module:
    """Build the prior for an encoder of these sizes; None for that of its embeddings."""
    sizes = sizes or encoder_sizes(config.embeds)
    options: Any = getattr(config, config.prior)
    if config.prior == "autoregressive" and not options.num_codes:
        # only data tell how many codes are enough: a dry run counts all dimensions
        options = dataclasses.replace(options, num_codes=sizes["embed_dim"])
    kind: Any = PRIORS[config.prior]
    model = kind(options, **sizes, vocab_size=VOCAB_SIZE)
    if isinstance(model, DiffusionPrior):
        require_weights(model.schedule, model.config.weighting, "x0")
    return model


def decoder_model(
    config: DecoderRunConfig, sizes: dict[str, int] | None = None
) -> Decoder | Upsampler:
    """Build the model of one stage for an encoder of these sizes; None for that of its
    embeddings."""
    model: Decoder | Upsampler
    if config.stage == "base":
        sizes = dict(sizes or encoder_sizes(config.embeds))
        del sizes["context_length"]
        model = Decoder(config.base, image_size=config.image_size, **sizes, vocab_size=VOCAB_SIZE)
    else:
        factor, crop = cascade_sizes(config)
        model = Upsampler(config.up, factor=factor, crop_size=crop)
    require_weights(model.schedule, model.config.weighting, model.config.prediction)
    return model


def cascade_sizes(config: DecoderRunConfig) -> tuple[int, int]:
    """Return an upsampler's factor and crop size in px; ValueError if the sizes do not divide."""
    size = config.image_size
    low_res = config.low_res_size or size // 4
    crop = config.crop_size or max(MIN_CROP, size // 4)
    if size % low_res or crop % (size // low_res) or crop > size:
        raise ValueError(
            f"crop_size: found a crop of {crop} px from {size} px over {low_res} px, expected "
            f"sizes that divide"
        )
    return size // low_res, crop
