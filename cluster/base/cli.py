"""How every script reads its command line: frozen dataclasses through tyro, YAML differences,
one-line errors."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")
DONE, INCOMPLETE, WRONG_REQUEST = 0, 1, 2
DRY_RUN = "--dry-run"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a job
UNLISTED = "unlisted"  # Annotated[Sizes, UNLISTED]: flags that work, and that --help leaves out


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code.

    A user's mistake is one line on stderr and exit code 2; a training that diverged, a full disk or
    a lost connection are one line and 1.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        code = main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("MINIDALLE2_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = WRONG_REQUEST
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = INCOMPLETE
    except OSError as error:
        if os.environ.get("MINIDALLE2_TRACEBACK"):
            raise
        print(f"error: {error}; rerun the same command when that is mended", file=sys.stderr)
        code = INCOMPLETE
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to continue", file=sys.stderr)
        sys.exit(INCOMPLETE)
    exporter = sys.modules.get("cluster.base.exporter")  # there only if something was counted
    if exporter is not None:
        exporter.await_scrape()
    sys.exit(code or DONE)


def parse(
    config_class: type[Config],
    *,
    presets: Path | None = None,
    argv: Sequence[str] | None = None,
    check: Callable[[Config], object] | None = None,
) -> Config:
    """Read a configuration: the class's defaults, then --preset or --config, then flags.

    presets: folder of the shipped YAML files, so that `--preset NAME` is `<presets>/NAME.yaml`;
    None: the script has none. With --dry-run, of which a class with a field `dry_run` makes more,
    prints what was read, after `check` had no objection, and exits. Raises ValueError for an
    unknown flag, key or preset, naming the nearest, and for a value that the class refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    default = config_class()
    for path in _take_files(arguments, presets):
        default = merged(default, read_yaml(path), str(path))
    known = list(_flags(config_class))
    dry_run = DRY_RUN not in known and DRY_RUN in arguments
    if dry_run:
        arguments = [argument for argument in arguments if argument != DRY_RUN]
    _require_known(arguments, known)
    arguments = _with_values(arguments)
    help_asked = "--help" in arguments or "-h" in arguments
    with _listed(config_class, help_asked), nullcontext() if help_asked else _told_in_one_line():
        config = _read_flags(default, arguments, _also(presets, DRY_RUN not in known))
    if dry_run:
        if check is not None:
            check(config)
        print(to_yaml(config), end="")
        sys.exit(DONE)
    return config


def _read_flags(default: Config, arguments: list[str], also: str | None) -> Config:
    import tyro

    return tyro.cli(type(default), default=default, args=arguments, description=_description(also))


def _also(presets: Path | None, dry_run: bool) -> str | None:
    """Tell of the flags that are no fields."""
    told = []
    if presets is not None:
        told.append("Also: --preset NAME or --config FILE.yaml (differences from the defaults).")
    if dry_run:
        told.append(f"{DRY_RUN} prints the merged configuration and stops.")
    return " ".join(told) or None


def _require_known(arguments: list[str], known: list[str]) -> None:
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        plain = flag.replace("--no-", "--", 1).rpartition(".")
        # words with spaces are values: options to hand on, such as "--prior-steps 2 --seed 1"
        if not flag.startswith("--") or flag in ("--help", "--") or " " in flag:
            continue
        positive = flag if flag in known else f"{plain[0]}{plain[1]}{plain[2].removeprefix('no-')}"
        if positive not in known:
            more = sorted({"--config", "--preset", DRY_RUN} - {*known})
            raise ValueError(f"unknown flag {flag}{_nearest(flag, [*known, *more])}")


def _with_values(arguments: list[str]) -> list[str]:
    """Tie values that look like flags, such as "--prior-steps 2 --seed 1", to the flag before."""
    tied: list[str] = []
    for argument in arguments:
        if tied and argument.startswith("--") and " " in argument.split("=")[0]:
            tied[-1] += f"={argument}"
        else:
            tied.append(argument)
    return tied


def require_lasting(name: str, path: str, *, or_url: str = ", or a URL") -> None:
    """Refuse a relative local path for what a script writes, where that script is a Ray job's.

    A job's working directory is a copy of the submitter's, which goes away with the job. or_url:
    what else the refusal offers.
    """
    if os.environ.get(JOB_VARIABLE) and "://" not in path and not os.path.isabs(path):
        raise ValueError(
            f"{name}: found the relative path {path}, expected an absolute one{or_url}: a Ray "
            "job's folder is a copy that goes away"
        )


def require_local(name: str, path: str) -> None:
    """Refuse a URL, too, for what is written to local or shared folders alone."""
    if "://" in path:
        raise ValueError(f"{name}: found {path}, expected a local or a shared folder, no URL")
    if path:
        require_lasting(name, path, or_url="")


