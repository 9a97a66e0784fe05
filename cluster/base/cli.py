"""How every script reads its command line: frozen dataclasses through tyro, YAML differences,
one-line errors."""

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

Config = TypeVar("Config")
DONE, INCOMPLETE, WRONG_REQUEST = 0, 1, 2
DRY_RUN = "--dry-run"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a job
KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}

# The last word of a flag here, and what users of other projects type for it.
SYNONYMS = {
    "adam-eps": "eps",
    "batch-size": "batch bs",
    "cfg-scale": "cfg guidance guidance-scale scale",
    "checkpoint-every": "save-every save-steps save-interval",
    "decay": "scheduler lr-scheduler",
    "decoder-steps": "steps num-inference-steps sample-steps",
    "device": "accelerator gpu cuda",
    "ema-decay": "ema",
    "fresh": "overwrite force restart",
    "global-batch-size": "batch batch-size bs train-batch-size",
    "grad-clip": "clip-grad max-grad-norm gradient-clipping",
    "image-size": "resolution size",
    "images": "data dataset data-dir input",
    "embeds": "data dataset data-dir input",
    "init": "pretrained finetune checkpoint ckpt",
    "learning-rate": "lr",
    "limit": "n num-samples max-samples",
    "micro-batch-size": "grad-accum accumulate gradient-accumulation-steps",
    "num-steps": "steps iters iterations max-steps max-iters epochs num-epochs",
    "num-threads": "threads cpus",
    "num-workers": "workers gpus num-gpus nproc world-size",
    "num-actors": "workers",
    "num-processes": "workers",
    "out": "output output-dir out-dir",
    "precision": "bf16 fp16 fp32 amp dtype mixed-precision",
    "prompts": "prompt caption text",
    "report-every": "log-every log-interval",
    "run": "out output output-dir out-dir resume logdir checkpoint ckpt",
    "urls": "data dataset input",
    "warmup": "warmup-steps",
    "weight-decay": "wd",
    "zero-stage": "zero",
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a field beside its type and default: `Annotated[int, Option(hidden=True)]`.

    hidden: its flags work, but --help leaves them out; may_change: another launch of the same run
    may have another value; name: in flags and YAML, where that is not the field's own; inline: a
    group whose fields are named as if the class that holds it had them; groups: of a field with
    choices, the group of options that each choice uses. A group's hidden and may_change hold for
    all of its fields.
    """

    hidden: bool = False
    may_change: bool = False
    name: str = ""
    inline: bool = False
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionField:
    """Where an option is kept: the attributes that lead to it, its type, what is known of it."""

    path: tuple[str, ...]
    hint: Any
    option: Option


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
    flags = {_flag(name): field.hint for name, field in options_of(config_class).items()}
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


def _read_flags(default: Config, arguments: list[str], flags: dict[str, Any], usage: str) -> Config:
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
    for field, hint, option in _fields(type(config)):
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


def _wrong_value(flag: str, values: list[str], flags: dict[str, Any]) -> str:
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
            raise ValueError(f"unknown flag {flag}{_nearest(flag, known)}")


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


def _nearest(wrong: str, known: Sequence[str]) -> str:
    """Return a hint for a wrong flag or key: by its last word, by meaning, by spelling."""
    names = {name: name.removeprefix("--").rpartition(".")[2].replace("_", "-") for name in known}
    last = wrong.removeprefix("--").rpartition(".")[2].replace("_", "-").removeprefix("no-")
    meant = [name for name, others in SYNONYMS.items() if last in others.split()]
    for wanted in (last, *meant):
        close = [name for name in known if names[name] == wanted]
        if close:
            return f"; did you mean {' or '.join(close[:3])}?"
    plain = wrong.replace("--no-", "--", 1)
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    words = difflib.get_close_matches(last, names.values(), n=1, cutoff=0.6)
    close = close or [name for name in known if names[name] in words]
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


# -- options and their fields ----------------------------------------------------------------------


def _fields(config_class: type) -> Iterator[tuple[dataclasses.Field, Any, Option]]:
    """Yield each field with its type, and what is known of it."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        extras = getattr(hint, "__metadata__", ())
        yield field, hint, next((e for e in extras if isinstance(e, Option)), Option())


@functools.cache
def options_of(config_class: type) -> dict[str, OptionField]:
    """Return the options of a nested dataclass by their names in YAML, such as train.num_steps."""
    found: dict[str, OptionField] = {}
    plain = typing.get_type_hints(config_class)
    for field, _, option in _fields(config_class):
        hint, name = plain[field.name], option.name or field.name
        if not dataclasses.is_dataclass(hint):
            found[name] = OptionField((field.name,), hint, option)
            continue
        for inner, its in options_of(typing.cast(type, hint)).items():
            known = dataclasses.replace(
                its.option,
                hidden=its.option.hidden or option.hidden,
                may_change=its.option.may_change or option.may_change,
            )
            path = (field.name, *its.path)
            found[inner if option.inline else f"{name}.{inner}"] = OptionField(
                path, its.hint, known
            )
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def with_options(config: Config, **options: Any) -> Config:
    """Return `config` with other values of some options, by their names in YAML.

    with_options(TrainConfig(), num_steps=3, learning_rate=1e-4)
    with_options(PriorRunConfig(), **{"train.num_steps": 3}, run="runs/other")
    """
    known = options_of(type(config))
    changes: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"unknown option {name!r}{_nearest(name, list(known))}")
        *groups, last = known[name].path
        place = changes
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return _replaced(config, changes)


