"""The configuration of the training scripts; no torch here, so that --help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cluster.base.cli import UNLISTED
from models.configs import (
    AutoregressivePriorConfig,
    ClipConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UpsamplerConfig,
)
from training.engine.precision import Precision

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How any model is trained; sizes are in samples, never per worker."""

    num_steps: int = 1000
    """optimizer steps"""
    global_batch_size: int = 64
    """samples a step over all workers"""
    micro_batch_size: int = 0
    """samples a forward pass and worker; 0 = the worker's whole share"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of matrices and leaves the rest to AdamW; it needs
    zero_stage 0"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
    matrix_learning_rate: Annotated[float, UNLISTED] = 0.02
    """peak learning rate of Muon"""
    beta2: Annotated[float, UNLISTED] = 0.99
    """decay of AdamW's second moment"""
    adam_eps: Annotated[float, UNLISTED] = 1e-8
    """added to the root of AdamW's second moment"""
    weight_decay: float = 0.0
    """decoupled weight decay of matrices"""
    warmup: float = 0.04
    """share of the steps in which the learning rate rises linearly"""
    decay: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    """learning rate after the warm-up; inverse_sqrt: as the root of warm-up over step"""
    grad_clip: Annotated[float, UNLISTED] = 1.0
    """largest global gradient norm; 0 = no clipping"""
    ema_decay: float = 0.999
    """decay of the averaged weights; the first steps use (1 + step) / (10 + step)"""
    power_ema: Annotated[tuple[float, ...], UNLISTED] = ()
    """relative widths of power-function averages kept beside that one, to make one of any width
    from after the run (training/reconstruct_ema.py); 0.05 0.10 are the paper's; 4 bytes a
    parameter each"""
    snapshot_every: Annotated[int, UNLISTED] = 0
    """steps between snapshots of those averages, one at the last step too; 0 = none"""
    precision: Precision = "auto"
    """bf16: fp32 weights under autocast; fp32: no autocast; auto: bf16 where the device computes in
    it, which the run then keeps"""
    compile: bool = False
    """compile the network (torch.compile): minutes at the start, faster steps afterwards"""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's partitioning: 0 none, 1 optimizer state, 2 also gradients, 3 also weights"""
    offload: Literal["none", "cpu"] = "none"
    """where optimizer state and averaged weights are kept: with the weights, or in the memory of
    the CPU, which then takes the steps; zero_stage 2 or 3"""
    num_workers: int = 1
    """training processes under Ray; 0 = this very process, without Ray and DeepSpeed"""
    min_workers: int = 0
    """fewest of them that go on where nodes are lost, until there is room for all again; 0 = all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each worker where there are any; cuda: or else refuse; cpu: none"""
    num_threads: int = 2
    """threads a worker on the CPU"""
    max_failures: Annotated[int, UNLISTED] = 3
    """restarts of the worker group before giving up"""
    log_samples: Annotated[bool, UNLISTED] = False
    """log which samples each step trained on, by their keys, to <run>/samples"""
    seed: int = 0
    """of weights, sample order and every sample's noise"""
    checkpoint_every: int = 200
    """steps between checkpoints"""
    async_checkpoints: Annotated[bool, UNLISTED] = True
    """write checkpoints beside the steps, which wait for a copy in memory alone"""
    keep_checkpoints: int = 2
    """newest checkpoints kept"""
    keep_every: Annotated[int, UNLISTED] = 0
    """checkpoints at multiples of this many steps are kept as well; 0 = none"""
    report_every: int = 10
    """steps between lines of metrics.jsonl"""
    tensorboard: Annotated[bool, UNLISTED] = False
    """write those lines as TensorBoard events, too, to <run>/tensorboard"""
    spike_deviations: Annotated[float, UNLISTED] = 6.0
    """deviations of its logarithm above the last steps' median at which a loss is reported as a
    spike; 0 = never"""
    hang_seconds: Annotated[float, UNLISTED] = 600.0
    """a worker that takes longer over a step, checkpoints and validation apart, is taken to hang:
    the workers are ended and begin again at the newest checkpoint; 0 = never"""
    peak_tflops: Annotated[float, UNLISTED] = 0.0
    """teraFLOPs a second that a worker's device can do, by which its use is told; 0 = the
    manufacturer's figure for dense bf16, where the device is a known GPU"""
    profile: Annotated[str, UNLISTED] = ""
    """steps to profile, "first:count" such as 20:3: traces for chrome://tracing in <run>/profile"""
    validator: str = ""
    """command that Ray starts after each checkpoint, beside the steps, with --run and --once added,
    such as "python eval/watch.py --prior runs/prior"; empty = none; num_workers 1 or more"""
    validator_gpus: Annotated[float, UNLISTED] = 0.0
    """GPUs, or a share of one, that the validator is given"""
    validator_seconds: Annotated[float, UNLISTED] = 43_200.0
    """after which a validator is killed: the end of the run waits for the last one"""

    def __post_init__(self) -> None:
        workers = max(1, self.num_workers)
        if self.global_batch_size % workers:
            raise ValueError(
                f"train.global_batch_size: found {self.global_batch_size}, expected a multiple "
                f"of {workers} workers"
            )
        share = self.global_batch_size // workers
        if self.micro_batch_size and share % self.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size: found {self.micro_batch_size}, "
                f"expected a divisor of a worker's {share} samples"
            )
        if self.optimizer == "muon" and self.zero_stage:
            raise ValueError(
                f"train.optimizer: found muon with zero_stage {self.zero_stage}, expected adamw: "
                "ZeRO flattens the matrices that Muon needs whole"
            )
        if not 0 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"train.min_workers: found {self.min_workers}, expected at least 0 and at most the "
                f"{self.num_workers} of train.num_workers"
            )
        self._require_partitioning()
        for name in (
            "num_steps",
            "global_batch_size",
            "checkpoint_every",
            "report_every",
            "num_threads",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: found {getattr(self, name)}, expected at least 1")
        for name in (
            "snapshot_every",
            "keep_every",
            "micro_batch_size",
            "learning_rate",
            "matrix_learning_rate",
            "weight_decay",
            "grad_clip",
            "spike_deviations",
            "hang_seconds",
        ):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"train.{name}: found {getattr(self, name)}, expected at least 0")
        for name in ("warmup", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name}: found {getattr(self, name)}, expected 0 to 1")
        self._require_averages()
        if self.validator and not self.num_workers:
            raise ValueError(
                "train.validator: found a command with num_workers 0, expected 1 or more: Ray "
                "starts it; without Ray, run eval/watch.py beside the training"
            )

    def _require_averages(self) -> None:
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

    def _require_partitioning(self) -> None:
        if self.zero_stage == 3 and self.compile:
            raise ValueError(
                "train.zero_stage: found 3 with compile true, expected at most 2: weights are "
                "gathered layer by layer, which a network compiled whole does not wait for"
            )
        if self.offload == "cpu" and self.zero_stage < 2:
            raise ValueError(
                f"train.offload: found cpu with zero_stage {self.zero_stage}, expected none, or "
                "zero_stage 2 or 3"
            )
        if self.offload == "cpu" and not self.num_workers:
            raise ValueError(
                "train.offload: found cpu with num_workers 0, expected none, or num_workers 1 or "
                "more: the calling process trains without DeepSpeed"
            )

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches a step where all workers are there."""
        return self.micro_batches(max(1, self.num_workers))

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches a step where the fewest workers are left."""
        return self.micro_batches(max(1, self.min_workers or self.num_workers))

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches a step of each of so many workers: what makes the global batch, which
        stays, from their micro-batches."""
        share = -(-self.global_batch_size // world_size)
        return -(-share // (self.micro_batch_size or share))

    def samples_a_worker(self, world_size: int) -> int:
        """Samples a step of each of so many workers, with the padding that makes all its
        micro-batches equal; there is none where all workers are there."""
        parts = self.micro_batches(world_size)
        return -(-self.global_batch_size // (world_size * parts)) * parts


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How samples are read: see training/data/sampler.py."""

    weights: tuple[float, ...] = ()
    """share of each data set in the samples, of any sum; none = every sample equally often"""
    num_streams: int = 1
    """virtual streams that shards are dealt to: a multiple of the number of workers, where a
    worker is to open its own shards only"""
    window: Annotated[int, UNLISTED] = 16
    """shards of a stream that are shuffled together"""
    num_threads: Annotated[int, UNLISTED] = 2
    """threads of a worker that decode images ahead of the step"""
    prefetch: Annotated[int, UNLISTED] = 3
    """batches read ahead of the step"""

    def __post_init__(self) -> None:
        for name in ("num_streams", "window", "num_threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: found {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training script takes beside its data and model."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """how it is trained"""
    data: DataConfig = field(default_factory=DataConfig)
    """how samples are read"""
    ingest: Literal["native", "ray"] = "native"
    """who reads and decodes: threads of each worker, or Ray Data on any CPU of the cluster"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete the run and start over instead of continuing it"""
    dry_run: bool = False
    """print the configuration, the parameters and a memory estimate, and stop"""


@dataclass(frozen=True, kw_only=True)
class ClipRunConfig(RunConfig):
    """Train a CLIP on image shards."""

    images: tuple[str, ...] = ("data/shapes/images",)
    """folders of committed image shards; the demo's are drawn if it is absent"""
    run: str = "runs/clip"
    """folder of the run"""
    init: str = ""
    """start from the weights of another CLIP of these sizes, named as in ingest/embed.py; with
    --model.architecture for one of open_clip's"""
    block_size: int = 1
    """neighbouring samples kept in one batch: the drawn set's hard negatives come in blocks of 4"""
    sam_rho: float = 0.0
    """radius of sharpness-aware minimisation, the paper's 0.1; 0 = off, and half the time a step"""
    sam_batch_size: int = 64
    """samples of each worker that perturb its weights"""
    part: str = "1/1"
    """train on the k-th of n equal parts of the shards, "k/n"; a judge takes the part that CLIP
    did not"""
    model: Annotated[ClipConfig, UNLISTED] = field(default_factory=ClipConfig)
    """sizes: flags such as --model.width, not listed by --help but by --dry-run"""

    def __post_init__(self) -> None:
        if self.sam_rho and self.train.zero_stage == 3:
            raise ValueError(
                f"train.zero_stage: found 3 with sam_rho {self.sam_rho}, expected at most 2: a "
                "worker perturbs whole weights"
            )


@dataclass(frozen=True, kw_only=True)
class PriorRunConfig(RunConfig):
    """Train a prior on embeddings."""

    embeds: tuple[str, ...] = ("data/shapes/embeds",)
    """folders of committed embeddings, of one encoder; the demo's are made if it is absent"""
    clip: str = ""
    """encoder of the caption's token states; empty = the one the embeddings name"""
    run: str = "runs/prior"
    """folder of the run"""
    prior: Literal["diffusion", "autoregressive", "regression"] = "diffusion"
    """kind of prior"""
    validation: tuple[str, ...] = ()
    """folders of held-out embeddings, of the same encoder: a scorecard at each checkpoint"""
    init: str = ""
    """start from the weights of a finished run of this kind and these sizes, its statistics of
    embeddings included"""
    whiten: bool = True
    """standardise each dimension by the data instead of scaling all by 0.5375 sqrt(E)"""
    diffusion: Annotated[DiffusionPriorConfig, UNLISTED] = field(
        default_factory=DiffusionPriorConfig
    )
    """sizes of a diffusion prior: flags such as --diffusion.width, listed by --dry-run"""
    autoregressive: Annotated[AutoregressivePriorConfig, UNLISTED] = field(
        default_factory=AutoregressivePriorConfig
    )
    """sizes of an autoregressive prior"""
    regression: Annotated[RegressionPriorConfig, UNLISTED] = field(
        default_factory=RegressionPriorConfig
    )
    """sizes of a regression prior"""


@dataclass(frozen=True, kw_only=True)
class DecoderRunConfig(RunConfig):
    """Train one stage of the decoder cascade."""

    images: tuple[str, ...] = ("data/shapes/images",)
    """folders of committed image shards"""
    embeds: tuple[str, ...] = ("data/shapes/embeds",)
    """folders of the embeddings of those shards, in the same order; base only"""
    clip: str = ""
    """encoder of the caption's token states; empty = the one the embeddings name"""
    run: str = "runs/base"
    """folder of the run"""
    init: str = ""
    """start from the weights of a finished run of this stage and these sizes"""
    stage: Literal["base", "up256", "up1024"] = "base"
    """stage of the cascade"""
    validation: tuple[str, ...] = ()
    """folders of held-out image shards: their loss, and a picture in <run>/validation, at each
    checkpoint"""
    validation_embeds: tuple[str, ...] = ()
    """folders of their embeddings, of the same encoder; base only"""
    image_size: int = 64
    """side of this stage's images in px"""
    low_res_size: int = 0
    """side of the previous stage's images in px; 0 = a quarter; upsamplers only"""
    crop_size: int = 0
    """side of training crops in px; 0 = a quarter of the image, at least 16; upsamplers only"""
    flip: bool = False
    """mirror half of the samples; upsamplers only, whose input is made from the same pixels: the
    base decoder's embedding and caption are of the image as it was"""
    base: Annotated[DecoderConfig, UNLISTED] = field(default_factory=DecoderConfig)
    """sizes of the base decoder: flags such as --base.unet.channels, listed by --dry-run"""
    up: Annotated[UpsamplerConfig, UNLISTED] = field(default_factory=UpsamplerConfig)
    """sizes of an upsampler: flags such as --up.unet.channels, listed by --dry-run"""
