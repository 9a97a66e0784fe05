"""Training samples/s of the diffusion prior, beside dalle2-pytorch and diffusers' PriorTransformer.

    python benchmarks/prior_step.py        # some six minutes on two cores

Each is 512 wide and 6 deep, reads 77 token states and an embedding of 512, and takes whole training
steps: noise, forward, loss, backward, AdamW (torch's fused one), under bf16 autocast (in fp32 where
the device has no bf16), on the same number of threads. Captions are as long as LAION's
(`_captions.py`): 15.5 tokens on average, 77 the longest. Ours packs them, which is
exact, and counts the packing as a part of the step; neither peer can. Each measurement is a process
of its own, in turn. dalle2-pytorch runs in .venv-bench, which `make bench-setup` makes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from _captions import caption_lengths
from _common import run_benchmark
from _steps import DALLE2, StepsConfig, run

WIDTH, DEPTH, HEADS, WORDS = 512, 6, 8, 77


@dataclass(frozen=True, kw_only=True)
class Config(StepsConfig):
    """Sizes of the comparison."""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    builds = {"ours": _ours, "diffusers": _diffusers, DALLE2: _dalle2}
    return run(__file__, config, builds, lambda: _batch(config))


def _batch(config: Config) -> dict[str, Any]:
    """Return embeddings, states and masks of captions as long as LAION's."""
    import torch
    import torch.nn.functional as F

    count = config.batch_size
    mask = torch.arange(WORDS) < torch.from_numpy(caption_lengths(count))[:, None]
    return {
        "image_embed": F.normalize(torch.randn(count, WIDTH), dim=1),
        "text_embed": F.normalize(torch.randn(count, WIDTH), dim=1),
        "states": torch.randn(count, WORDS, WIDTH) * mask[..., None],
        "mask": mask,
    }


def _ours(compiled: bool) -> tuple[Any, Callable]:
    import torch

    from models.configs import DiffusionPriorConfig
    from models.priors.base import PackedText
    from models.priors.diffusion import DiffusionPrior

    sizes = DiffusionPriorConfig(width=WIDTH, depth=DEPTH, num_heads=HEADS)
    prior = DiffusionPrior(sizes, embed_dim=WIDTH, text_width=WIDTH, context_length=WORDS)
    if compiled:
        prior.compile()

    def loss_of(image_embed: Any, text_embed: Any, states: Any, mask: Any) -> Any:
        keys = torch.arange(len(image_embed))
        lengths = torch.from_numpy(caption_lengths(len(keys)))
        packing = prior.pack(lengths, keys)  # on the CPU, as in the feed
        packing = packing.apply(lambda x: x.to(states.device, non_blocking=True))
        rows = states[packing.text.sequence, packing.text.position]
        keys = keys.to(states.device, non_blocking=True)
        text = PackedText(text_embed=text_embed, text=rows, packing=packing)
        return prior.losses(keys, image_embed, text)["loss"].mean()

    return prior, loss_of


def _diffusers(compiled: bool) -> tuple[Any, Callable]:
    import torch
    import torch.nn.functional as F
    from diffusers.models.transformers.prior_transformer import PriorTransformer
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    model: Any = PriorTransformer(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=DEPTH,
        embedding_dim=WIDTH, num_embeddings=WORDS, additional_embeddings=4,
    )  # fmt: skip
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    network = torch.compile(model) if compiled else model

    def loss_of(image_embed: Any, text_embed: Any, states: Any, mask: Any) -> Any:
        t = torch.randint(0, 1000, (len(image_embed),), device=image_embed.device)
        noise: Any = torch.randn_like(image_embed)
        noised = schedule.add_noise(image_embed, noise, cast(Any, t))
        arguments = {"proj_embedding": text_embed, "encoder_hidden_states": states}
        output: Any = network(noised, timestep=t, attention_mask=mask, **arguments)
        return F.mse_loss(output.predicted_image_embedding.float(), image_embed)

    return model, loss_of


def _dalle2(compiled: bool) -> tuple[Any, Callable]:
    import torch
    from dalle2_pytorch.dalle2_pytorch import (  # pyright: ignore[reportMissingImports]
        DiffusionPrior,
        DiffusionPriorNetwork,
    )

    network = DiffusionPriorNetwork(
        dim=WIDTH, depth=DEPTH, dim_head=WIDTH // HEADS, heads=HEADS, max_text_len=WORDS
    )
    prior = DiffusionPrior(network, image_embed_dim=WIDTH, timesteps=1000, cond_drop_prob=0.1)
    if compiled:
        prior.net = torch.compile(network)

    def loss_of(image_embed: Any, text_embed: Any, states: Any, mask: Any) -> Any:
        return prior(text_embed=text_embed, image_embed=image_embed, text_encodings=states)

    return prior, loss_of


if __name__ == "__main__":
    run_benchmark(Config, main, num_steps=1, repeats=1, batch_size=4)
