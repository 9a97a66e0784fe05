"""Checkpoints: what was killed continues bit for bit, and what is broken is never read."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import INCIDENTS_NAME, step_folder
from models.configs import (
    AutoregressivePriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from models.weights import FINAL_NAME
from training.checkpoints import checkpointer
from training.checkpoints.records import Progress, newest_valid
from training.config import ClipRunConfig, DecoderRunConfig, PriorRunConfig, RunConfig, TrainConfig
from training.runs.run_folder import prepare_run
from training.runs.worker import train_here
from training.tasks import clip as clip_task
from training.tasks import decoder as jobs
from training.tasks import prior as prior_job

HALF, WHOLE = 3, 6
TRAIN = TrainConfig.of(
    num_steps=WHOLE, checkpoint_every=HALF, global_batch_size=8, micro_batch_size=4,
    num_workers=0, num_threads=1, report_every=1, ema_decay=0.9, warmup=0.2,
)  # fmt: skip
UNET = UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, attn_resolutions=(),
                  patch_size=8, dropout=0.1)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    """Two small shards of drawn images, and their embeddings."""
    return write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=10)


def clip_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    model = ClipConfig(embed_dim=16, vision_width=32, vision_depth=1, text_width=32, text_depth=1,
                       patch_size=16, vocab_size=512)  # fmt: skip
    train = with_options(TRAIN, micro_batch_size=0)
    config = ClipRunConfig(images=(str(data / "images"),), run=str(run), model=model, train=train)
    return config, clip_task.build_clip_task


def prior_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    model = DiffusionPriorConfig(width=16, depth=1, num_heads=2, dropout=0.1)
    config = PriorRunConfig(
        embeds=(str(data / "embeds"),), run=str(run), diffusion=model, train=TRAIN
    )
    return config, prior_job.build_prior


def ar_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    model = AutoregressivePriorConfig(
        width=16, depth=1, num_heads=2, dropout=0.1, num_prefix=3, codebook_size=16, energy=0.9,
        text_tokens=12, text_width=16, text_depth=1, text_heads=2,
    )  # fmt: skip
    config = PriorRunConfig(
        prior="autoregressive", embeds=(str(data / "embeds"),), run=str(run), train=TRAIN,
        autoregressive=model, validation=(str(data / "embeds"),),
    )  # fmt: skip
    return config, prior_job.build_prior


def regression_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    model = RegressionPriorConfig(width=16, depth=1, num_heads=2, dropout=0.1)
    config = PriorRunConfig(
        prior="regression", embeds=(str(data / "embeds"),), run=str(run), regression=model,
        train=with_options(TRAIN, micro_batch_size=0),
    )  # fmt: skip
    return config, prior_job.build_prior


def decoder_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    config = DecoderRunConfig(
        images=(str(data / "images"),), embeds=(str(data / "embeds"),), run=str(run), image_size=16,
        base=DecoderConfig(unet=UNET, context_width=8),
        train=with_options(TRAIN, optimizer="muon"),
    )  # fmt: skip
    return config, jobs.build_decoder


def upsampler_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    config = DecoderRunConfig(
        images=(str(data / "images"),), run=str(run), stage="up256", image_size=32, low_res_size=16,
        crop_size=16, up=UpsamplerConfig(unet=UNET), train=TRAIN,
    )  # fmt: skip
    return config, jobs.build_decoder


def paper_decoder_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    """What the paper's has and others have not: its own text, and a variance that it learns."""
    config, build = decoder_run(data, run)
    assert isinstance(config, DecoderRunConfig)
    base = dataclasses.replace(
        config.base, text_tokens=12, text_depth=1, text_heads=2, learned_variance=True,
        prediction="eps", weighting="simple", norm_embed_tokens=False,
    )  # fmt: skip
    return dataclasses.replace(config, base=base), build


