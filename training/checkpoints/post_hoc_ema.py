"""Averages of any width after the run: the combination of its snapshots nearest to the profile.

The maths is in models/power_ema.py. Here the fragments of a parameter are put together, one
snapshot after another, and its sum is written before the next parameter is read.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.base.run_dir import step_folder
from models.power_ema import Profile, coefficients, gamma_of
from models.weights import (
    FINAL_NAME,
    exported,
    load_config,
    num_elements,
    rewrite_weights,
    save_config,
)
from training.checkpoints.checkpoint import SNAPSHOTS
from training.checkpoints.fragments import Fragments
from training.checkpoints.records import Progress, records
from training.engine.ema import POWER


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """The averages after one step."""

    progress: Progress
    stored: Fragments
    sections: dict[str, set[str]]


def reconstruct(run: Path, sigma_rel: float, step: int, out: Path) -> dict[str, Any]:
    """Write the average of width `sigma_rel` at `step` (0: the last snapshot's) as the run `out`.

    Returns what config.json tells of it under "post_hoc_ema": the error is the fit's, see
    models/power_ema.py. Raises ValueError where there is no such average to be had, or
    something in its place.
    """
    gamma = gamma_of(sigma_rel)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: found a folder with files, expected none; name another --out")
    source = exported(run)
    snapshots = _snapshots(run)
    step = step or snapshots[-1].progress.step
    wanted = Profile(gamma, _time_of(step, snapshots, run))
    places = [(s, section) for s in snapshots for section in sorted(s.sections)]
    profiles = [
        Profile(gamma_of(float(section.removeprefix(POWER))), s.progress.updates)
        for s, section in places
    ]
    shares, error = coefficients(profiles, wanted)
    told = {
        "run": str(run), "sigma_rel": sigma_rel, "step": step, "error": error,
        "snapshots": len(snapshots), "profiles": len({section for _, section in places}),
    }  # fmt: skip
    terms = [
        (float(share), s.stored, section)
        for share, (s, section) in zip(shares, places, strict=True)
    ]
    _write_run(source, out, terms, told)
    return told


def _snapshots(run: Path) -> list[_Snapshot]:
    """Open the snapshots of a run, in order; every byte is checked against its record."""
    found = []
    for folder in sorted((run / SNAPSHOTS).glob("step_*")):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            of_ranks = records(folder)
        if of_ranks is None:
            raise ValueError(
                f"{folder}: found a broken snapshot ({told[-1].message}), expected a whole one; "
                "move the folder away to do without it"
            )
        stored = Fragments(folder, len(of_ranks))
        progress = Progress(**of_ranks[0].progress)
        found.append(_Snapshot(progress=progress, stored=stored, sections=stored.sections()))
    if not found:
        raise ValueError(
            f"{run}: found no snapshots in {SNAPSHOTS}/, expected some; train with "
            "--train.power-ema 0.05 0.10 --train.snapshot-every"
        )
    return found


def _time_of(step: int, snapshots: list[_Snapshot], run: Path) -> float:
    """Return the updates made by `step`: between snapshots that skipped some, by interpolation."""
    steps, updates = zip(*((s.progress.step, s.progress.updates) for s in snapshots), strict=True)
    if not 0 < step <= steps[-1]:
        raise ValueError(
            f"--step: found {step}, expected 1 to {steps[-1]}, the last snapshot of {run}"
        )
    return float(np.interp(step, [0, *steps], [0, *updates]))


def _write_run(
    source: Path, out: Path, terms: list[tuple[float, Fragments, str]], told: dict[str, Any]
) -> None:
    """Write a finished run with the sum of `terms` (share, fragments, section) as its weights.

    Buffers, and parameters that were not trained, are those of `source`. Under another name until
    it is whole.
    """
    sizes = num_elements(source / "ema.safetensors")
    names = {name for _, stored, section in terms for name in stored.sections()[section]}
    part = out.with_name(f"{out.name}.part")
    if part.exists():  # of a killed attempt
        shutil.rmtree(part)
    folder = step_folder(part, told["step"])
    folder.mkdir(parents=True)
    weights = folder / "ema.safetensors"
    summed = _summed(terms, {name: sizes[name] for name in sorted(names) if name in sizes})
    rewrite_weights(source / "ema.safetensors", weights, names, summed)
    shutil.copyfile(weights, folder / "model.safetensors")
    save_config(folder, {**load_config(source), "post_hoc_ema": told})
    (part / FINAL_NAME).write_text(json.dumps({"step": folder.name}))
    part.replace(out)


def _summed(
    terms: list[tuple[float, Fragments, str]], sizes: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's sum over `terms`, flat, added up in float64."""
    for name, size in sizes.items():
        total, flat = torch.zeros(size, dtype=torch.float64), torch.empty(size)
        for share, stored, section in terms:
            stored.read(f"{section}/{name}", 0, flat)
            total.add_(flat, alpha=share)
        yield name, total.float()
