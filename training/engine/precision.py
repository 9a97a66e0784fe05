"""In which numbers a network computes, where the user leaves that to the device."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "fp32"]
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # as torch names what x86 and ARM processors have


def device_of_run(choice: Literal["auto", "cpu", "cuda"]) -> "torch.device":
    """Return the device that this process trains on, by `train.device`."""
    import torch

    if choice != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def native_bf16(device_type: str) -> bool:
    """Say whether this process's device computes in bfloat16; device_type: "cuda" or "cpu".

    GPUs do from NVIDIA's Ampere on, and processors with instructions of their own. On others it is
    emulated: a CPU without them took 20 to 60 times as long as in fp32.
    """
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in CPU_BF16)


def settled(precision: Precision, device_type: str) -> Literal["bf16", "fp32"]:
    """Return what "auto" comes to on a device: bf16 where it is native; others as they are."""
    if precision == "auto":
        return "bf16" if native_bf16(device_type) else "fp32"
    return precision


def autocast(device_type: str, precision: Precision) -> AbstractContextManager:
    """Return the block in which networks of fp32 weights compute in that precision."""
    import torch

    enabled = settled(precision, device_type) == "bf16"
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


def compute_whole_fp32() -> None:
    """Compute convolutions in fp32 on a GPU with all 23 bits; torch's default is TF32, with 10."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
