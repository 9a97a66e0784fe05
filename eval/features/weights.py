"""Weights of the published extractors: found on this machine, verified, never downloaded."""

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.base.files import Json

VARIABLE = "MINIDALLE2_WEIGHTS"


@dataclass(frozen=True, kw_only=True)
class Official:
    """A published file of weights: its name, its address, and its sha256."""

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
    """A file of weights with its expected sha256. official: it is the published file."""

    path: str
    sha256: str
    official: bool

    @property
    def label(self) -> str:
        """The suffix of a score's name where the weights are not the published ones."""
        return "" if self.official else f", weights sha256 {self.sha256[:12]}: not the official"

    def load(self) -> Json:
        """Return the tensors of the file, verified: see `load_tensors`."""
        from models.weights import load_tensors  # which imports torch

        return load_tensors(self.path, self.sha256)


def find_weights(
    official: Official, folder: str, flag: str, file: str = "", digest: str = ""
) -> WeightsFile:
    """Return the published weights in `folder`, or another `file` with its sha256 `digest`.

    folder: "" = the one that $MINIDALLE2_WEIGHTS names. flag: the prefix of the two options for
    another file, for errors. Raises ValueError where there is no file, with its address, and for a
    file without its digest. `WeightsFile.load` verifies it.
    """
    if bool(file) != bool(digest):
        given, missing = ("weights", "sha256") if file else ("sha256", "weights")
        raise ValueError(
            f"--{flag}-{given}: found it without --{flag}-{missing}, expected both: a score is "
            "named after its weights"
        )
    if file:
        digest = digest.lower()
        if not Path(file).is_file():
            raise ValueError(f"--{flag}-weights: found no file {file}, expected one")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"--{flag}-sha256: found {digest!r}, expected 64 hex digits")
        same = digest == official.sha256
        return WeightsFile(path=str(Path(file).absolute()), sha256=digest, official=same)
    where = folder or os.environ.get(VARIABLE, "")
    path = Path(where) / official.file
    if not where or not path.is_file():
        problem = f"{path}: found no such file" if where else "found neither"
        raise ValueError(
            f"weights: {problem}; expected {official.file} in --weights-dir or {VARIABLE}: get it "
            f"from {official.address} (sha256 {official.sha256}); nothing is downloaded here"
        )
    return WeightsFile(path=str(path.absolute()), sha256=official.sha256, official=True)
