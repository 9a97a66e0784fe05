"""One training step of one model, by a bare PyTorch loop and by
the engines of training/engine/engines.py."""

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {  # width, depth, batch: 3 and 100 million parameters
    "small": (256, 4, 64),
    "large": (1024, 8, 8),
}
EMBED, WORDS = 512, 24


def join(meeting: Path, rank: int, ranks: int) -> None:
    """Join a process group, as a worker of Ray Train has; meeting: a folder that all know."""
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=ranks
    )


def saved_bytes(model: Any, batch_size: int) -> int:
    """Return what a forward pass keeps for the backward pass, beside the weights."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _objective(model, make_batch(batch_size))["loss"].mean()
    return sum(kept.values())


def build_model(size: str, device: str = "cpu") -> Any:
    import torch

    from models.configs import DiffusionPriorConfig
    from models.priors.diffusion import DiffusionPrior

    width, depth, _ = SIZES[size]
    torch.manual_seed(0)
    config = DiffusionPriorConfig(width=width, depth=depth, num_heads=width // 64)
    with torch.device(device):
        return DiffusionPrior(config, embed_dim=EMBED, text_width=EMBED, context_length=WORDS)


def make_batch(batch_size: int) -> Any:
    """Return a batch as a feed makes it."""
    import torch
    import torch.nn.functional as F

    from training.data.dataloader import Batch

    columns = {
        "image_embed": F.normalize(torch.randn(batch_size, EMBED), dim=1),
        "text_embed": F.normalize(torch.randn(batch_size, EMBED), dim=1),
        "states": torch.randn(batch_size, WORDS, EMBED),
        "token_mask": torch.ones(batch_size, WORDS, dtype=torch.bool),
    }
    return Batch(
        columns=columns, keys=torch.arange(batch_size), weight=torch.ones(batch_size),
        num_real=batch_size,
    )  # fmt: skip


def _objective(model: Any, batch: Any) -> Any:
    from models.priors.base import PriorText

    text = PriorText(
        text_embed=batch["text_embed"], text=batch["states"], token_mask=batch["token_mask"]
    )
    return model.losses(batch.keys, batch["image_embed"], text)


def bare_step(model: Any, batch_size: int, *, ranks: int = 1) -> Callable[[], None]:
    """Return a step as anyone would write it: the same model, optimizer, clipping and average;
    with several ranks, each with its part of the batch, in torch's DistributedDataParallel."""
    import torch

    from training.engine.engines import Objective

    batch = make_batch(batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    average = [p.detach().clone() for p in model.parameters()]
    model.train()
    loss_of: Any = Objective(model, _objective)
    if ranks > 1:
        ddp = torch.nn.parallel.DistributedDataParallel
        loss_of = ddp(loss_of, gradient_as_bucket_view=True, broadcast_buffers=False)

    def step() -> None:
        loss = loss_of(batch)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for shadow, parameter in zip(average, model.parameters(), strict=True):
                shadow.lerp_(parameter, 0.001)
        loss.item()

    return step


def engine_step(
    model: Any, engine: str, batch_size: int, ranks: int = 1
) -> tuple[Callable[[], None], Callable[[], dict]]:
    """Return the step of an engine as the loop takes it, and what measures its checkpoint; any
    engine but the plain one has joined a process group. batch_size: of this rank."""
    import torch

    from training.config import TrainConfig
    from training.engine.ema import Ema
    from training.engine.engines import PlainEngine, ZeroEngine
    from training.loop import Flags, all_reduce_scores

    stage: Any = 0 if engine == "plain" else int(engine.removeprefix("zero"))
    config = TrainConfig.of(
        global_batch_size=batch_size * ranks, learning_rate=1e-4, precision="fp32",
        zero_stage=stage, num_workers=0 if engine == "plain" else ranks,
    )  # fmt: skip
    kind: Any = PlainEngine if engine == "plain" else ZeroEngine
    made = kind(model, _objective, config, torch.device("cpu"))
    averages = Ema(made.fragments(), 0.999)
    batch, count = make_batch(batch_size), iter(range(1 << 30))
    model.train()

    def step() -> None:
        loss = made.losses(batch)["loss"].mean()
        made.backward(loss)
        all_reduce_scores(made, {"loss": loss.detach()}, Flags(written=True))
        if not math.isfinite(made.step(1.0)):
            raise FloatingPointError("found a gradient that is not finite")
        averages.update(next(count), 0)

    return step, lambda: _checkpointed(made, averages) if engine == "plain" else {}


def _checkpointed(engine: Any, averages: Any) -> dict[str, float]:
    """Return how long a checkpoint holds up the steps, and how long it takes to write; the first
    one, which touches the memory of its copy for the first time, apart."""
    from training.bucket.mirror import Mirror
    from training.checkpoints.checkpointer import Checkpointer
    from training.checkpoints.records import Progress
    from training.config import TrainConfig

    blocked = []
    with tempfile.TemporaryDirectory() as folder:
        config, export = TrainConfig(), {"kind": "benchmark"}
        checkpoints = Checkpointer(Mirror(Path(folder)), engine, averages, export, config)
        for step in (1, 2):
            started = time.perf_counter()
            checkpoints.save(Progress(step=step))
            blocked.append(time.perf_counter() - started)
            checkpoints.wait()
        write = checkpoints.write_seconds
    first, block = blocked
    return {"first_block_seconds": first, "block_seconds": block, "write_seconds": write}
