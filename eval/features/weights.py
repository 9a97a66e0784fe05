"""Weights of the published extractors: looked for on this machine, verified, and never fetched."""

import io
import os
import pickle
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

VARIABLE = "MINIDALLE2_WEIGHTS"


@dataclass(frozen=True, kw_only=True)
class Official:
    """A published file of weights: what it is called, where it is given out, and its sha256."""

    file: str
    address: str
    sha256: str


INCEPTION = Official(
    file="weights-inception-2015-12-05-6726825d.pth",
    address="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
DINOV2 = Official(
    file="dinov2_vitl14_pretrain.pth",
    address="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file of weights and the sha256 that it must have; official: it is the published one."""

    path: str
    sha256: str
    official: bool

    @property
    def label(self) -> str:
        """Say in a score's name what the weights are, where they are not the published ones."""
        return "" if self.official else f", weights sha256 {self.sha256[:12]}: not the official"

    def load(self) -> dict[str, Any]:
        """Return the tensors of the file; ValueError for another digest, or for more than tensors.

        It is read once, so that the bytes that were verified are the bytes that are loaded, and by
        the unpickler that builds nothing but tensors.
        """
        import torch

        content = Path(self.path).read_bytes()
        found = sha256(content).hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{self.path}: found sha256 {found}, expected {self.sha256}; get it again"
            )
        try:
            state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.path}: found no plain tensors ({reason}), expected a file of weights"
            ) from None
        if not isinstance(state, dict):
            raise ValueError(f"{self.path}: found a {type(state).__name__}, expected named tensors")
        return state


def find_weights(
    official: Official, folder: str, flag: str, file: str = "", digest: str = ""
) -> WeightsFile:
    """Return the weights to use: `official` in a folder, or another `file` of a known `digest`.

    folder: empty = the one that MINIDALLE2_WEIGHTS names. flag: what the two options for another
    file begin with, for errors. Raises ValueError where there is no file, saying where it is given
    out, and for a file without its digest. `load` verifies it.
    """
    if bool(file) != bool(digest):
        there, missing = ("weights", "sha256") if file else ("sha256", "weights")
        raise ValueError(
            f"--{flag}-{there}: found it without --{flag}-{missing}, expected both: a score is "
            "named after its weights"
        )
    if file:
        return _given(flag, file, digest.lower(), official)
    where = folder or os.environ.get(VARIABLE, "")
    path = Path(where) / official.file
    if not where or not path.is_file():
        told = f"{path}: found no such file" if where else "found neither"
        raise ValueError(
            f"weights: {told}; expected {official.file} in --weights-dir or {VARIABLE}: get it "
            f"from {official.address} (sha256 {official.sha256}); nothing is downloaded here"
        )
    return WeightsFile(path=str(path.absolute()), sha256=official.sha256, official=True)


def _given(flag: str, file: str, digest: str, official: Official) -> WeightsFile:
    if not Path(file).is_file():
        raise ValueError(f"--{flag}-weights: found no file {file}, expected one")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"--{flag}-sha256: found {digest!r}, expected 64 hex digits")
    same = digest == official.sha256
    return WeightsFile(path=str(Path(file).absolute()), sha256=digest, official=same)


def require_local_clip(clip: str) -> None:
    """Raise ValueError for an ARCHITECTURE:TAG whose weights open_clip would download.

    Runs, files and untrained encoders pass, as does what `load_clip` knows better to refuse.
    """
    architecture, _, tag = clip.partition(":")
    if Path(clip).is_dir() or not tag or tag == "random" or tag.endswith(".safetensors"):
        return
    from open_clip.pretrained import get_pretrained_cfg

    told: dict[str, Any] = get_pretrained_cfg(architecture, tag)
    hub, address = told.get("hf_hub", ""), told.get("url", "")
    if not told or (_in_hub_cache(hub) if hub else _in_clip_cache(address)):
        return
    where = " or ".join([f"https://huggingface.co/{hub}"] * bool(hub) + [address] * bool(address))
    raise ValueError(
        f"clip {clip}: found no weights of it on this machine, expected them in open_clip's cache; "
        f"get them from {where}, and name a file as {architecture}:FILE.safetensors; nothing is "
        "downloaded here"
    )


def _in_hub_cache(hub: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, file = hub.rpartition("/")
    names = (file,) if file else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)


def _in_clip_cache(address: str) -> bool:
    name = address.rpartition("/")[2]
    return bool(name) and (Path.home() / ".cache" / "clip" / name).is_file()
