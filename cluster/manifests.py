"""Write cluster/kuberay/rules.yaml: Prometheus's rules as its Kubernetes operator reads them.

    python cluster/manifests.py

Edit the rules in cluster/prometheus/recording.yaml and alerts.yaml.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.base.cli import DONE, INCOMPLETE, parse, read_yaml, run_script
from cluster.base.files import update_files

HERE = Path(__file__).resolve().parent
SOURCES = ("recording.yaml", "alerts.yaml")
HEADER = "# Made by cluster/manifests.py from cluster/prometheus: edit that.\n"


@dataclass(frozen=True, kw_only=True)
class ManifestsConfig:
    """The file is in the repository: commit it when a run changes it."""

    prometheus: str = str(HERE / "prometheus")
    """folder of the rules"""
    out: str = str(HERE / "kuberay" / "rules.yaml")
    """file to write"""
    check: bool = False
    """write nothing; exit code 1 where the file is not as it would be written"""


def main(config: ManifestsConfig) -> int:
    """Write the manifest, or compare it."""
    text = prometheus_rule(Path(config.prometheus))
    current = update_files({Path(config.out): text}, check=config.check)
    return INCOMPLETE if config.check and not current else DONE


def prometheus_rule(folder: Path) -> str:
    """Return the manifest of a PrometheusRule with the groups of a folder's rule files."""
    import yaml

    groups = [group for name in SOURCES for group in read_yaml(folder / name)["groups"]]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "minidalle2"},
        "spec": {"groups": groups},
    }
    return HEADER + yaml.safe_dump(manifest, sort_keys=False, width=10_000)


if __name__ == "__main__":
    run_script(lambda: main(parse(ManifestsConfig)))
