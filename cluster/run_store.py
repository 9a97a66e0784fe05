"""What a folder of runs holds: which runs, in what state, and the removal of one.

A run is a folder with a config.yaml that has our section `train`; a demo is one with a demo.json,
and holds runs. The folder may be local or on any storage that fsspec reaches. The text of a run's
files is not trusted: `printable` makes it fit for a terminal.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from cluster.base.files import Json, try_lock
from cluster.base.run_dir import (
    CONFIG_NAME,
    DEMO_NAME,
    ERROR_PREFIX,
    ERRORS_FOLDER,
    EVAL_NAME,
    INCIDENTS_NAME,
    LEASE_FOLDER,
    LEASE_SECONDS,
    LOCKS,
    METRICS_NAME,
    PARTS_FOLDER,
    SNAPSHOT_PREFIX,
    STATE_NAME,
    STEP_PREFIX,
    VALIDATION_NAME,
)
from models.weights import FINAL_NAME

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

State = Literal["finished", "running", "failed", "stopped", "damaged"]

MARKS = (CONFIG_NAME, DEMO_NAME)  # deleted last
TAIL_BYTES, MAX_BYTES = 1 << 16, 1 << 20  # of a file of lines, and of any other
RECENT_SECONDS = 600.0  # a run on a remote storage, which shows no lock, runs if it wrote so lately


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What the files of a run record.

    records: the digest of each snapshot, the last line of metrics, of validation and of incidents,
    and the scores of eval.json, by the word that `show` begins their lines with; checkpoint_age: of
    the newest in seconds, None where there is none.
    """

    name: str
    state: State
    kind: str = ""
    error: str = ""
    records: dict[str, Json] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
    checkpoint_age: float | None = None


