"""Quality an hour: what ours and its peers draw after the same seconds of training.

    python benchmarks/quality_an_hour.py             # ten hours on two cores
    python benchmarks/quality_an_hour.py --minutes 4 --rounds 1 --sets emoji --work race

Base decoders of 32 px and near-equal size race: ours by training/decoder.py, diffusers' unCLIP
U-Net in a plain loop, dalle2-pytorch's Decoder by its own trainer. With `--leg prior` diffusion
priors do: ours, PriorTransformer, DiffusionPrior. All read the same pictures, the embeddings of one
CLIP and the states of its text tower, in batches of one size, on the same threads, with the same
EMA and guidance. Each first runs heats of a quarter of the time in each of its settings; the best
one races, the rounds in turn. After each lap (an eighth, a quarter, half and all of the time) it
draws held-out pictures from their embeddings and captions, or embeddings from captions, by its own
sampler, in as many steps as fit into the same seconds.

The judge of pictures is EfficientNet-Lite0 of ImageNet, which none has seen: FD with its 95 %
interval (of the pictures drawn), KID, PSNR to the pictures whose embeddings were given, and the
score by a CLIP of another split and other weights. Drawn embeddings are judged beside the true
ones: FD of them and their captions' together, mean cosine, and how often one finds its own picture
first. `ratio` = seconds of the best
peer until its least FD, over the seconds that ours takes to reach that, the least of all sets.
Results are kept in --work, and continued there.

    python benchmarks/quality_an_hour.py --sides ours --heats 3 --rounds 0 --minutes 8

compares our settings alone, U-Net and transformer, by FD after two minutes with three seeds.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from _common import BenchmarkConfig, run_benchmark
from _decoder_racers import DECODER_SETTINGS, DECODERS
from _pairs import EMOJI, embedded_sets, trained_clip
from _prior_racers import PRIOR_SETTINGS, PRIORS
from _racers import DALLE2, OURS, SIZE, Heat, race, write_arrays
from PIL import Image

from cluster.base.files import Json

ROOT = Path(__file__).resolve().parent.parent
PEERS = str(ROOT / ".venv-bench" / "bin" / "python")
LAPS = (0.125, 0.25, 0.5, 1.0)  # of the time
HEAT = 0.25
JUDGE = "judge"
LEGS = {"decoder": (DECODERS, DECODER_SETTINGS), "prior": (PRIORS, PRIOR_SETTINGS)}
Tried = dict[str, dict[str, list[float]]]  # FDs of heats, by side and setting
NUM_SHOWN = 16  # pictures of each side in the grid


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Sizes of the race."""

    leg: Literal["decoder", "prior"] = "decoder"
    """which stage of the chain"""
    minutes: float = 20.0
    """training of each side"""
    rounds: int = 3
    """races, alternating"""
    sets: tuple[str, ...] = ("emoji", "shapes")
    """pictures: Fluent emoji (../shared/data), the drawn set, or a Parquet file of pairs"""
    sides: tuple[str, ...] = tuple(DECODERS)
    """who races; ours and one more at least, or ours alone in heats without rounds"""
    num_train: int = 4500
    """training pairs, about"""
    num_test: int = 600
    """held-out pairs, about"""
    num_pictures: int = 500
    """pictures that each side draws"""
    sampling_seconds: float = 60.0
    """time in which it draws them"""
    clip_steps: int = 400
    """steps of the CLIP whose embeddings are given"""
    num_resamples: int = 40
    """bootstrap resamples of the intervals"""
    batch_size: int = 64
    """samples a step"""
    size: Literal["demo", "small"] = "demo"
    """of decoders, `_decoder_racers.SIZES`"""
    heats: int = 1
    """heats of each setting, with other seeds, whose best by mean FD races; 0: the first races"""
    num_threads: int | None = None
    """threads on the CPU; None = all cores"""
    work: str = ""
    """folder that keeps data and results, to continue; empty = a temporary one"""
    out: str = "quality_an_hour"
    """head of the names of the grids that are written, as quality_an_hour_emoji.png"""
    heat: str = ""
    """internal: run this heat, here"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    if config.heat:
        values = json.loads(config.heat)
        heat = Heat(**{**values, "laps": tuple(values["laps"])})
        race(heat, LEGS[heat.leg][0][heat.racer])
        return 0
    alone = len(config.sides) < 2 and config.rounds
    if OURS not in config.sides or alone or set(config.sides) - set(DECODERS):
        expected = f"{OURS} and some of {', '.join(sorted(set(DECODERS) - {OURS}))}"
        raise ValueError(f"--sides: found {' '.join(config.sides)}, expected {expected}")
    if config.leg == "prior" and config.size != "demo":
        raise ValueError(f"--size: found {config.size} with --leg prior, expected demo")
    if not config.rounds and not config.heats:
        raise ValueError("--rounds: found 0 without --heats, expected one of them")
    if DALLE2 in config.sides and not Path(PEERS).exists():
        raise ValueError(f"{PEERS}: found no such file; make it with: make bench-setup")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(config.work or folder).absolute()
        figures = {name: _race(work / Path(name).stem, name, config) for name in config.sets}
    _show(figures)
    ratio = min(each["ratio"] for each in figures.values())
    print(json.dumps({"ratio": ratio, "minutes": config.minutes, **figures}))
    return 0


def _race(data: Path, name: str, config: Config) -> Json:
    """Race on one set; returns ratio, and by side its setting, curve and sizes."""
    import torch

    threads = config.num_threads or torch.get_num_threads()
    sources = {"emoji": EMOJI, "shapes": None}
    source = sources.get(name, Path(name))
    _require_same(data, config)
    counts = config.num_train, config.num_test
    embedded_sets(data, source, *counts, config.clip_steps, threads)
    if config.leg == "decoder":  # whose CLIP scores captions: of another split, other weights
        trained_clip(data / JUDGE, source, *counts, config.clip_steps, threads, seed=1)
    for split in ("train", "test"):
        if not (data / f"{split}_mask.npy").exists():  # the last that is written
            write_arrays(data, split)

    def run(side: str, setting: str, label: str, laps: tuple[float, ...], seed: int) -> list[Json]:
        heat = Heat(
            leg=config.leg, racer=side, setting=setting, data=str(data),
            out=str(data / label / side / setting), laps=laps, seed=seed, num_threads=threads,
            sampling_seconds=config.sampling_seconds, batch_size=config.batch_size,
            num_pictures=config.num_pictures, size=config.size,
        )  # fmt: skip
        return _result(heat, config.num_resamples)

    seconds = 60 * config.minutes
    known = LEGS[config.leg][1]
    tried: Tried = {side: {each: [] for each in known[side]} for side in config.sides}
    for number in range(config.heats):
        for side, settings in tried.items():
            for setting, fds in settings.items():
                heat = run(side, setting, f"heats_{number}", (HEAT * seconds,), number)
                fds.append(heat[-1]["fd"])
    if not config.rounds:
        return {"ratio": heat_ratio(tried), "heats": tried}
    chosen = {side: min(each, key=lambda name: sum(each[name])) for side, each in tried.items()}
    rounds: dict[str, list[list[Json]]] = {side: [] for side in config.sides}
    laps = tuple(share * seconds for share in LAPS)
    for number in range(config.rounds):
        for side, setting in chosen.items():
            rounds[side].append(run(side, setting, f"round_{number}", laps, number + 1))
    if config.leg == "decoder":
        _save_grid(data, chosen, Path(f"{config.out}_{Path(name).stem}.png"))
    return {**_figures(rounds, chosen), "heats": tried}


def heat_ratio(tried: Tried) -> float:
    """Return the least mean FD of the peers' settings over ours; of ours alone, that of the second
    over the first."""
    means = {side: sorted(map(np.mean, each.values())) for side, each in tried.items()}
    ours, *others = means.pop(OURS)
    of_peers = [mean for each in means.values() for mean in each]
    return float(min(of_peers or others) / ours)


def _require_same(data: Path, config: Config) -> None:
    """Keep the options of what is in a folder; ValueError where it was made with others."""
    changing = ("rounds", "sets", "sides", "work", "out", "heat", "heats", "quick")
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in changing}
    options = json.loads(json.dumps({**options, "settings": LEGS[config.leg][1], "judge": JUDGE}))
    path = data / "options.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in options.items():
            if before.get(name) != value:
                raise ValueError(
                    f"--work: {data}: found results of {name} {before.get(name)!r}, expected "
                    f"{value!r}; take another folder"
                )
    data.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options))


def _result(heat: Heat, num_resamples: int) -> list[Json]:
    """Return a heat's laps with their scores; run it where that is not there."""
    path = Path(heat.out) / "scores.json"
    if path.exists():
        return json.loads(path.read_text())
    print(f"{heat.out}: {heat.laps[-1]:.0f} s of training", flush=True)
    shutil.rmtree(heat.out, ignore_errors=True)  # of a heat that was ended
    python = PEERS if heat.racer == DALLE2 else sys.executable
    command = [python, __file__, "--heat", json.dumps(dataclasses.asdict(heat))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20 * 3600)
    if done.returncode:
        raise RuntimeError(f"{heat.racer}, {heat.setting}: {done.stderr[-3000:]}")
    laps = json.loads((Path(heat.out) / "laps.json").read_text())
    for lap, scores in enumerate(laps):
        drawn = np.load(Path(heat.out) / f"drawn_{lap}.npy")
        scored = embedding_scores if heat.leg == "prior" else picture_scores
        scores |= scored(Path(heat.data), drawn, num_resamples)
    path.write_text(json.dumps(laps))
    return laps


