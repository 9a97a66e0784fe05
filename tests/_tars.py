"""Tars as their users make them, and adoptions of them in the calling process."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ingest.adopting.config import AdoptConfig

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_TAR = SHARED / "webdataset" / "cc12m-train-0000.tar"


def picture(red: int = 200, kind: str = "JPEG", size: tuple[int, int] = (40, 32)) -> bytes:
    """Return an image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (red, red * 83 % 256, red * 41 % 256)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> str:
    """Write a tar of regular members in this order; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def pairs(first: int, number: int) -> list[tuple[str, bytes]]:
    """Return the members of samples as img2dataset names them, each of another colour."""
    members = []
    for i in range(first, first + number):
        text = f'{{"url": "https://host/{i}.jpg", "score": {i / 10}}}'
        members += [(f"{i:05d}.jpg", picture(red=i)), (f"{i:05d}.txt", f"caption {i}".encode())]
        members.append((f"{i:05d}.json", text.encode()))
    return members


def write_tars(folder: Path, number: int = 3, samples: int = 4) -> str:
    """Write tars of some samples each; return the glob of them."""
    for i in range(number):
        write_tar(folder / f"{i:05d}.tar", pairs(i * samples, samples))
    return str(folder / "*.tar")


def adoption(source: str | Path, out: Path | str, **fields: Any) -> AdoptConfig:
    """Describe an adoption in the calling process."""
    return AdoptConfig(source=str(source), out=str(out), **{"num_processes": 0, **fields})
