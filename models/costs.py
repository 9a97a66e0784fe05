"""What a model costs, counted at its own sizes on the meta device: parameters, multiplications, and
the bytes of its training state and of a training step.

A meta tensor has a size and no memory, so a network of any size runs forward and backward in
seconds on any machine.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from models.clip import ImageTower, is_clip, model_sizes
from models.decoder import Condition, Decoder
from models.priors.autoregressive import AutoregressivePrior
from models.priors.base import PriorText
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.upsampler import Upsampler

CAPTION_TOKENS = 16  # of web captions: 15.5 is the mean of LAION's
FLOPS_PER_MAC = 6  # two in the forward pass, four in the backward

# Bytes of a parameter in fp32
WEIGHT, GRAD, MOMENTS, EMA = 4, 4, 8, 4


# -- parameters and training state -----------------------------------------------------------------


def num_parameters(model: nn.Module) -> int:
    """Count trained parameters; works on the meta device."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def state_bytes(
    model: nn.Module, zero_stage: int = 0, world_size: int = 1, *, offload: bool = False
) -> int:
    """Return the bytes of fp32 weights, gradients, moments and EMA on each worker's device.

    Activations, and with `offload` what `offloaded_bytes` counts, are not included. ZeRO
    (Rajbhandari et al. 2020) partitions moments and EMA in stage 1, gradients as well in stage 2,
    weights as well in stage 3. Stages 1 and 2 keep flat copies of the rank's part of the weights,
    its masters, and of its gradients; elsewhere the fp32 weights are their own masters. The layers
    that stage 3 has gathered, and the small parameters that it does not partition, come on top.
    """
    count = num_parameters(model)
    if zero_stage == 0:
        return count * (WEIGHT + GRAD + MOMENTS) + count * EMA // world_size
    if offload:
        return count * WEIGHT // (world_size if zero_stage == 3 else 1)
    if zero_stage == 3:
        return count * (WEIGHT + GRAD + MOMENTS + EMA) // world_size
    flat_copies = WEIGHT + GRAD
    if zero_stage == 2:
        return count * WEIGHT + count * (GRAD + MOMENTS + EMA + flat_copies) // world_size
    return count * (WEIGHT + GRAD) + count * (MOMENTS + EMA + flat_copies) // world_size


def offloaded_bytes(model: nn.Module, world_size: int = 1) -> int:
    """Return the bytes each worker keeps on the CPU under optimizer offload: fp32 master weights,
    gradients, moments and EMA."""
    return num_parameters(model) * (WEIGHT + GRAD + MOMENTS + EMA) // world_size


# -- multiplications -------------------------------------------------------------------------------


def forward_macs(forward: Callable[[], object]) -> int:
    """Count the multiply-accumulates of matrix products and convolutions in a call.

    Works on the meta device. Training costs `FLOPS_PER_MAC` FLOPs for each.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops() // 2


def training_flops(model: nn.Module, num_tokens: int = CAPTION_TOKENS) -> float:
    """Return the FLOPs of training on one sample: the model's own products and convolutions.

    Activations that checkpointing recomputes and frozen encoders are not counted: this is the
    numerator of MFU (Chowdhery et al. 2022, appendix B). num_tokens: of a caption, at most what
    the model has room for. Raises ValueError for a model of another project.
    """
    forward = forward_of(meta_copy(model).eval(), num_tokens)
    with torch.device("meta"):
        return FLOPS_PER_MAC * forward_macs(forward)


def flops_of_captions(model: nn.Module) -> Callable[[float], float]:
    """Return a function from the mean length of captions, in tokens, to the FLOPs of training on a
    sample.

    Linear through 8 and 16 tokens: at these lengths the square in attention is under 1 %.
    """
    few, many = (training_flops(model, num_tokens) for num_tokens in (8, 16))
    return lambda num_tokens: few + (many - few) * (num_tokens - 8) / 8


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` on the meta device, without memory and gradients."""
    # deepcopy finds every tensor in its memo, as one of the same shape on the meta device
    tensors = (*model.parameters(), *model.buffers())
    memo = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    return copy.deepcopy(model, memo)


