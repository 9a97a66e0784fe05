"""Random numbers that belong to a sample, not to a process.

Every draw is a pure function of (key of the sample, purpose, position). A batch split over 1, 2 or
64 workers, in any order, therefore sees the same timesteps, noise and conditioning drops, and a
resumed run continues the same sequence. The generator is counter-based: the splitmix64 finaliser
(Steele, Lea and Flood 2014) over key and counter, in two rounds, so that neighbouring keys and
counters are independent.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # the two multipliers of splitmix64
_MIX_2 = -7723592293110705685


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 `x` right without copying the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply the splitmix64 finaliser to int64 `x`."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def bits(keys: Tensor, purpose: str, count: int) -> Tensor:
    """Return int64 [B, count] of uniform 64-bit words for int64 `keys` [B].

    purpose: "eps", "t", "text_drop", ..., hashed to the number of a stream (FNV-1a).
    """
    stream = 0xCBF29CE484222325
    for byte in purpose.encode():
        stream = ((stream ^ byte) * 0x100000001B3) % (1 << 64)
    stream -= (1 << 64) if stream >= 1 << 63 else 0  # signed
    keyed = _mix(keys * _GOLDEN + stream)  # [B]
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    return _mix(keyed[:, None] + counter[None, :])  # [B, count]


def uniform(keys: Tensor, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Draw float32 [B, *shape] uniform in [0, 1) for int64 `keys` [B]."""
    drawn = _shift_right(bits(keys, purpose, math.prod(shape)), 40)  # 24 bits: exact in float32
    return (drawn.to(torch.float32) * 2.0**-24).reshape(len(keys), *shape)


def normal(keys: Tensor, purpose: str, shape: Sequence[int]) -> Tensor:
    """Draw float32 [B, *shape] standard normal for int64 `keys` [B] (Box and Muller 1958)."""
    count = math.prod(shape)
    drawn = bits(keys, purpose, (count + 1) // 2)
    # in (0, 1]: the log is finite
    radius = (_shift_right(drawn, 32).to(torch.float32) + 1.0) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(radius.clamp(max=1.0)))
    angle = (drawn & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    pair = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pair[:, :count].reshape(len(keys), *shape)


def step_noise(keys: Tensor, purpose: str, shape: Sequence[int]) -> Callable[[int], Tensor]:
    """Return a sampler's source of noise: from a step to float32 [B, *shape], standard normal."""
    return lambda step: normal(keys, f"{purpose}_{step}", shape)


def sample_keys(seed: int, epoch: Tensor, sample: Tensor) -> Tensor:
    """Return the int64 key [B] of each (epoch, sample) pair under `seed`; both int64 [B].

    Raises ValueError for a seed of more than 64 bits.
    """
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed: found {seed}, expected a number of 64 bits")
    return _mix(_mix(epoch * _GOLDEN + seed) + sample * _MIX_1)


def row_hashes(rows: Tensor) -> Tensor:
    """Return an int64 [B] for each row of int [B, L], the same for equal rows.

    A sum of one word for each value at each position (Zobrist 1970): two different rows share
    theirs once in 2^64.
    """
    position = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.int64) * _GOLDEN
    return _mix(_mix(rows.long() * _MIX_2) + position).sum(1)
