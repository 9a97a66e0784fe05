"""Training samples/s of the diffusion prior, beside dalle2-pytorch and diffusers' PriorTransformer.

    python benchmarks/prior_step.py        # some six minutes on two cores

Each is 512 wide and 6 deep, reads 77 token states and an embedding of 512, and takes whole training
steps: noise, forward, loss, backward, AdamW (torch's fused one), under bf16 autocast, on the same
number of threads. Captions have 8 to 40 tokens, as a web list's have; ours leaves out the columns
that only pad a batch, which is exact; neither peer can (`--longest 77` shows the rest). Each
measurement is a process of its own, in turn. dalle2-pytorch runs in
.venv-bench, which `make bench-setup` makes.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from cluster.cli import parse, run_script

ROOT = Path(__file__).resolve().parent.parent
WIDTH, DEPTH, HEADS, WORDS = 512, 6, 8, 77
PEERS = ("ours", "diffusers", "dalle2-pytorch")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the comparison."""

    batch_size: int = 32
    """samples a step"""
    num_steps: int = 6
    """steps of a measurement, after two that warm up"""
    repeats: int = 5
    """measurements of each, alternating"""
    num_threads: int = 2
    """threads on the CPU"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """of the networks"""
    compile: bool = False
    """compile each network (torch.compile)"""
    longest: int = 40
    """tokens of the longest caption, of 77"""
    peer: str = ""
    """internal: measure this one, here"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.peer:
        return _measure(config)
    from rich.console import Console
    from rich.table import Table

    python = ROOT / ".venv-bench" / "bin" / "python"
    if not python.exists():
        raise ValueError(f"{python}: found no such file; make it with: make bench-setup")
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    for _ in range(config.repeats):
        for peer in PEERS:
            found[peer].append(_run(config, peer, str(python)))
    table = Table("prior", "parameters", "samples/s", "spread")
    rates = {peer: [each["samples_per_second"] for each in found[peer]] for peer in PEERS}
    for peer, all_rates in rates.items():
        count = f"{found[peer][0]['parameters']:,.0f}"
        table.add_row(peer, count, f"{np.median(all_rates):.1f}", f"{np.ptp(all_rates):.1f}")
    Console().print(table)
    middle = {peer: float(np.median(all_rates)) for peer, all_rates in rates.items()}
    best = max(middle[peer] for peer in PEERS[1:])
    ratios = [
        ours / max(theirs)
        for ours, *theirs in zip(*(rates[peer] for peer in PEERS), strict=True)
    ]  # fmt: skip
    figures = {"ratio": middle["ours"] / best, "ratio_spread": float(np.ptp(ratios)), **middle}
    print(json.dumps({**figures, "rates": rates}))
    return 0


def _run(config: Config, peer: str, bench_python: str) -> dict[str, float]:
    """Measure one peer in a process of its own."""
    python = bench_python if peer == "dalle2-pytorch" else sys.executable
    command = [
        python, __file__, "--peer", peer, "--batch-size", str(config.batch_size), "--num-steps",
        str(config.num_steps), "--num-threads", str(config.num_threads), "--precision",
        config.precision, "--compile" if config.compile else "--no-compile", "--longest",
        str(config.longest),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{peer}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(config: Config) -> int:
    import torch

    torch.set_num_threads(config.num_threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = {"ours": _ours, "diffusers": _diffusers, "dalle2-pytorch": _dalle2}[config.peer]
    model, loss_of = build(config.compile)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = _batch(config, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = loss_of(**{name: value.clone() for name, value in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    started = time.perf_counter()
    for _ in range(config.num_steps):
        step()
    seconds = time.perf_counter() - started
    figures = {
        "samples_per_second": config.num_steps * config.batch_size / seconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    print(json.dumps(figures))
    return 0


def _batch(config: Config, device: Any) -> dict[str, Any]:
    """Return embeddings, states and masks of captions of 8 to `longest` tokens."""
    import torch
    import torch.nn.functional as F

    count = config.batch_size
    lengths = torch.linspace(8, config.longest, count).long()
    mask = torch.arange(WORDS) < lengths[:, None]
    parts = {
        "image_embed": F.normalize(torch.randn(count, WIDTH), dim=1),
        "text_embed": F.normalize(torch.randn(count, WIDTH), dim=1),
        "states": torch.randn(count, WORDS, WIDTH) * mask[..., None],
        "mask": mask,
    }
    return {name: value.to(device) for name, value in parts.items()}


def _ours(compiled: bool) -> tuple[Any, Callable]:
    import torch

    from models.configs import DiffusionPriorConfig
    from models.diffusion_prior import DiffusionPrior
    from models.priors import PriorText

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
        told = {"proj_embedding": text_embed, "encoder_hidden_states": states}
        found: Any = network(noised, timestep=t, attention_mask=mask, **told)
        return F.mse_loss(found.predicted_image_embedding.float(), image_embed)

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
    run_script(lambda: main(parse(Config)))
