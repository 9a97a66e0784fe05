"""What k tokens of an image beside its embedding buy, after equal steps of training.

    python benchmarks/image_tokens.py                # half an hour on two cores
    python benchmarks/image_tokens.py --num-steps 2000 --tokens 1 4 16 --work tokens

For each k the same pictures are embedded with k tokens, and a transformer decoder and a diffusion
prior of one size train on them for the same steps each. What a step takes is measured before, in
short runs by turns. The decoder then draws held-out pictures
from what the encoder made of them (`true`), from the same without tokens (`vector`), and from the
prior's draw for their caption (`prior`). EfficientNet-Lite0 judges: FD with its 95 % interval, and
PSNR to the pictures that were embedded. `ratio` = FD of the true vector of k = 1 over that of the
true tokens of the largest k: k = 1 is the paper's chain, its own peer here.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from _decoder_racers import DECODER_SETTINGS, GUIDANCE
from _pairs import EMOJI, ROOT, embedded_sets
from _racers import SIZE, TRIAL, write_arrays
from quality_an_hour import picture_scores

from cluster.base.files import Json
from cluster.base.jsonl import read_lines

AT_ONCE = 50  # pictures


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the comparison."""

    tokens: tuple[int, ...] = (1, 4, 16)
    """numbers k of tokens, the first of them 1"""
    num_steps: int = 300
    """steps of training of each decoder and of each prior"""
    timings: int = 3
    """short runs of each decoder, by turns, that are timed"""
    set: str = "emoji"
    """pictures: Fluent emoji (../shared/data), shapes, or a Parquet file of pairs"""
    num_train: int = 4500
    """training pairs, about"""
    num_test: int = 600
    """held-out pairs, about"""
    num_pictures: int = 300
    """pictures that are drawn of each kind"""
    sample_steps: int = 12
    """steps in which the decoder draws them"""
    clip_steps: int = 400
    """steps of the CLIP"""
    num_resamples: int = 40
    """bootstrap resamples of the intervals"""
    num_threads: int | None = None
    """threads; None = all cores"""
    work: str = ""
    """folder that keeps data and runs, to continue; empty = a temporary one"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.tokens[:1] != (1,):
        raise ValueError(f"--tokens: found {config.tokens}, expected 1 as the first")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(config.work or folder).absolute()
        rows = list(_rows(data, config))
    _show(rows)
    fds = {row["tokens"]: row["fd"] for row in rows if row["given"] == "true"}
    print(json.dumps({"ratio": fds[1] / fds[config.tokens[-1]], "rows": rows}))
    return 0


def _rows(data: Path, config: Config) -> Iterator[Json]:
    """Train and score; yield a row for each k and each kind of embedding that is given."""
    import torch

    from training.data.demo_data import embed_here

    threads = config.num_threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    sources = {"emoji": EMOJI, "shapes": None}
    source = sources.get(config.set, Path(config.set))
    embedded_sets(data, source, config.num_train, config.num_test, config.clip_steps, threads)
    if not (data / "test_mask.npy").exists():
        write_arrays(data, "test")  # the pictures that the judge compares with
    for count in config.tokens:
        for split in ("train", "test") if count > 1 else ():
            embed_here(
                str(data / split), _embeds(data, split, count), str(data / "clip"),
                image_tokens=count,
            )  # fmt: skip
    taken: dict[int, list[float]] = {count: [] for count in config.tokens}
    for number in range(config.timings):
        for count, seconds in taken.items():
            lines = _trained(data, "base", f"trial_{number}", count, TRIAL, threads)
            first, last = lines[2], lines[-1]
            seconds.append((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))
    for count in config.tokens:
        for stage in ("base", "prior"):
            _trained(data, stage, "run", count, config.num_steps, threads)
        for given, drawn in _drawn(data, count, config).items():
            scores = picture_scores(data, drawn, config.num_resamples)
            row = {"tokens": count, "given": given, "step_seconds": median(taken[count]), **scores}
            print(json.dumps(row), flush=True)
            yield row


def _embeds(data: Path, split: str, count: int) -> Path:
    return data / (f"{split}_embeds_{count}" if count > 1 else f"{split}_embeds")


def _trained(
    data: Path, stage: str, name: str, count: int, num_steps: int, threads: int
) -> list[Json]:
    """Train a stage, where that is not done; returns its reports."""
    if stage == "base":
        command = [
            "training/decoder.py", "--preset", "demo_pictures", "--base.dit.width", "192",
            *DECODER_SETTINGS["ours"]["transformer"],
            "--base.image-tokens", str(count), "--images", str(data / "train"),
            "--image-size", str(SIZE),
        ]  # fmt: skip
    else:
        command = [
            "training/prior.py", "--preset", "demo", "--prior", "diffusion",
            "--diffusion.image-tokens", str(count),
        ]  # fmt: skip
    folder = data / f"{stage}_{count}_{name}"
    if not (folder / "final.json").exists():
        command = [
            sys.executable, str(ROOT / command[0]), *command[1:], "--run", str(folder),
            "--embeds", str(_embeds(data, "train", count)), "--clip", str(data / "clip"),
            "--train.num-steps", str(num_steps), "--train.checkpoint-every", str(num_steps),
            "--train.report-every", "5", "--train.num-workers", "0", "--train.ema-decay", ".99",
            "--train.num-threads", str(threads),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{folder.name}: {done.stderr[-2000:]}")
    return read_lines(folder / "metrics.jsonl")


def _drawn(data: Path, count: int, config: Config) -> dict[str, np.ndarray]:
    """Return what is drawn, uint8 [n, 3, H, W], by what is given."""
    import torch

    from eval.sampling.chain import load_chain
    from eval.sampling.generate import default_sampling
    from eval.scores.scorecard import read_embeds
    from models.decoder import ImageSampling
    from models.diffusion.samplers import dpmpp_2m
    from models.priors.base import vector_of

    order = np.load(data / "test_key.npy")[: config.num_pictures]
    captions, image, _ = read_embeds(str(_embeds(data, "test", count)), count)
    captions, image = [captions[i] for i in order], image[torch.from_numpy(order)]
    prior, base = (str(data / f"{stage}_{count}_run") for stage in ("prior", "base"))
    chain = load_chain(str(data / "clip"), prior, base, (), device="auto")
    options = ImageSampling(
        sampler=dpmpp_2m, sample_steps=config.sample_steps, cfg_scale=GUIDANCE
    )
    sampling = default_sampling()
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(order), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        keys, texts = torch.from_numpy(order[rows]), captions[rows]
        given = {"true": image[rows], "prior": chain.sample_prior(keys, texts, sampling)}
        if count > 1:
            given["vector"] = vector_of(image[rows])
        for name, z in given.items():
            with torch.no_grad(), sampling.autocast(chain.condition(texts, z).image_embed):
                x = chain.base.sample(keys, chain.condition(texts, z), options)
            pixels = ((x.float() + 1) * 127.5).round().byte().cpu().numpy()
            found.setdefault(name, []).append(pixels)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _show(rows: list[Json]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("step_seconds", "fd", "fd_low", "fd_high", "kid", "psnr_db")
    table = Table("tokens", "given", *columns)
    for row in rows:
        shown = [f"{row[key]:,.4g}" for key in columns]
        table.add_row(str(row["tokens"]), row["given"], *shown)
    Console(width=120).print(table)


if __name__ == "__main__":
    run_benchmark(
        Config, main, num_steps=10, timings=1, set="shapes", num_train=300, num_test=60,
        num_pictures=40, sample_steps=4, clip_steps=5, num_resamples=3, tokens=(1, 4),
    )  # fmt: skip
