"""Training samples/s of the diffusion prior, beside dalle2-pytorch and diffusers' PriorTransformer.

    python benchmarks/prior_step.py        # some six minutes on two cores

Each is 512 wide and 6 deep, reads 77 token states and an embedding of 512, and takes whole training
steps: noise, forward, loss, backward, AdamW (torch's fused one), under bf16 autocast (in fp32 where
the device has no bf16), on the same number of threads. Captions have 8 to 40 tokens, as a web
list's have; ours leaves out the columns that only pad a batch, which is exact; neither peer can
(`--longest 77` shows the rest). Each measurement is a process of its own, in turn. dalle2-pytorch
runs in .venv-bench, which `make bench-setup` makes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from _common import run_benchmark
from _steps import DALLE2, StepsConfig, run

WIDTH, DEPTH, HEADS, WORDS = 512, 6, 8, 77


@dataclass(frozen=True, kw_only=True)
class Config(StepsConfig):
    """Sizes of the comparison."""

    longest: int = 40
    """tokens of the longest caption, of 77"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    builds = {"ours": _ours, "diffusers": _diffusers, DALLE2: _dalle2}
    return run(__file__, config, builds, lambda: _batch(config))


def _batch(config: Config) -> dict[str, Any]:
    """Return embeddings, states and masks of captions of 8 to `longest` tokens."""
    import torch
    import torch.nn.functional as F

    count = config.batch_size
    lengths = torch.linspace(8, config.longest, count).long()
    mask = torch.arange(WORDS) < lengths[:, None]
    return {
        "image_embed": F.normalize(torch.randn(count, WIDTH), dim=1),
        "text_embed": F.normalize(torch.randn(count, WIDTH), dim=1),
        "states": torch.randn(count, WORDS, WIDTH) * mask[..., None],
        "mask": mask,
    }


def _ours(compiled: bool) -> tuple[Any, Callable]:
    import torch

    from models.configs import DiffusionPriorConfig
    from models.priors.base import PriorText
    from models.priors.diffusion import DiffusionPrior

    sizes = DiffusionPriorConfig(width=WIDTH, depth=DEPTH, num_heads=HEADS)
    prior = DiffusionPrior(sizes, embed_dim=WIDTH, text_width=WIDTH, context_length=WORDS)
    if compiled:
        prior.compile()

    def loss_of(image_embed: Any, text_embed: Any, states: Any, mask: Any) -> Any:
        keys = torch.arange(len(image_embed), device=image_embed.device)
        text = PriorText(text_embed=text_embed, text=states, token_mask=mask).trimmed()
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
