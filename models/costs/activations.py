"""What a training step holds beside its state, counted on the meta device as a GPU would hold it.

A meta tensor has a size and no memory, so a network of any size is run forward and backward in
seconds on any machine, while every storage that lives is added up.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# What CUDA's autocast computes in bf16 and in fp32 (torch's documentation, "Autocast Op
# Reference"), as far as networks here call it; all else follows the widest of its inputs.
_BF16 = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__}
_FP32 = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.exp,
    torch.Tensor.exp, torch.Tensor.pow, torch.Tensor.sum, torch.Tensor.norm, F.mse_loss,
    F.cross_entropy,
}  # fmt: skip


class _AsOnGpu(TorchFunctionMode):
    """Lets meta tensors take the types and kernels of a GPU under bf16 autocast."""

    def __init__(self, *, keep_copies: bool) -> None:
        super().__init__()
        self._copies: dict[int, Tensor] | None = {} if keep_copies else None

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend_all(*args, **kwargs)
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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask=None, **_: Any) -> Tensor:
        """Attend by the kernel that keeps queries, keys, values and sums of rows, no table."""
        q, k, v = (self._bf16(x) for x in (q, k, v))
        bias = None
        if attn_mask is not None:
            bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, q.requires_grad)[0]

    def _attend_all(self, query, key, value, width, num_heads, *more: Any, **_: Any) -> Any:
        """Attend as torch's own module does, which calls nothing that a mode could see."""
        weight, bias, *_unused, out_weight, out_bias = more[:8]
        with self:
            x = F.linear(query, weight, bias).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (num_heads, -1)).movedim(-2, 1) for y in x)
            y = F.scaled_dot_product_attention(q, k, v).movedim(1, -2).flatten(-2)
            return F.linear(y, out_weight, out_bias), None


def _fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that live, and remembers the most there ever were."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = known
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.most = max(self.most, self.live)

        def drop(_: object) -> None:
            self._seen.discard(key)
            del self._watched[key]
            self.live -= size

        self._watched[key] = weakref.ref(storage, drop)


def _backward(loss: Tensor) -> None:
    """Run the backward pass inside of a mode: `Tensor.backward` would first leave it."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)


def peak_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the most bytes that a forward and backward pass hold beside weights and gradients.

    model: on the meta device, in fp32, in training mode; forward: calls it on a batch and returns
    a tensor or several. Counts activations, autocast's bf16 copies of weights, and gradients that
    are under way, as on a GPU under bf16 autocast with fused attention; a kernel's workspace and
    what the allocator leaves unused are not counted.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    held = (*model.parameters(), *model.buffers(), *(p.grad for p in parameters))
    known = {x.untyped_storage()._cdata for x in held if x is not None}
    with _LiveBytes(known) as counter:
        with _AsOnGpu(keep_copies=True):  # as autocast does until its block ends
            out = [y for y in tree_flatten(forward())[0] if isinstance(y, Tensor)]
            loss = torch.stack([y.float().mean() for y in out]).sum()
        with _AsOnGpu(keep_copies=False):  # what is checkpointed runs again
            _backward(loss)
    for parameter in parameters:
        parameter.grad = None
    return counter.most
