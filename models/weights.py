"""Inference weights on disk: safetensors beside a config.json.

Beside models/convert/ the one module of `models/` that touches files.
"""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.names import CONFIG_NAME, EMA_NAME, FINAL_NAME, MODEL_NAME

__all__ = ["CONFIG_NAME", "EMA_NAME", "FINAL_NAME", "MODEL_NAME"]  # beside what is defined here

LFS_POINTER = b"version https://git-lfs"
JsonObject = dict[str, Any]  # config.json


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` to `path` as safetensors."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path)
    )


def rewrite_weights(
    source: Path, path: Path, names: set[str], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Copy the weights file `source` to `path` with other values for `names`, all fp32.

    tensors: (name, tensor with as many elements), each of `names` once; a single one is in memory
    at a time. A safetensors file is 8 bytes of little-endian length, a JSON header with each
    tensor's offsets after it, and the tensors. Raises ValueError for a tensor that is not fp32.
    """
    shutil.copyfile(source, path)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in sorted(names):
            if header.get(name, {}).get("dtype") != "F32":
                raise ValueError(
                    f"{source}: tensor {name}: found {header.get(name, {}).get('dtype', 'nothing')}"
                    ", expected F32; these weights belong to another run"
                )
        for name, tensor in tensors:
            start, stop = header[name]["data_offsets"]
            raw = tensor.detach().cpu().contiguous().float().numpy().astype("<f4").tobytes()
            assert len(raw) == stop - start, name
            file.seek(8 + size + start)
            file.write(raw)


def num_elements(path: Path) -> dict[str, int]:
    """Return the number of elements of each tensor in a weights file, reading its header only."""
    with safe_open(str(path), "pt") as file:
        return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load the safetensors `path` into `model` and return it in evaluation mode.

    Raises ValueError naming the first tensor that is missing, left over or of another shape.
    """
    return load_state(model, read_safetensors(path), path)


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Load the tensors of `path` as `load_weights` does."""
    expected = model.state_dict()
    for name in sorted(state.keys() | expected.keys()):
        shapes = [list(s[name].shape) if name in s else "nothing" for s in (state, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path}: tensor {name}: found {shapes[0]}, expected {shapes[1]}; "
                "these weights belong to another configuration"
            )
    model.load_state_dict(state)
    return model.eval()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; ValueError for none, a pointer to one, or a damaged one."""
    _require_weights(path)
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path}: found no complete safetensors ({error}), expected weights; get it again"
        ) from None


def read_checkpoint(path: Path) -> JsonObject:
    """Return the tensors of a safetensors file, or of a pickled one, by name.

    Of a checkpoint of open_clip's training its `state_dict`, without the prefix `module.` of
    torch's DistributedDataParallel. The unpickler builds nothing but tensors and plain values.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    _require_weights(path)
    with path.open("rb") as file:
        state = _unpickled(file, path)
    state = state.get("state_dict", state)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: found more than tensors, expected weights or a state_dict")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _require_weights(path: Path) -> None:
    """Raise ValueError for no file, or for the pointer that Git LFS leaves in the place of one."""
    if not path.is_file():
        raise ValueError(f"{path}: found no weights file, expected one")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path}: found a pointer of Git LFS, expected the weights themselves; fetch them "
                "with: git lfs pull"
            )


def load_tensors(path: str, sha256: str) -> JsonObject:
    """Return the tensors of a pickled file; ValueError for another digest, or for more than
    tensors.

    The file is read once, so the loaded bytes are the verified ones. The unpickler builds nothing
    but tensors.
    """
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: found sha256 {found}, expected {sha256}; get it again")
    return _unpickled(io.BytesIO(content), path)


def _unpickled(file: IO[bytes], path: Path | str) -> JsonObject:
    try:
        state = torch.load(  # tensors stay in memory, whatever device they were saved from
            file, lambda storage, _: storage, weights_only=True
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: found no plain tensors ({reason}), expected a file of weights"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: found a {type(state).__name__}, expected named tensors")
    return state


def save_config(folder: Path, config: JsonObject) -> None:
    """Write `config.json` atomically: the configuration to build the model from."""
    temporary = folder / f"{CONFIG_NAME}.part"
    with temporary.open("w") as file:
        file.write(json.dumps(config, indent=1, sort_keys=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / CONFIG_NAME)


def load_config(folder: Path) -> JsonObject:
    """Read `config.json` of `folder`; ValueError if there is none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{path}: found no file, expected the configuration of a trained model")
    return json.loads(path.read_text())


def exported(run: str | os.PathLike[str]) -> Path:
    """Return the step folder with a finished run's exported weights; ValueError if it is
    unfinished. A run that a URL names is copied: see models/convert/remote_runs.py."""
    from models.convert.remote_runs import fetched_run, is_remote_run

    run = fetched_run(os.fspath(run)) if is_remote_run(run) else Path(run)
    marker = run / FINAL_NAME
    if not run.is_dir():
        raise ValueError(
            f"{run}: found no such folder, expected a training run; see --help for how to train one"
        )
    if not marker.is_file():
        raise ValueError(
            f"{run}: found an unfinished run, expected {FINAL_NAME}; rerun its training to "
            "finish it"
        )
    return run / json.loads(marker.read_text())["step"]


def digest(tensors: dict[str, Tensor]) -> str:
    """Return a sha256 over names, shapes and bytes of `tensors`, in name order: the identity of
    an encoder."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
