"""Group norm with scale, shift and SiLU: the kernel under Triton's interpreter, torch's path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _group_norm import CASES, NAMES, TOLERANCE, Case, evaluated, inputs, reference
from torch import Tensor

from models.networks import group_norm
from models.networks.group_norm import FusedGroupNorm


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """What the kernel computes under Triton's interpreter, which is chosen before its import."""
    pytest.importorskip("triton", reason="torch's builds for CPUs come without triton")
    script = Path(__file__).with_name("_group_norm.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=1200,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_float64_up_to_rounding(interpreted: dict[str, dict[str, float]], name: str):
    case, errors = CASES[name], interpreted[name]
    assert list(errors) == list(NAMES if case.modulated else NAMES[:4])
    limit = TOLERANCE[case.dtype] * max(1, case.mean / 10)
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize("name", ["splits of one cell more", "no scale", "no SiLU"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_torch_s_path_is_the_same_function(name: str, memory_format: torch.memory_format):
    case = CASES[name]
    wanted = evaluated(case, reference, [each.double() for each in inputs(case)])

    def by_module(case: Case, x: Tensor, weight: Tensor, bias: Tensor, *modulation: Tensor):
        norm = FusedGroupNorm(case.num_groups, case.shape[1], silu=case.silu)
        named = {"weight": weight, "bias": bias}
        x = x.contiguous(memory_format=memory_format)
        return torch.func.functional_call(norm, named, (x, *modulation))

    found = evaluated(case, by_module, inputs(case))
    assert found[0].is_contiguous(memory_format=memory_format)
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() - w).norm() < 1e-5 * w.norm()


def test_the_kernel_is_one_node_of_a_graph_without_breaks(monkeypatch: pytest.MonkeyPatch):
    """Traced with the kernel chosen: `torch.compile` neither breaks the graph nor looks inside."""
    monkeypatch.setattr(group_norm, "has_kernel", lambda x, scale: True)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(graph)
        return lambda *inputs: (torch.zeros(2, 64, 11, 12),)

    norm = FusedGroupNorm(16, 64, silu=True)
    x, *_, scale, shift = inputs(Case((2, 64, 11, 12), 16))
    torch.compile(norm, backend=keep, fullgraph=True)(x, scale, shift)
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if "minidalle2" in str(node.target)]
    assert len(nodes) == 1