def bsr_upsampler_run(data: Path, run: Path) -> tuple[RunConfig, Callable]:
    config, build = upsampler_run(data, run)
    assert isinstance(config, DecoderRunConfig)
    up = dataclasses.replace(config.up, degradation="bsr", low_res_noise=0.2, tell_noise=True)
    return dataclasses.replace(config, up=up, flip=True), build


def train(make: Callable, data: Path, run: Path) -> Path:
    config, build = make(data, run)
    train_here(config, prepare_run(config, str(run)), build)
    return run


def contents(run: Path, step: int = WHOLE) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, moments, averages, buffers, and both exports."""
    folder = step_folder(run, step)
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(str(path))  # a map of the file, which a test may damage: hence clone
        found.update({f"{path.relative_to(folder)}: {k}": v.clone() for k, v in tensors.items()})
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def lines(run: Path) -> list[tuple[int, float]]:
    text = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, text)]


def forget_the_end(run: Path) -> None:
    """Leave what a run killed in its second half leaves."""
    (run / FINAL_NAME).unlink()
    for path in sorted(step_folder(run, WHOLE).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    step_folder(run, WHOLE).rmdir()


@pytest.mark.parametrize(
    "make",
    [clip_run, prior_run, ar_run, regression_run, decoder_run, paper_decoder_run, upsampler_run,
     bsr_upsampler_run],
)  # fmt: skip
def test_2n_steps_are_n_steps_resumed_for_n_more(make: Callable, data: Path, tmp_path: Path):
    run = train(make, data, tmp_path / "run")
    expected, curve = contents(run), lines(run)
    sections = {name.split(": ")[1].split("/")[0] for name in expected if "rank_0000" in name}
    assert {"master", "ema", "exp_avg", "exp_avg_sq"} <= sections
    assert_differs(contents(run, HALF), expected)
    forget_the_end(run)
    train(make, data, run)
    assert_same(contents(run), expected)
    assert lines(run) == curve and [step for step, _ in curve] == list(range(1, WHOLE + 1))


def assert_differs(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """The second half moved every kind of tensor, so that equality afterwards says something."""
    for section in ("master", "ema", "exp_avg", "exp_avg_sq"):
        names = [name for name in after if f": {section}/" in name]
        assert any(not torch.equal(before[name], after[name]) for name in names), section


def test_a_finished_export_is_the_checkpoints_weights_and_averages(data: Path, tmp_path: Path):
    found = contents(train(prior_run, data, tmp_path / "run"))
    for name, tensor in found.items():
        file, _, key = name.partition(": ")
        section = {"model.safetensors": "master", "ema.safetensors": "ema"}.get(file)
        if section and not key.startswith(("scale.", "null_length")):
            flat = found[f"fragments/rank_0000.safetensors: {section}/{key}/0"]
            assert torch.equal(tensor.flatten(), flat)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs the Debian package g++")
def test_a_compiled_network_trains_as_it_does_uncompiled(data: Path, tmp_path: Path):
    def trained(compiled: bool) -> dict[str, torch.Tensor]:
        config, build = prior_run(data, tmp_path / str(compiled))
        assert isinstance(config, PriorRunConfig)
        settings = with_options(config.train, compile=compiled, precision="fp32")
        sizes = dataclasses.replace(config.diffusion, dropout=0.0)
        config = dataclasses.replace(config, train=settings, diffusion=sizes)
        train_here(config, prepare_run(config, config.run), build)
        return contents(Path(config.run))

    found, expected = trained(True), trained(False)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-3, rtol=1e-2, msg=name)


EARLY = ("save_file", "digest_file", "write_json")  # before the record that makes it count


@pytest.mark.filterwarnings("ignore:.*incomplete; skipped")
@pytest.mark.parametrize("where", [*EARLY, "export", "prune", "finish"])
def test_a_run_killed_inside_its_last_checkpoint_ends_the_same(
    where: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = contents(train(prior_run, data, tmp_path / "whole"))
    owner = checkpointer.Checkpointer if where == "finish" else checkpointer
    real = getattr(owner, where)

    def killed(*args, **kwargs):
        late = (run / step_folder(run, WHOLE).name).is_dir()
        if late:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    run = tmp_path / "run"
    monkeypatch.setattr(owner, where, killed)
    with pytest.raises(KeyboardInterrupt):
        train(prior_run, data, run)
    monkeypatch.undo()
    assert not (run / FINAL_NAME).is_file()
    found = newest_valid(run)
    assert found is not None and found[1].step == (HALF if where in EARLY else WHOLE)
    train(prior_run, data, run)
    assert_same(contents(run), expected)
    assert json.loads((run / FINAL_NAME).read_text()) == {"step": step_folder(run, WHOLE).name}


# -- broken checkpoints ----------------------------------------------------------------------------


def flip(folder: Path) -> None:
    path = folder / "fragments" / "rank_0000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def truncate(folder: Path) -> None:
    path = folder / "fragments" / "rank_0000.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def lose_tensors(folder: Path) -> None:
    (folder / "fragments" / "rank_0000.safetensors").unlink()


def lose_record(folder: Path) -> None:
    (folder / "fragments" / "rank_0000.json").unlink()


def cut_record(folder: Path) -> None:
    (folder / "fragments" / "rank_0000.json").write_text('{"format": 1, "ra')


def flip_record(folder: Path) -> None:
    path = folder / "fragments" / "rank_0000.json"
    path.write_bytes(path.read_bytes().replace(b"progress", b"prog\xf2ess"))


def forget_format(folder: Path) -> None:
    path = folder / "fragments" / "rank_0000.json"
    path.write_text(path.read_text().replace('"format"', '"gormat"'))


def expect_a_second_rank(folder: Path) -> None:
    edit(folder, world_size=2)


def edit(folder: Path, **changes) -> None:
    path = folder / "fragments" / "rank_0000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "warning"),
    [
        (flip, "digest differs"), (truncate, "digest differs"), (lose_tensors, "unreadable"),
        (lose_record, "found the records of 0 ranks"), (cut_record, "unreadable"),
        (flip_record, "unreadable"), (forget_format, "unreadable"),
        (expect_a_second_rank, "found the records of 1 ranks, incomplete"),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_skipped_with_a_warning_and_made_again(
    damage: Callable, warning: str, data: Path, tmp_path: Path
):
    run = train(prior_run, data, tmp_path / "run")
    expected = contents(run)
    (run / FINAL_NAME).unlink()
    damage(step_folder(run, WHOLE))
    with pytest.warns(UserWarning, match=warning):
        found = newest_valid(run)
    assert found is not None and found[1] == Progress(step=HALF, samples_seen=HALF * 8 - 4)
    with pytest.warns(UserWarning, match=warning):
        train(prior_run, data, run)
    assert_same(contents(run), expected)
    (incident,) = read_lines(run / INCIDENTS_NAME)
    assert (incident["kind"], incident["step"]) == ("broken", HALF)
    assert incident["message"].startswith(f"{step_folder(run, WHOLE).name}: no complete")


def test_a_run_whose_checkpoints_are_all_broken_starts_over(data: Path, tmp_path: Path):
    run = train(prior_run, data, tmp_path / "run")
    expected = contents(run)
    (run / FINAL_NAME).unlink()
    for step in (HALF, WHOLE):
        truncate(step_folder(run, step))
    with pytest.warns(UserWarning):
        assert newest_valid(run) is None
        train(prior_run, data, run)
    assert_same(contents(run), expected)


def test_a_storage_that_fails_ends_the_attempt_and_costs_no_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may answer the next attempt: a run that went on from an older one would delete this."""
    run = train(prior_run, data, tmp_path / "run")
    expected = contents(run)
    (run / FINAL_NAME).unlink()

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("training.checkpoints.records.digest_file", fails)
    with pytest.raises(OSError, match="Input/output error"):
        train(prior_run, data, run)
    monkeypatch.undo()
    train(prior_run, data, run)
    assert_same(contents(run), expected)
