"""Is a sample of 20 steps as good as one of 250? Frechet distance and images/s of both.

    python benchmarks/sampling_steps.py        # after make demo; 45 minutes on two idle cores
    python benchmarks/sampling_steps.py --run FOLDER        # which holds such runs, clip and base

The demo's base decoder draws the same new scenes from the same starting noise under their true
image embeddings and captions, unguided: by DPM-Solver++ 2M in 20 steps (the default is 16); at
evenly spaced timesteps instead of the default's; in 250 steps, which tells what the few cost; and
by DDPM in 250, the paper's, which tells what drawing no fresh noise costs besides. The distance is
in the space of the demo's CLIP (its own: it serves to compare them, not to quote), to the true
drawings; the intervals are bootstraps over scenes, drawn alike for all.
"""

import io
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import BenchmarkConfig, run_benchmark

NUM_RESAMPLES = 1000
FEW = ("dpmpp_2m", 20, "karras")
OTHERS = (("dpmpp_2m", 20, "trailing"), ("dpmpp_2m", 250, "karras"), ("ddpm", 250, "trailing"))


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Of a finished demo."""

    run: str = "runs/demo"
    """folder of a demo on the drawn set"""
    num_samples: int = 2000
    """scenes drawn by each sampler"""
    batch_size: int = 200
    """scenes drawn at a time"""
    seed: int = 2_000
    """of the scenes; the demo's own is 0"""
    num_threads: int = 2
    """threads on the CPU"""
    device: str = "auto"
    """auto: the first GPU where there is one; cpu, cuda:0, ..."""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from eval.features.extractors import clip_features, extract
    from eval.sampling.chain import load_chain

    torch.set_num_threads(config.num_threads)
    run = config.run
    for run_name in ("clip", "base"):
        if not Path(run, run_name).is_dir():
            raise ValueError(
                f"{run}: found no {run_name}, expected a finished demo; run make demo first"
            )
    chain = load_chain(f"{run}/clip", "", f"{run}/base", (), device=config.device)
    features = partial(clip_features, chain.clip)
    captions, pictures = _scenes(config)
    real = extract(features, pictures)
    drawn, rates = {}, {}
    for name in ("dpmpp_2m", "ddpm"):  # warm up
        _draw(chain, captions[:1], real[:1], (name, 2, "trailing"), config)
    for by in (FEW, *OTHERS):
        started = time.perf_counter()
        images = _draw(chain, captions, real, by, config)
        rates[by] = len(images) / (time.perf_counter() - started)
        drawn[by] = extract(features, images)
    table = Table("sampler", "steps", "spacing", "FD, CLIP", "images/s", "first less it, 95 %")
    figures: dict[str, Any] = {
        "ratio": rates[FEW] / rates["ddpm", 250, "trailing"], "n": len(captions),
        "judge": f"clip {chain.clip.encoder_id}",
    }  # fmt: skip
    for by, images in drawn.items():
        result: dict[str, Any] = {"fd": _distance(real, images), "images_per_second": rates[by]}
        if by != FEW:
            result["interval_95"] = _interval(real, drawn[FEW], images)
        shown = " to ".join(f"{end:.4f}" for end in result.get("interval_95", ()))
        rate = f"{result['images_per_second']:.2f}"
        table.add_row(*map(str, by), f"{result['fd']:.4f}", rate, shown)
        figures["_".join(map(str, by))] = result
    Console().print(table)
    print(json.dumps(figures))
    return 0


def _scenes(config: Config) -> tuple[list[str], list[Any]]:
    """Return captions and pictures of new scenes, one thing and two."""
    from PIL import Image

    from ingest.shapes import make_pairs

    half = config.num_samples // 2
    pairs = [pair for split in ("single", "seen") for pair in make_pairs(half, config.seed, split)]
    pictures = [Image.open(io.BytesIO(pair.image_bytes)).convert("RGB") for pair in pairs]
    return [pair.caption for pair in pairs], pictures


def _draw(
    chain: Any, captions: list[str], embeds: np.ndarray, by: tuple[str, int, Any], config: Config
) -> list[Any]:
    """Draw a picture of each caption under its embedding by (sampler, steps, spacing)."""
    import torch
    from PIL import Image

    from eval.sampling.generate import SamplingSettings, build_sampling, caption_keys
    from training.tasks.pictures import to_uint8

    sampler, steps, spacing = by
    settings = SamplingSettings(
        sampler=sampler, decoder_steps=steps, spacing=spacing, cfg_scale=1.0
    )  # fmt: skip
    sampling = build_sampling(settings, chain.device.type)
    images = []
    for start in range(0, len(captions), config.batch_size):
        batch = captions[start : start + config.batch_size]
        keys = caption_keys(batch, config.seed, start)
        z = torch.from_numpy(embeds[start : start + len(batch)])
        images += map(Image.fromarray, to_uint8(chain.render(keys, batch, z, sampling)))
    return images


def _distance(real: np.ndarray, fake: np.ndarray) -> float:
    from eval.distances.frechet import Moments, frechet_distance

    return frechet_distance(Moments.of(real), Moments.of(fake))


def _interval(real: np.ndarray, few: np.ndarray, many: np.ndarray) -> tuple[float, float]:
    """Return the bootstrap's 95 % interval of FD(few) - FD(many): scenes are drawn anew, and with
    each its real picture and both samples."""
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(NUM_RESAMPLES):
        rows = rng.integers(len(real), size=len(real))
        gains.append(_distance(real[rows], few[rows]) - _distance(real[rows], many[rows]))
    low, high = np.percentile(gains, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    run_benchmark(Config, main, num_samples=20, batch_size=20)