def _replaced(config: Config, changes: dict[str, Any]) -> Config:
    values = {
        name: _replaced(getattr(config, name), value)
        if isinstance(value, dict) and dataclasses.is_dataclass(getattr(config, name))
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(typing.cast(Any, config), **values)


def option_values(config: Any) -> dict[str, Any]:
    """Return the value of each option by its name in YAML."""
    return {
        name: functools.reduce(getattr, field.path, config)
        for name, field in options_of(type(config)).items()
    }


def described(hint: Any) -> str:
    """Say what a field of this type may hold."""
    choices, kinds = _choices(hint), typing.get_args(hint)
    if choices:
        return f"one of {', '.join(map(str, choices))}"
    if typing.get_origin(hint) is tuple:
        if kinds[-1] is Ellipsis:
            return f"any number of values, each {described(kinds[0])}"
        return f"{len(kinds)} values, each {described(kinds[0])}"
    if kinds:
        return " or ".join("null" if kind is type(None) else described(kind) for kind in kinds)
    return KINDS.get(hint, str(hint))


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the choices of a Literal, or of several; none for other types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_choices(kind) for kind in typing.get_args(hint)]
        return tuple(choice for part in parts for choice in part) if all(parts) else ()
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


# -- YAML ------------------------------------------------------------------------------------------


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


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def merged(config: Config, differences: dict, where: str) -> Config:
    """Return `config` with the nested `differences` applied; ValueError names an unknown key's
    nearest, and a value of another type."""
    known = options_of(type(config))
    changes = {}
    for name, value in flattened(differences).items():
        if any(option.startswith(f"{name}.") for option in known):
            raise ValueError(f"{where}: {name}: found {value!r}, expected a mapping of fields")
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r}{_nearest(name, list(known))}")
        changes[name] = _converted(value, known[name].hint, f"{where}: {name}")
    return with_options(config, **changes)


def _converted(value: Any, hint: Any, where: str) -> Any:
    """Return a value of YAML as a field of this type holds it; ValueError where it cannot."""
    kinds, right = typing.get_args(hint), False
    if _choices(hint):
        right = value in _choices(hint)
    elif typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        each = [kinds[0]] * len(items) if kinds[-1] is Ellipsis else list(kinds)
        if len(each) == len(items):
            return tuple(_converted(*pair, where) for pair in zip(items, each, strict=True))
    elif kinds:  # a type, or None
        if value is None:
            return None
        return _converted(value, next(kind for kind in kinds if kind is not type(None)), where)
    elif hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    else:
        right = type(value) is hint
    if not right:
        raise ValueError(f"{where}: found {value!r}, expected {described(hint)}")
    return value


def to_yaml(config: Any) -> str:
    """Return `config` as YAML that `merged` reads back."""
    import yaml

    nested: dict[str, Any] = {}
    for name, value in option_values(config).items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = _plain(value)
    return yaml.safe_dump(nested, sort_keys=False)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


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
        group = dict(zip(_choices(field.hint), field.option.groups, strict=False)).get(chosen)
        if group is None or group in stated or not stated & {*field.option.groups}:
            continue
        others = {path.stem: read_yaml(path) for path in sorted(preset.parent.glob("*.yaml"))}
        right = [
            stem for stem, content in others.items()
            if group in content and content.get(name, chosen) == chosen
        ]  # fmt: skip
        family = [stem for stem in right if stem.startswith(f"{preset.stem}_")]
        raise ValueError(
            f"preset: found {preset.stem}, which has no sizes for {_flag(name)} {chosen}; expected "
            f"--preset {' or '.join(family or right)}"
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
                f"{_flag(name)}: found {getattr(config, name)}, expected {bound} or more"
            )
