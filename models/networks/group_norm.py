"""Group norm with what follows it in a U-Net: a scale and shift by sample, and SiLU.

On a GPU, on channels-last images, one Triton kernel (models/networks/group_norm_triton.py) does all
of it, where torch's own would first make the image contiguous; elsewhere torch's functions do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.transformer import without_autocast


def in_channels_last(x: Tensor) -> bool:
    """Return whether x [B, C, H, W] has its channels side by side in memory."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class FusedGroupNorm(nn.GroupNorm):
    """Map x [B, C, H, W] to f(norm(x) (1 + scale) + shift), f = SiLU or the identity.

    Keeps its input's type and memory format. Autocast would convert a bf16 image to fp32, and all
    that follows up to the next convolution: four tenths of a step's activations. Sums are in fp32,
    as in ADM's half precision.
    """

    def __init__(self, num_groups: int, num_channels: int, *, silu: bool = False) -> None:
        super().__init__(num_groups, num_channels)
        self.silu = silu

    def forward(
        self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """scale, shift: [B, C], both or neither."""
        arguments = (self.weight, self.bias, scale, shift, self.num_groups, self.eps, self.silu)
        if has_kernel(input, scale):
            return group_norm(input, *arguments)[0]
        return group_norm_by_torch(input, *arguments)


def has_kernel(x: Tensor, scale: Tensor | None) -> bool:
    """Return whether the kernel takes x [B, C, H, W] and scale [B, C], which has x's type."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    same = scale is None or scale.dtype == x.dtype
    return x.is_cuda and x.dtype in types and same and in_channels_last(x)


def group_norm_by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    num_groups: int, eps: float, silu: bool,
) -> Tensor:  # fmt: skip
    """Return `FusedGroupNorm`'s result by torch's functions."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    with without_autocast(x):
        h = torch.group_norm(x, num_groups, weight, bias, eps)  # [B, C, H, W]
    if in_channels_last(x):
        h = h.contiguous(memory_format=torch.channels_last)  # on GPUs it is not
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]  # [B, C, H, W]
    return F.silu(h) if silu else h


# -- the kernel as an operator of torch ------------------------------------------------------------


@torch.library.custom_op("minidalle2::group_norm", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `FusedGroupNorm`'s result by the kernel, and float32 [2, B, G]: mean and
    1 / standard deviation."""
    from models.networks import group_norm_triton  # triton comes with torch for GPUs alone

    with torch.cuda.device_of(x):
        return group_norm_triton.forward(
            _channels_last(x), weight, bias, _rows(scale), _rows(shift), num_groups, eps, silu
        )


@torch.library.custom_op("minidalle2::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, moments: Tensor, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of x, and float32 [2, B, C]: sums over cells of dz and of dz times the
    normalised x, where z is SiLU's input."""
    from models.networks import group_norm_triton

    with torch.cuda.device_of(x):
        return group_norm_triton.backward(
            _channels_last(dy), _channels_last(x), weight, bias, _rows(scale), _rows(shift),
            moments, silu,
        )  # fmt: skip


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor | None) -> Tensor | None:
    """Return x [B, C] with each row's values side by side."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


@group_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    num_groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    moments = x.new_empty(2, len(x), num_groups, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), moments


@group_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, moments: Tensor, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.silu = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift, moments = ctx.saved_tensors
    dx, (dz, dz_x) = group_norm_backward(
        dy, x, weight, bias, scale, shift, moments, ctx.silu
    )  # dz, dz_x: [B, C]
    dscale = dshift = None
    if scale is not None:
        dshift, dscale = dz.to(scale.dtype), (dz * bias + dz_x * weight).to(scale.dtype)
        dz, dz_x = (each * (1 + scale.float()) for each in (dz, dz_x))  # [B, C] each
    dweight, dbias = dz_x.sum(0).to(weight.dtype), dz.sum(0).to(bias.dtype)
    return dx, dweight, dbias, dscale, dshift, None, None, None


group_norm.register_autograd(_gradients, setup_context=_setup_context)