# -- scores ----------------------------------------------------------------------------------------


def picture_scores(data: Path, drawn: np.ndarray, num_resamples: int) -> dict[str, float]:
    """Return FD with its interval, KID and PSNR of drawn pictures, uint8 [n, 3, H, W], and the CLIP
    score where there is a judge's CLIP."""
    from eval.distances.intervals import kernel_distance
    from eval.features.blocks import Features
    from eval.scores.scorecard import caption_scores
    from models.convert.runs import load_clip

    real = np.load(data / "test_image.npy")
    path = data / "test_features.npy"
    if not path.exists():
        np.save(path, _features(real))
    seen, features = np.load(path), _features(drawn)
    squares = np.square(drawn.astype(float) - real[: len(drawn)]).mean((1, 2, 3))
    clip_score = {}
    if (data / JUDGE).exists():
        captions = json.loads((data / "test_captions.json").read_text())[: len(drawn)]
        found = caption_scores(_pictures(drawn), captions, load_clip(str(data / JUDGE / "clip")))
        clip_score = {"clip_score": found["clip_score"]}
    return {
        **_distance(seen, features, num_resamples),
        **clip_score,
        "kid": float(kernel_distance(Features.of(features), Features.of(seen))["kid"]),
        "psnr_db": float((10 * np.log10(255**2 / squares.clip(min=1e-9))).mean()),
    }  # fmt: skip


