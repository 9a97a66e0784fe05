"""What racers of quality_an_hour.py share: each trains for given seconds, and then draws.

Each is a process of its own, which reads arrays and writes what it drew after each lap.
`_decoder_racers.py` and `_prior_racers.py` have them.
"""

import copy
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.base.files import Json

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32  # px
TRIAL = 30  # steps of ours, to learn how many fit into the time
AVERAGE = 0.99  # EMA of every racer
MIN_STEPS, MAX_STEPS = 4, 50  # of sampling
WARM_UP = 0.05  # of the time
AT_ONCE = 50  # pictures
RATES = (1e-3, 3e-4)  # of learning, of the peers
OURS, DIFFUSERS, DALLE2 = "ours", "diffusers", "dalle2-pytorch"


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One racer's task.

    leg: "decoder" or "prior"; data: folder of shards, embeddings, their CLIP and arrays; out:
    folder for what it draws; setting: one of its settings; laps: seconds of training after which it
    draws; size: of decoders, one of `_decoder_racers.SIZES`.
    """

    leg: str
    racer: str
    setting: str
    data: str
    out: str
    laps: tuple[float, ...]
    sampling_seconds: float
    num_pictures: int
    batch_size: int
    size: str
    num_threads: int
    seed: int


def race(heat: Heat, racer: "Racer") -> None:
    """Train, draw after each lap, and write drawn_<lap>.npy, uint8 [n, 3, H, W] or of a prior
    float32 [n, E], and laps.json."""
    import torch

    from training.engine.precision import autocast, settled

    torch.set_num_threads(heat.num_threads)
    torch.manual_seed(heat.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(heat.out)
    out.mkdir(parents=True, exist_ok=True)
    drawing = Arrays.read(Path(heat.data), "test", device).first(heat.num_pictures)
    laps: list[Json] = []
    for lap, trained in enumerate(racer(heat, device)):
        with torch.no_grad(), autocast(device.type, "auto"):
            steps = fitting_steps(trained.draw, drawing, heat.sampling_seconds)
            started = time.perf_counter()
            parts = [trained.draw(part, steps) for part in drawing.parts(AT_ONCE)]
        seconds, drawn = time.perf_counter() - started, torch.cat(parts).float()
        if drawn.ndim == 4:
            drawn = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte()
        np.save(out / f"drawn_{lap}.npy", drawn.cpu().numpy())
        laps.append({
            "seconds": trained.seconds, "steps": trained.steps, "sampling_steps": steps,
            "sampling_seconds": seconds, "parameters": trained.parameters,
            "precision": settled("auto", device.type),
        })  # fmt: skip
    (out / "laps.json").write_text(json.dumps(laps))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A racer after a lap. draw: draws for rows of arrays in so many steps, [n, 3, H, W] in [-1, 1]
    or of a prior [n, E]."""

    seconds: float
    steps: int
    parameters: int
    draw: Callable[["Arrays", int], Any]


Racer = Callable[[Heat, Any], Iterator[Trained]]  # of a heat and its device


def fitting_steps(draw: Callable[["Arrays", int], Any], rows: "Arrays", seconds: float) -> int:
    """Return how many sampling steps draw all rows in `seconds`, as a few steps of a few show."""
    few = rows.first(AT_ONCE)
    draw(few, MIN_STEPS)
    started = time.perf_counter()
    draw(few, MIN_STEPS)
    each = (time.perf_counter() - started) / MIN_STEPS / len(few)
    return max(MIN_STEPS, min(MAX_STEPS, int(seconds / each / len(rows))))


