"""Folders in diffusers' layout: config.json, which names a class and its options, and weights."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from models.weights import save_weights

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def read_folder(folder: Path, class_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options and the tensors of a model; ValueError for another class, or none."""
    try:
        told = json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: found no configuration of {class_name}: {error}") from None
    if told.get("_class_name") != class_name:
        found = told.get("_class_name")
        raise ValueError(f"{folder}: found a {found}, expected a folder of {class_name}")
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{path}: found no such file, expected the weights of {class_name}")
    return told, load_file(str(path))


def option(folder: Path, told: dict[str, Any], name: str) -> Any:
    """Return an option that a configuration must have; ValueError if it has not."""
    if name not in told:
        raise ValueError(f"{folder}: {name}: found none in config.json, expected it")
    return told[name]


def taken(folder: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Take a tensor out of those that are left; ValueError if it is not there."""
    if name not in tensors:
        raise ValueError(f"{folder}: tensor {name}: found none, expected it")
    return tensors.pop(name)


def write_folder(folder: Path, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a model that diffusers can load; `told` names its class."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS_NAME, tensors)
    (folder / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def require(folder: Path, told: dict[str, Any], wanted: dict[str, Any], **defaults: Any) -> None:
    """Raise ValueError for an option that is not as wanted.

    defaults: what diffusers takes where its configuration leaves one out; else what is wanted.
    """
    for name, value in wanted.items():
        found = told.get(name, defaults.get(name, value))
        if found != value:
            raise ValueError(f"{folder}: {name}: found {found!r}, expected {value!r}")


def require_option(folder: Path, class_name: str, name: str, found: Any, wanted: Any) -> None:
    """Raise ValueError for an option of ours that diffusers' class does not have."""
    if found != wanted:
        raise ValueError(
            f"{folder}: {name}: found {found!r}, expected {wanted!r}, which is all that "
            f"{class_name} can be"
        )


def require_used(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for tensors that found no place."""
    if tensors:
        raise ValueError(f"{folder}: found tensors without a place: {', '.join(sorted(tensors))}")
