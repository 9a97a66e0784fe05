"""Build what Prometheus and Grafana read: recording rules and three dashboards.

    python cluster/dashboards.py

They are cluster/prometheus/recording.yaml and cluster/grafana/dashboards/*.json. Edit the metrics
in cluster/base/metrics.py and the panels in cluster/monitoring/panels.yaml.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.base.cli import DONE, INCOMPLETE, parse, run_script
from cluster.base.files import update_files

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders import timeseries

    from cluster.monitoring.panels import Dashboard, Panel

HERE = Path(__file__).resolve().parent
RAYS_OWN = {  # Ray writes these dashboards itself, under these addresses
    "Ray: nodes and tasks": "rayDefaultDashboard",
    "Ray Data": "rayDataDashboard",
    "Ray Train": "rayTrainDashboard",
}
HEADER = "# Made by cluster/dashboards.py from the table in cluster/base/metrics.py: edit that.\n"
WIDTH, COLUMNS, HEIGHT = 24, 3, 8  # of Grafana's grid, and of a panel in it
DATA_SOURCE = "${source}"


@dataclass(frozen=True, kw_only=True)
class DashboardsConfig:
    """Both kinds of files are in the repository: commit what a run changes."""

    out: str = str(HERE)
    """folder that holds prometheus/ and grafana/"""
    check: bool = False
    """write nothing; exit code 1 where a file is missing or not as it would be written"""


def main(config: DashboardsConfig) -> int:
    """Write every file, or compare it."""
    texts = {Path(config.out, name): text for name, text in files().items()}
    current = update_files(texts, check=config.check)
    return INCOMPLETE if config.check and not current else DONE


def files() -> dict[str, str]:
    """Return the text of each file, by its name below the folder."""
    import yaml

    from cluster.monitoring.panels import DASHBOARDS
    from cluster.monitoring.rules import recording_rules

    made = {"prometheus/recording.yaml": HEADER + yaml.safe_dump(
        recording_rules(), sort_keys=False, width=10_000)}  # fmt: skip
    for dashboard in DASHBOARDS:
        made[f"grafana/dashboards/{dashboard.name}.json"] = grafana_json(dashboard)
    return made


def address(dashboard: "Dashboard") -> str:
    """Return the address (uid) of a dashboard in Grafana."""
    return f"minidalle2-{dashboard.name}"


def grafana_json(dashboard: "Dashboard") -> str:
    """Return a dashboard as Grafana's JSON, with links to the others and to those that Ray
    brings."""
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import dashboard as models

    from cluster.monitoring.panels import DASHBOARDS

    board = (
        builders.Dashboard(dashboard.title)
        .uid(address(dashboard))
        .tags(["minidalle2"])
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            builders.DatasourceVariable("source").label("Prometheus").type("prometheus")
        )
    )
    others = {each.title: address(each) for each in DASHBOARDS if each is not dashboard}
    for title, uid in {**others, **RAYS_OWN}.items():
        link = builders.DashboardLink(title).type(models.DashboardLinkType.LINK).url(f"/d/{uid}")
        board = board.link(link.keep_time(True).target_blank(uid in RAYS_OWN.values()))
    top, width = 0, WIDTH // COLUMNS
    for title, panels in dashboard.rows.items():
        place = models.GridPos(x=0, y=top, w=WIDTH, h=1)
        board = board.with_row(builders.Row(title).grid_pos(place))
        for number, panel in enumerate(panels):
            line, column = divmod(number, COLUMNS)
            place = models.GridPos(x=column * width, y=top + 1 + line * HEIGHT, w=width, h=HEIGHT)
            board = board.with_panel(_chart(panel).grid_pos(place))
        top += 1 + -(-len(panels) // COLUMNS) * HEIGHT
    return json.dumps(json.loads(JSONEncoder().encode(board.build())), indent=1) + "\n"


def _chart(panel: "Panel") -> "timeseries.Panel":
    """Return the builder of a panel: lines over time, with a table of their last values."""
    from grafana_foundation_sdk.builders import common, prometheus, timeseries
    from grafana_foundation_sdk.models import common as models
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    source = DataSourceRef(type_val="prometheus", uid=DATA_SOURCE)
    query = prometheus.Dataquery().ref_id("A").expr(panel.query).legend_format(panel.legend)
    legend = (
        common.VizLegendOptions()
        .display_mode(models.LegendDisplayMode.LIST)
        .placement(models.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull"])
    )
    chart = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.help)
        .datasource(source)
        .with_target(query.datasource(source))
        .unit("bool_yes_no" if panel.unit == "bool" else panel.unit)
        .fill_opacity(8)
        .line_width(2)
        .show_points(models.VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(models.TooltipDisplayMode.MULTI))
        .legend(legend)
    )
    return chart.min(0).max(1) if panel.unit == "bool" else chart


if __name__ == "__main__":
    run_script(lambda: main(parse(DashboardsConfig)))