def embedding_scores(data: Path, drawn: np.ndarray, num_resamples: int) -> dict[str, float]:
    """Return scores of drawn embeddings [n, E] beside the true ones of their captions.

    FD, with its interval, is that of z_i and z_t together (Frechet joint distance, DeVries et al.
    2019): draws that do not depend on their caption are far off.
    """
    import torch

    from models.scores import prior_scorecard

    true = [np.load(data / f"test_{name}_embed.npy") for name in ("image", "text")]
    captions = json.loads((data / "test_captions.json").read_text())[: len(drawn)]
    image, text = (torch.from_numpy(each[: len(drawn)]) for each in true)
    scores = prior_scorecard(torch.from_numpy(drawn), image, text, captions)
    pairs = np.concatenate([drawn, text], axis=1)
    return {
        **_distance(np.concatenate(true, axis=1), pairs, num_resamples),
        "cos": scores["cos"], "retrieval_at_1": scores["retrieval_at_1"],
    }  # fmt: skip


def _distance(real: np.ndarray, drawn: np.ndarray, num_resamples: int) -> dict[str, float]:
    """Return FD of features [n, D], with its interval."""
    from eval.distances.frechet import Moments, Reference
    from eval.distances.intervals import bootstrap_error, interval
    from eval.features.blocks import Features

    reference = Reference.of(Moments.of(real))
    distance = reference.distance(Moments.of(drawn))
    error = bootstrap_error(Features.of(drawn), reference, num_resamples)
    low, high = interval(distance, error)
    return {"fd": distance, "fd_low": low, "fd_high": high}


def _features(images: np.ndarray) -> np.ndarray:
    from eval.features.extractors import efficientnet_spec, extract

    return extract(efficientnet_spec().build("cpu"), _pictures(images))


