"""Checkpoints: what was killed continues bit for bit, and what is broken is never read."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _networks import DIT
from _records import newest_valid
from _runs import (
    HALF,
    HERE,
    UNET,
    WHOLE,
    assert_same,
    base_run,
    clip_run,
    embeds_of,
    flip,
    forget_the_end,
    prior_run,
    tensors_of,
    truncate,
    up_run,
)

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import INCIDENTS_NAME, fragment_path, step_folder
from models.configs import (
    AutoregressivePriorConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UpsamplerConfig,
)
from models.weights import FINAL_NAME
from training.bucket.mirror import Mirror
from training.checkpoints.records import Progress
from training.config import RunConfig, TrainConfig
from training.runs.run_folder import prepare_run
from training.runs.worker import train_here
from training.tasks.clip import build_clip_task
from training.tasks.decoder import build_decoder
from training.tasks.prior import build_prior

TRAIN = TrainConfig.of(
    **HERE, num_steps=WHOLE, checkpoint_every=HALF, global_batch_size=8, micro_batch_size=4,
    ema_decay=0.9, warmup=0.2,
)  # fmt: skip
ONE_BATCH = with_options(TRAIN, micro_batch_size=0)
SMALL: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2, "dropout": 0.1}
DROPPING = dataclasses.replace(UNET, dropout=0.1)
BASE = DecoderConfig(unet=DROPPING, context_width=8)
UP = UpsamplerConfig(unet=DROPPING)
# what the paper's has and others have not: its own text, and a variance that it learns
PAPER = dataclasses.replace(
    BASE, text_tokens=12, text_depth=1, text_heads=2, learned_variance=True, prediction="eps",
    weighting="simple", norm_embed_tokens=False,
)  # fmt: skip
TRANSFORMER = DecoderConfig(
    network="dit", dit=dataclasses.replace(DIT, dropout=0.1, refine_channels=4, patch_size=4),
    context_width=8, embed_grid=True, prediction="x0", weighting="v", image_tokens=4,
)  # fmt: skip
BSR = dataclasses.replace(UP, degradation="bsr", low_res_noise=0.2, tell_noise=True)
AUTOREGRESSIVE = AutoregressivePriorConfig(
    **SMALL, num_prefix=3, codebook_size=16, energy=0.9, text_tokens=12, text_width=16,
    text_depth=1, text_heads=2,
)  # fmt: skip
KINDS: dict[str, tuple[Callable, Callable, dict[str, Any]]] = {
    "clip": (build_clip_task, clip_run, {"train": ONE_BATCH}),
    "diffusion": (build_prior, prior_run, {"diffusion": DiffusionPriorConfig(**SMALL)}),
    "tokens": (build_prior, prior_run,
               {"diffusion": DiffusionPriorConfig(**SMALL, image_tokens=4)}),
    "autoregressive": (build_prior, prior_run, {"prior": "autoregressive",
                                                "autoregressive": AUTOREGRESSIVE}),
    "regression": (build_prior, prior_run, {"prior": "regression", "train": ONE_BATCH,
                                            "regression": RegressionPriorConfig(**SMALL)}),
    "decoder": (build_decoder, base_run, {"train": with_options(TRAIN, optimizer="muon"),
                                          "base": BASE}),
    "paper": (build_decoder, base_run, {"train": with_options(TRAIN, optimizer="muon"),
                                        "base": PAPER}),
    "transformer": (build_decoder, base_run, {"train": with_options(TRAIN, optimizer="muon"),
                                              "base": TRANSFORMER}),
    "upsampler": (build_decoder, up_run, {"up": UP}),
    "bsr": (build_decoder, up_run, {"up": BSR, "flip": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    """Two small shards of drawn images, and their embeddings."""
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, num_shards=2, samples_per_shard=10, image_tokens=4)


def train(data: Path, run: Path, kind: str = "diffusion", **changes: Any) -> Path:
    """Train a model of a kind; an autoregressive prior is validated, too."""
    build, configure, fields = KINDS[kind]
    given = {"train": TRAIN, **fields, **changes}
    if kind == "autoregressive":
        given["validation"] = embeds_of(data)
    config: RunConfig = configure(data, run, **given)
    train_here(config, Mirror(prepare_run(config, str(run))), build)
    return run


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of a diffusion prior, to be damaged."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(run)))
    return run


@pytest.fixture(scope="module")
def expected(finished: Path) -> dict[str, torch.Tensor]:
    """Every tensor of its last checkpoint: weights, moments, averages, buffers, both exports."""
    return tensors_of(step_folder(finished, WHOLE))


def last(run: Path) -> dict[str, torch.Tensor]:
    return tensors_of(step_folder(run, WHOLE))



@pytest.mark.parametrize("kind", KINDS)
def test_2n_steps_are_n_steps_resumed_for_n_more(kind: str, data: Path, tmp_path: Path):
    run = train(data, tmp_path / "run", kind)
    expected, curve = last(run), read_lines(run / "metrics.jsonl")
    assert_differs(tensors_of(step_folder(run, HALF)), expected)
    forget_the_end(run)
    train(data, run, kind)
    assert_same(last(run), expected)
    again = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in again] == list(range(1, WHOLE + 1))
    assert [line["loss"] for line in again] == [line["loss"] for line in curve]


def assert_differs(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """The second half moved every kind of tensor, so that equality afterwards says something."""
    for section in ("master", "ema", "exp_avg", "exp_avg_sq"):
        names = [name for name in after if f": {section}/" in name]
        assert any(not torch.equal(before[name], after[name]) for name in names), section


def test_a_finished_export_is_the_checkpoints_weights_and_averages(expected: dict):
    for name, tensor in expected.items():
        file, _, key = name.partition(": ")
        section = {"model.safetensors": "master", "ema.safetensors": "ema"}.get(file)
        if section and not key.startswith(("scale.", "null_length")):
            flat = expected[f"fragments/rank_0000.safetensors: {section}/{key}/0"]
            assert torch.equal(tensor.flatten(), flat)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs the Debian package g++")
def test_a_compiled_network_trains_as_it_does_uncompiled(data: Path, tmp_path: Path):
    model = DiffusionPriorConfig(**{**SMALL, "dropout": 0.0})
    found, expected = (
        last(train(data, tmp_path / str(compiled), diffusion=model,
                   train=with_options(TRAIN, compile=compiled, precision="fp32")))
        for compiled in (True, False)
    )  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-3, rtol=1e-2, msg=name)


# -- broken checkpoints ----------------------------------------------------------------------------



def edit(record: Path, **changes: Any) -> None:
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))


def replace(record: Path, old: bytes, new: bytes) -> None:
    record.write_bytes(record.read_bytes().replace(old, new))


TENSORS, RECORD = "rank_0000.safetensors", "rank_0000.json"


@pytest.mark.parametrize(
    ("file", "damage", "warning"),
    [
        (TENSORS, flip, "digest differs"),
        (TENSORS, truncate, "digest differs"),
        (TENSORS, Path.unlink, "unreadable"),
        (RECORD, Path.unlink, "found the records of 0 ranks"),
        (RECORD, lambda path: path.write_text('{"format": 1, "ra'), "unreadable"),
        (RECORD, lambda path: replace(path, b"progress", b"prog\xf2ess"), "unreadable"),
        (RECORD, lambda path: replace(path, b'"format"', b'"gormat"'), "unreadable"),
        (RECORD, lambda path: edit(path, world_size=2), "found the records of 1 ranks, incomplete"),
    ],
)
def test_a_broken_checkpoint_is_skipped_with_a_warning_and_made_again(
    file: str, damage: Callable, warning: str, data: Path, run: Path, expected: dict
):
    (run / FINAL_NAME).unlink()
    damage(step_folder(run, WHOLE) / "fragments" / file)
    with pytest.warns(UserWarning, match=warning):
        found = newest_valid(run)
    assert found is not None and found[1] == Progress(step=HALF, samples_seen=HALF * 8 - 4)
    with pytest.warns(UserWarning, match=warning):
        train(data, run)
    assert_same(last(run), expected)
    (incident,) = read_lines(run / INCIDENTS_NAME)
    assert (incident["kind"], incident["step"]) == ("broken", HALF)
    assert incident["message"].startswith(f"{step_folder(run, WHOLE).name}: no complete")


def test_a_run_whose_checkpoints_are_all_broken_starts_over(data: Path, run: Path, expected: dict):
    (run / FINAL_NAME).unlink()
    for step in (HALF, WHOLE):
        truncate(fragment_path(step_folder(run, step), 0))
    with pytest.warns(UserWarning):
        assert newest_valid(run) is None
        train(data, run)
    assert_same(last(run), expected)


def test_a_storage_that_fails_ends_the_attempt_and_costs_no_checkpoint(
    data: Path, run: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
):
    """It may answer the next attempt: a run that went on from an older one would delete this."""
    (run / FINAL_NAME).unlink()

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("training.checkpoints.records.digest_file", fails)
    with pytest.raises(OSError, match="Input/output error"):
        train(data, run)
    monkeypatch.undo()
    train(data, run)
    assert_same(last(run), expected)
