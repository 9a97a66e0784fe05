"""The runs in a folder: what ran, on which data, how far it came and how good it is.

    python cluster/runs.py list --runs runs
    python cluster/runs.py show base --runs s3://bucket/runs
    python cluster/runs.py rm base old_prior --runs runs

`list` is what no sub-command means; each has a --help of its own.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from cluster.base.cli import DONE, INCOMPLETE, parse, run_script

if TYPE_CHECKING:
    from cluster.run_store import RunInfo, RunsFolder

SCORES_LISTED = ("images.fid", "images.fd_clip", "images.clip_score", "prior.cos")


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """All runs, a line each."""

    runs: str = "runs"
    """folder of runs, local or any fsspec URL"""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Everything that one run tells."""

    name: Positional[tuple[str, ...]] = ()
    """run, as `list` names it"""
    runs: str = "runs"
    """folder of runs, local or any fsspec URL"""


@dataclass(frozen=True, kw_only=True)
class RemoveConfig:
    """Delete runs for good, after a question; nothing but folders that bear our mark."""

    name: Positional[tuple[str, ...]] = ()
    """run or demo, as `list` names it; several are asked for at once"""
    runs: str = "runs"
    """folder of runs, local or any fsspec URL"""
    yes: bool = False
    """do not ask"""


def list_runs(config: ListConfig) -> int:
    """Print a table of the runs."""
    from cluster.run_store import RunsFolder, plain

    folder = RunsFolder(config.runs)
    found = [folder.read(name) for name in folder.names()]
    if not found:
        print(f"{plain(config.runs)}: no runs")
        return DONE
    names = ("run", "what", "state", "step", "loss", "scores", "snapshot", "checkpoint")
    _print_table(names, [_row(info) for info in found])
    return DONE


def _row(info: "RunInfo") -> list[str]:
    from cluster.run_store import plain

    cells = (
        info.name, info.kind, info.state, _progress(info), _number(info.last.get("loss")),
        _best(info), " ".join(digest[:12] for digest in info.snapshots.values()), _age(info),
    )  # fmt: skip
    return [plain(cell) for cell in cells]


def _progress(info: "RunInfo") -> str:
    step, total = info.last.get("step"), info.last.get("num_steps")
    return "" if step is None else f"{step}/{total}"


def _best(info: "RunInfo") -> str:
    """Return the foremost scores of eval.json, or else of the last validation."""
    flat = _flat(info.scores)
    found = {name: flat[name] for name in SCORES_LISTED if flat.get(name) is not None}
    found = found or {k: v for k, v in info.validation.items() if k != "step"}
    return ", ".join(f"{name} {_number(value)}" for name, value in list(found.items())[:2])


def _age(info: "RunInfo") -> str:
    age = info.checkpoint_age
    if age is None:
        return ""
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return f"{age:.0f} s ago"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _flat(value: Any) -> dict[str, Any]:
    from eval.html_report.formats import flatten

    return flatten(value) if value else {}


def _print_table(names: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print cells as they are: no markup is read in them, and none is cut off."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # a line a run, for whatever reads it
    console.print(table)


def show_run(config: ShowConfig) -> int:
    """Print what a run tells, a line each."""
    from cluster.run_store import RunsFolder, plain

    if len(config.name) != 1:
        raise ValueError(f"show: found {len(config.name)} names, expected one run")
    folder = RunsFolder(config.runs)
    name = folder.inside(config.name[0])
    if not folder.is_run(name):
        raise ValueError(f"{plain(name)}: found no run, expected one that `list` names")
    info = folder.read(name)
    told = {
        "run": info.name, "what": info.kind, "state": info.state, "told": info.told,
        "step": _progress(info), "checkpoints": " ".join(info.checkpoints), "newest": _age(info),
        "size": f"{folder.size(name) / 2**20:.1f} MiB",
        **{f"snapshot {kind}": digest for kind, digest in info.snapshots.items()},
        **{f"last {key}": value for key, value in info.last.items()},
        **{f"validation {key}": value for key, value in info.validation.items()},
        **{f"incident {key}": value for key, value in info.incident.items()},
        **{f"score {key}": value for key, value in _flat(info.scores).items()},
    }  # fmt: skip
    for key, value in told.items():
        if value not in ("", None):
            print(f"{plain(key)}: {plain(_number(value))}")
    return DONE


def remove_runs(config: RemoveConfig) -> int:
    """Delete the runs named, if they are ours and someone agrees."""
    from cluster.run_store import RunsFolder, plain

    if not config.name:
        raise ValueError("rm: found no name, expected those of runs to delete")
    folder = RunsFolder(config.runs)
    names = [folder.inside(name) for name in config.name]
    strangers = [plain(name) for name in names if not folder.is_ours(name)]
    if strangers:
        raise ValueError(f"{strangers[0]}: found no mark of ours, expected a run or a demo")
    if not config.yes and not _agreed(folder, names, config.runs):
        print("nothing removed")
        return INCOMPLETE
    for name in names:
        folder.remove(name)
        print(f"removed {plain(name)}")
    return DONE


def _agreed(folder: "RunsFolder", names: list[str], runs: str) -> bool:
    from cluster.run_store import plain

    if not sys.stdin.isatty():
        raise ValueError("rm: found no terminal to ask on, expected one, or --yes")
    for name in names:
        print(f"{plain(runs)}: {plain(name)}, {folder.size(name) / 2**20:.1f} MiB")
    return input(f"delete {'it' if len(names) == 1 else 'them'} for good? [y/N] ") in ("y", "yes")


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "list": (ListConfig, list_runs),
    "show": (ShowConfig, show_run),
    "rm": (RemoveConfig, remove_runs),
}


def command(argv: list[str]) -> int:
    """Run the sub-command that the first argument names."""
    if not argv or argv[0].startswith("-"):
        argv = ["list", *argv]
    if argv[0] not in COMMANDS:
        raise ValueError(f"found {argv[0]!r}, expected one of {', '.join(COMMANDS)}")
    config_class, run = COMMANDS[argv[0]]
    return run(parse(config_class, argv=argv[1:]))


if __name__ == "__main__":
    run_script(lambda: command(sys.argv[1:]))
