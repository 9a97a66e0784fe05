"""Gradients are reduced beside the backward pass, and the steps are those of a run that waits.

Two ranks, processes of this file. What each rank's thread calls of torch.distributed is seen by a
dispatch mode, and how far its backward pass is by hooks of the layers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import rank_main, run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import TrainConfig
from training.engine import engines
from training.engine.fsdp import FsdpEngine

pytestmark = pytest.mark.slow

NUM_LAYERS, WIDTH = 24, 16
# engine's options, and whether DeepSpeed is told to wait for the end of the backward pass
CASES: dict[str, tuple[dict, bool]] = {
    "stage_1": ({"zero_stage": 1}, False),
    "stage_2": ({"zero_stage": 2}, False),
    "fsdp2": ({"engine": "fsdp2"}, False),
    "stage_1_waits": ({"zero_stage": 1}, True),
    "stage_2_waits": ({"zero_stage": 2}, True),
}


class Deep(nn.Module):
    """Layers of equal size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


class Collectives(TorchDispatchMode):
    """The share of the layers whose gradients exist at each reduction."""

    def __init__(self, model: Deep) -> None:
        super().__init__()
        self.num_done, self.shares = 0, []
        for layer in model.layers:
            layer.register_full_backward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.num_done += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__:
            self.shares.append(self.num_done / NUM_LAYERS)
        return func(*args, **(kwargs or {}))


def act(root: Path, calls: list) -> None:
    """Take three steps of two micro-batches with each engine."""
    for name in calls:
        options, waits = CASES[name]
        config = TrainConfig.of(
            **options, num_workers=2, global_batch_size=8, micro_batch_size=2, precision="fp32",
            learning_rate=1e-2,
        )  # fmt: skip
        model, seen = Deep(), []
        zero: Any = WaitingEngine if waits else engines.ZeroEngine
        engine_class = FsdpEngine if "engine" in options else zero
        engine = engine_class(model, lambda model, x: {"loss": model(x).square().mean(1)}, config,
                              torch.device("cpu"))  # fmt: skip
        collectives = Collectives(model)
        for step in range(3):
            for micro in range(2):
                key = 100 * step + 10 * micro + engine.rank
                x: Any = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(key))
                loss = engine.losses(x)["loss"].mean()
                collectives.num_done, collectives.shares = 0, []
                with collectives:
                    engine.backward(loss)
            seen.append(collectives.shares)  # of the last micro-batch
            engine.step(1.0)
        fragments = {f"{f.name}/{f.offset}": f.master.clone() for f in engine.fragments()}
        save_file(fragments, str(root / f"{name}_{engine.rank}.safetensors"))
        (root / f"{name}_{engine.rank}.json").write_text(json.dumps(seen))
        dist.barrier()


class WaitingEngine(engines.ZeroEngine):
    """Reduces all gradients at once, after the backward pass."""

    def _settings(self) -> dict:
        settings = super()._settings()
        more = {"overlap_comm": False, "reduce_bucket_size": 10**9}
        return {**settings, "zero_optimization": {**settings["zero_optimization"], **more}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    run_ranks(__file__, root, 2, list(CASES))
    return root


def shares(root: Path, name: str) -> list[list[float]]:
    """The shares of each step's last micro-batch, of both ranks."""
    files = (root / f"{name}_{rank}.json" for rank in (0, 1))
    return [step for file in files for step in json.loads(file.read_text())]


@pytest.mark.parametrize("name", ["stage_1", "stage_2", "fsdp2"])
def test_the_first_reduction_begins_before_a_third_of_the_backward_pass(name: str, root: Path):
    for step in shares(root, name):
        assert len(step) >= 12 and step[0] < 0.3, step


@pytest.mark.parametrize("name", ["stage_1_waits", "stage_2_waits"])
def test_without_overlap_nothing_is_reduced_before_its_end(name: str, root: Path):
    for step in shares(root, name):
        assert step and step[0] == 1.0


@pytest.mark.parametrize("stage", [1, 2])
def test_overlap_changes_no_bit(stage: int, root: Path):
    for rank in (0, 1):
        files = (root / f"stage_{stage}{how}_{rank}.safetensors" for how in ("", "_waits"))
        found, expected = (load_file(str(file)) for file in files)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_fsdp2_steps_as_deepspeed_does(root: Path):
    whole: list[dict[str, Tensor]] = []
    for name in ("fsdp2", "stage_1_waits"):
        parts: dict[str, dict[int, Tensor]] = {}
        for rank in (0, 1):
            for key, value in load_file(str(root / f"{name}_{rank}.safetensors")).items():
                parameter, _, offset = key.partition("/")
                parts.setdefault(parameter, {})[int(offset)] = value
        ordered = {key: [x for _, x in sorted(p.items())] for key, p in parts.items()}
        whole.append({key: torch.cat(each) for key, each in ordered.items()})
    torch.testing.assert_close(whole[0], whole[1], atol=1e-6, rtol=0)


if __name__ == "__main__":
    rank_main(act)
