"""Whether activations are kept or computed again in the backward pass, where the model leaves that
to the memory of the device."""

import dataclasses
from typing import Any

from torch import nn

from models.configs import network_of
from models.costs import forward_of, meta_copy, num_parameters, peak_bytes, state_bytes
from training.config import TrainConfig
from training.engine.choices import zero_stage

PROBE = 4  # samples on which activations are counted
MAX_TOKENS = 256  # of a caption, or as many as the model has room for
BF16_BYTES = 2
USABLE = 0.9  # share of the memory that kernels' workspaces, NCCL and the allocator leave


def settle_checkpointing(
    model: nn.Module, config: TrainConfig, memory_bytes: int, world_size: int
) -> str:
    """Choose for a network whose `checkpointing` is None, in place: as counted, activations are
    kept where they fit; returns a line about it, "" where there was nothing to choose.

    memory_bytes: of each worker's GPU; 0 for a CPU, on which they are computed again.
    """
    name, options = network_of(getattr(model, "config", None))
    network: Any = getattr(model, name, model)
    if getattr(options, "checkpointing", False) is not None:
        return ""
    chosen, why = True, "on a CPU"
    network.config = dataclasses.replace(options, checkpointing=False)
    if memory_bytes:
        count, samples = num_parameters(model), config.samples_a_worker(world_size)
        micro_batch = samples // config.micro_batches(world_size)
        workers = config.workers
        stage = 3 if workers.engine == "fsdp2" else zero_stage(config, count)
        state = state_bytes(model, stage, world_size, offload=workers.offload == "cpu")
        state += 4 * count * len(config.averages.power_ema) // world_size
        fixed, meta = BF16_BYTES * count, meta_copy(model).train()
        for copied, parameter in zip(meta.parameters(), model.parameters(), strict=True):
            copied.requires_grad_(parameter.requires_grad)
        each = max(0, peak_bytes(meta, forward_of(meta, MAX_TOKENS, PROBE)) - fixed) / PROBE
        needed = state + fixed + each * micro_batch
        chosen = needed > USABLE * memory_bytes
        why = (
            f"{needed / 2**30:.1f} GiB with the activations of {micro_batch} samples kept, "
            f"{memory_bytes / 2**30:.1f} there"
        )
    network.config = dataclasses.replace(options, checkpointing=chosen)
    return f"checkpointing: {str(chosen).lower()}, {why}"
