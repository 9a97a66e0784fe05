"""Folders in diffusers' layout: config.json, which names a class and its options, and weights."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from models.weights import CONFIG_NAME, JsonObject, read_safetensors, save_weights

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class DiffusersModel:
    """A model's folder as it was read: its options, and the tensors not yet converted."""

    def __init__(self, folder: Path, class_name: str) -> None:
        """Read `folder`; ValueError for another class than `class_name`, or none."""
        self.folder = folder
        try:
            self.config: JsonObject = json.loads((folder / CONFIG_NAME).read_text())
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: found no configuration of {class_name}: {error}") from None
        name = self.config.get("_class_name")
        if name != class_name:
            raise ValueError(f"{folder}: found a {name}, expected a folder of {class_name}")
        path = folder / WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(f"{path}: found no such file, expected the weights of {class_name}")
        self.tensors = read_safetensors(path)

    def option(self, name: str) -> Any:
        """Return an option that config.json must have; ValueError if it is missing."""
        if name not in self.config:
            raise ValueError(f"{self.folder}: {name}: found none in config.json, expected it")
        return self.config[name]

    def require(self, expected: dict[str, object], **defaults: object) -> None:
        """Raise ValueError for an option with another value than expected.

        defaults: what diffusers takes for an option that config.json omits; others are as expected.
        """
        for name, value in expected.items():
            actual = self.config.get(name, defaults.get(name, value))
            if actual != value:
                raise ValueError(f"{self.folder}: {name}: found {actual!r}, expected {value!r}")

    def take(self, name: str) -> Tensor:
        """Remove and return a tensor; ValueError if it is missing."""
        if name not in self.tensors:
            raise ValueError(f"{self.folder}: tensor {name}: found none, expected it")
        return self.tensors.pop(name)

    def require_empty(self) -> None:
        """Raise ValueError for tensors that were not taken."""
        if self.tensors:
            names = ", ".join(sorted(self.tensors))
            raise ValueError(f"{self.folder}: found tensors without a place: {names}")


def write_folder(folder: Path, config: JsonObject, tensors: dict[str, Tensor]) -> None:
    """Write a model that diffusers can load; `config` names its class."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS_NAME, tensors)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def require_convertible(
    folder: Path, class_name: str, options: dict[str, tuple[object, object]]
) -> None:
    """Raise ValueError for an option of ours that diffusers' class does not have.

    options: by name, the value of our model and the only one that the class can have.
    """
    for name, (actual, expected) in options.items():
        if actual != expected:
            raise ValueError(
                f"{folder}: {name}: found {actual!r}, expected {expected!r}, which is all that "
                f"{class_name} can be"
            )
