"""Priors that race in quality_an_hour.py: ours, diffusers' PriorTransformer, dalle2-pytorch's
DiffusionPrior; of near-equal size, one draw a caption, without guidance."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _racers import (
    DALLE2,
    DIFFUSERS,
    OURS,
    RATES,
    Arrays,
    Heat,
    Trained,
    accelerated,
    laps_of,
    plain_loop,
    rate_at,
    train_ours,
    unit_rms,
)

WIDTH, DEPTH, HEADS = 256, 2, 4  # as the demo's prior
DALLE2_DEPTH = 8  # its network is as wide as an embedding
TEXT_DROP = 0.1  # probability, of every racer

PRIOR_SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {
        "Muon": (),
        "AdamW": ("--train.optimizer", "adamw", "--train.learning-rate", "1e-3"),
    },
    DIFFUSERS: {f"lr {rate}": rate for rate in RATES},
    DALLE2: {f"lr {rate}": rate for rate in RATES},
}


def _ours(heat: Heat, device: Any) -> Iterator[Trained]:
    flags = (
        "--preset", "demo", "--diffusion.text-drop", str(TEXT_DROP),
        *PRIOR_SETTINGS[OURS][heat.setting],
    )  # fmt: skip
    return train_ours(heat, device, "prior.py", flags, _draw_ours)


def _draw_ours(prior: Any, rows: Arrays, steps: int) -> Any:
    from models.diffusion.samplers import SAMPLERS
    from models.priors.base import PriorSampling, PriorText

    text = PriorText(text_embed=rows.text_embed, text=rows.states, token_mask=rows.mask)
    options = PriorSampling(sampler=SAMPLERS["ddpm"], sample_steps=steps, best_of=1, cfg_scale=1)
    return prior.sample(rows.key, text, options)


def _diffusers(heat: Heat, device: Any) -> Iterator[Trained]:
    """Train as Karlo's: it predicts x0 of whitened embeddings; a dropped caption is zeros."""
    import torch
    import torch.nn.functional as F
    from diffusers.models.transformers.prior_transformer import PriorTransformer
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    train = Arrays.read(Path(heat.data), "train", device)
    model: Any = PriorTransformer(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=DEPTH,
        embedding_dim=train.image_embed.shape[1], num_embeddings=train.states.shape[1],
        additional_embeddings=4,
    ).to(device)  # fmt: skip
    model.clip_mean.data.copy_(train.image_embed.mean(0))
    model.clip_std.data.copy_(train.image_embed.std(0))
    model.clip_mean.requires_grad_(False)
    model.clip_std.requires_grad_(False)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    def loss_of(rows: Arrays) -> Any:
        x0, count = (rows.image_embed - model.clip_mean) / model.clip_std, len(rows)
        t: Any = torch.randint(0, 1000, (count,), device=device)
        noise: Any = torch.randn_like(x0)
        kept = (torch.rand(count, 1, device=device) >= TEXT_DROP).float()
        x_t = schedule.add_noise(x0, noise, t)
        predicted = model(
            x_t, timestep=t, proj_embedding=unit_rms(rows.text_embed) * kept,
            encoder_hidden_states=rows.states * kept[..., None], attention_mask=rows.mask,
        ).predicted_image_embedding  # fmt: skip
        return F.mse_loss(predicted.float(), x0)

    return plain_loop(heat, model, PRIOR_SETTINGS[DIFFUSERS][heat.setting], loss_of, _draw)


def _draw(model: Any, rows: Arrays, steps: int) -> Any:
    """Draw as diffusers' `UnCLIPPipeline` does, unguided."""
    import torch
    from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler

    scheduler = UnCLIPScheduler(
        num_train_timesteps=1000, variance_type="fixed_small_log", prediction_type="sample",
        clip_sample_range=5.0,
    )  # fmt: skip
    scheduler.set_timesteps(steps, device=rows.image_embed.device)
    x, times = torch.randn_like(rows.image_embed), scheduler.timesteps.tolist()
    for t, before in zip(times, [*times[1:], None], strict=True):
        predicted = model(
            x, timestep=t, proj_embedding=unit_rms(rows.text_embed),
            encoder_hidden_states=rows.states, attention_mask=rows.mask,
        ).predicted_image_embedding  # fmt: skip
        x = scheduler.step(predicted.float(), t, x, before, return_dict=False)[0]
    return torch.nn.functional.normalize(model.post_process_latents(x), dim=1)


def _dalle2(heat: Heat, device: Any) -> Iterator[Trained]:
    """Train dalle2-pytorch's DiffusionPrior by its own trainer."""
    import torch
    from dalle2_pytorch import (  # pyright: ignore[reportMissingImports]
        DiffusionPrior,
        DiffusionPriorNetwork,
        DiffusionPriorTrainer,
    )

    train = Arrays.read(Path(heat.data), "train", device)
    embed = train.image_embed.shape[1]
    network = DiffusionPriorNetwork(
        dim=embed, depth=DALLE2_DEPTH, dim_head=embed // HEADS, heads=HEADS,
        max_text_len=train.states.shape[1],
    )  # fmt: skip
    prior = DiffusionPrior(
        network, image_embed_dim=embed, timesteps=1000, text_cond_drop_prob=TEXT_DROP,
        image_cond_drop_prob=0.0,
    )  # fmt: skip
    rate = PRIOR_SETTINGS[DALLE2][heat.setting]
    trainer = DiffusionPriorTrainer(prior, lr=rate, max_grad_norm=1.0, **accelerated(device))
    batches = train.batches(heat.batch_size)

    def step(share: float) -> None:
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate_at(rate, share)
        rows = next(batches)
        trainer(
            text_embed=rows.text_embed, image_embed=rows.image_embed, text_encodings=rows.states
        )
        trainer.update()

    def draw(prior: Any, rows: Arrays, steps: int) -> Any:
        condition = {"text_embed": rows.text_embed, "text_encodings": rows.states}
        shape, points = rows.image_embed.shape, steps + 1  # of which it visits all but the first
        drawn = prior.p_sample_loop(shape, text_cond=condition, timesteps=points)
        return torch.nn.functional.normalize(drawn, dim=1)

    trainer.train()
    parameters = sum(p.numel() for p in network.parameters())
    for seconds, steps in laps_of(heat, step):
        averaged = copy.deepcopy(trainer.ema_diffusion_prior.ema_model).eval()
        yield Trained(
            seconds=seconds, steps=steps, parameters=parameters, draw=partial(draw, averaged)
        )


PRIORS = {OURS: _ours, DIFFUSERS: _diffusers, DALLE2: _dalle2}
