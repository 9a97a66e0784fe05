"""How every script reads its command line: frozen dataclasses through tyro, YAML differences,
one-line errors."""

import contextlib
import dataclasses
import io
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.base.files import Json
from cluster.base.options import (
    Config,
    Option,
    choices_of,
    described,
    fields_of,
    flag_of,
    flattened,
    merged,
    nearest,
    option_values,
    options_of,
    read_yaml,
    to_yaml,
    with_options,
)

__all__ = [
    "DONE", "INCOMPLETE", "JOB_VARIABLE", "WRONG_REQUEST", "Option", "flattened", "merged",
    "options_of", "parse", "read_yaml", "require_at_least", "require_lasting", "require_local",
    "run_script", "to_yaml", "with_options",
]  # fmt: skip

DONE, INCOMPLETE, WRONG_REQUEST = 0, 1, 2
DRY_RUN = "--dry-run"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a job

# -- scripts ---------------------------------------------------------------------------------------


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
    exporter = sys.modules.get("cluster.base.exporter")  # loaded only if something was counted
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
    None: the script has none. With --dry-run, where the class has no field `dry_run` of its own,
    prints the merged configuration, after `check` had no objection, and exits. Raises ValueError
    for an unknown flag, key or preset, naming the nearest, and for a value that the class refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    default = config_class()
    files = _take_files(arguments, presets)
    for path in files:
        default = merged(default, read_yaml(path), str(path))
    flags = {flag_of(name): field.hint for name, field in options_of(config_class).items()}
    dry_run = DRY_RUN not in flags and DRY_RUN in arguments
    if dry_run:
        arguments = [argument for argument in arguments if argument != DRY_RUN]
    _require_known(arguments, flags)
    usage = []
    if presets is not None:
        usage.append("Also: --preset NAME or --config FILE.yaml (differences from the defaults).")
    if DRY_RUN not in flags:
        usage.append(f"{DRY_RUN} prints the merged configuration and stops.")
    config = _read_flags(default, _join_values(arguments), flags, " ".join(usage))
    for path in files:
        if path.parent == presets:
            _require_sizes(config, path)
    if dry_run:
        if check is not None:
            check(config)
        print(to_yaml(config), end="")
        sys.exit(DONE)
    return config


# -- flags, through tyro ---------------------------------------------------------------------------


def _read_flags(default: Config, arguments: list[str], flags: Json, usage: str) -> Config:
    """Read `arguments`, flags that are known, over `default`; ValueError for a wrong value."""
    if not arguments:
        return default
    import tyro

    if "--help" in arguments or "-h" in arguments:
        documentation = getattr(sys.modules.get("__main__"), "__doc__", None) or ""
        description = f"{documentation.strip()}\n\n{usage}".strip()
        tyro.cli(type(_view(default, hide=True)), args=["--help"], description=description)
    view = type(_view(default, hide=False))
    with contextlib.redirect_stderr(io.StringIO()):  # tyro's message is a box of many lines
        try:
            return _restored(tyro.cli(view, args=arguments), default)
        except SystemExit:
            for flag, values in _by_flag(arguments):
                try:
                    tyro.cli(view, args=[flag, *values] if flag else values)
                except SystemExit:
                    raise ValueError(_wrong_value(flag, values, flags)) from None
            raise


