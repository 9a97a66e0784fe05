"""The configuration of the training scripts; no torch here, so that --help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cluster.base.cli import Option, with_options
from cluster.base.machine import threads_for
from models.configs import (
    AutoregressivePriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UpsamplerConfig,
)
from training.engine.choices import EngineName, require_engine
from training.engine.precision import Precision

TrackerName = Literal["tensorboard", "wandb", "mlflow"]  # see training/runs/trackers.py
PRESETS = Path(__file__).parent / "presets"
HIDDEN = Option(hidden=True)
MAY_CHANGE = Option(may_change=True)
HIDDEN_MAY_CHANGE = Option(hidden=True, may_change=True)
INLINE = Option(inline=True)
INFINITY = float("inf")
MAIN_CAPTION = "caption"  # what --data.captions calls the main caption of a sample
# What training reads by default: the drawn set, which is made where it is absent
IMAGES, EMBEDS = "data/shapes/images", "data/shapes/embeds"


def _require(config: Any, group: str, low: float, high: float, *names: str) -> None:
    """Refuse a number outside of [low, high], or NaN."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            expected = f"at least {low}" if high == INFINITY else f"{low} to {high}"
            raise ValueError(f"{group}.{name}: found {value}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes are in samples, never per worker."""

    global_batch_size: int = 64
    """samples a step over all workers"""
    micro_batch_size: Annotated[int, MAY_CHANGE] = 0
    """samples a forward pass and worker; 0 = the worker's complete share"""

    def __post_init__(self) -> None:
        _require(self, "train", 1, INFINITY, "global_batch_size")
        _require(self, "train", 0, INFINITY, "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long a model is trained, and how the learning rate moves."""

    num_steps: int = 1000
    """optimizer steps"""
    warmup: float = 0.04
    """share of the steps in which the learning rate rises linearly"""
    decay: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    """learning rate after the warm-up; inverse_sqrt: as the root of warm-up over step"""
    extend: Annotated[Literal["constant", "rewarm"], HIDDEN] = "rewarm"
    """learning rate of the steps by which a larger num_steps extends a run: warmed up and decayed
    again, or its last one"""
    extended: Annotated[tuple[str, ...], HIDDEN] = ()
    """ends that were extended, each with how, such as 20:constant; a run records it by itself"""

    def __post_init__(self) -> None:
        _require(self, "train", 1, INFINITY, "num_steps")
        _require(self, "train", 0, 1, "warmup")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    kind: Annotated[Literal["adamw", "muon"], Option(name="optimizer")] = "adamw"
    """muon orthogonalises the updates of matrices and leaves the rest to AdamW; it needs
    zero_stage 0"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
    matrix_learning_rate: Annotated[float, HIDDEN] = 0.02
    """peak learning rate of Muon"""
    beta2: Annotated[float, HIDDEN] = 0.99
    """decay of AdamW's second moment"""
    adam_eps: Annotated[float, HIDDEN] = 1e-8
    """added to the root of AdamW's second moment"""
    weight_decay: float = 0.0
    """decoupled weight decay of matrices"""
    grad_clip: Annotated[float, HIDDEN] = 1.0
    """largest global gradient norm; 0 = no clipping"""

    def __post_init__(self) -> None:
        least = ("learning_rate", "matrix_learning_rate", "weight_decay", "grad_clip")
        _require(self, "train", 0, INFINITY, *least)
        _require(self, "train", 0, 1, "beta2")


@dataclass(frozen=True, kw_only=True)
class AveragesConfig:
    """Averages of the weights over the steps."""

    ema_decay: float = 0.999
    """decay of the averaged weights; the first steps use (1 + step) / (10 + step)"""
    power_ema: Annotated[tuple[float, ...], HIDDEN] = ()
    """relative widths of power-function averages kept beside that one, to make one of any width
    from after the run (training/reconstruct_ema.py); 0.05 0.10 are the paper's; 4 bytes a
    parameter each"""
    snapshot_every: Annotated[int, HIDDEN_MAY_CHANGE] = 0
    """steps between snapshots of those averages, one at the last step too; 0 = none"""

    def __post_init__(self) -> None:
        _require(self, "train", 0, 1, "ema_decay")
        _require(self, "train", 0, INFINITY, "snapshot_every")
        if self.snapshot_every and not self.power_ema:
            raise ValueError(
                f"train.snapshot_every: found {self.snapshot_every} without train.power_ema, "
                "expected 0 or widths such as --train.power-ema 0.05 0.10: there is nothing to "
                "snapshot"
            )
        if len(set(self.power_ema)) < len(self.power_ema):
            raise ValueError(f"train.power_ema: found {self.power_ema}, expected different widths")
        if self.power_ema:
            from models.power_ema import SIGMA_REL_MAX  # imports numpy

            wrong = [sigma for sigma in self.power_ema if not 0 < sigma <= SIGMA_REL_MAX]
            if wrong:
                raise ValueError(
                    f"train.power_ema: found {wrong[0]}, expected more than 0 and at most "
                    f"{SIGMA_REL_MAX:.4f}"
                )


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Who trains: processes, devices, and what they hold of the model."""

    num_workers: Annotated[int, MAY_CHANGE] = 1
    """training processes under Ray; 0 = this very process, without Ray and DeepSpeed"""
    min_workers: Annotated[int, MAY_CHANGE] = 0
    """fewest of them that continue where nodes are lost, until there is room for all again; 0 =
    all"""
    device: Annotated[Literal["auto", "cpu", "cuda"], MAY_CHANGE] = "auto"
    """auto: a GPU for each worker where there are any; cuda: or else refuse; cpu: none"""
    num_threads: Annotated[int | None, MAY_CHANGE] = None
    """threads a worker on the CPU; None: the cores of its machine, shared by its workers there"""
    precision: Precision = "auto"
    """bf16: fp32 weights under autocast; fp32: no autocast; auto: bf16 where the device computes in
    it, which the run then keeps"""
    compile: Annotated[bool | None, MAY_CHANGE] = None
    """compile the network (torch.compile): a minute or more at the start, faster steps afterwards;
    None: on GPUs, but with zero_stage 3"""
    engine: Annotated[EngineName | None, MAY_CHANGE] = None
    """who takes the steps: deepspeed, torch's fsdp2 (rows of all parameters on each worker, weights
    and gradients sent in bf16 beside the passes), or plain PyTorch in one process; None: deepspeed
    for workers under Ray, plain without"""
    zero_stage: Annotated[Literal[0, 1, 2, 3] | None, MAY_CHANGE] = None
    """DeepSpeed's partitioning: 0 none, 1 optimizer state, 2 also gradients, 3 also weights; None:
    on several GPUs 1 below a billion parameters, else 2; 0 elsewhere and with muon"""
    offload: Annotated[Literal["none", "cpu"], HIDDEN_MAY_CHANGE] = "none"
    """where optimizer state and averaged weights are kept: with the weights, or in the memory of
    the CPU, which then takes the steps; zero_stage 2 or 3"""

    def __post_init__(self) -> None:
        _require(self, "train", 1, INFINITY, "num_threads")
        if not 0 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"train.min_workers: found {self.min_workers}, expected at least 0 and at most the "
                f"{self.num_workers} of train.num_workers"
            )
        if self.zero_stage == 3 and self.compile:
            raise ValueError(
                "train.zero_stage: found 3 with compile true, expected at most 2: weights are "
                "gathered layer by layer, which a compiled network does not wait for"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    checkpoint_every: int = 200
    """steps between checkpoints"""
    async_checkpoints: Annotated[bool, HIDDEN] = True
    """write checkpoints beside the steps, which wait for a copy in memory alone"""
    keep_checkpoints: int = 2
    """newest checkpoints kept"""
    keep_every: Annotated[int, HIDDEN] = 0
    """checkpoints at multiples of this many steps are kept as well; 0 = none"""

    def __post_init__(self) -> None:
        _require(self, "train", 1, INFINITY, "checkpoint_every", "keep_checkpoints")
        _require(self, "train", 0, INFINITY, "keep_every")


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What a run does about lost workers, hangs and odd losses."""

    max_failures: Annotated[int, HIDDEN] = 3
    """restarts of the worker group before giving up"""
    hang_seconds: Annotated[float, HIDDEN] = 600.0
    """a worker that takes longer over a step, checkpoints and validation apart, counts as hanging:
    the workers are ended and start again from the newest checkpoint; 0 = never"""
    spike_deviations: Annotated[float, HIDDEN] = 6.0
    """deviations of its logarithm above the last steps' median at which a loss is reported as a
    spike; 0 = never"""

    def __post_init__(self) -> None:
        _require(self, "train", 0, INFINITY, "hang_seconds", "spike_deviations")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports."""

    report_every: int = 10
    """steps between lines of metrics.jsonl"""
    track: Annotated[tuple[TrackerName, ...], HIDDEN] = ()
    """pass on to trackers: losses, scores, pictures, where checkpoints lie; TensorBoard in
    <run>/tensorboard, wandb as its own variables say, mlflow on the server MLFLOW_TRACKING_URI"""
    log_samples: Annotated[bool, HIDDEN] = False
    """log which samples each step trained on, by their keys, to <run>/samples"""
    peak_tflops: Annotated[float, HIDDEN] = 0.0
    """teraFLOPs a second that a worker's device can do, by which its use is reported; 0 = the
    manufacturer's figure for dense bf16, where the device is a known GPU"""
    profile: Annotated[str, HIDDEN] = ""
    """steps to profile, "first:count" such as 20:3: traces for chrome://tracing in <run>/profile"""

    def __post_init__(self) -> None:
        _require(self, "train", 1, INFINITY, "report_every")


@dataclass(frozen=True, kw_only=True)
class ValidatorConfig:
    """What scores checkpoints beside the training."""

    command: Annotated[str, Option(name="validator")] = ""
    """command that Ray starts after each checkpoint, beside the steps, with --run and --once added,
    such as "python eval/watch.py --prior runs/prior"; empty = none; num_workers 1 or more"""
    num_gpus: Annotated[float, Option(name="validator_gpus", hidden=True)] = 0.0
    """GPUs, or a share of one, that the validator is given"""
    seconds: Annotated[float, Option(name="validator_seconds", hidden=True)] = 43_200.0
    """after which a validator is killed: the end of the run waits for the last one"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How any model is trained. Flags and YAML name an option without its group:
    --train.learning-rate is `train.optimizer.learning_rate`."""

    schedule: Annotated[ScheduleConfig, INLINE] = field(default_factory=ScheduleConfig)
    batch: Annotated[BatchConfig, INLINE] = field(default_factory=BatchConfig)
    optimizer: Annotated[OptimizerConfig, INLINE] = field(default_factory=OptimizerConfig)
    averages: Annotated[AveragesConfig, INLINE] = field(default_factory=AveragesConfig)
    workers: Annotated[WorkersConfig, INLINE] = field(default_factory=WorkersConfig)
    seed: int = 0
    """of weights, sample order and every sample's noise"""
    checkpoint: Annotated[CheckpointConfig, Option(inline=True, may_change=True)] = field(
        default_factory=CheckpointConfig
    )
    faults: Annotated[FaultsConfig, Option(inline=True, may_change=True)] = field(
        default_factory=FaultsConfig
    )
    logging: Annotated[LoggingConfig, Option(inline=True, may_change=True)] = field(
        default_factory=LoggingConfig
    )
    validator: Annotated[ValidatorConfig, Option(inline=True, may_change=True)] = field(
        default_factory=ValidatorConfig
    )

    def __post_init__(self) -> None:
        num_workers = max(1, self.workers.num_workers)
        share, rest = divmod(self.batch.global_batch_size, num_workers)
        if rest:
            raise ValueError(
                f"train.global_batch_size: found {self.batch.global_batch_size}, expected a "
                f"multiple of {num_workers} workers"
            )
        if self.batch.micro_batch_size and share % self.batch.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size: found {self.batch.micro_batch_size}, "
                f"expected a divisor of a worker's {share} samples"
            )
        require_engine(self)
        if self.validator.command and not self.workers.num_workers:
            raise ValueError(
                "train.validator: found a command with num_workers 0, expected 1 or more: Ray "
                "starts it; without Ray, run eval/watch.py beside the training"
            )

    @classmethod
    def of(cls, **options: Any) -> "TrainConfig":
        """Return the defaults with these options, named as their flags are."""
        return with_options(cls(), **options)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches a step where all workers are there."""
        return self.micro_batches(max(1, self.workers.num_workers))

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches a step where the fewest workers are left."""
        return self.micro_batches(max(1, self.workers.min_workers or self.workers.num_workers))

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches a step of each of `world_size` workers: what makes the global batch, which
        stays, from their micro-batches."""
        share = -(-self.batch.global_batch_size // world_size)
        return -(-share // (self.batch.micro_batch_size or share))

    def samples_a_worker(self, world_size: int) -> int:
        """Samples a step of each of `world_size` workers, with the padding that makes all its
        micro-batches equal; there is none where all workers are there."""
        parts = self.micro_batches(world_size)
        return -(-self.batch.global_batch_size // (world_size * parts)) * parts


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How samples are read: see training/data/sampler.py."""

    weights: tuple[float, ...] = ()
    """share of each data set in the samples, of any sum; none = every sample equally often"""
    captions: str = ""
    """caption of a sample in an epoch: columns with weights such as caption:0.7,alt:0.3, where
    `caption` is the main one; empty = the main one always"""
    num_streams: int = 1
    """virtual streams that shards are dealt to: a multiple of the number of workers, where a
    worker is to open its own shards only"""
    window: Annotated[int, HIDDEN] = 16
    """shards of a stream that are shuffled together"""
    num_threads: Annotated[int | None, HIDDEN_MAY_CHANGE] = None
    """threads of a worker that decode images ahead of the step; None: as of train.num_threads"""
    prefetch: Annotated[int, HIDDEN_MAY_CHANGE] = 3
    """batches read ahead of the step"""

    def __post_init__(self) -> None:
        _require(self, "data", 1, INFINITY, "num_streams", "window", "num_threads", "prefetch")
        self.caption_weights()

    def caption_weights(self) -> dict[str, float]:
        """Return the weight of each column of captions; {} for the main caption always."""
        weights: dict[str, float] = {}
        for item in self.captions.split(",") if self.captions else ():
            name, _, number = item.rpartition(":")
            try:
                weight = float(number)
            except ValueError:
                weight = 0.0
            if not name or name in weights or not 0 < weight < INFINITY:
                raise ValueError(
                    f"data.captions: found {item!r} in {self.captions!r}, expected each column "
                    "once with a positive weight, such as caption:0.7,alt:0.3"
                )
            weights[name] = weight
        return weights


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training script takes beside its data and model."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """how it is trained"""
    data: DataConfig = field(default_factory=DataConfig)
    """how samples are read"""
    ingest: Annotated[Literal["native", "ray"], MAY_CHANGE] = "native"
    """who reads and decodes: threads of each worker, or Ray Data on any CPU of the cluster"""
    metrics_port: Annotated[int | None, MAY_CHANGE] = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""
    scratch: Annotated[str, HIDDEN_MAY_CHANGE] = ""
    """of a run whose --run is a URL: the folder for its copy on each node, deleted when the run has
    finished; empty = below the system's temporary folder"""
    fresh: Annotated[bool, MAY_CHANGE] = False
    """delete the run and start over instead of continuing it"""
    dry_run: Annotated[bool, MAY_CHANGE] = False
    """print the configuration, the parameters and a memory estimate, and stop"""

    @property
    def num_decode_threads(self) -> int:
        """Threads of a worker that decode images, on this machine."""
        return threads_for(self.data.num_threads or self.train.workers.num_threads)


