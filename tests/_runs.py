"""Runs of the smallest models, what they leave, and what a kill or a bad disk does to it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _networks import CLIP
from safetensors.torch import load_file

from models.configs import DecoderConfig, DiffusionPriorConfig, UNetConfig, UpsamplerConfig
from models.weights import FINAL_NAME, exported
from training.config import ClipRunConfig, DecoderRunConfig, PriorRunConfig, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
HERE: dict[str, Any] = {"num_workers": 0, "num_threads": 1, "report_every": 1}
UNET = UNetConfig(
    channels=8, channel_mult=(1,), num_res_blocks=1, attn_resolutions=(), patch_size=8
)
HALF, WHOLE = 3, 6
SIX_STEPS = TrainConfig.of(  # with clipping, weight decay, two micro-batches a step of two ranks
    **HERE, num_steps=WHOLE, checkpoint_every=HALF, global_batch_size=16, micro_batch_size=4,
    precision="fp32", ema_decay=0.9, learning_rate=3e-3, grad_clip=0.5, weight_decay=0.1,
    max_failures=1,
)  # fmt: skip
TOLERANCE = 5e-5  # of its weights, which move by about 1e-2; a step of Adam is 3e-3


def named(build: Callable) -> str:
    """Return the name of what builds a task, as workers import it that have tests/ on their path:
    there may be another package `tests`."""
    module = build.__module__.removeprefix("tests.")
    return f"{module}:{build.__qualname__}"


def images_of(data: Path) -> tuple[str, ...]:
    """Return the image shards of `write_data`, as options take them."""
    return (str(data / "images"),)


def embeds_of(data: Path) -> tuple[str, ...]:
    """Return the embeddings of `write_data`, as options take them."""
    return (str(data / "embeds"),)


def prior_run(data: Path, run: Path, /, train: TrainConfig, **fields: Any) -> PriorRunConfig:
    """Configure a diffusion prior."""
    model = DiffusionPriorConfig(width=16, depth=1, num_heads=2)
    given = {"embeds": embeds_of(data), "diffusion": model, **fields}
    return PriorRunConfig(**given, run=str(run), train=train)


def clip_run(data: Path, run: Path, /, train: TrainConfig, **fields: Any) -> ClipRunConfig:
    """Configure a CLIP."""
    given = {"images": images_of(data), "model": CLIP, **fields}
    return ClipRunConfig(**given, run=str(run), train=train)


def base_run(data: Path, run: Path, /, train: TrainConfig, **fields: Any) -> DecoderRunConfig:
    """Configure a decoder of 16 px."""
    base = DecoderConfig(unet=UNET, context_width=8)
    given = {"images": images_of(data), "embeds": embeds_of(data), "base": base, **fields}
    return DecoderRunConfig(**{"image_size": 16, **given}, run=str(run), train=train)


def up_run(data: Path, run: Path, /, train: TrainConfig, **fields: Any) -> DecoderRunConfig:
    """Configure an upsampler from 16 to 32 px."""
    given = {"images": images_of(data), "up": UpsamplerConfig(unet=UNET), **fields}
    sizes = {"image_size": 32, "low_res_size": 16, "crop_size": 16}
    return DecoderRunConfig(**sizes, **given, stage="up256", run=str(run), train=train)


def script(name: str, *arguments: object) -> list[str]:
    """Return the command of a script of the project, named by its path in the repository."""
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a script: one thread of the CPU."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def debug_prior(data: Path, run: Path, num_steps: int, *more: str) -> list[str]:
    """Return a command that trains the shipped debug prior in one process."""
    return script(
        "training/prior.py", "--preset", "debug", "--embeds", data / "embeds", "--run", run,
        "--train.num-workers", "0", "--train.num-threads", "1", "--train.global-batch-size", "8",
        "--train.num-steps", num_steps, *more,
    )  # fmt: skip


def done(
    command: list[str], seconds: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, cwd=ROOT,
        env=environment(**variables),
    )  # fmt: skip


# -- what a run leaves -----------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor below a folder, by "file: name"."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(str(path))  # a map of the file, which a test may damage: hence clone
        found.update({f"{path.relative_to(folder)}: {k}": v.clone() for k, v in tensors.items()})
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Require the same tensors, bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def forget_the_end(run: Path) -> None:
    """Leave what a run that was killed before its last checkpoint leaves."""
    shutil.rmtree(exported(run))
    (run / FINAL_NAME).unlink()


def killed_half_way(run: Path, copy: Path) -> Path:
    """Return a copy of a run as a kill before its last checkpoint would have left it."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("_ray"))
    forget_the_end(copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(copy)))
    return copy


# -- damage ----------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Flip the last bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    """Cut the end of a file."""
    path.write_bytes(path.read_bytes()[:-7])
