"""What "auto" comes to: the device's own, chosen once a run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cluster.base.cli import read_yaml
from training.config import PriorRunConfig, TrainConfig
from training.engine.optimizer import build_optimizer
from training.engine.precision import Precision, autocast, native_bf16, settled
from training.runs import worker
from training.runs.run_folder import prepare_run
from training.runs.worker import resolve_precision

CONFIG = PriorRunConfig(train=TrainConfig.of(num_workers=0))


@pytest.fixture
def device(monkeypatch):
    """Sets whether this device computes in bfloat16."""

    def choose(native: bool) -> None:
        monkeypatch.setattr("training.engine.precision.native_bf16", lambda device_type: native)
        monkeypatch.setattr(worker, "native_bf16", lambda device_type: native)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return choose


def chosen(config: PriorRunConfig) -> str:
    return resolve_precision(config, Path(config.run)).train.workers.precision


def test_a_processor_without_the_instructions_has_no_native_bf16(monkeypatch):
    for found, native in (({}, False), ({"avx2": True}, False), ({"avx512_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert native_bf16("cpu") is native


def test_auto_is_what_the_device_computes_in(device, tmp_path):
    config = dataclasses.replace(CONFIG, run=str(tmp_path / "run"))
    for native, expected in ((True, "bf16"), (False, "fp32")):
        device(native)
        assert chosen(config) == settled("auto", "cpu") == expected
        assert settled("bf16", "cpu") == "bf16" and settled("fp32", "cpu") == "fp32"


def test_a_run_keeps_the_precision_it_began_with(device, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, run=str(tmp_path / "run"))
    device(True)
    run = prepare_run(resolve_precision(config, tmp_path / "run"), config.run)
    assert read_yaml(run / "config.yaml")["train"]["precision"] == "bf16"
    device(False)
    capsys.readouterr()
    assert chosen(config) == "bf16" and "emulates" in capsys.readouterr().out
    assert chosen(dataclasses.replace(config, fresh=True)) == "fp32"
    other = dataclasses.replace(config, train=TrainConfig.of(num_workers=0, precision="fp32"))
    with pytest.raises(ValueError, match="train.precision: found 'bf16' in the run"):
        prepare_run(resolve_precision(other, run), config.run)


def test_networks_and_muon_compute_in_it():
    x, linear = torch.randn(4, 8), torch.nn.Linear(8, 8)
    cases: list[tuple[Precision, torch.dtype]] = [("fp32", torch.float32), ("bf16", torch.bfloat16)]
    for precision, dtype in cases:
        with autocast("cpu", precision):
            assert linear(x).dtype == dtype
        optimizer = build_optimizer(linear, TrainConfig.of(optimizer="muon", precision=precision))
        assert optimizer.matrix_dtype == dtype
