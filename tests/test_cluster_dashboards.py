"""Laws of what dashboards.py makes, and of what docker-compose.yaml starts."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from _prometheus import CLUSTER, free_port, wait_for

from cluster.base.cli import parse
from cluster.base.metrics import METRICS
from cluster.dashboards import DashboardsConfig, files, main
from cluster.monitoring.panels import DASHBOARDS, UNITS
from cluster.monitoring.rules import EVENTS, recorded, recording_rules

COMPOSE = yaml.safe_load((CLUSTER / "docker-compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ALERTS = (CLUSTER / "prometheus" / "alerts.yaml").read_text()
# What the images call a program, and what Debian calls it, with its package.
PROGRAMS = {
    "prometheus": ("prometheus", "prometheus"),
    "alertmanager": ("prometheus-alertmanager", "prometheus-alertmanager"),
}
PATHS = re.compile(r"/[\w./-]+")


def series(text: str) -> set[str]:
    """Return the recorded series that a text reads."""
    return set(re.findall(r"minidalle2:[a-z0-9_:]+", text))


# -- dashboards and recording rules ----------------------------------------------------------------


def test_what_is_in_the_repository_is_what_would_be_made():
    for name, text in files().items():
        assert (CLUSTER / name).read_text() == text, "run python cluster/dashboards.py"
    there = {path.name for path in (CLUSTER / "grafana" / "dashboards").iterdir()}
    assert there == {Path(name).name for name in files() if name.startswith("grafana/")}


def test_a_stale_file_is_reported_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture):
    def run(*arguments: str) -> int:
        return main(parse(DashboardsConfig, argv=["--out", str(tmp_path), *arguments]))

    assert run("--check") == 1 and not list(tmp_path.iterdir())
    assert run() == 0 and run("--check") == 0
    path = tmp_path / "prometheus" / "recording.yaml"
    path.write_text(path.read_text() + "# by hand\n")
    capsys.readouterr()
    assert run("--check") == 1
    assert capsys.readouterr().out == f"{path}: out of date\n"
    assert run() == 0 and run("--check") == 0


def test_every_metric_is_recorded_and_every_recorded_series_is_read():
    rules = recording_rules()["groups"][0]["rules"]
    names = [rule["record"] for rule in rules]
    assert len(names) == len(set(names)) == len(METRICS)
    read = series(ALERTS)
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            read |= series(panel.query)
    assert read == set(names)
    counters = {n.removesuffix("_total") for n, m in METRICS.items() if m.kind == "counter"}
    assert {f"minidalle2_{name}" for name in EVENTS} <= counters


def test_a_rule_reads_a_metric_in_and_outside_ray_and_no_other():
    for metric in METRICS.values():
        (pattern,) = re.findall(r'=~"([^"]+)"', recorded(metric)["expr"])
        suffix = "_bucket" if metric.kind == "histogram" else ""
        others = [name for name in METRICS if re.fullmatch(pattern, name + suffix)]
        assert others == [metric.name]
        assert re.fullmatch(pattern, f"ray_{metric.name}{suffix}")


def test_every_query_parses():
    import promql_parser

    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            promql_parser.parse(panel.query)
            assert panel.unit in UNITS and panel.help.endswith("."), panel.title
    for group in [*recording_rules()["groups"], *yaml.safe_load(ALERTS)["groups"]]:
        for rule in group["rules"]:
            promql_parser.parse(rule["expr"])


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.name)
def test_grafana_is_given_every_panel_once_in_its_place_and_links_to_the_others(dashboard: Any):
    board = json.loads((CLUSTER / "grafana" / "dashboards" / f"{dashboard.name}.json").read_text())
    charts = [panel for panel in board["panels"] if panel["type"] == "timeseries"]
    found = [(each["title"], each["targets"][0]["expr"]) for each in charts]
    assert found == [(panel.title, panel.query) for panel in dashboard.panels]
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    links = {link["url"] for link in board["links"]}
    others = {f"/d/minidalle2-{each.name}" for each in DASHBOARDS if each is not dashboard}
    assert links - others == {f"/d/ray{name}Dashboard" for name in ("Default", "Data", "Train")}
    assert others <= links


def test_the_dashboards_of_ray_have_the_addresses_that_are_linked():
    from ray.dashboard.modules.metrics.dashboards import (
        data_dashboard_panels,
        default_dashboard_panels,
        train_dashboard_panels,
    )

    uids = {
        default_dashboard_panels.default_dashboard_config.default_uid,
        data_dashboard_panels.data_dashboard_config.default_uid,
        train_dashboard_panels.train_dashboard_config.default_uid,
    }
    assert uids == {"rayDefaultDashboard", "rayDataDashboard", "rayTrainDashboard"}


# -- the compose file ------------------------------------------------------------------------------


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return source by target."""
    found = {}
    for each in service["volumes"]:
        source, target = (
            (each["source"], each["target"]) if isinstance(each, dict) else each.split(":")[:2]
        )
        found[target] = source
    return found


