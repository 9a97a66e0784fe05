"""--dry-run: what would be trained, without data, without allocating it."""

from collections.abc import Callable

import torch
from torch import nn

from cluster.base.cli import to_yaml
from models.costs import num_parameters, offloaded_bytes, state_bytes
from training.config import RunConfig
from training.engine.choices import zero_stage

COPIED_BYTES = 16  # a parameter: master weight, two moments, average


def on_meta(config: RunConfig, build_model: Callable[..., nn.Module]) -> nn.Module:
    """Build what would be trained, without allocating it; ValueError for options that cannot be."""
    with torch.device("meta"):
        return build_model(config)


def dry_run(config: RunConfig, build_model: Callable[..., nn.Module]) -> int:
    """Print the merged configuration, the parameter count and the memory of weights and
    optimizer."""
    model = on_meta(config, build_model)
    train = config.train
    print(to_yaml(config), end="")
    print(f"parameters: {num_parameters(model):,}")
    workers = max(1, train.workers.num_workers)
    offload = train.workers.offload == "cpu"
    # power-function averages are shared out, as the classic one is, and lie where it does
    powers = 4 * num_parameters(model) * len(train.averages.power_ema) // workers
    device = "cpu" if train.workers.device == "cpu" else "cuda"  # of the cluster's workers
    stage = zero_stage(train, num_parameters(model), device)
    stage = 3 if train.workers.engine == "fsdp2" else stage
    here = state_bytes(model, stage, workers, offload=offload)
    gigabytes = (here if offload else here + powers) / 1e9
    kept = "weights" if offload else "weights, gradients, moments and averages"
    print(f"state a worker: {gigabytes:.3f} GB in {kept}; activations come on top")
    if offload:
        gigabytes = (offloaded_bytes(model, workers) + powers) / 1e9
        print(
            f"offloaded: {gigabytes:.3f} GB of each worker's in master weights, gradients, moments "
            "and averages, on the CPU"
        )
    copy = (COPIED_BYTES * num_parameters(model) // workers + powers) / 1e9
    print(f"checkpoints: {copy:.3f} GB of CPU memory for each worker's copy of its part")
    print(
        f"batch: {train.batch.global_batch_size} = {workers} workers x {train.grad_accum_steps} "
        f"micro-batches"
    )
    return 0