def require_at_least(config: Any, **least: int) -> None:
    """Refuse a number that is less than `least` says for its field, by the name of its flag."""
    for name, bound in least.items():
        if getattr(config, name) < bound:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: found {getattr(config, name)}, expected {bound} or more")


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Raise as a ValueError of one line what tyro would print in a box before it exits."""
    told, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # no line of the box is wrapped
    try:
        with contextlib.redirect_stderr(told):
            yield
    except SystemExit as error:
        if error.code == DONE:
            raise
        raise ValueError(_unboxed(told.getvalue())) from None
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _unboxed(box: str) -> str:
    """Return what a box says between its title and the next rule; boxes are of lines, or of ASCII.

    A class's own message names its field.
    """
    lines = [line.strip().strip("│").strip() for line in box.splitlines()[1:]]
    parts = [" ".join(part) for rule, part in groupby(lines, key=_is_rule) if not rule]
    return re.sub(r"^Error parsing ([^-]\S+: )?", "", parts[0]) if parts else box


def _is_rule(line: str) -> bool:
    return not line.strip("─-╰╯")


@contextmanager
def _listed(config_class: type, help_asked: bool) -> Iterator[None]:
    """Keep the flags that are `UNLISTED` out of a page of help."""
    from tyro.conf import Suppress

    changed: list[tuple[type, str, Any]] = []
    for owner in _dataclasses_in(config_class) if help_asked else ():
        for name, hint in list(owner.__annotations__.items()):
            if UNLISTED in getattr(hint, "__metadata__", ()):
                changed.append((owner, name, hint))
                owner.__annotations__[name] = typing.Annotated[hint, Suppress]
    try:
        yield
    finally:
        for owner, name, hint in changed:
            owner.__annotations__[name] = hint


def _dataclasses_in(config_class: type) -> Iterator[type]:
    """Yield a dataclass, those it inherits from, and those of its fields."""
    for owner in config_class.__mro__:
        if dataclasses.is_dataclass(owner):
            yield owner
    for hint in typing.get_type_hints(config_class).values():
        if dataclasses.is_dataclass(hint):
            yield from _dataclasses_in(typing.cast(type, hint))


def _description(usage: str | None) -> str | None:
    main = sys.modules.get("__main__")
    lines = [text.strip() for text in (getattr(main, "__doc__", None), usage) if text]
    return "\n\n".join(lines) or None


def _take_files(arguments: list[str], presets: Path | None) -> list[Path]:
    """Remove --config and --preset with their values from `arguments` and return the files they
    name."""
    found: list[Path] = []
    while True:
        at = next(
            (i for i, a in enumerate(arguments) if a.split("=")[0] in ("--config", "--preset")),
            None,
        )
        if at is None:
            return found
        flag, equals, value = arguments.pop(at).partition("=")
        if not equals:
            if at >= len(arguments):
                raise ValueError(f"{flag}: found nothing after it, expected a value")
            value = arguments.pop(at)
        found.append(Path(value) if flag == "--config" else _preset_path(value, presets))


def _preset_path(name: str, presets: Path | None) -> Path:
    names = [path.stem for path in sorted(presets.glob("*.yaml"))] if presets else []
    if presets is None or name not in names:
        raise ValueError(
            f"preset: found {name!r}, expected one of {', '.join(names) or 'none: there are none'}"
        )
    return presets / f"{name}.yaml"


def read_yaml(path: Path) -> dict:
    """Read a YAML mapping; ValueError if it is absent or something else."""
    import yaml

    if not path.is_file():
        raise ValueError(f"{path}: found no such file, expected a YAML configuration")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: found {error}, expected YAML") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a mapping of fields")
    return content


def merged(config: Config, differences: dict, where: str) -> Config:
    """Return `config` with the nested `differences` applied; ValueError names an unknown key's
    nearest field."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(typing.cast(Any, config))
    }
    changes = {}
    for key, value in differences.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}{_nearest(str(key), list(fields))}")
        old = fields[key]
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {key}: found {value!r}, expected a mapping of fields")
            value = merged(old, value, f"{where}: {key}")
        elif isinstance(old, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        elif (
            isinstance(old, float) and isinstance(value, (int, str)) and not isinstance(value, bool)
        ):
            value = float(value)  # YAML 1.1 reads 1e-3 as a string
        elif old is not None and type(value) is not type(old):
            raise ValueError(f"{where}: {key}: found {value!r}, expected a {type(old).__name__}")
        choices = _choices(type(config), key)
        if choices and value not in choices:
            raise ValueError(
                f"{where}: {key}: found {value!r}, expected one of {', '.join(map(str, choices))}"
            )
        changes[key] = value
    return dataclasses.replace(typing.cast(Any, config), **changes)


def _choices(config_class: type, name: str) -> tuple[Any, ...]:
    """Return what a field of a Literal type may be; nothing for other types."""
    hint = typing.get_type_hints(config_class)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def to_yaml(config: Any) -> str:
    """Return `config` as YAML that `merged` reads back."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def _nearest(found: str, known: list[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _flags(config_class: type, prefix: str = "") -> list[str]:
    """List the flags of a nested dataclass as tyro spells them: --train.num-steps."""
    found: list[str] = []
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next((k for k in typing.get_args(kind) if dataclasses.is_dataclass(k)), kind)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            found += _flags(typing.cast(type, kind), f"{name}.")
        else:
            found.append(f"--{name}")
    return found
