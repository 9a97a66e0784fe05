"""Whole steps of every kind of run, and a mode in which a step may not wait for its device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _networks import DIT
from _runs import UNET, base_run, clip_run, prior_run, up_run
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.base.cli import with_options
from models.configs import (
    AutoregressivePriorConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from training.bucket.mirror import Mirror
from training.config import RunConfig, TrainConfig
from training.engine.engines import PlainEngine
from training.loop import Task, train
from training.runs.reporting import Reporter
from training.runs.worker import compile_model
from training.tasks.clip import build_clip_task
from training.tasks.decoder import build_decoder
from training.tasks.prior import build_prior

FIRST, COUNT = 2, 3  # the steps that are watched, after some that fill caches
ATTENDING = UNetConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), head_channels=8
)
MAGNITUDE = UNetConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), head_channels=8,
    magnitude_preserving=True, dropout=0.1,
)  # fmt: skip
SMALL: Any = {"width": 16, "depth": 1, "num_heads": 2}
SETTINGS = TrainConfig.of(
    num_workers=0, num_steps=FIRST + COUNT + 1, global_batch_size=8, micro_batch_size=4,
    precision="fp32", learning_rate=1e-3, report_every=1, checkpoint_every=100, power_ema=(0.1,),
    weight_decay=0.1,
)  # fmt: skip
WHOLE = with_options(SETTINGS, micro_batch_size=0)  # of those that contrast a step's samples
Made = tuple[RunConfig, Callable[[Any], Task]]


def _prior(kind: Any, **small: Any) -> Callable[[Path, Path], Made]:
    settings = WHOLE if kind == "regression" else SETTINGS
    return lambda data, run: (prior_run(data, run, settings, prior=kind, **small), build_prior)


def _decoder(train: TrainConfig = SETTINGS, **changes: Any) -> Callable[[Path, Path], Made]:
    base = DecoderConfig(**{"unet": ATTENDING, "context_width": 8, **changes})
    return lambda data, run: (base_run(data, run, train, base=base), build_decoder)


def _upsampler(degradation: Any) -> Callable[[Path, Path], Made]:
    up = UpsamplerConfig(unet=UNET, degradation=degradation)
    return lambda data, run: (up_run(data, run, SETTINGS, up=up), build_decoder)


KINDS: dict[str, Callable[[Path, Path], Made]] = {
    "clip": lambda data, run: (clip_run(data, run, WHOLE), build_clip_task),
    "diffusion": _prior("diffusion", diffusion=DiffusionPriorConfig(**SMALL)),
    "autoregressive": _prior(
        "autoregressive",
        autoregressive=AutoregressivePriorConfig(**SMALL, num_codes=5, codebook_size=16),
    ),
    "regression": _prior("regression", regression=RegressionPriorConfig(**SMALL)),
    "decoder": _decoder(),
    "decoder of its own text": _decoder(text_tokens=16, text_depth=1),
    "decoder that drops captions": _decoder(empty_caption=True),
    "decoder by muon": _decoder(with_options(SETTINGS, optimizer="muon")),
    "transformer of patches": _decoder(network="dit", dit=DIT, embed_grid=True),
    "magnitude-preserving": _decoder(unet=MAGNITUDE),
    "upsampler of blur": _upsampler("blur"),
    "upsampler of bsr": _upsampler("bsr"),
}


class _Watched(Reporter):
    """Holds a context from the beginning of step FIRST to that of step FIRST + COUNT."""

    def __init__(self, *arguments: Any, watch: Callable[[], AbstractContextManager]) -> None:
        super().__init__(*arguments)
        self._watch, self.watched = watch, ExitStack()

    @contextmanager
    def fetching(self, step: int) -> Iterator[None]:
        if step == FIRST + COUNT:
            self.watched.close()
        with super().fetching(step):
            yield
        if step == FIRST:
            self.watched.enter_context(self._watch())


def train_watched(
    kind: str, data: Path, run: Path, device: torch.device,
    watch: Callable[[], AbstractContextManager], *, compiled: bool = False, **changes: Any,
) -> nn.Module:  # fmt: skip
    """Train the smallest model of a kind for some steps, and return it.

    watch: a context that three whole steps run in, but for the wait for the first one's data.
    """
    config, build = KINDS[kind](data, run)
    torch.manual_seed(0)
    run.mkdir(parents=True)
    task, settings = build(config), with_options(config.train, **changes)
    if compiled:
        compile_model(task.model, device)
    engine = PlainEngine(task.model, task.objective, settings, device)
    reporter = _Watched(run, settings, 0, watch=watch)
    with reporter.watched:
        train(task, replace(config, train=settings), engine, Mirror(run), reporter)
    return task.model


class WaitsForDeviceError(AssertionError):
    """A step reads on the host what is computed on the device, or copies as it waits."""


# what gives the host a value, or a shape that depends on values
READS = {
    "item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__",
    "__contains__", "nonzero", "argwhere", "equal", "allclose", "masked_select", "unique",
    "unique_consecutive", "is_nonzero", "bincount", "multinomial",
}  # fmt: skip
# what would copy from memory that is not pinned, were there a device
COPIES = {"tensor", "as_tensor", "from_numpy", "asarray"}
OPERATORS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique",
    "_unique2", "unique_dim", "unique_consecutive", "bincount", "multinomial",
    "_linalg_check_errors",
}  # fmt: skip


class NoSyncs(TorchFunctionMode):
    """While `armed`, raises WaitsForDeviceError where a GPU would keep the host waiting.

    It knows that by the names of calls in Python, and by torch's operators. On a CPU nothing waits,
    so all counts as on the device but what this mode has seen sent to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self._arrived: set[int] = set()
        self._armed = False

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Refuse what waits."""
        self._armed = True
        try:
            with _Operators():
                yield
        finally:
            self._armed = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        sends, later = name == "to" and args[1:2] == ("cpu",), kwargs.get("non_blocking")
        if self._armed:
            if name in READS and self._memory(args[0]) not in self._arrived:
                raise WaitsForDeviceError(f"{name} of {tuple(args[0].shape)}")
            if (name in COPIES and not kwargs.get("pin_memory")) or (sends and not later):
                raise WaitsForDeviceError(name)
        found = func(*args, **kwargs)
        if sends and later:
            self._arrived.add(self._memory(found))
        return found

    def _memory(self, tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


class _Operators(TorchDispatchMode):
    """Refuses operators, whoever calls them: torch's own functions, the backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = func is torch.ops.aten.repeat_interleave.Tensor
        if name in OPERATORS or by_mask or (repeats and not (kwargs or {}).get("output_size")):
            raise WaitsForDeviceError(name)
        return func(*args, **(kwargs or {}))