class RunsFolder:
    """A folder of runs, on any storage; a run's name is its path below it."""

    def __init__(self, root: str) -> None:
        """Raises ValueError where nothing can be listed."""
        import fsspec.core

        try:
            files, path = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{root}: cannot be reached: {error}") from None
        self._files: AbstractFileSystem = files
        self._is_local = "file" in (files.protocol, *files.protocol)
        self._root = os.path.realpath(path) if self._is_local else path.rstrip("/")
        if not files.isdir(self._root):
            raise ValueError(f"{root}: found no such folder, expected one of runs")

    def names(self) -> list[str]:
        """List the runs, those of a demo as demo/run, by name."""
        names = []
        for name in self._children(""):
            if self.is_run(name):
                names.append(name)
            elif self._is_demo(name):
                inner = (f"{name}/{child}" for child in self._children(name))
                names += [child for child in inner if self.is_run(child)]
        return names

    def is_run(self, name: str) -> bool:
        """Return whether a folder has the mark of a run."""
        return "train" in self._config(name)

    def require_ours(self, name: str) -> None:
        """Raise ValueError for a folder without the mark of a run or of a demo."""
        if not self.is_run(name) and not self._is_demo(name):
            raise ValueError(f"{printable(name)}: found no mark of ours, expected a run or a demo")

    def _is_demo(self, name: str) -> bool:
        return "num_train" in _parse_object(self._text(f"{name}/{DEMO_NAME}"))

    def resolve(self, name: str) -> str:
        """Return the name of an existing folder, without a slash at its end.

        Raises ValueError for a name that leads out of this one: by "..", from the root or by a
        link.
        """
        steps = name.removesuffix("/").split("/")
        if name.startswith("/") or any(step in ("", ".", "..") for step in steps) or "\0" in name:
            raise ValueError(f"{printable(name)}: expected the name of a run, as `list` shows it")
        paths = [self._path("/".join(steps[: end + 1])) for end in range(len(steps))]
        if self._is_local and any(map(os.path.islink, paths)):
            raise ValueError(f"{printable(name)}: found a link, expected a folder of its own")
        if not self._files.isdir(paths[-1]):
            known = ", ".join(map(printable, self.names()[:20])) or "none"
            raise ValueError(f"{printable(name)}: found no such run, expected one of {known}")
        return "/".join(steps)

    def read(self, name: str) -> RunInfo:
        """Read what a run records; one whose files are not what they should be is damaged."""
        try:
            return self._read(name)
        except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            return RunInfo(name=name, state="damaged", error=f"{type(error).__name__}: {error}")

    def _read(self, name: str) -> RunInfo:
        children, config = self._children(name), self._config(name)
        errors = [child for child in children if child.startswith(ERROR_PREFIX)]
        for launch in self._children(f"{name}/{ERRORS_FOLDER}")[-1:]:
            folder = f"{ERRORS_FOLDER}/{launch}"
            errors = [f"{folder}/{child}" for child in self._children(f"{name}/{folder}")]
        states = (f"{child}/{STATE_NAME}" for child in children if child.startswith(STEP_PREFIX))
        complete = [state for state in states if self._is_file(f"{name}/{state}")]
        if FINAL_NAME in children:
            state: State = "finished"
        elif self._is_running(name):
            state = "running"
        else:
            state = "failed" if errors else "stopped"
        # Only the configuration of that script has the field
        fields = (("prior", "prior"), ("stage", "decoder"), ("sam_rho", "clip"))
        key, kind = next((pair for pair in fields if pair[0] in config), ("", "unknown"))
        variant = config.get(key)
        snapshots = {
            child.removeprefix(SNAPSHOT_PREFIX).removesuffix(".txt"): self._text(f"{name}/{child}")
            for child in children
            if child.startswith(SNAPSHOT_PREFIX)
        }
        return RunInfo(
            name=name,
            state=state,
            kind=f"{kind} {variant}" if isinstance(variant, str) else kind,
            error=self._text(f"{name}/{errors[0]}") if errors else "",
            records={
                "snapshot": snapshots,
                "last": self._last_line(f"{name}/{METRICS_NAME}"),
                "validation": self._last_line(f"{name}/{VALIDATION_NAME}"),
                "incident": self._last_line(f"{name}/{INCIDENTS_NAME}"),
                "score": _parse_object(self._text(f"{name}/{EVAL_NAME}")),
            },
            checkpoints=tuple(state.partition("/")[0] for state in complete),
            checkpoint_age=self._age(f"{name}/{complete[-1]}") if complete else None,
        )

    def _is_running(self, name: str) -> bool:
        if self._is_local:
            for lock in (f"{name}/{lock}" for lock in LOCKS if self._is_file(f"{name}/{lock}")):
                with open(self._path(lock)) as file:
                    if not try_lock(file, shared=True):
                        return True
            return False
        if self._is_file(f"{name}/{FINAL_NAME}"):
            return False
        if leases := self._children(f"{name}/{LEASE_FOLDER}"):  # the newest's files are the last
            alive = self._age(f"{name}/{LEASE_FOLDER}/{leases[-1]}")
            return leases[-1].endswith(".alive") and alive is not None and alive < LEASE_SECONDS
        ages = [self._age(f"{name}/{file}") for file in (CONFIG_NAME, METRICS_NAME)]
        return any(age is not None and age < RECENT_SECONDS for age in ages)

    def size(self, name: str) -> int:
        """Return the bytes of all files of a folder."""
        return cast(int, self._files.du(self._path(name)))

    def remove(self, name: str) -> None:
        """Delete a run or a demo, its mark last: a removal that is cut short can be repeated.

        Raises ValueError for a folder without a mark, or that runs.
        """
        name = self.resolve(name)
        self.require_ours(name)
        children = self._children(name)
        for run in (name, *(f"{name}/{child}" for child in children)):
            if self.is_run(run) and self._is_running(run):
                raise ValueError(
                    f"{printable(run)}: found it running, expected it to be stopped; `touch stop` "
                    "in its folder ends it with a checkpoint"
                )
        for child in sorted(children, key=lambda child: child in MARKS):
            self._delete(f"{name}/{child}")
        self._delete(name)

    def _delete(self, name: str) -> None:
        path = self._path(name)
        if not self._is_local:
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
        if not self._files.isdir(path):
            return []
        paths = (child.rstrip("/") for child in self._files.ls(path, detail=False))
        return sorted(child.rpartition("/")[2] for child in paths if child != path)

    def _is_file(self, name: str) -> bool:
        """Return whether there is a file of that name; a link to one, or below one, is none."""
        path = self._path(name)
        if self._is_local and any(map(os.path.islink, (path, os.path.dirname(path)))):
            return False
        return bool(self._files.isfile(path))

    def _text(self, name: str, start: int | None = None) -> str:
        """Return a file's text, its beginning if it is huge, or from `start`; "" if absent."""
        if not self._is_file(name):
            return ""
        end = MAX_BYTES if start is None else None
        data = cast(bytes, self._files.cat_file(self._path(name), start=start, end=end))
        return data.decode(errors="replace").strip()

    def _last_line(self, name: str) -> Json:
        """Return the last complete line of a file of JSON objects, or of the newest part of one in
        a bucket; {} if there is none."""
        run, _, file = name.rpartition("/")
        folder = f"{run}/{PARTS_FOLDER}/{file}"
        for place in (*(f"{folder}/{part}" for part in self._children(folder)[-1:]), name):
            lines = reversed(self._text(place, start=-TAIL_BYTES).splitlines())
            if line := next(filter(None, map(_parse_object, lines)), {}):
                return line
        return {}

    def _age(self, name: str) -> float | None:
        if not self._is_file(name):
            return None
        return max(0.0, time.time() - self._files.modified(self._path(name)).timestamp())

    def _config(self, name: str) -> Json:
        import yaml

        try:
            config = yaml.safe_load(self._text(f"{name}/{CONFIG_NAME}"))
        except (yaml.YAMLError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}


def _parse_object(text: str) -> Json:
    """Parse a JSON object; anything else is an empty one."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def printable(value: object) -> str:
    """Return text for a terminal: control and direction characters are spelled out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(value)
    )