@dataclass(frozen=True, kw_only=True)
class ClipRunConfig(RunConfig):
    """Train a CLIP on image shards."""

    images: tuple[str, ...] = (IMAGES,)
    """folders of committed image shards; the demo's are drawn if it is absent"""
    run: Annotated[str, MAY_CHANGE] = "runs/clip"
    """folder of the run"""
    init: str = ""
    """start from the weights of another CLIP of these sizes, named as in ingest/embed.py; with
    --model.architecture for one of open_clip's"""
    image_tower: Literal["", "efficientnet_lite0"] = ""
    """a published network, frozen, in the place of a vision tower of our own: only a projection of
    its features and the text tower learn"""
    block_size: int = 1
    """neighbouring samples kept in one batch: the drawn set's hard negatives come in blocks of 4"""
    sam_rho: float = 0.0
    """radius of sharpness-aware minimisation, the paper's 0.1; 0 = off, and half the time a step"""
    sam_batch_size: int = 64
    """samples of each worker that perturb its weights"""
    part: str = "1/1"
    """train on the k-th of n equal parts of the shards, "k/n"; a judge takes the part that CLIP
    did not"""
    model: Annotated[ClipConfig, HIDDEN] = field(default_factory=ClipConfig)
    """sizes: flags such as --model.width, not listed by --help but by --dry-run"""

    def __post_init__(self) -> None:
        workers = self.train.workers
        if self.sam_rho and (workers.zero_stage == 3 or workers.engine == "fsdp2"):
            stage = workers.zero_stage == 3
            name, value = ("zero_stage", "3") if stage else ("engine", "fsdp2")
            raise ValueError(
                f"train.{name}: found {value} with sam_rho {self.sam_rho}, expected "
                f"{'at most 2' if stage else 'deepspeed'}: a worker perturbs whole weights"
            )


