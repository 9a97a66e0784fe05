"""The panels of three dashboards, for Grafana and for the page of watch.py, as panels.yaml states
them."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from cluster.base.options import read_yaml

SOURCE = Path(__file__).with_suffix(".yaml")
UNITS = {  # Grafana's names
    "short": "a number", "percentunit": "a share of 1", "s": "seconds", "bytes": "bytes",
    "Bps": "bytes a second", "cps": "a second", "bool": "yes or no",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart: a PromQL query, and the name of each of its lines.

    key: names it on the page of watch.py; legend: {{label}} stands for a label's value; unit: of
    UNITS; gpu: whether only a run on a GPU has it.
    """

    key: str
    title: str
    query: str
    legend: str
    help: str
    unit: str = "short"
    gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Panels in titled rows; `name` ends its address and its file's name."""

    name: str
    title: str
    rows: dict[str, tuple[Panel, ...]] = field(default_factory=dict)

    @property
    def panels(self) -> list[Panel]:
        """All panels, row by row."""
        return [panel for row in self.rows.values() for panel in row]


def read_dashboards(path: Path = SOURCE) -> tuple[Dashboard, ...]:
    """Read the dashboards of a file such as panels.yaml."""
    dashboards = []
    for name, content in read_yaml(path).items():
        numbers = itertools.count()
        rows = {
            title: tuple(Panel(key=f"{name}-{next(numbers)}", **panel) for panel in panels)
            for title, panels in content["rows"].items()
        }
        dashboards.append(Dashboard(name=name, title=content["title"], rows=rows))
    return tuple(dashboards)


DASHBOARDS = read_dashboards()
