"""Group norm, scale and shift, and SiLU: the kernel, torch eager, torch compiled.

    python benchmarks/group_norm.py        # two minutes on one GPU

Forward and backward in bf16 on feature maps of the presets `mini` and `modern`, as CUDA graphs, so
that no launch waits for the host. Bytes are counted: of two passes forward and backward x or its
like is read or written eight times, of an ideal kernel five times. `ratio` is the geometric mean of
compiled torch's time over the kernel's. Without a GPU only torch's path runs, at toy size.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from _common import BenchmarkConfig, run_benchmark

SHAPES = (
    (256, 128, 64), (256, 256, 64), (256, 256, 32), (256, 384, 16), (256, 512, 8),
    (64, 192, 64), (64, 384, 64), (64, 384, 32), (64, 1344, 16), (8, 128, 256),
)  # fmt: skip
TOY_SHAPES = ((2, 32, 8), (2, 64, 16))
PASSED, IDEAL = 8, 5  # x's bytes, forward and backward


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Options of the comparison."""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    import torch
    from rich.console import Console
    from rich.table import Table

    if not torch.cuda.is_available():
        print("there is no GPU: torch's path at toy size; the kernel was not measured")
    on_gpu = torch.cuda.is_available()
    copied = _copy_bandwidth() if on_gpu else None
    table = Table("B, C, side", "way", "forward, ms", "both, ms", "TB/s", "ideal TB/s", "of a copy")
    rows, speedups = [], []
    shapes = SHAPES[:2] if config.quick and on_gpu else SHAPES if on_gpu else TOY_SHAPES
    for shape in shapes:
        for way in _ways(on_gpu):
            forward, both = _milliseconds(shape, way)
            size = 2e-9 * shape[0] * shape[1] * shape[2] ** 2  # terabytes a second of a millisecond
            row = {
                "shape": shape, "way": way, "forward_ms": forward, "both_ms": both,
                "terabytes_per_second": PASSED * size / both,
                "ideal_terabytes_per_second": IDEAL * size / both,
                "share_of_copy": PASSED * size / both / copied if copied else None,
            }  # fmt: skip
            rows.append(row)
            shown = (f"{value:.3g}" if isinstance(value, float) else "" for value in row.values())
            table.add_row(", ".join(map(str, shape)), way, *list(shown)[2:])
        times = {row["way"]: row["both_ms"] for row in rows if row["shape"] == shape}
        if on_gpu:
            speedups.append(times["torch, compiled, channels-last"] / times["kernel"])
    Console(width=140).print(table)
    ratio = float(np.exp(np.mean(np.log(speedups)))) if speedups else None
    print(json.dumps({"ratio": ratio, "copy_terabytes_per_second": copied, "measured": rows}))
    return 0


def _ways(on_gpu: bool) -> tuple[str, ...]:
    by_torch = ("torch, eager, contiguous", "torch, compiled, channels-last")
    return (*by_torch, "kernel", "kernel, compiled") if on_gpu else by_torch[:1]


def _milliseconds(shape: tuple[int, int, int], way: str) -> tuple[float, float]:
    """Return the times of forward, and of forward and backward."""
    import torch

    from models.networks.group_norm import group_norm, group_norm_by_torch

    batch, channels, side = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.compiler.reset()
    x = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16)
    if "contiguous" not in way:
        x = x.contiguous(memory_format=torch.channels_last)
    modulation = torch.randn(batch, 2 * channels, device=device, dtype=torch.bfloat16)
    scale, shift = modulation.chunk(2, dim=1)  # [B, C] each
    weight, bias = torch.ones(2, channels, device=device)
    dy = torch.randn_like(x)
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias, scale, shift)]
    options = {"num_groups": 32, "eps": 1e-5, "silu": True}

    def function(*inputs: Any) -> torch.Tensor:
        if "kernel" in way:
            return group_norm(*inputs, **options)[0]
        return group_norm_by_torch(*inputs, **options)

    called = torch.compile(function, fullgraph=True) if "compiled" in way else function

    def forward() -> None:
        with torch.no_grad():
            called(*leaves)

    def both() -> None:
        torch.autograd.grad(called(*leaves), leaves, dy)

    return _timed(forward), _timed(both)


def _timed(call: Callable[[], object]) -> float:
    """Return a call's milliseconds, the median."""
    import torch

    if torch.cuda.is_available():
        from triton.testing import do_bench_cudagraph  # triton comes with torch for GPUs alone

        return cast(float, do_bench_cudagraph(call, rep=100, return_mode="median"))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def _copy_bandwidth() -> float:
    """Return the terabytes a second that a copy of 1 GiB reads and writes."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 * 1e-9 / _timed(lambda: target.copy_(source))


if __name__ == "__main__":
    run_benchmark(Config, main)
