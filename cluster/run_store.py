"""What a folder of runs holds: which runs, in what state, and the removal of one.

A run is a folder with a config.yaml that has our section `train`; a demo is one with a demo.json,
and holds runs. The folder may be local or on any storage that fsspec reaches. Whatever a run's
files say is a stranger's text: `plain` makes it fit to be printed.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["finished", "running", "failed", "stopped", "damaged"]

CONFIG, DEMO = "config.yaml", "demo.json"  # the marks of what is ours
FINAL, METRICS, EVAL = "final.json", "metrics.jsonl", "eval.json"
LOCKS = ".launch", ".lock"  # of the driver, and of its first rank
VALIDATION, INCIDENTS = "validation.jsonl", "incidents.jsonl"
STEP, ERROR, SNAPSHOT = "step_", "error_", "snapshot_"
TAIL_BYTES, MOST_BYTES = 1 << 16, 1 << 20  # of a file of lines, and of any other
RECENT_SECONDS = 600.0  # a run on a remote storage, which shows no lock, runs if it wrote so lately


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run tells of itself; ages in seconds, None where there is nothing yet."""

    name: str
    state: State
    kind: str = ""
    told: str = ""
    snapshots: dict[str, str] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    incident: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
    checkpoint_age: float | None = None


class RunsFolder:
    """A folder of runs, on any storage."""

    def __init__(self, root: str) -> None:
        """Raises ValueError where nothing can be listed."""
        import fsspec.core

        try:
            files, path = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{root}: cannot be reached: {error}") from None
        self._files: Any = files
        self.is_local = files.protocol == "file" or "file" in files.protocol
        self._root = os.path.realpath(path) if self.is_local else path.rstrip("/")
        if not files.isdir(self._root):
            raise ValueError(f"{root}: found no such folder, expected one of runs")

    def names(self) -> list[str]:
        """List the runs, those of a demo as demo/run, by name."""
        found = []
        for name in self._children(""):
            if self.is_run(name):
                found.append(name)
            elif self._is_demo(name):
                inner = (f"{name}/{child}" for child in self._children(name))
                found += [child for child in inner if self.is_run(child)]
        return found

    def is_run(self, name: str) -> bool:
        """Say whether a folder bears the mark of a run."""
        return "train" in self._config(name)

    def is_ours(self, name: str) -> bool:
        """Say whether a folder bears one of our marks."""
        return self.is_run(name) or self._is_demo(name)

    def _is_demo(self, name: str) -> bool:
        return "num_train" in _mapping(self._text(f"{name}/{DEMO}"))

    def inside(self, name: str) -> str:
        """Return the name of a folder below this one.

        Raises ValueError for a name that leads elsewhere: by "..", from the root or by a link.
        """
        parts = name.removesuffix("/").split("/")
        if name.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\0" in name:
            raise ValueError(f"{plain(name)}: expected the name of a run, as `list` shows it")
        for number in range(len(parts)):
            path = self._path("/".join(parts[: number + 1]))
            if self.is_local and os.path.islink(path):
                raise ValueError(f"{plain(name)}: found a link, expected a folder of its own")
        if not self._files.isdir(self._path("/".join(parts))):
            known = ", ".join(map(plain, self.names()[:20])) or "none"
            raise ValueError(f"{plain(name)}: found no such run, expected one of {known}")
        return "/".join(parts)

    def read(self, name: str) -> RunInfo:
        """Read what a run tells; one whose files are not what they should be is damaged."""
        try:
            return self._read(name)
        except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            return RunInfo(name=name, state="damaged", told=f"{type(error).__name__}: {error}")

    def _read(self, name: str) -> RunInfo:
        children, config = self._children(name), self._config(name)
        errors = [child for child in children if child.startswith(ERROR)]
        steps = [c for c in children if c.startswith(STEP) and c[len(STEP) :].isdecimal()]
        whole = [step for step in steps if self._is_file(f"{name}/{step}/state.json")]
        newest = f"{name}/{whole[-1]}/state.json" if whole else ""
        return RunInfo(
            name=name,
            state=self._state(name, children, errors),
            kind=_kind(config),
            told=self._text(f"{name}/{errors[0]}") if errors else "",
            snapshots={
                child.removeprefix(SNAPSHOT).removesuffix(".txt"): self._text(f"{name}/{child}")
                for child in children
                if child.startswith(SNAPSHOT)
            },
            last=self._last_line(f"{name}/{METRICS}"),
            validation=self._last_line(f"{name}/{VALIDATION}"),
            incident=self._last_line(f"{name}/{INCIDENTS}"),
            scores=_mapping(self._text(f"{name}/{EVAL}")),
            checkpoints=tuple(whole),
            checkpoint_age=self._age(newest) if newest else None,
        )

    def _state(self, name: str, children: list[str], errors: list[str]) -> State:
        if FINAL in children:
            return "finished"
        if self._is_running(name):
            return "running"
        return "failed" if errors else "stopped"

    def _is_running(self, name: str) -> bool:
        if not self.is_local:
            names = () if self._is_file(f"{name}/{FINAL}") else (CONFIG, METRICS)
            found = [self._age(f"{name}/{file}") for file in names]
            return any(age is not None and age < RECENT_SECONDS for age in found)
        return any(self._is_held(f"{name}/{lock}") for lock in LOCKS)

    def _is_held(self, lock: str) -> bool:
        if not self._is_file(lock):
            return False
        with open(self._path(lock)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def size(self, name: str) -> int:
        """Return the bytes of all files of a folder; a link counts nothing."""
        if not self.is_local:
            return int(self._files.du(self._path(name)))
        found = (
            os.path.join(folder, file)
            for folder, _, files in os.walk(self._path(name))
            for file in files
        )
        return sum(os.lstat(path).st_size for path in found if not os.path.islink(path))

    def remove(self, name: str) -> None:
        """Delete a folder that bears our mark, the mark last: a removal that is cut short can be
        repeated.

        Raises ValueError for one without a mark, or that runs.
        """
        name = self.inside(name)
        if not self.is_ours(name):
            raise ValueError(f"{plain(name)}: found no mark of ours, expected a run or a demo")
        running = [each for each in self._runs_in(name) if self._is_running(each)]
        if running:
            raise ValueError(
                f"{plain(running[0])}: found it running, expected it to be stopped; `touch stop` "
                "in its folder ends it with a checkpoint"
            )
        marks = (CONFIG, DEMO)
        for child in [*(c for c in self._children(name) if c not in marks), *marks]:
            self._delete(f"{name}/{child}")
        self._delete(name)

    def _runs_in(self, name: str) -> list[str]:
        inner = [f"{name}/{child}" for child in self._children(name)]
        return [each for each in (name, *inner) if self.is_run(each)]

    def _delete(self, name: str) -> None:
        path = self._path(name)
        if not self.is_local:
            if any(letter in path for letter in "*?["):  # fsspec would take it for a pattern
                raise ValueError(f"{name}: found * ? or [, expected none: delete it by hand")
            if self._files.exists(path):
                self._files.rm(path, recursive=True)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    # -- files -------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _children(self, name: str) -> list[str]:
        path = self._path(name)
        if self.is_local:
            return sorted(os.listdir(path)) if os.path.isdir(path) else []
        found = (each.rstrip("/") for each in self._files.ls(path, detail=False))
        return sorted(each.rpartition("/")[2] for each in found if each != path)

    def _is_file(self, name: str) -> bool:
        """Say whether there is a file of that name; a link to one, or below one, is none."""
        path = self._path(name)
        if not self.is_local:
            return bool(self._files.isfile(path))
        links = (path, os.path.dirname(path))
        return os.path.isfile(path) and not any(map(os.path.islink, links))

    def _text(self, name: str, start: int | None = None) -> str:
        """Return a file's text, its beginning if it is huge, or from `start`; "" if absent."""
        if not self._is_file(name):
            return ""
        stop = MOST_BYTES if start is None else None
        data = self._files.cat_file(self._path(name), start=start, end=stop)
        return data.decode(errors="replace").strip()

    def _last_line(self, name: str) -> dict[str, Any]:
        """Return the last whole line of a file of JSON objects; {} if there is none."""
        for line in reversed(self._text(name, start=-TAIL_BYTES).splitlines()):
            found = _mapping(line)
            if found:
                return found
        return {}

    def _age(self, name: str) -> float | None:
        if not self._is_file(name):
            return None
        return max(0.0, time.time() - self._files.modified(self._path(name)).timestamp())

    def _config(self, name: str) -> dict[str, Any]:
        import yaml

        try:
            found = yaml.safe_load(self._text(f"{name}/{CONFIG}"))
        except (yaml.YAMLError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(config: dict[str, Any]) -> str:
    """Say which script's run it is, and of what: only that script's configuration has the field."""
    for field_name, kind in (("prior", "prior"), ("stage", "decoder"), ("sam_rho", "clip")):
        if field_name in config:
            value = config[field_name]
            return f"{kind} {value}" if isinstance(value, str) else kind
    return "unknown"


def plain(text: Any) -> str:
    """Return text that a terminal shows as it is: escapes and what turns its direction are spelled
    out, and it has no line ends."""
    return "".join(_shown(str(text)))


def _shown(text: str) -> Iterator[str]:
    for sign in text:
        yield sign if sign.isprintable() else sign.encode("unicode_escape").decode()
