"""Devices by name; a module of its own, since torch takes seconds to import."""

import re

import torch


def device_named(name: str) -> torch.device:
    """Return the device called `name`: "auto" is a GPU where there is one, else the CPU.

    Raises ValueError for one that is not here.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if not re.fullmatch(r"cpu|cuda(:\d+)?", chosen):
        raise ValueError(f"device: found {name!r}, expected auto, cpu, cuda or cuda:N")
    device = torch.device(chosen)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: found {name!r} on a machine with {torch.cuda.device_count()} GPUs, expected "
            "auto, cpu or one of those"
        )
    return device
