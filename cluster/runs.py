"""The runs in a folder: what ran, on which data, how far it came and how good it is.

    python cluster/runs.py list --runs runs
    python cluster/runs.py show base --runs s3://bucket/runs
    python cluster/runs.py rm base old_prior --runs runs

Without a sub-command it lists; each has a --help of its own.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from cluster.base.cli import DONE, INCOMPLETE, parse, run_script
from cluster.base.files import Json

if TYPE_CHECKING:
    from cluster.run_store import RunInfo

SCORES_LISTED = ("images.fid", "images.fd_clip", "images.clip_score", "prior.cos")


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """All runs, a line each."""

    runs: str = "runs"
    """folder of runs, local or any fsspec URL"""


@dataclass(frozen=True, kw_only=True)
class ShowConfig(ListConfig):
    """Everything that is recorded of one run."""

    name: Positional[tuple[str, ...]] = ()
    """run, as `list` names it"""


@dataclass(frozen=True, kw_only=True)
class RemoveConfig(ListConfig):
    """Delete runs for good, after a question; only folders with our mark."""

    name: Positional[tuple[str, ...]] = ()
    """run or demo, as `list` names it; one question for several"""
    yes: bool = False
    """do not ask"""


def list_runs(config: ListConfig) -> int:
    """Print a table of the runs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cluster.run_store import RunsFolder, printable

    folder = RunsFolder(config.runs)
    names = folder.names()
    if not names:
        print(f"{printable(config.runs)}: no runs")
        return DONE
    table = Table(box=None, pad_edge=False)
    for title in ("run", "what", "state", "step", "loss", "scores", "snapshot", "checkpoint"):
        table.add_column(title, overflow="fold")
    for info in map(folder.read, names):
        # The foremost scores of eval.json, or else of the last validation
        flat, last = _flat_scores(info), info.records.get("last", {})
        scores = {name: flat[name] for name in SCORES_LISTED if flat.get(name) is not None}
        validation = info.records.get("validation", {})
        scores = scores or {k: v for k, v in validation.items() if k != "step"}
        best = ", ".join(f"{name} {_number(value)}" for name, value in list(scores.items())[:2])
        digests = (digest[:12] for digest in info.records.get("snapshot", {}).values())
        cells = (
            info.name, info.kind, info.state, _progress(info), _number(last.get("loss")), best,
            " ".join(digests), _age(info),
        )  # fmt: skip
        table.add_row(*(Text(printable(cell)) for cell in cells))  # Text: no markup is read
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # a line a run
    console.print(table)
    return DONE


def _progress(info: "RunInfo") -> str:
    last = info.records.get("last", {})
    return "" if last.get("step") is None else f"{last['step']}/{last.get('num_steps')}"


def _age(info: "RunInfo") -> str:
    age = info.checkpoint_age
    if age is None:
        return ""
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return f"{age:.0f} s ago"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _flat_scores(info: "RunInfo") -> Json:
    from eval.html_report.formats import flatten

    scores = info.records.get("score")
    return flatten(scores) if scores else {}


def show_run(config: ShowConfig) -> int:
    """Print what is recorded of a run, a line each."""
    from cluster.run_store import RunsFolder, printable

    if len(config.name) != 1:
        raise ValueError(f"show: found {len(config.name)} names, expected one run")
    folder = RunsFolder(config.runs)
    name = folder.resolve(config.name[0])
    if not folder.is_run(name):
        raise ValueError(f"{printable(name)}: found no run, expected one that `list` names")
    info = folder.read(name)
    facts: Json = {
        "run": info.name, "what": info.kind, "state": info.state, "error": info.error,
        "step": _progress(info), "checkpoints": " ".join(info.checkpoints), "newest": _age(info),
        "size": f"{folder.size(name) / 2**20:.1f} MiB",
    }  # fmt: skip
    for group, values in {**info.records, "score": _flat_scores(info)}.items():
        facts |= {f"{group} {key}": value for key, value in values.items()}
    for key, value in facts.items():
        if value not in ("", None):
            print(f"{printable(key)}: {printable(_number(value))}")
    return DONE


def remove_runs(config: RemoveConfig) -> int:
    """Delete the runs named, if they are ours and the user agrees."""
    from cluster.run_store import RunsFolder, printable

    if not config.name:
        raise ValueError("rm: found no name, expected those of runs to delete")
    folder = RunsFolder(config.runs)
    names = [folder.resolve(name) for name in config.name]
    for name in names:
        folder.require_ours(name)
    if not config.yes:
        if not sys.stdin.isatty():
            raise ValueError("rm: found no terminal to ask on, expected one, or --yes")
        for name in names:
            size = f"{folder.size(name) / 2**20:.1f} MiB"
            print(f"{printable(config.runs)}: {printable(name)}, {size}")
        which = "it" if len(names) == 1 else "them"
        if input(f"delete {which} for good? [y/N] ") not in ("y", "yes"):
            print("nothing removed")
            return INCOMPLETE
    for name in names:
        folder.remove(name)
        print(f"removed {printable(name)}")
    return DONE


def command(argv: list[str]) -> int:
    """Run the sub-command that the first argument names; `list` without one."""
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("list", argv)
    match name:
        case "list":
            return list_runs(parse(ListConfig, argv=rest))
        case "show":
            return show_run(parse(ShowConfig, argv=rest))
        case "rm":
            return remove_runs(parse(RemoveConfig, argv=rest))
    raise ValueError(f"found {name!r}, expected one of list, show, rm")


if __name__ == "__main__":
    run_script(lambda: command(sys.argv[1:]))