def _view(config: Any, *, hide: bool) -> Any:
    """Return `config` as an instance of a subclass that tyro reads.

    It has no checks, whose messages tyro would print in a box of its own; inline groups have no
    level of their own; with `hide`, hidden options are left out.
    """
    from tyro.conf import Suppress, arg

    fields = []
    for field, hint, option in fields_of(type(config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = _view(value, hide=hide)
            hint = type(value)
        if option.inline or option.name:
            hint = typing.Annotated[hint, arg(name=option.name.replace("_", "-"))]
        if option.hidden and hide:
            hint = Suppress[hint]
        fields.append((field.name, hint, dataclasses.field(default=value)))
    view = dataclasses.make_dataclass(
        type(config).__name__, fields, bases=(type(config),), frozen=True, kw_only=True,
        namespace={"__post_init__": lambda self: None, "__doc__": type(config).__doc__},
    )  # fmt: skip
    return view()


def _restored(view: Any, config: Config) -> Config:
    """Return what a view of `config` holds as an instance of the class of `config`."""
    values = {}
    for field in dataclasses.fields(typing.cast(Any, config)):
        value, old = getattr(view, field.name), getattr(config, field.name)
        values[field.name] = _restored(value, old) if dataclasses.is_dataclass(old) else value
    return type(config)(**values)


def _by_flag(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the values after it, "" for values before the first flag."""
    at = 0
    while at < len(arguments):
        flag = arguments[at] if arguments[at].startswith("--") else ""
        end = at + bool(flag)
        while end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        yield flag, arguments[at + bool(flag) : end]
        at = end


def _wrong_value(flag: str, values: list[str], flags: Json) -> str:
    """Return the message for a flag whose values are not of its type."""
    if not flag:
        return f"found {' '.join(values)!r}, expected a flag before it"
    name, equals, value = flag.partition("=")
    given = " ".join([value] * bool(equals) + values)
    expected = described(flags[_positive(name.replace("_", "-"), flags)])
    return f"{name}: found {f'{given!r}' if given else 'nothing after it'}, expected {expected}"


def _require_known(arguments: Iterable[str], flags: Mapping[str, Any]) -> None:
    """Raise ValueError for the first flag that there is not."""
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        # words with spaces are values: options to pass on, such as "--prior-steps 2 --seed 1"
        if not flag.startswith("--") or flag in ("--help", "--") or " " in flag:
            continue
        if _positive(flag, flags) not in flags:
            known = [*flags, *sorted({"--config", "--preset", DRY_RUN} - {*flags})]
            raise ValueError(f"unknown flag {flag}{nearest(flag, known)}")


def _positive(flag: str, flags: Iterable[str]) -> str:
    """Return the flag of the field that `flag`, such as --train.no-compile, switches off."""
    group, dot, last = flag.removeprefix("--").rpartition(".")
    return flag if flag in flags else f"--{group}{dot}{last.removeprefix('no-')}"


def _join_values(arguments: list[str]) -> list[str]:
    """Join values that look like flags, such as "--prior-steps 2 --seed 1", to the flag before."""
    joined: list[str] = []
    for argument in arguments:
        if joined and argument.startswith("--") and " " in argument.split("=")[0]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


# -- files that hold differences -------------------------------------------------------------------


def _take_files(arguments: list[str], presets: Path | None) -> list[Path]:
    """Remove --config and --preset with their values from `arguments` and return the files they
    name."""
    files: list[Path] = []
    while True:
        at = next(
            (i for i, a in enumerate(arguments) if a.split("=")[0] in ("--config", "--preset")),
            None,
        )
        if at is None:
            return files
        flag, equals, value = arguments.pop(at).partition("=")
        if not equals:
            if at >= len(arguments):
                raise ValueError(f"{flag}: found nothing after it, expected a value")
            value = arguments.pop(at)
        files.append(Path(value) if flag == "--config" else _preset_path(value, presets))


def _preset_path(name: str, presets: Path | None) -> Path:
    names = [path.stem for path in sorted(presets.glob("*.yaml"))] if presets else []
    if presets is None or name not in names:
        raise ValueError(
            f"preset: found {name!r}, expected one of {', '.join(names) or 'none: there are none'}"
        )
    return presets / f"{name}.yaml"


def _require_sizes(config: Any, preset: Path) -> None:
    """Refuse a preset that states the sizes of other choices than the one chosen: the defaults, of
    a toy, would be trained in their place."""
    stated = read_yaml(preset).keys()
    for name, field in options_of(type(config)).items():
        chosen = option_values(config)[name]
        group = dict(zip(choices_of(field.hint), field.option.groups, strict=False)).get(chosen)
        if group is None or group in stated or not stated & {*field.option.groups}:
            continue
        others = {path.stem: read_yaml(path) for path in sorted(preset.parent.glob("*.yaml"))}
        right = [
            stem for stem, content in others.items()
            if group in content and content.get(name, chosen) == chosen
        ]  # fmt: skip
        family = [stem for stem in right if stem.startswith(f"{preset.stem}_")]
        raise ValueError(
            f"preset: found {preset.stem}, which has no sizes for {flag_of(name)} {chosen}; "
            f"expected --preset {' or '.join(family or right)}"
        )


# -- checks that several scripts share -------------------------------------------------------------


def require_lasting(name: str, path: str, *, or_url: str = ", or a URL") -> None:
    """Refuse a relative local path for what a script writes, where that script is a Ray job's.

    A job's working directory is a copy of the submitter's, which is deleted with the job. or_url:
    what else the message offers.
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


def require_at_least(config: Any, **least: float) -> None:
    """Refuse a number that is less than `least` says for its field, by the name of its flag."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:  # nor NaN
            raise ValueError(
                f"{flag_of(name)}: found {getattr(config, name)}, expected {bound} or more"
            )
