"""Which engine takes the steps, and how DeepSpeed partitions; no torch here."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from training.config import TrainConfig

EngineName = Literal["deepspeed", "fsdp2", "plain"]
# Elements that are reduced at once, at most: so many are sent at full speed, and DeepSpeed
# allocates two buckets of each type.
MAX_BUCKET = 50_000_000
ZERO_1_BELOW = 1_000_000_000  # parameters, whose gradients, 4 GB, still fit on each GPU


def zero_stage(config: "TrainConfig", num_parameters: int, device_type: str = "cuda") -> int:
    """Return DeepSpeed's stage for a model of that size, by the workers' number and devices."""
    workers = config.workers
    if workers.zero_stage is not None:
        return workers.zero_stage
    if workers.offload == "cpu":
        return 2
    if device_type == "cpu" or workers.num_workers < 2 or config.optimizer.kind == "muon":
        return 0
    return 1 if num_parameters < ZERO_1_BELOW else 2


def require_engine(config: "TrainConfig") -> None:
    """Raise ValueError where an engine does not do what the other options ask for."""
    workers, muon = config.workers, config.optimizer.kind == "muon"
    engine, stage, num_workers = workers.engine, workers.zero_stage, workers.num_workers
    if engine is not None and (engine == "plain") != (num_workers == 0):
        expected = "num_workers 0" if engine == "plain" else "num_workers 1 or more"
        raise ValueError(
            f"train.engine: found {engine} with num_workers {num_workers}, expected {expected}: "
            "plain is for the calling process, others are for workers under Ray"
        )
    if engine == "fsdp2" and (workers.offload == "cpu" or stage is not None):
        name, none = ("offload", "none") if workers.offload == "cpu" else ("zero_stage", "null")
        raise ValueError(
            f"train.{name}: found {getattr(workers, name)} with engine fsdp2, expected {none}: it "
            "is DeepSpeed's"
        )
    if workers.offload == "cpu" and stage in (0, 1):
        raise ValueError(
            f"train.offload: found cpu with zero_stage {stage}, expected none, or zero_stage 2 or 3"
        )
    if workers.offload == "cpu" and not num_workers:
        raise ValueError(
            "train.offload: found cpu with num_workers 0, expected none, or num_workers 1 or "
            "more: the calling process trains without DeepSpeed"
        )
    if muon and stage:
        raise ValueError(
            f"train.optimizer: found muon with zero_stage {stage}, expected adamw: ZeRO flattens "
            "the matrices that Muon needs whole"
        )
    if muon and (engine == "fsdp2" or workers.offload == "cpu"):
        name = "engine fsdp2" if engine == "fsdp2" else "offload cpu"
        raise ValueError(
            f"train.optimizer: found muon with {name}, expected adamw: ranks own parts of the "
            "matrices that Muon needs whole"
        )