def forward_of(
    model: nn.Module, num_tokens: int = CAPTION_TOKENS, batch: int = 1
) -> Callable[[], object]:
    """Return a function without arguments that runs `model`, which is on the meta device, forward.

    It runs on `batch` samples whose captions have `num_tokens` tokens, or as many as the model has
    room for. Raises ValueError for a model of another project.
    """
    with torch.device("meta"):
        t = torch.zeros(batch, dtype=torch.long)  # [B]
        keep = t.bool()

        if is_clip(model):
            size, context_length = model_sizes(model)
            image = torch.zeros(batch, 3, size, size)
            tower = cast(nn.Module, model.visual)
            if isinstance(tower, ImageTower):  # whose features are computed once
                image = torch.zeros(batch, tower.proj.in_features)
            tokens = torch.zeros(batch, context_length, dtype=torch.long)
            return lambda: (model.encode_image(image), model.encode_text(tokens))

        if isinstance(model, Upsampler):
            side = model.crop_size
            x_t = torch.zeros(batch, 3, side, side)
            low_res = torch.zeros(batch, 3, side // model.factor, side // model.factor)
            return lambda: model(x_t, t, low_res)

        if isinstance(model, Decoder):
            width = 0 if model.text_in is None else model.text_in.in_features
            text, token_mask = _caption(model.config.text_tokens, width, num_tokens, batch)
            embed = torch.zeros(batch, len(model.null_image_embed))
            image_embed = embed
            if model.config.image_tokens > 1:
                image_embed = torch.zeros(batch, 1 + model.config.image_tokens, embed.shape[1])
            condition = Condition(
                image_embed=image_embed, text_embed=embed, token_mask=token_mask,
                tokens=text, text_states=text,
            )  # fmt: skip
            x_t = torch.zeros(batch, 3, model.image_size, model.image_size)
            return lambda: model(x_t, t, condition, keep, keep)

        if isinstance(model, AutoregressivePrior):
            width = model.pool.kv.in_features
            text, token_mask = _caption(model.config.text_tokens, width, num_tokens, batch)
            codes = torch.zeros(batch, model.config.num_codes, dtype=torch.long)
            prior_text = PriorText(
                text_embed=torch.zeros(batch, model.embed_dim), text=text, token_mask=token_mask
            )
            return lambda: model(prior_text, t, codes, keep)

        if isinstance(model, DiffusionPrior | RegressionPrior):
            # the positions of a regression prior are the caption's, z_t and the query
            num_extra = model.num_extra if isinstance(model, DiffusionPrior) else 2
            num_tokens = min(num_tokens, model.position.shape[1] - num_extra)
            width = 0 if model.text_in.states is None else model.text_in.states.in_features
            text, token_mask = _caption(model.config.text_tokens, width, num_tokens, batch)
            embed = torch.zeros(batch, model.embed_dim)
            prior_text = PriorText(text_embed=embed, text=text, token_mask=token_mask)
            if isinstance(model, RegressionPrior):
                return lambda: model(prior_text)
            x_t = embed
            if model.num_drawn > 1:
                x_t = torch.zeros(batch, model.num_drawn, model.embed_dim)
            return lambda: model(x_t, t, prior_text, keep)

    raise ValueError(f"costs: found a {type(model).__name__}, expected a model of this project")


def _caption(own_tokens: int, width: int, num_tokens: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return a caption's own tokens int64 [B, L] or CLIP's states [B, L, width], and its mask."""
    if own_tokens:
        tokens = torch.ones(batch, min(num_tokens, own_tokens), dtype=torch.long)
        return tokens, tokens > 0
    states = torch.zeros(batch, num_tokens, width)
    return states, torch.ones(batch, num_tokens, dtype=torch.bool)


# -- activations -----------------------------------------------------------------------------------

# The functions that CUDA's autocast computes in bf16 and in fp32 (torch's documentation, "Autocast
# Op Reference"), as far as the networks here call them; others follow the widest of their inputs.
_BF16 = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__}
_FP32 = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.exp,
    torch.Tensor.exp, torch.Tensor.pow, torch.Tensor.sum, torch.Tensor.norm, F.mse_loss,
    F.cross_entropy,
}  # fmt: skip
_IS_CUDA = inspect.getattr_static(Tensor, "is_cuda").__get__


def peak_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the most bytes that a forward and backward pass hold beside weights and gradients.

    model: on the meta device, in fp32, in training mode; forward: calls it on a batch and returns
    a tensor or several. Counts activations, autocast's bf16 copies of weights and temporary
    gradients, as on a GPU under bf16 autocast with fused attention. A kernel's workspace and the
    allocator's unused memory are not counted.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    held = (*model.parameters(), *model.buffers(), *(p.grad for p in parameters))
    known = {x.untyped_storage()._cdata for x in held if x is not None}
    with _LiveBytes(known) as counter:
        with _AsOnGpu(keep_copies=True):  # as autocast does until its block ends
            outputs = [y for y in tree_flatten(forward())[0] if isinstance(y, Tensor)]
            loss = torch.stack([y.float().mean() for y in outputs]).sum()
        with _AsOnGpu(keep_copies=False):  # checkpointed blocks run again
            # `Tensor.backward` would first leave the mode
            engine = torch.autograd.Variable._execution_engine
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
    for parameter in parameters:
        parameter.grad = None
    return counter.peak


class _AsOnGpu(TorchFunctionMode):
    """Give meta tensors the types and kernels of a GPU under bf16 autocast."""

    def __init__(self, *, keep_copies: bool) -> None:
        super().__init__()
        self._copies: dict[int, Tensor] | None = {} if keep_copies else None

    def __torch_function__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return True
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head_attention(*args)
        if func in _BF16 or func in _FP32:
            cast = self._bf16 if func in _BF16 else _fp32
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)

    def _bf16(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if self._copies is None or not (x.is_leaf and x.requires_grad):
            return x.bfloat16()
        if id(x) not in self._copies:
            self._copies[id(x)] = x.bfloat16()
        return self._copies[id(x)]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: object
    ) -> Tensor:
        """Run the kernel that keeps queries, keys, values and sums of rows, and no table."""
        q, k, v = (self._bf16(x) for x in (q, k, v))
        bias = None
        if attn_mask is not None:
            bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, q.requires_grad)[0]

    def _multi_head_attention(
        self, query: Tensor, key: Tensor, value: Tensor, width: int, num_heads: int, *more
    ) -> tuple[Tensor, None]:
        """Run torch's own attention module, which calls nothing that a mode could see."""
        weight, bias, *_unused, out_weight, out_bias = more[:8]
        with self:
            x = F.linear(query, weight, bias).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (num_heads, -1)).movedim(-2, 1) for y in x)
            y = F.scaled_dot_product_attention(q, k, v).movedim(1, -2).flatten(-2)
            return F.linear(y, out_weight, out_bias), None


def _fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


class _LiveBytes(TorchDispatchMode):
    """Add up the storages that are alive, and keep the largest sum."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = known
        self._refs: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def drop(_: object) -> None:
            self._known.discard(key)
            del self._refs[key]
            self.live -= size

        self._refs[key] = weakref.ref(storage, drop)