@dataclass(frozen=True, kw_only=True)
class PriorRunConfig(RunConfig):
    """Train a prior on embeddings."""

    embeds: tuple[str, ...] = (EMBEDS,)
    """folders of committed embeddings, of one encoder; the demo's are made if it is absent"""
    clip: str = ""
    """encoder of the caption's token states; empty = the one the embeddings name"""
    run: Annotated[str, MAY_CHANGE] = "runs/prior"
    """folder of the run"""
    prior: Annotated[
        Literal["diffusion", "autoregressive", "regression"],
        Option(groups=("diffusion", "autoregressive", "regression")),
    ] = "diffusion"
    """kind of prior"""
    validation: tuple[str, ...] = ()
    """folders of held-out embeddings, of the same encoder: a scorecard at each checkpoint"""
    init: str = ""
    """start from the weights of a finished run of this kind and these sizes, its statistics of
    embeddings included"""
    whiten: bool = True
    """standardise each dimension by the data instead of scaling all by 0.5375 sqrt(E)"""
    diffusion: Annotated[DiffusionPriorConfig, HIDDEN] = field(default_factory=DiffusionPriorConfig)
    """sizes of a diffusion prior: flags such as --diffusion.width, listed by --dry-run"""
    autoregressive: Annotated[AutoregressivePriorConfig, HIDDEN] = field(
        default_factory=AutoregressivePriorConfig
    )
    """sizes of an autoregressive prior"""
    regression: Annotated[RegressionPriorConfig, HIDDEN] = field(
        default_factory=RegressionPriorConfig
    )
    """sizes of a regression prior"""


