"""On a GPU a whole step never waits for the device, and trains what it trains on a CPU.

python -m pytest tests/test_training_cuda.py
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from _syncs import KINDS, train_watched
from torch import Tensor

from cluster.base.jsonl import read_lines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_shards=1, samples_per_shard=20)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions and products in fp32, as on the CPU, not in TF32."""
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(backend, "allow_tf32", False)


@contextmanager
def refuse_waits() -> Iterator[None]:
    """Let torch raise RuntimeError where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait(kind: str, precision: str, data: Path, tmp_path: Path):
    """Three whole steps: data, loss, gradient, clipping, optimizer, averages, report."""
    device = torch.device("cuda")
    train_watched(kind, data, tmp_path / "run", device, refuse_waits, precision=precision)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) > 5


@pytest.mark.parametrize("kind", ["decoder", "diffusion"])
def test_a_compiled_step_does_not_wait(kind: str, data: Path, tmp_path: Path):
    """Once the steps before have compiled it, for any number of tokens."""
    device, settings = torch.device("cuda"), {"precision": "bf16", "compiled": True}
    train_watched(kind, data, tmp_path / "run", device, refuse_waits, **settings)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) > 5


def test_what_waits_is_refused():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), refuse_waits():
        x.sum().item()


def trained(kind: str, data: Path, run: Path, device: str) -> tuple[Tensor, dict[str, Any]]:
    """Return the weights after five steps as one vector, and the curves of their reports."""
    # Adam's usual eps would make whole steps of gradients that are nothing but rounding
    changes = {"num_steps": 5, "adam_eps": 1e-4}
    model = train_watched(kind, data, run, torch.device(device), nullcontext, **changes)
    lines = read_lines(run / "metrics.jsonl")
    weights = torch.cat([p.detach().double().flatten().cpu() for p in model.parameters()])
    return weights, {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "muon" not in kind])
def test_five_steps_are_those_of_the_cpu(kind: str, data: Path, tmp_path: Path):
    """Not by Muon, which makes whole steps of singular values that are nothing but rounding."""
    expected, curves = trained(kind, data, tmp_path / "cpu", "cpu")
    found, theirs = trained(kind, data, tmp_path / "cuda", "cuda")
    assert (found - expected).norm() / expected.norm() < 1e-3
    for name, curve in curves.items():
        assert theirs[name] == pytest.approx(curve, rel=1e-3, abs=1e-6)
