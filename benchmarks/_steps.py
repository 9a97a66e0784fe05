"""Training steps of peers, each measured in a process of its own, in turn."""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import BenchmarkConfig

from training.engine.precision import Precision, autocast

ROOT = Path(__file__).resolve().parent.parent
DALLE2 = "dalle2-pytorch"  # in .venv-bench, which `make bench-setup` makes
OURS = "ours"  # the name of what is compared, and the head of the names of other shapes of ours
WARMING_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class StepsConfig(BenchmarkConfig):
    """Sizes of the comparison."""

    batch_size: int = 32
    """samples a step"""
    num_steps: int = 6
    """steps of a measurement, after two that warm up"""
    repeats: int = 5
    """measurements of each, alternating"""
    num_threads: int = 2
    """threads on the CPU"""
    precision: Precision = "auto"
    """of the networks: auto is bf16 where the device computes in it, else fp32"""
    compile: bool = False
    """compile each network (torch.compile)"""
    peer: str = ""
    """internal: measure this one, here"""


def run(script: str, config: Any, builds: dict[str, Any], batch: Callable[[], dict]) -> int:
    """Compare ours with the peers, or be the one that `config` names; the exit code.

    builds: what `measure` builds, by name, ours first; batch: makes the columns of a batch.
    """
    if config.peer:
        measure(config, builds[config.peer], batch())
    else:
        print(json.dumps(compare(script, config, list(builds))))
    return 0


def compare(script: str, config: Any, peers: Sequence[str]) -> dict[str, Any]:
    """Measure ours and every peer in turn; print a table and return the figures."""
    from rich.console import Console
    from rich.table import Table

    python = ROOT / ".venv-bench" / "bin" / "python"
    if not python.exists():
        raise ValueError(f"{python}: found no such file; make it with: make bench-setup")
    runs: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for _ in range(config.repeats):
        for peer in peers:
            runs[peer].append(_run(script, config, peer, str(python)))
    table = Table("network", "parameters", "samples/s", "spread", "peak memory, MiB")
    rates = {peer: [each["samples_per_second"] for each in runs[peer]] for peer in peers}
    memory = {peer: float(np.median([e["memory_bytes"] for e in runs[peer]])) for peer in peers}
    for peer, all_rates in rates.items():
        count = f"{runs[peer][0]['parameters']:,.0f}"
        rate, spread = f"{np.median(all_rates):.1f}", f"{np.ptp(all_rates):.1f}"
        table.add_row(peer, count, rate, spread, f"{memory[peer] / 2**20:,.0f}")
    Console().print(table)
    middle = {peer: float(np.median(all_rates)) for peer, all_rates in rates.items()}
    rivals = [peer for peer in peers if not peer.startswith(OURS)]
    best = max(middle[peer] for peer in rivals)
    rounds = zip(rates[OURS], zip(*(rates[peer] for peer in rivals), strict=True), strict=True)
    ratios = [ours / max(theirs) for ours, theirs in rounds]
    return {
        "ratio": middle[OURS] / best,
        "ratio_spread": float(np.ptp(ratios)),
        "memory_ratio": memory[OURS] / min(memory[peer] for peer in rivals),
        **middle,
        "rates": rates,
        "memory_bytes": memory,
        "precision": runs[OURS][0]["precision"],
    }


def _run(script: str, config: Any, peer: str, bench_python: str) -> dict[str, float]:
    """Measure one peer in a process of its own."""
    command = [bench_python if peer == DALLE2 else sys.executable, script, "--peer", peer]
    for field in dataclasses.fields(config):
        if field.name == "peer":
            continue
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{peer}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    config: Any, build: Callable[[bool], tuple[Any, Callable]], batch: dict[str, Any]
) -> None:
    """Print the figures of whole training steps: forward, loss, backward, torch's fused AdamW.

    build(compiled) -> the network and its loss of a batch's columns.
    """
    import torch

    from training.engine.precision import settled

    torch.set_num_threads(config.num_threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = _peak_bytes(device)
    model, loss_of = build(config.compile)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    columns = {name: value.to(device) for name, value in batch.items()}

    def step() -> None:
        with autocast(device.type, config.precision):
            loss = loss_of(**{name: value.clone() for name, value in columns.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARMING_STEPS):
        step()
    started = time.perf_counter()
    for _ in range(config.num_steps):
        step()
    seconds = time.perf_counter() - started
    figures = {
        "samples_per_second": config.num_steps * config.batch_size / seconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory_bytes": _peak_bytes(device) - before,
        "precision": settled(config.precision, device.type),
    }
    print(json.dumps(figures))


def _peak_bytes(device: Any) -> int:
    """Return the most memory there was: the device's, or this process's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
