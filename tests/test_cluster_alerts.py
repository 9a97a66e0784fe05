"""Laws of the alert rules: each fires, stays silent and resolves when it should, in and outside
Ray, and a test of it fails when its threshold or its `for` is another."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

PROMETHEUS = Path(__file__).parent.parent / "cluster" / "prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())
RULES = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}
RECORDED = yaml.safe_load((PROMETHEUS / "recording.yaml").read_text())["groups"][0]["rules"]
THRESHOLD = re.compile(r"(>=|<=|==|>|<) (-?[\d.]+)")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Debian's package prometheus is absent"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What Prometheus sees, from minute 0 on, and what becomes of one alert.

    series: values in promtool's notation, one a minute, by name without the prefix; times before
    minute 0 are negative. silent, fires, resolved: minutes, the first two one evaluation apart, so
    that neither threshold nor `for` can be another. when: tells it from the alert's other case.
    """

    alert: str
    series: dict[str, str]
    silent: int
    fires: int
    resolved: int
    labels: str = ""
    when: str = ""


PRIOR, CLIP = '{model="prior"}', '{model="clip"}'
OTHER = '{model="prior",at="other"}'  # a run of the same model on another machine, which goes well
HERE = 'instance="host",model="prior"'
EVERY_CASE = [
    Case(  # clip is silent as well, but does not run
        alert="TrainingStalled",
        series={
            f"train_running{PRIOR}": "1x60",
            f"train_report_timestamp_seconds{PRIOR}": "0x29 1800x30",
            f"train_running{CLIP}": "0x60", f"train_report_timestamp_seconds{CLIP}": "0x60",
            f"train_running{OTHER}": "1x60", f"train_report_timestamp_seconds{OTHER}": "0+60x60",
        },
        silent=20, fires=21, resolved=30, labels=HERE,
    ),
    Case(  # clip was nearly done, the decoder said that it ended
        alert="TrainingLost",
        series={
            f"train_running{PRIOR}": "1x10 stale _x13 1x20",
            f"train_eta_seconds{PRIOR}": "310x10 stale",
            f"train_running{CLIP}": "1x10 stale", f"train_eta_seconds{CLIP}": "290x10 stale",
            'train_running{model="decoder"}': "1x9 0x0 stale",
            'train_eta_seconds{model="decoder"}': "900x10 stale",
            f"train_running{OTHER}": "1x60", f"train_eta_seconds{OTHER}": "900x60",
        },
        silent=15, fires=16, resolved=25, labels=HERE,
    ),
    Case(
        alert="TrainingRestarting",
        series={f"train_start_timestamp_seconds{PRIOR}": "1x9 2x9 3x9 4x90",
                f"train_start_timestamp_seconds{CLIP}": "1x9 2x9 3x99",
                f"train_start_timestamp_seconds{OTHER}": "9x99"},
        silent=31, fires=32, resolved=71, labels=HERE,
    ),
    Case(
        alert="LossNotFinite",
        series={f"train_nonfinite_steps_total{PRIOR}": "0x9 1x90",
                f"train_nonfinite_steps_total{CLIP}": "0x99"},
        silent=11, fires=12, resolved=71, labels='model="prior"',
    ),
    Case(
        alert="LossSpikes",
        series={'train_incidents_total{model="prior",kind="spike"}': "0x9 1x4 2x4 3x90",
                'train_incidents_total{model="clip",kind="spike"}': "0x9 1x4 2x90",
                'train_incidents_total{model="clip",kind="hang"}': "0x9 9x90"},
        silent=21, fires=22, resolved=71, labels='model="prior"',
    ),
    Case(
        alert="GpuStarved",
        series={
            f"train_running{PRIOR}": "1x60", f"train_data_wait_ratio{PRIOR}": "0.005+0.01x39 0x20",
            f"train_running{CLIP}": "0x60", f"train_data_wait_ratio{CLIP}": "0.9x60",
            f"train_running{OTHER}": "1x60", f"train_data_wait_ratio{OTHER}": "0.01x60",
        },
        silent=29, fires=30, resolved=40, labels=HERE,
    ),
    Case(
        alert="CheckpointStale",
        series={
            f"train_running{PRIOR}": "1x50",
            f"checkpoint_timestamp_seconds{PRIOR}": "-5430x39 2400x10",
            f"train_running{CLIP}": "0x50", f"checkpoint_timestamp_seconds{CLIP}": "-9000x50",
            f"train_running{OTHER}": "1x50", f"checkpoint_timestamp_seconds{OTHER}": "0+60x50",
        },
        silent=34, fires=35, resolved=40, labels=HERE,
    ),
    Case(  # six rows of ten, then eight: two minutes until their mean over five is above .7
        alert="IngestFailing",
        series={'ingest_rows_total{outcome="stored"}': "0+20x30 620+20x29 1220+1000x30",
                'ingest_rows_total{outcome="filtered"}': "0+20x30 620+20x29 1220+20x30",
                'ingest_rows_total{outcome="failed"}': "0+60x30 1960+160x29 6600+60x30"},
        silent=46, fires=47, resolved=70,
    ),
    Case(
        alert="EmbeddingFailing",
        series={"embed_failed_shards_total": "0x9 1x90"},
        silent=11, fires=12, resolved=71,
    ),
    Case(  # downloads elsewhere: one shard in half an hour; nothing to do; just begun
        alert="ShardBacklog",
        series={'backlog_shards{stage="embed"}': "1x49 0x20",
                'backlog_shards{stage="download",at="slow"}': "9x14 8x28 7x28",
                'backlog_shards{stage="download",at="idle"}': "0x70",
                'backlog_shards{stage="download",at="new"}': "0x19 5x27 0x20"},
        silent=34, fires=35, resolved=50, labels='stage="embed"',
    ),
    Case(
        alert="DiskLow",
        series={'storage_size_bytes{folder="runs"}': "100x60",
                'storage_free_bytes{folder="runs"}': "20.5-1x19 50x40"},
        silent=15, fires=16, resolved=20, labels='folder="runs"',
    ),
    Case(  # 33 of 10,000 a minute; the images' disk fills faster, but was just mounted
        alert="DiskFilling",
        series={'storage_size_bytes{folder="runs"}': "10000x160",
                'storage_free_bytes{folder="runs"}': "10010-33x90 10010x60",
                'storage_size_bytes{folder="images"}': "_x75 10000x20",
                'storage_free_bytes{folder="images"}': "_x75 10000-330x20"},
        silent=70, fires=71, resolved=95, labels='folder="runs"',
    ),
    Case(
        alert="TargetDown",
        series={'up{job="ray"}': "1x9 0x19 1x9", 'up{job="minidalle2"}': "1x60",
                'up{job="somebodys"}': "0x60"},
        silent=14, fires=15, resolved=30, labels='job="ray"',
    ),
    Case(  # its workers began again just now, clip was scored long ago
        alert="EvaluationStale",
        series={'eval_timestamp_seconds{of="chain"}': "-83000x79 4800x10",
                'eval_timestamp_seconds{of="clip"}': "-99000x10 stale",
                f"train_start_timestamp_seconds{PRIOR}": "-90000x49 3000x39",
                f"train_running{PRIOR}": "1x89"},
        silent=71, fires=72, resolved=80,
    ),
    Case(  # nothing was ever scored; clip has ended long ago, the other runs began just now
        alert="EvaluationStale", when="never scored",
        series={f"train_start_timestamp_seconds{PRIOR}": "-83000x49 3000x39",
                f"train_start_timestamp_seconds{CLIP}": "-99000x89",
                f"train_start_timestamp_seconds{OTHER}": "0x89",
                f"train_running{PRIOR}": "1x79 0x10", f"train_running{CLIP}": "0x89",
                f"train_running{OTHER}": "1x79 0x10"},
        silent=71, fires=72, resolved=80,
    ),
]  # fmt: skip
CASES = {f"{case.alert} {case.when}".strip(): case for case in EVERY_CASE}