def test_compose_names_only_what_is_there_and_listens_on_the_loopback():
    assert set(SERVICES) == {"prometheus", "alertmanager", "grafana"}
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), "pinned"
        assert service["network_mode"] == "host" and "ports" not in service
        for source in mounts(service).values():
            if source.startswith("./"):
                assert (CLUSTER / source).is_dir(), source
            else:
                assert source == "/tmp/ray" or source in COMPOSE["volumes"], source
        address = service.get("environment", {}).get("GF_SERVER_HTTP_ADDR", "") or next(
            each for each in service["command"] if "--web.listen-address" in each
        )
        assert "127.0.0.1" in address, name
    assert ":?" in SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]


def test_grafana_finds_what_its_provisioning_names():
    grafana = SERVICES["grafana"]
    there = mounts(grafana)
    provisioning = CLUSTER / there["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    listens = next(c for c in SERVICES["prometheus"]["command"] if "listen-address" in c)
    assert source["url"] == f"http://{listens.partition('=')[2]}"
    providers = yaml.safe_load((provisioning / "dashboards/minidalle2.yaml").read_text())
    ours, rays = (each["options"]["path"] for each in providers["providers"])
    assert CLUSTER / there[ours] == CLUSTER / "grafana/dashboards"
    assert rays.startswith(next(target for target in there if target == "/tmp/ray"))
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (CLUSTER / there[ours] / Path(home).name).is_file()


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_commands_run_in_a_plain_shell(tmp_path: Path, name: str):
    """With the mounts' sources for their targets, other ports, and Debian's program."""
    program, package = PROGRAMS[name]
    if shutil.which(program) is None:
        pytest.skip(f"Debian's package {package} is absent")
    there = {**mounts(SERVICES[name])}
    folders = {t: str(CLUSTER / s) if s.startswith("./") else s for t, s in there.items()}
    folders |= {t: str(tmp_path / s) for t, s in folders.items() if s in COMPOSE["volumes"]}

    def here(argument: str) -> str:
        path = PATHS.search(argument)
        for target, source in folders.items():
            if path and (path[0] == target or path[0].startswith(f"{target}/")):
                return argument.replace(target, source, 1)
        return argument

    port = free_port()
    command = [here(argument) for argument in SERVICES[name]["command"]]
    command = [re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", each) for each in command]
    process = subprocess.Popen([program, *command], stderr=subprocess.PIPE, cwd=tmp_path, text=True)
    try:
        wait_for(lambda: process.poll() is not None or answers(port), name, 60)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
    finally:
        process.terminate()
        process.communicate(timeout=30)


def answers(port: int) -> bool:
    import urllib.request

    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("prometheus", ["promtool", "check", "config", "prometheus.yaml"]),
        ("prometheus", ["promtool", "check", "rules", "recording.yaml", "alerts.yaml"]),
        ("prometheus-alertmanager", ["amtool", "check-config", "alertmanager.yaml"]),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_the_tools_find_nothing_wrong(package: str, command: list[str]):
    if shutil.which(command[0]) is None:
        pytest.skip(f"Debian's package {package} is absent")
    done = subprocess.run(command, cwd=CLUSTER / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