@dataclass(frozen=True, kw_only=True)
class DecoderRunConfig(RunConfig):
    """Train one stage of the decoder cascade."""

    images: tuple[str, ...] = (IMAGES,)
    """folders of committed image shards"""
    embeds: tuple[str, ...] = (EMBEDS,)
    """folders of the embeddings of those shards, in the same order; base only"""
    clip: str = ""
    """encoder of the caption's token states; empty = the one the embeddings name"""
    run: Annotated[str, MAY_CHANGE] = "runs/base"
    """folder of the run"""
    init: str = ""
    """start from the weights of a finished run of this stage and these sizes"""
    stage: Annotated[Literal["base", "up256", "up1024"], Option(groups=("base", "up", "up"))] = (
        "base"
    )
    """stage of the cascade"""
    validation: tuple[str, ...] = ()
    """folders of held-out image shards: their loss, and a picture in <run>/validation, at each
    checkpoint"""
    validation_embeds: tuple[str, ...] = ()
    """folders of their embeddings, of the same encoder; base only"""
    image_size: int = 64
    """side of this stage's images in px"""
    low_res_size: Annotated[int, HIDDEN] = 0
    """side of the previous stage's images in px; 0 = a quarter; upsamplers only"""
    crop_size: int = 0
    """side of training crops in px; 0 = a quarter of the image, at least 16; upsamplers only"""
    flip: bool = False
    """mirror half of the samples; upsamplers only, whose input is made from the same pixels: the
    base decoder's embedding and caption are of the image as it was"""
    base: Annotated[DecoderConfig, HIDDEN] = field(default_factory=DecoderConfig)
    """sizes of the base decoder: flags such as --base.unet.channels, listed by --dry-run"""
    up: Annotated[UpsamplerConfig, HIDDEN] = field(default_factory=UpsamplerConfig)
    """sizes of an upsampler: flags such as --up.unet.channels, listed by --dry-run"""
