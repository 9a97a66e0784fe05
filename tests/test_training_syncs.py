"""A step queues its work and never waits for the device; the mode that says so can fail."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _syncs import KINDS, NoSyncs, WaitsForDeviceError, train_watched
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_shards=1, samples_per_shard=20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three whole steps: data, loss, gradient, clipping, optimizer, averages, report."""
    monkeypatch.setattr("training.loop.QUEUED", ("cpu",))
    with NoSyncs() as mode:
        model = train_watched(kind, data, tmp_path / "run", CPU, mode.armed)
    assert all(p.isfinite().all() for p in model.parameters())


WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "max": lambda x: max(x),
    "index": lambda x: range(x.long()[0]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "set by a mask": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat": lambda x: torch.repeat_interleave(x, x.long()),
    "inverse": lambda x: torch.linalg.inv(torch.diag(x)),
    "a constant": lambda x: x + torch.tensor([1.0]),
    "error_if_nonfinite": lambda x: nn.utils.get_total_norm([x], error_if_nonfinite=True),
}


@pytest.mark.parametrize("kind", WAITING)
def test_the_mode_refuses_what_waits(kind: str):
    x = torch.arange(1.0, 4.0)
    WAITING[kind](x.clone())
    with NoSyncs() as mode, pytest.raises(WaitsForDeviceError), mode.armed():
        WAITING[kind](x.clone())


def test_the_mode_lets_the_host_read_what_was_sent_to_it():
    with NoSyncs() as mode, mode.armed():
        x = torch.arange(1.0, 4.0).square()
        sent = x.to("cpu", non_blocking=True)
        assert sent.tolist() == [1, 4, 9]
        x[torch.arange(2)] = torch.where(x[:2] > 1, x[:2], 0.0)
        with pytest.raises(WaitsForDeviceError):
            (x + 1).tolist()
