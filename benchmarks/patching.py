"""What folding pixels into cells costs a decoder in quality, and what it spares in time.

    python benchmarks/patching.py        # some twenty minutes on two cores

One decoder of 32 px as it is, one whose first layer reads cells of 2 x 2 px (`patch_size` 2) and
that is otherwise alike, for the same steps and for as many as take the same time; on Fluent emoji
where ../shared/data holds them, else on drawings. Told: the mean squared error of eps on held-out
pairs, over all noise levels and by thirds of the noising time, same noise for all.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from _common import BenchmarkConfig, run_benchmark
from _pairs import EMOJI, embedded_sets

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32  # px
WHOLE, FOLDED = "as it is", "2 x 2 px folded"
SHAPES = {WHOLE: (1, "16 8"), FOLDED: (2, "8 4")}  # patch_size, sides with attention
THIRDS = ("clean third", "middle third", "noisy third")


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    num_train: int = 4500
    """training pairs, about"""
    num_test: int = 500
    """held-out pairs, about"""
    num_steps: int = 250
    """steps of 64 of the decoders"""
    clip_steps: int = 200
    """steps of the CLIP whose embeddings they are given"""
    channels: int = 32
    """channels at the first resolution"""
    num_draws: int = 4
    """noises for each held-out picture"""
    num_threads: int = 2
    """threads on the CPU"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    from rich.console import Console
    from rich.table import Table

    pairs = EMOJI if EMOJI.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        counts = config.num_train, config.num_test
        embedded_sets(root, pairs, *counts, config.clip_steps, config.num_threads)
        whole = _decoder(config, root, WHOLE, config.num_steps)
        folded = _decoder(config, root, FOLDED, config.num_steps)
        longer = int(config.num_steps * whole["train_seconds"] / folded["train_seconds"])
        as_long = _decoder(config, root, FOLDED, longer)
    figures = {WHOLE: whole, FOLDED: folded, f"{FOLDED}, as long": as_long}
    table = Table("decoder", *whole)
    for name, values in figures.items():
        table.add_row(name, *(f"{value:,.4g}" for value in values.values()))
    Console(width=140).print(table)
    ratios = {
        "ratio": whole["mse"] / as_long["mse"], "ratio_same_steps": whole["mse"] / folded["mse"],
    }  # fmt: skip
    print(json.dumps({**ratios, "pairs": "emoji" if pairs else "shapes", **figures}))
    return 0


def _train(config: Config, run: Path, steps: int, *arguments: str) -> float:
    """Train for so many steps in this machine's own process; the seconds of the loop."""
    command = [
        sys.executable, str(ROOT / "training" / "decoder.py"), *arguments, "--run", str(run),
        "--train.num-steps", str(steps), "--train.num-workers", "0",
        "--train.num-threads", str(config.num_threads), "--train.checkpoint-every", str(steps),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL)
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]


def _decoder(config: Config, root: Path, name: str, steps: int) -> dict[str, float]:
    """Train one decoder, and return its size, its time and its errors."""
    from models.convert.runs import load_model
    from models.costs import num_parameters

    patch_size, attending = SHAPES[name]
    run = root / f"decoder_{patch_size}_{steps}"
    seconds = _train(
        config, run, steps, "--images", str(root / "train"),
        "--embeds", str(root / "train_embeds"), "--image-size", str(SIZE),
        "--base.prediction", "v", "--base.unet.channels", str(config.channels),
        "--base.unet.channel-mult", "1", "2", "3", "--base.unet.num-res-blocks", "1",
        "--base.unet.attn-resolutions", *attending.split(), "--base.unet.head-channels", "32",
        "--base.unet.patch-size", str(patch_size), "--train.ema-decay", "0.99",
    )  # fmt: skip
    decoder, _ = load_model(run, "decoder")
    sizes = {"parameters": num_parameters(decoder), "steps": steps, "train_seconds": seconds}
    return {**sizes, **_errors(decoder, config, root)}


def _errors(decoder, config: Config, root: Path) -> dict[str, float]:
    """Return the mean squared error of eps on the held-out pairs, with its standard error, and by
    thirds of the noising time."""
    import numpy as np
    import torch

    from eval.sampling.image_source import open_images
    from eval.scores.scorecard import read_embeds
    from ingest.fetching.decode import square_pixels
    from models.convert.runs import load_clip
    from models.decoder import Condition
    from models.diffusion import keyed_random
    from models.tokenizers import token_mask
    from training.tasks.pictures import pixels

    torch.set_num_threads(config.num_threads)
    clip = load_clip(str(root / "clip"))
    captions, image_embed, text_embed = read_embeds(str(root / "test_embeds"))
    shards = open_images(str(root / "test")).shards
    small = [square_pixels(s.image_bytes(row), SIZE) for s in shards for row in range(len(s))]
    images = pixels(torch.from_numpy(np.stack(small)))
    tokens = torch.from_numpy(clip.tokenize(captions))
    schedule, never = decoder.schedule, torch.zeros(1, dtype=torch.bool)
    errors = torch.empty(config.num_draws, len(images))
    times = torch.empty(config.num_draws, len(images))
    for draw in range(config.num_draws):
        for start in range(0, len(images), 100):
            rows = slice(start, start + 100)
            x, word_tokens = images[rows], tokens[rows]
            keys = torch.arange(start, start + len(x)) + 1_000_000 * (draw + 1)
            t = (keyed_random.uniform(keys, "t") * schedule.num_timesteps).long()
            eps = keyed_random.normal(keys, "eps", x.shape[1:])
            condition = Condition(
                image_embed=image_embed[rows], text_embed=text_embed[rows],
                text_states=clip.encode_text(word_tokens)[1], token_mask=token_mask(word_tokens),
            )  # fmt: skip
            x_t, kept = schedule.q_sample(x, t, eps), never.expand(len(x))
            with torch.no_grad():
                output = decoder(x_t, t, condition, kept, kept)
            x0 = schedule.to_x0(decoder.config.prediction, output, x_t, t)
            wrong = (schedule.to_eps(x0, x_t, t) - eps).square().mean((1, 2, 3))
            errors[draw, rows], times[draw, rows] = wrong, t / schedule.num_timesteps
    scores = {"mse": errors.mean(), "standard_error": errors.mean(0).std() / len(images) ** 0.5}
    for number, third in enumerate(THIRDS):
        scores[third] = errors[(3 * times).long() == number].mean()
    return {key: float(value) for key, value in scores.items()}


if __name__ == "__main__":
    run_benchmark(Config, main, num_train=300, num_test=60, num_steps=5, clip_steps=5, num_draws=1)