def raw(name: str, *, ray: bool) -> str:
    """Name a series as a script serves it, or as Ray's exporter does."""
    if name.startswith("up{"):
        return name
    metric, _, labels = name.rstrip("}").partition("{")
    labels, at = re.subn(r',?at="(\w+)"', "", labels), re.findall(r'at="(\w+)"', labels)
    given = [labels[0], f'instance="{at[0] if at else "host"}"', 'WorkerId="ab"' if ray else ""]
    prefix = "ray_minidalle2_" if ray else "minidalle2_"
    return f"{prefix}{metric}{{{', '.join(part for part in given if part)}}}"


def written(case: Case, *, ray: bool = False) -> dict[str, Any]:
    """Return the case as a test of promtool's."""
    names = ", ".join(re.findall(r"(\w+)=", case.labels))
    by = f" by ({names})" if names else ""
    firing = f'count{by} (ALERTS{{alertname="{case.alert}", alertstate="firing"}})'
    none = list[dict[str, Any]]()
    one = [{"labels": f"{{{case.labels}}}", "value": 1}]
    expected = {0: none, case.silent: none, case.fires: one, case.resolved: none}
    return {
        "interval": "1m",
        "input_series": [
            {"series": raw(name, ray=ray), "values": values} for name, values in case.series.items()
        ],
        "promql_expr_test": [
            {"expr": firing, "eval_time": f"{minute}m", "exp_samples": samples}
            for minute, samples in expected.items()
        ],
    }


