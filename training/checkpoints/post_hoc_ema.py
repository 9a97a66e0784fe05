"""Averages of any width after the run: the combination of its snapshots nearest to the profile.

The maths is in models/power_ema.py. The fragments of one parameter are added up, snapshot after
snapshot, and its sum is written before the next parameter is read.
"""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.base.files import Json, write_json
from cluster.base.run_dir import EMA_SNAPSHOTS_FOLDER, step_folder
from ingest.store.storage import is_remote, storage_of
from models.power_ema import Profile, coefficients, gamma_of
from models.weights import (
    EMA_NAME,
    FINAL_NAME,
    MODEL_NAME,
    exported,
    load_config,
    num_elements,
    rewrite_weights,
    save_config,
)
from training.checkpoints.records import FragmentReader, Progress, valid_records
from training.engine.ema import POWER

Term = tuple[float, FragmentReader, str]  # share in the sum, snapshot, section


def reconstruct(run: str | Path, sigma_rel: float, step: int, out: Path) -> Json:
    """Write the average of width `sigma_rel` at `step` (0: the last snapshot's) as the run `out`.

    run: a folder, or the URL of a run in a bucket, whose snapshots are copied meanwhile. Returns
    what config.json says of it under "post_hoc_ema"; "error" is the fit's, see
    models/power_ema.py. Raises ValueError where the snapshots hold no such average, or `out` holds
    files.
    """
    gamma_of(sigma_rel)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: found a folder with files, expected none; name another --out")
    if not is_remote(run):
        return _reconstruct(Path(run), run, sigma_rel, step, out)
    storage = storage_of(run)
    with tempfile.TemporaryDirectory() as copy:
        for name in storage.find(EMA_SNAPSHOTS_FOLDER):
            storage.get(name, Path(copy) / name)
        return _reconstruct(Path(copy), run, sigma_rel, step, out)


def _reconstruct(folder: Path, run: str | Path, sigma_rel: float, step: int, out: Path) -> Json:
    """Do what `reconstruct` says with the snapshots in a folder."""
    source, snapshots, gamma = exported(run), _snapshots(folder, run), gamma_of(sigma_rel)

    # Updates made by `step`: between snapshots that skipped some, by interpolation
    steps, updates = zip(*((p.step, p.updates) for p, _ in snapshots), strict=True)
    step = step or steps[-1]
    if not 0 < step <= steps[-1]:
        raise ValueError(
            f"--step: found {step}, expected 1 to {steps[-1]}, the last snapshot of {run}"
        )
    wanted = Profile(gamma, float(np.interp(step, [0, *steps], [0, *updates])))

    # The combination of all stored averages that is nearest to that profile
    places = [(p, stored, name) for p, stored in snapshots for name in sorted(stored.sections())]
    profiles = [
        Profile(gamma_of(float(section.removeprefix(POWER))), progress.updates)
        for progress, _, section in places
    ]
    shares, error = coefficients(profiles, wanted)
    fit = {
        "run": str(run), "sigma_rel": sigma_rel, "step": step, "error": error,
        "snapshots": len(snapshots), "profiles": len({section for _, _, section in places}),
    }  # fmt: skip
    terms = [
        (float(share), stored, section)
        for share, (_, stored, section) in zip(shares, places, strict=True)
    ]
    _write_run(source, out, terms, fit)
    return fit


def _snapshots(copy: Path, run: str | Path) -> list[tuple[Progress, FragmentReader]]:
    """Open the snapshots of a run's copy, in order; every byte is checked against its record."""
    snapshots = []
    for folder in sorted((copy / EMA_SNAPSHOTS_FOLDER).glob("step_*")):
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            records = valid_records(folder)
        if records is None:
            raise ValueError(
                f"{folder}: found a broken snapshot ({messages[-1].message}), expected a "
                "complete one; move the folder away to do without it"
            )
        snapshots.append((Progress(**records[0].progress), FragmentReader(folder, len(records))))
    if not snapshots:
        raise ValueError(
            f"{run}: found no snapshots in {EMA_SNAPSHOTS_FOLDER}/, expected some; train with "
            "--train.power-ema 0.05 0.10 --train.snapshot-every"
        )
    return snapshots


def _write_run(source: Path, out: Path, terms: list[Term], fit: Json) -> None:
    """Write a finished run with the sum of `terms` as its weights.

    Buffers, and parameters that were not trained, are those of `source`. The folder has another
    name until it is complete.
    """
    sizes = num_elements(source / EMA_NAME)
    names = {name for _, stored, section in terms for name in stored.sections()[section]}
    unfinished = out.with_name(f"{out.name}.part")
    if unfinished.exists():  # of a killed attempt
        shutil.rmtree(unfinished)
    folder = step_folder(unfinished, fit["step"])
    folder.mkdir(parents=True)
    weights = folder / EMA_NAME

    def sums() -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's sum over `terms`, flat, added up in float64."""
        for name in sorted(names & sizes.keys()):
            total, flat = torch.zeros(sizes[name], dtype=torch.float64), torch.empty(sizes[name])
            for share, stored, section in terms:
                stored.read(f"{section}/{name}", 0, flat)
                total.add_(flat, alpha=share)
            yield name, total.float()

    rewrite_weights(source / EMA_NAME, weights, names, sums())
    shutil.copyfile(weights, folder / MODEL_NAME)
    save_config(folder, {**load_config(source), "post_hoc_ema": fit})
    write_json(unfinished / FINAL_NAME, {"step": folder.name})
    unfinished.replace(out)