# -- what all of them read -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Pairs as tensors: key int64 [n], image uint8 [n, 3, H, W], z_i [n, E], z_t [n, E], CLIP's
    states [n, L, W], 0 at padding, and their mask bool [n, L]."""

    key: Any
    image: Any
    image_embed: Any
    text_embed: Any
    states: Any
    mask: Any

    @classmethod
    def read(cls, data: Path, split: str, device: Any) -> "Arrays":
        """Read what `write_arrays` wrote."""
        import torch

        names = [field.name for field in dataclasses.fields(cls)]
        arrays = {name: np.load(data / f"{split}_{name}.npy") for name in names}
        return cls(**{name: torch.from_numpy(x).to(device) for name, x in arrays.items()})

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, rows: Any) -> "Arrays":
        """Return some rows."""
        return Arrays(**{name: value[rows] for name, value in vars(self).items()})

    def first(self, count: int) -> "Arrays":
        """Return the first `count` rows."""
        return self.rows(slice(count))

    def parts(self, size: int) -> Iterator["Arrays"]:
        """Return all rows in order, `size` at a time."""
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))

    def batches(self, size: int) -> Iterator["Arrays"]:
        """Return batches for ever, in an order of torch's generator."""
        import torch

        while True:
            for rows in torch.randperm(len(self)).split(size)[: len(self) // size]:
                yield self.rows(rows)


def write_arrays(data: Path, split: str) -> None:
    """Write a split's pictures at `SIZE`, embeddings, and states of its captions, as arrays, in an
    order in which the first rows are a sample of all."""
    import torch

    from eval.sampling.image_source import open_images
    from eval.scores.scorecard import read_embeds
    from ingest.fetching.decode import square_pixels
    from models.convert.runs import load_clip
    from models.tokenizers import token_mask

    clip = load_clip(str(data / "clip"))
    captions, image_embed, text_embed = read_embeds(str(data / f"{split}_embeds"))
    shards = open_images(str(data / split)).shards
    image = np.stack([square_pixels(s.image_bytes(i), SIZE) for s in shards for i in range(len(s))])
    tokens = torch.from_numpy(clip.tokenize(captions))
    states = torch.cat([clip.encode_text(part)[1] for part in tokens.split(256)])
    mask = token_mask(tokens)[:, : states.shape[1]]
    arrays = {
        "key": torch.arange(len(image)), "image": image, "image_embed": image_embed,
        "text_embed": text_embed, "states": states * mask[..., None], "mask": mask,
    }  # fmt: skip
    order = np.random.default_rng(0).permutation(len(image))
    (data / f"{split}_captions.json").write_text(json.dumps([captions[i] for i in order]))
    for name, array in arrays.items():
        np.save(data / f"{split}_{name}.npy", np.asarray(array)[order])


def unit_rms(embed: Any) -> Any:
    """Return unit-norm rows [n, E] at unit RMS, as linear layers expect them, as ours does."""
    return embed * embed.shape[1] ** 0.5


def laps_of(heat: Heat, step: Callable[[float], None]) -> Iterator[tuple[float, int]]:
    """Train by a step that takes the share of the time that is over; return the seconds and steps
    at the end of each lap, without what was done there."""
    import torch

    seconds, steps = 0.0, 0
    for lap in heat.laps:
        while seconds < lap:
            started = time.perf_counter()
            step(seconds / heat.laps[-1])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, steps = seconds + time.perf_counter() - started, steps + 1
        yield seconds, steps


# -- trainers --------------------------------------------------------------------------------------


def train_ours(
    heat: Heat, device: Any, script: str, flags: Sequence[str], draw: Callable[..., Any]
) -> Iterator[Trained]:
    """Train by a script of training/ for as many steps as a short trial says, and draw from its
    checkpoints."""
    from cluster.base.jsonl import read_lines
    from models.convert.runs import build_model
    from models.costs import num_parameters
    from models.weights import EMA_NAME, load_config, load_weights

    def train(name: str, steps: int, every: int) -> None:
        command = [
            sys.executable, str(ROOT / "training" / script), *flags,
            "--embeds", f"{heat.data}/train_embeds", "--run", f"{heat.out}/{name}",
            "--train.num-steps", str(steps), "--train.checkpoint-every", str(every),
            "--train.num-threads", str(heat.num_threads), "--train.seed", str(heat.seed),
            "--train.global-batch-size", str(heat.batch_size), "--train.num-workers", "0",
            "--train.ema-decay", str(AVERAGE), "--train.report-every", "5",
            "--train.keep-checkpoints", "100",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")

    train("trial", TRIAL, TRIAL)
    reports = read_lines(Path(heat.out) / "trial" / "metrics.jsonl")
    a_step = (reports[-1]["seconds"] - reports[2]["seconds"]) / (TRIAL - reports[2]["step"])
    every = max(5, round(heat.laps[0] / a_step / 5) * 5)
    steps = every * max(1, round(heat.laps[-1] / a_step / every))
    train("run", steps, every)
    run = Path(heat.out) / "run"
    seconds_at = {line["step"]: line["seconds"] for line in read_lines(run / "metrics.jsonl")}
    for lap in heat.laps:
        at = min(steps, every * max(1, round(lap / a_step / every)))
        folder = run / f"step_{at:08d}"
        model: Any = load_weights(build_model(load_config(folder)), folder / EMA_NAME)
        model.to(device).eval()
        yield Trained(
            seconds=seconds_at[at], steps=at, parameters=num_parameters(model),
            draw=partial(draw, model),
        )  # fmt: skip


def rate_at(rate: float, share: float) -> float:
    """Return a rate that warms up and falls by a cosine, after a share of the time."""
    return rate * min(1, share / WARM_UP) * (1 + math.cos(math.pi * min(share, 1))) / 2


def plain_loop(
    heat: Heat, model: Any, rate: float, loss_of: Callable[[Arrays], Any], draw: Callable[..., Any]
) -> Iterator[Trained]:
    """Train a model in a plain loop: AdamW, a rate that warms up and falls by a cosine, EMA."""
    import torch
    from torch.optim.swa_utils import AveragedModel

    from training.engine.precision import autocast

    def averaged_with(means: Any, values: Any, count: Any) -> None:
        decay = min(AVERAGE, (1 + int(count)) / (10 + int(count)))  # the first values fade sooner
        for mean, value in zip(means, values, strict=True):
            mean.lerp_(value, 1 - decay)

    average = AveragedModel(model, multi_avg_fn=averaged_with)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    device = next(model.parameters()).device
    batches = Arrays.read(Path(heat.data), "train", device).batches(heat.batch_size)

    def step(share: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(rate, share)
        with autocast(device.type, "auto"):
            loss = loss_of(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)

    model.train()
    for seconds, steps in laps_of(heat, step):
        averaged = copy.deepcopy(average.module).eval()
        yield Trained(
            seconds=seconds, steps=steps, parameters=sum(p.numel() for p in model.parameters()),
            draw=partial(draw, averaged),
        )  # fmt: skip


def accelerated(device: Any) -> dict[str, Any]:
    """Return what dalle2-pytorch's trainers take: precision and EMA of every racer."""
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    from training.engine.precision import settled

    mixed = "bf16" if settled("auto", device.type) == "bf16" else "no"
    return {
        "accelerator": Accelerator(cpu=device.type == "cpu", mixed_precision=mixed),
        "ema_beta": AVERAGE, "ema_update_after_step": 0, "ema_update_every": 1,
    }  # fmt: skip