def promtool(folder: Path, trials: dict[str, tuple[Case, bool, dict[str, str]]]) -> dict[str, str]:
    """Run cases by name, in or outside Ray and with fields of their rule changed; return what
    promtool says of those that fail."""
    for name, (case, ray, changes) in trials.items():
        rule = {**RULES[case.alert], **changes}
        read = [each for each in RECORDED if re.search(rf"{each['record']}\b", rule["expr"])]
        files = {"recording": read, "alerts": [rule]}
        for kind, rules in files.items():
            content: dict[str, Any] = {"groups": [{"name": kind, "rules": rules}]}
            (folder / f"{name}.{kind}.yaml").write_text(yaml.safe_dump(content))
        content = {
            "rule_files": [f"{name}.{kind}.yaml" for kind in files],
            "evaluation_interval": "1m",
            "group_eval_order": [*files],
            "tests": [written(case, ray=ray)],
        }
        (folder / name).write_text(yaml.safe_dump(content))
    command = ["promtool", "test", "rules", *trials]
    output = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout
    parts = re.split(r"^Unit Testing: +(\S+)\n", output, flags=re.M)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert said.keys() == trials.keys(), output
    return {name: text for name, text in said.items() if "SUCCESS" not in text}


def mutations(alert: str) -> list[tuple[str, str]]:
    """Return what another threshold or `for` would be: (field, its text). Small whole numbers
    become their neighbours, others half as much again and half."""
    rule, found = RULES[alert], []
    for match in THRESHOLD.finditer(rule["expr"]):
        number = float(match[2])
        small = number == int(number) and abs(number) <= 5
        for other in (number - 1, number + 1) if small else (number * 0.5, number * 1.5):
            start, end = match.span(2)
            found.append(("expr", f"{rule['expr'][:start]}{other:g}{rule['expr'][end:]}"))
    length, unit = int(rule["for"][:-1]), rule["for"][-1]
    assert unit == "m" and length
    return [*found, ("for", f"{length * 30}s"), ("for", f"{length * 2}m")]


def test_every_alert_has_a_case():
    assert {case.alert for case in EVERY_CASE} == set(RULES) and len(CASES) == len(EVERY_CASE)


@needs_promtool
@pytest.mark.parametrize("ray", [False, True], ids=["scripts", "ray"])
def test_alerts_fire_stay_silent_and_resolve(tmp_path: Path, ray: bool):
    trials = {name.replace(" ", "_"): (case, ray, {}) for name, case in CASES.items()}
    assert promtool(tmp_path, trials) == {}


@needs_promtool
def test_another_threshold_or_duration_fails_one_of_its_cases(tmp_path: Path):
    changed = {alert: mutations(alert) for alert in RULES}
    assert all(len({field for field, _ in found}) == 2 for found in changed.values())
    trials = {
        f"{name.replace(' ', '_')}.{number}": (case, False, {field: text})
        for name, case in CASES.items()
        for number, (field, text) in enumerate(changed[case.alert])
    }
    failed = promtool(tmp_path, trials)
    noticed = {
        (trials[name][0].alert, *trials[name][2].items())
        for name, text in failed.items()
        if trials[name][0].alert in text
    }
    assert [
        (alert, change) for alert, found in changed.items() for change in found
        if (alert, change) not in noticed
    ] == []  # fmt: skip


def test_no_target_is_down_before_a_script_is_listed():
    text = (PROMETHEUS / "scripts.yaml").read_text()
    assert yaml.safe_load(text) == []
    listed = text.replace("\n[]", "").replace("# - targets", "- targets")
    assert yaml.safe_load(listed) == [{"targets": ["127.0.0.1:9400"]}]
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    ours = RULES["TargetDown"]["expr"]
    jobs = {job["job_name"] for job in config["scrape_configs"]} - {"prometheus"}
    assert jobs == set(re.findall(r'job=~"(.*)"', ours)[0].split("|"))


def test_every_alert_says_what_is_wrong_and_what_helps():
    for name, rule in RULES.items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert set(rule["annotations"]) == {"summary", "description"}, name
        assert len(rule["annotations"]["description"].split()) >= 5, name
