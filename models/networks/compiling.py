"""Compilation in parts: the functions of a model that are one graph each.

Compiled as a whole, a U-Net of 28 levels is one graph of ten thousand nodes: minutes before the
first step, and no gradient until the end of the backward pass. In parts, levels and blocks of equal
shapes share a graph, and a level's gradients can be reduced while the level before it computes.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Method = TypeVar("Method", bound=Callable)

MAX_SHAPES = 256  # graphs of one function: `UNet`'s levels have up to 28 shapes, torch allows 8


def compiled(*, dynamic: bool | None) -> Callable[[Method], Method]:
    """Mark a module's method as one graph where its model is compiled.

    dynamic: False for a graph for each shape; None for one with lengths that vary, from the second
    shape on.
    """

    def mark(method: Method) -> Method:
        method.compiled_dynamic = dynamic  # pyright: ignore[reportFunctionMemberAccess]
        return method

    return mark


def compile_parts(model: nn.Module) -> None:
    """Compile the marked methods of a model and its modules, in place.

    Names in the state dict stay. A break of a graph, or more shapes than `MAX_SHAPES`, is an error
    in the first call that meets it.
    """
    torch.compiler.config.recompile_limit = MAX_SHAPES
    for module in model.modules():
        for name in dir(type(module)):
            method = getattr(type(module), name)
            if not hasattr(method, "compiled_dynamic"):
                continue
            bound, dynamic = getattr(module, name), method.compiled_dynamic
            setattr(module, name, torch.compile(bound, dynamic=dynamic, fullgraph=True))
