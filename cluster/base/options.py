"""Options of a script: fields of its nested dataclasses, by their names in flags and YAML."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")
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


def fields_of(config_class: type) -> Iterator[tuple[dataclasses.Field, Any, Option]]:
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
    for field, _, option in fields_of(config_class):
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


def flag_of(name: str) -> str:
    """Return the flag of the option `name`, such as --train.num-steps."""
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
            raise ValueError(f"unknown option {name!r}{nearest(name, list(known))}")
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
    choices, kinds = choices_of(hint), typing.get_args(hint)
    if choices:
        return f"one of {', '.join(map(str, choices))}"
    if typing.get_origin(hint) is tuple:
        if kinds[-1] is Ellipsis:
            return f"any number of values, each {described(kinds[0])}"
        return f"{len(kinds)} values, each {described(kinds[0])}"
    if kinds:
        return " or ".join("null" if kind is type(None) else described(kind) for kind in kinds)
    return KINDS.get(hint, str(hint))


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the choices of a Literal, or of several; none for other types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [choices_of(kind) for kind in typing.get_args(hint)]
        return tuple(choice for part in parts for choice in part) if all(parts) else ()
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def nearest(wrong: str, known: Sequence[str]) -> str:
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
            raise ValueError(f"{where}: unknown key {name!r}{nearest(name, list(known))}")
        changes[name] = _converted(value, known[name].hint, f"{where}: {name}")
    return with_options(config, **changes)


def _converted(value: Any, hint: Any, where: str) -> Any:
    """Return a value of YAML as a field of this type holds it; ValueError where it cannot."""
    kinds, right = typing.get_args(hint), False
    if choices_of(hint):
        right = value in choices_of(hint)
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
