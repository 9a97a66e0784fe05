"""The planner beside runs that others have measured: published.yaml."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.base.options import read_yaml
from cluster.planning.devices import GPUS
from cluster.planning.efficiency import PUBLISHED, Workload
from cluster.planning.layouts import Layout, step_time

TOLERANCE = 0.25  # of what was published
DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run, as published and as planned, in `unit`; chosen: an efficiency is from it."""

    name: str
    num_gpus: int
    unit: str
    published: float
    planned: float
    chosen: bool
    source: str

    @property
    def error(self) -> float:
        """Relative error of the plan."""
        return self.planned / self.published - 1

    @property
    def is_off(self) -> bool:
        """Whether the plan misses the run."""
        return abs(self.error) > TOLERANCE


def validated() -> list[PublishedRun]:
    """Plan every run of published.yaml by published efficiencies alone. The update is part of the
    measured computation."""
    runs = []
    for name, entry in read_yaml(Path(__file__).with_name("published.yaml")).items():
        model, gpu = Workload(**entry["model"]), GPUS[entry["gpu"]]
        efficiency = PUBLISHED[model.network, gpu.generation]
        for num_gpus, published in entry["published"].items():
            share = entry.get("samples") or entry["global_batch"] // num_gpus
            layout = Layout(
                zero_stage=2, micro_batch=entry["micro"], checkpointing=False, engine="fsdp2"
            )
            flops = 6 * entry["macs"]
            step = step_time(model, flops, share, gpu, num_gpus, layout, efficiency)
            rate = num_gpus * share / (step.compute + step.wait)
            total = entry.get("total")
            runs.append(PublishedRun(
                name=name, num_gpus=num_gpus, unit="days" if total else "samples/s",
                published=published, planned=total / rate / DAY if total else rate,
                chosen=num_gpus in entry.get("chosen", ()), source=entry["source"],
            ))  # fmt: skip
    return runs


def print_runs(runs: list[PublishedRun], console: Console) -> None:
    """Print a line for each run."""
    table = Table("run", "GPUs", "published", "planned", "unit", "error", "")
    for run in runs:
        use = "chosen by it" if run.chosen else "tests"
        table.add_row(
            run.name, f"{run.num_gpus:,}", f"{run.published:,.5g}", f"{run.planned:,.5g}", run.unit,
            f"{run.error:+.1%}", f"off by more than {TOLERANCE:.0%}" if run.is_off else use,
        )  # fmt: skip
    console.print(table)
    for name, source in {run.name: run.source for run in runs}.items():
        console.print(f"{name}: {source}", highlight=False, soft_wrap=True)
