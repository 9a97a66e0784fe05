"""Options of a script: fields of its nested dataclasses, by their names in flags and YAML."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TypeGuard, TypeVar

from cluster.base.files import Json


class DataclassInstance(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


Config = TypeVar("Config", bound=DataclassInstance)
KINDS: dict[object, str] = {
    int: "an integer", float: "a number", str: "a text", bool: "true or false",
}  # fmt: skip

SYNONYMS = Path(__file__).with_name("synonyms.yaml")  # what users of other projects type


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a field beside its type and default: `Annotated[int, Option(hidden=True)]`.

    hidden: its flags work, but --help leaves them out; may_change: another launch of the same run
    may have another value; name: in flags and YAML, where that is not the field's own; inline: a
    group whose fields are named as if the class that holds it had them; groups: of a field with
    choices, the group of options that each choice uses; least, most: of a finite number, as
    `require_bounds` checks it. A group's hidden and may_change hold for all of its fields.
    """

    hidden: bool = False
    may_change: bool = False
    name: str = ""
    inline: bool = False
    groups: tuple[str, ...] = ()
    least: float | None = None
    most: float = math.inf


@dataclass(frozen=True)
class OptionField:
    """Where an option is kept: the attributes that lead to it, its type, what is known of it."""

    path: tuple[str, ...]
    hint: object
    option: Option


def fields_of(
    config_class: type[DataclassInstance],
) -> Iterator[tuple[dataclasses.Field, object, Option]]:
    """Yield each field with its type, and what is known of it."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        extras = getattr(hint, "__metadata__", ())
        yield field, hint, next((e for e in extras if isinstance(e, Option)), Option())


@functools.cache
def options_of(config_class: type[DataclassInstance]) -> dict[str, OptionField]:
    """Return the options of a nested dataclass by their names in YAML, such as train.num_steps."""
    options: dict[str, OptionField] = {}
    plain = typing.get_type_hints(config_class)
    for field, _, option in fields_of(config_class):
        hint, name = plain[field.name], option.name or field.name
        if not dataclasses.is_dataclass(hint):
            options[name] = OptionField((field.name,), hint, option)
            continue
        for inner_name, inner in options_of(hint).items():
            merged_option = dataclasses.replace(
                inner.option,
                hidden=inner.option.hidden or option.hidden,
                may_change=inner.option.may_change or option.may_change,
            )
            options[inner_name if option.inline else f"{name}.{inner_name}"] = OptionField(
                (field.name, *inner.path), inner.hint, merged_option
            )
    return options


@functools.cache
def _bounds(config_class: type[DataclassInstance]) -> list[tuple[str, float, float]]:
    options = ((field.name, option) for field, _, option in fields_of(config_class))
    return [(name, o.least, o.most) for name, o in options if o.least is not None]


def require_bounds(config: DataclassInstance) -> None:
    """Raise ValueError for the first field whose value is outside of its option's bounds."""
    for name, least, most in _bounds(type(config)):
        value = getattr(config, name)
        if not math.isfinite(value) or not least <= value <= most:
            bounds = f"{least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
            raise ValueError(f"{name}: found {value:g}, expected {bounds}")


def is_group(value: object) -> TypeGuard[DataclassInstance]:
    """Return whether the value of a field is a group of options."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def flag_of(name: str) -> str:
    """Return the flag of the option `name`, such as --train.num-steps."""
    return f"--{name.replace('_', '-')}"


def with_options(config: Config, **options: object) -> Config:
    """Return `config` with other values of some options, by their names in YAML.

    with_options(TrainConfig(), num_steps=3, learning_rate=1e-4)
    with_options(PriorRunConfig(), **{"train.num_steps": 3}, run="runs/other")
    """
    known = options_of(type(config))
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}{nearest(name, list(known))}")
    return _replaced(config, _nested((known[name].path, options[name]) for name in options))


def _nested(values: Iterable[tuple[Sequence[str], object]]) -> Json:
    """Return nested dictionaries with each value at its path."""
    nested: Json = {}
    for path, value in values:
        place = nested
        for group in path[:-1]:
            place = place.setdefault(group, {})
        place[path[-1]] = value
    return nested


def _replaced(config: Config, changes: Json) -> Config:
    values = {}
    for name, value in changes.items():
        old = getattr(config, name)
        values[name] = _replaced(old, value) if is_group(old) else value
    return dataclasses.replace(config, **values)


def option_values(config: DataclassInstance) -> Json:
    """Return the value of each option by its name in YAML."""
    return {
        name: functools.reduce(getattr, field.path, config)
        for name, field in options_of(type(config)).items()
    }


def described(hint: object) -> str:
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


def choices_of(hint: object) -> tuple[object, ...]:
    """Return the choices of a Literal, or of several; none for other types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [choices_of(kind) for kind in typing.get_args(hint)]
        return sum(choices, ()) if all(choices) else ()
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def nearest(wrong: str, known: Sequence[str]) -> str:
    """Return a hint for a wrong flag or key: by its last word, by meaning, by spelling."""
    names = {name: name.removeprefix("--").rpartition(".")[2].replace("_", "-") for name in known}
    last = wrong.removeprefix("--").rpartition(".")[2].replace("_", "-").removeprefix("no-")
    synonyms = read_yaml(SYNONYMS)
    meant = [name for name, others in synonyms.items() if last in others.split()]
    for wanted in (last, *meant):
        close = [name for name in known if names[name] == wanted]
        if close:
            return f"; did you mean {' or '.join(close[:3])}?"
    plain = wrong.replace("--no-", "--", 1)
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    similar = difflib.get_close_matches(last, names.values(), n=1, cutoff=0.6)
    close = close or [name for name in known if names[name] in similar]
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


# -- YAML ------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict:
    """Read a YAML mapping; ValueError if it is absent or something else."""
    import yaml

    if not path.is_file():
        raise ValueError(f"{path}: found no such file, expected a YAML configuration")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: found {error}, expected YAML") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a mapping of fields")
    return content


def flattened(nested: Mapping[str, object], prefix: str = "") -> Json:
    """Return the values of nested mappings by their dotted names."""
    flat: Json = {}
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


def _converted(value: object, hint: object, where: str) -> object:
    """Return a value of YAML as a field of this type holds it; ValueError where it cannot."""
    kinds, right = typing.get_args(hint), False
    if choices_of(hint):
        right = value in choices_of(hint)
    elif typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
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


def to_yaml(config: DataclassInstance) -> str:
    """Return `config` as YAML that `merged` reads back."""
    import yaml

    values = option_values(config).items()
    return yaml.safe_dump(_nested((n.split("."), _plain(v)) for n, v in values), sort_keys=False)


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
