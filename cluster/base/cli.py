"""How every script reads its command line: frozen dataclasses through tyro, YAML differences,
one-line errors."""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cluster.base.options import (
    Config,
    DataclassInstance,
    Option,
    OptionField,
    choices_of,
    described,
    fields_of,
    flag_of,
    flattened,
    is_group,
    merged,
    nearest,
    option_values,
    options_of,
    read_yaml,
    to_yaml,
    with_options,
)

__all__ = [
    "DONE", "DRY_RUN", "HELP_ALL", "INCOMPLETE", "JOB_VARIABLE", "STOPPED_ON_REQUEST",
    "WRONG_REQUEST", "Option", "flattened", "merged", "options_of", "parse", "read_yaml",
    "require_at_least", "require_lasting", "require_local", "run_script", "to_yaml", "with_options",
]  # fmt: skip

DONE, INCOMPLETE, WRONG_REQUEST = 0, 1, 2
STOPPED_ON_REQUEST = "stopped on request"  # in the last line of a run that ends incomplete by it
DRY_RUN, HELP_ALL = "--dry-run", "--help-all"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a job

# -- scripts ---------------------------------------------------------------------------------------


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code.

    A user's mistake is one line on stderr and exit code 2; a training that diverged, a full disk or
    a lost connection are one line and 1.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # Threads that spin while they wait for each other keep a core from whoever else has work: ten
    # times as long for a step, where libgomp's 300,000 turns gain nothing (benchmarks/results.md)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
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
    prints the merged configuration, after `check` had no objection, and exits; so does --help, and
    --help-all, which lists hidden flags as well. Raises ValueError for an unknown flag, key or
    preset, naming the nearest, and for a value that the class refuses.
    """
    flags = {flag_of(name): field for name, field in options_of(config_class).items()}
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--config", "--preset"):
        ours.add_argument(flag, dest="files", action="append", type=lambda v, f=flag: (f, v))
    ours.add_argument("--help", "-h", action="store_true")
    ours.add_argument(HELP_ALL, action="store_true")
    if DRY_RUN not in flags:
        ours.add_argument(DRY_RUN, action="store_true")
    try:
        asked, arguments = ours.parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").partition("/")[0]
        raise ValueError(f"{name}: found nothing after it, expected a value") from None
    files = [
        Path(value).expanduser() if flag == "--config" else _preset_path(value, presets)
        for flag, value in asked.files or ()
    ]
    config = config_class()
    for path in files:
        config = merged(config, read_yaml(path), str(path))
    if asked.help or asked.help_all:
        _print_help(config, presets, everything=asked.help_all)
    config = _with_flags(config, _by_flag(arguments, flags), flags)
    for path in files:
        if path.parent == presets:
            _require_sizes(config, path)
    if DRY_RUN not in flags and asked.dry_run:
        if check is not None:
            check(config)
        print(to_yaml(config), end="")
        sys.exit(DONE)
    return config


# -- flags, through tyro ---------------------------------------------------------------------------

Given = tuple[str, list[str]]  # a flag and its values; "" for values that stand before any flag


def _by_flag(arguments: list[str], flags: dict[str, OptionField]) -> list[Given]:
    """Return each flag as it was given with its values; ValueError for one that there is not."""
    given: list[Given] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or " " in flag:  # such as "--prior-steps 2", to pass on
            given = given or [("", [])]
            given[-1][1].append(argument)
            continue
        if _positive(flag, flags) not in flags:
            known = [*flags, *sorted({"--config", "--preset", DRY_RUN} - {*flags})]
            raise ValueError(f"unknown flag {flag}{nearest(flag, known)}")
        given.append((flag, [value] if equals else []))
    # Text that UTF-8 can hold; ~ where no shell has replaced it, as after "="
    for i, (flag, values) in enumerate(given):
        for value in values:
            if value != value.encode("utf-8", "replace").decode():
                raise ValueError(f"{flag}: found {value!a}, bytes that are not UTF-8")
        home = [os.path.expanduser(v) if v.startswith("~/") else v for v in values]
        given[i] = flag, home
    # A choice of yes, no and None reads as a switch, too
    for i, (flag, values) in enumerate(given):
        switch = _positive(flag, flags)
        if flag and not values and flags[switch].hint == bool | None:
            given[i] = switch, [str(switch == flag.replace("_", "-"))]
    return given


def _positive(flag: str, flags: dict[str, OptionField]) -> str:
    """Return the flag of the field that `flag` sets, or, such as --train.no-compile, switches
    off."""
    flag = flag.replace("_", "-")
    group, dot, last = flag.removeprefix("--").rpartition(".")
    return flag if flag in flags else f"--{group}{dot}{last.removeprefix('no-')}"


def _with_flags(config: Config, given: list[Given], flags: dict[str, OptionField]) -> Config:
    """Return `config` with the values of flags; ValueError for a wrong one."""
    if not given:
        return config
    import tyro

    def parsed(some: list[Given]) -> DataclassInstance | None:
        arguments = []
        for flag, values in some:
            if flag and len(values) == 1 and values[0].startswith("-"):
                arguments.append(f"{flag}={values[0]}")
            else:
                arguments += [flag, *values] if flag else values
        # tyro's message is a box of many lines
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
            return tyro.cli(view, args=arguments)
        return None

    view = type(_view(config))
    result = parsed(given)
    if result is not None:
        return _restored(result, config)
    flag, values = next((pair for pair in given if parsed([pair]) is None), given[-1])
    text = repr(" ".join(values)) if values else "nothing after it"
    if not flag:
        raise ValueError(f"found {text}, expected a flag before it")
    expected = described(flags[_positive(flag, flags)].hint)
    raise ValueError(f"{flag}: found {text}, expected {expected}")


def _print_help(config: DataclassInstance, presets: Path | None, *, everything: bool) -> NoReturn:
    """Print what the script does and its flags, with their defaults in `config`; hidden ones only
    if `everything` is asked for."""
    import tyro

    options = options_of(type(config))
    usage = [(getattr(sys.modules.get("__main__"), "__doc__", None) or "").strip() + "\n\n"]
    if presets is not None:
        usage.append("Also: --preset NAME or --config FILE.yaml (differences from the defaults).")
    if "dry_run" not in options:
        usage.append(f"{DRY_RUN} prints the merged configuration and stops.")
    view = type(_view(config, hide=not everything))
    with contextlib.suppress(SystemExit):
        tyro.cli(view, args=["--help"], description=" ".join(usage).strip())
    num_hidden = sum(field.option.hidden for field in options.values())
    if num_hidden and not everything:
        print(f"{HELP_ALL} lists {num_hidden} more flags, which few runs need.")
    sys.exit(DONE)


def _view(config: DataclassInstance, *, hide: bool = False) -> DataclassInstance:
    """Return `config` as an instance of a subclass that tyro reads.

    It has no checks, whose messages tyro would print in a box of its own; inline groups have no
    level of their own; with `hide`, hidden options are left out.
    """
    from tyro.conf import Suppress, arg

    fields = []
    for field, hint, option in fields_of(type(config)):
        value = getattr(config, field.name)
        if is_group(value):
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


def _restored(view: object, config: Config) -> Config:
    """Return what a view of `config` holds as an instance of the class of `config`."""
    values = {}
    for field in dataclasses.fields(config):
        value, old = getattr(view, field.name), getattr(config, field.name)
        values[field.name] = _restored(value, old) if is_group(old) else value
    return type(config)(**values)


# -- presets ---------------------------------------------------------------------------------------


def _preset_path(name: str, presets: Path | None) -> Path:
    names = [path.stem for path in sorted(presets.glob("*.yaml"))] if presets else []
    if presets is None or name not in names:
        raise ValueError(
            f"preset: found {name!r}, expected one of {', '.join(names) or 'none: there are none'}"
        )
    return presets / f"{name}.yaml"


def _require_sizes(config: DataclassInstance, preset: Path) -> None:
    """Refuse a preset that states the sizes of other choices than the one chosen: the defaults, of
    a toy, would be trained in their place."""
    stated, values = read_yaml(preset).keys(), option_values(config)
    for name, field in options_of(type(config)).items():
        chosen = values[name]
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


def require_at_least(config: object, **least: float) -> None:
    """Refuse a number that is less than `least` says for its field, by the name of its flag."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:  # nor NaN
            raise ValueError(
                f"{flag_of(name)}: found {getattr(config, name)}, expected {bound} or more"
            )