def _pictures(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image.transpose(1, 2, 0)) for image in images]


def seconds_until(curve: list[tuple[float, float]], distance: float) -> float | None:
    """Return the seconds at which a curve of (seconds, FD) first is at a distance, None if never;
    between two points its FD is linear in the logarithm of the seconds."""
    before: tuple[float, float] | None = None
    for seconds, value in curve:
        if value <= distance:
            if before is None or before[1] <= value:
                return seconds
            share = (before[1] - distance) / (before[1] - value)
            return float(np.exp((1 - share) * np.log(before[0]) + share * np.log(seconds)))
        before = seconds, value
    return None


def speed_up(ours: list[tuple[float, float]], peer: list[tuple[float, float]]) -> float:
    """Return a peer's seconds over ours to the same FD: the peer's least, or ours where we do not
    reach that."""
    target = max(min(distance for _, distance in curve) for curve in (ours, peer))
    reached, theirs = seconds_until(ours, target), seconds_until(peer, target)
    assert reached is not None and theirs is not None, "both curves reach the larger of their least"
    return theirs / reached


def _figures(rounds: dict[str, list[list[Json]]], chosen: dict[str, str]) -> Json:
    """Return the ratio of every round and their median, and the medians of every side's laps."""
    sides = {}
    for side, each in rounds.items():
        laps = [
            {key: float(np.median([one[lap][key] for one in each])) for key in _numbers(each[0][0])}
            for lap in range(len(LAPS))
        ]
        last = [one[-1]["fd"] for one in each]
        sides[side] = {"setting": chosen[side], "last_fds": last, "laps": laps}
    peers = [side for side in rounds if side != OURS]
    best = min(peers, key=lambda side: sides[side]["laps"][-1]["fd"])
    curves = {
        side: [[(lap["seconds"], lap["fd"]) for lap in one] for one in each]
        for side, each in rounds.items()
    }
    ratios = [speed_up(*pair) for pair in zip(curves[OURS], curves[best], strict=True)]
    return {"ratio": float(np.median(ratios)), "ratios": ratios, "best_peer": best, "sides": sides}


def _numbers(lap: Json) -> list[str]:
    return [key for key, value in lap.items() if isinstance(value, int | float)]


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    tried = Table("set", "side", "FD after a quarter of the time", "mean")
    heats = [
        (name, f"{side}, {setting}", fds)
        for name, of_set in figures.items()
        for side, settings in of_set["heats"].items()
        for setting, fds in settings.items()
    ]
    for name, who, fds in heats:
        if fds:
            tried.add_row(name, who, ", ".join(f"{fd:.4g}" for fd in fds), f"{np.mean(fds):.4g}")
    Console(width=150).print(tried)
    first = next(iter(figures.values()))
    if "sides" not in first:
        return
    first = first["sides"][OURS]["laps"][0]
    hidden = ("parameters", "sampling_seconds")
    columns = [name for name in first if name not in hidden]
    table = Table("set", "side", "parameters", *columns)
    for name, of_set in figures.items():
        for side, entry in of_set["sides"].items():
            for lap in entry["laps"]:
                shown = [f"{lap[key]:,.4g}" for key in columns]
                who, count = f"{side}, {entry['setting']}", f"{lap['parameters']:,.0f}"
                table.add_row(name, who, count, *shown)
    Console(width=150).print(table)


def _save_grid(data: Path, chosen: dict[str, str], path: Path) -> None:
    """Draw real pictures over what each side drew of their embeddings in the first round."""
    from training.tasks.pictures import grid, save_png

    rows = {"real": np.load(data / "test_image.npy")}
    for side, setting in chosen.items():
        rows[side] = np.load(data / "round_0" / side / setting / f"drawn_{len(LAPS) - 1}.npy")
    pictures = [list(row[:NUM_SHOWN].transpose(0, 2, 3, 1)) for row in rows.values()]
    save_png(path, grid(pictures, list(rows), []))
    print(f"{path}: {SIZE} px, real and drawn")


if __name__ == "__main__":
    run_benchmark(
        Config, main, minutes=0.1, rounds=1, sets=("shapes",), num_train=300, num_test=60,
        num_pictures=40, sampling_seconds=1.0, clip_steps=5, heats=0, num_resamples=3,
    )  # fmt: skip
