"""The stages of a chain that are trained: what a sample costs, and what a step keeps in memory."""

from dataclasses import dataclass, field

from cluster.planning.counts import (
    MAX_TOKENS,
    Counts,
    TrainedConfig,
    architecture,
    caption_tokens,
    encoder_counts,
    read_preset,
    stage_counts,
)
from cluster.planning.efficiency import Workload, network_kind
from cluster.planning.request import CHAINS, PlanRequest
from models.configs import network_of
from training.config import ClipRunConfig, DecoderRunConfig, TrainConfig

BEST_OF = 2  # samples of a diffusion prior, of which one is kept
FLOPS_PER_MAC = 6  # of training: two in the forward pass, four in the backward


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model that is trained, and how its preset trains it.

    caption_tokens: how many it reads; frozen: counts of the encoder whose text tower every step
    runs, None where the model reads tokens of its own or none.
    """

    name: str
    kind: str
    preset: str
    config: TrainedConfig = field(repr=False)
    counts: Counts = field(repr=False)
    caption_tokens: int
    frozen: Counts | None = field(default=None, repr=False)

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return self.counts["parameters"]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass on one sample, as trained."""
        return self.counts["macs"]

    @property
    def train(self) -> TrainConfig:
        """Its options of training."""
        return self.config.train

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.train.schedule.num_steps

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.train.batch.global_batch_size

    @property
    def samples(self) -> int:
        """Samples that training sees."""
        return self.num_steps * self.global_batch_size

    @property
    def average_bytes(self) -> int:
        """Bytes a parameter of further averages, for post-hoc reconstruction."""
        return 4 * len(self.train.averages.power_ema)

    @property
    def network(self) -> str:
        """Kind of network, which decides its efficiency."""
        return network_kind(architecture(self.config)[1], compiled=self.is_compiled)

    @property
    def is_compiled(self) -> bool:
        """Whether a GPU runs it compiled, and a U-Net channels-last then: unless its preset says
        otherwise."""
        return self.train.workers.compile is not False

    @property
    def workload(self) -> Workload:
        """What its efficiency depends on."""
        return Workload(
            network=self.network, preset=self.preset, parameters=self.parameters,
            tensors=self.counts["tensors"], compiled=self.is_compiled,
        )  # fmt: skip

    def flops(self, share: int = 0) -> float:
        """FLOPs of training on one sample, the frozen text tower and SAM's second pass included.

        share: samples of a worker's step, of which SAM takes some twice; 0 = no SAM.
        """
        own = float(FLOPS_PER_MAC * self.macs)
        if share and isinstance(self.config, ClipRunConfig) and self.config.sam_rho:
            own *= 1 + min(self.config.sam_batch_size, share) / share
        return own + (2 * self.frozen["caption_macs"] if self.frozen else 0)

    @property
    def accumulates(self) -> bool:
        """Whether a worker's share may come in micro-batches; CLIP contrasts all of it at once."""
        return self.kind != "clip"

    @property
    def checkpointing_flag(self) -> str:
        """Flag that chooses activation checkpointing."""
        group, config = architecture(self.config)
        return ".".join(filter(None, [group, network_of(config)[0], "checkpointing"]))

    @property
    def checkpointing(self) -> tuple[bool, ...]:
        """The choices: activations kept or computed again, the preset's own first."""
        if "checkpointed" not in self.counts["activations"]:
            return (False,)
        _, network = architecture(self.config)
        chosen = bool(network_of(network)[1].checkpointing)
        return chosen, not chosen

    def activation_bytes(self, micro_batch: int, checkpointing: bool) -> float:
        """Bytes that a step holds beside its state, weights in bf16 included."""
        counts = self.counts["activations"]["checkpointed" if checkpointing else "kept"]
        return counts["fixed"] + counts["each"] * micro_batch


def build_stages(request: PlanRequest) -> tuple[Counts, list[Stage]]:
    """Return the counts of a chain's encoder, and all that is trained in the pipeline's order."""
    chain = CHAINS[request.chain]
    encoder = encoder_counts(chain.encoder) | {"name": chain.encoder}
    most = request.caption_tokens or MAX_TOKENS
    presets: list[tuple[str, str, tuple[str, ...]]] = []
    if request.train_clip:
        if not chain.encoder.startswith("clip_"):
            raise ValueError(
                f"train_clip: found true for the preset {request.chain}, whose encoder is a "
                f"pretrained {chain.encoder}, expected false; paper, demo and debug train one"
            )
        presets.append(("clip", chain.encoder.removeprefix("clip_"), ()))
    prior = chain.prior if request.prior == "diffusion" else chain.ar
    if not prior:
        raise ValueError(
            f"prior: found autoregressive for the preset {request.chain}, which has none of that "
            "kind, expected diffusion; paper, mini, demo and debug have one"
        )
    presets.append(("prior", prior, ("--prior", request.prior)))
    presets += [("decoder", name, ()) for name in chain.decoders]

    stages = []
    for kind, preset, flags in presets:
        config = read_preset(kind, preset, *flags)
        tokens, reads_states = caption_tokens(config, encoder, most)
        name = kind
        if isinstance(config, DecoderRunConfig):
            name = "base" if config.stage == "base" else f"up{config.image_size}"
        stages.append(
            Stage(
                name=name, kind=kind, preset=preset, config=config, caption_tokens=tokens,
                counts=stage_counts(kind, config, encoder, tokens),
                frozen=encoder if reads_states else None,
            )
        )  # fmt: skip
    return encoder, stages


def image_flops(chain_name: str, stages: list[Stage]) -> dict[str, float]:
    """Return the FLOPs of each stage to sample one image, two a multiply-accumulate.

    A diffusion prior samples twice and keeps one; a decoder encodes its caption once; an upsampler
    runs on the complete image, not on a crop; guidance takes two passes a step.
    """
    chain = CHAINS[chain_name]
    prior_steps, decoder_steps, *upsampler_steps = chain.sample_steps
    prior_passes, decoder_passes = chain.passes_per_step
    flops = {}
    for stage in stages:
        text, image = stage.counts["text_macs"], stage.counts["image_macs"]
        if stage.name == "base":
            flops["base"] = 2.0 * (text + (image - text) * decoder_steps * decoder_passes)
        elif stage.kind == "decoder":
            flops[stage.name] = 2.0 * image * upsampler_steps.pop(0)
        elif stage.kind == "prior":
            diffusion = architecture(stage.config)[0] == "diffusion"
            passes = prior_steps * prior_passes * BEST_OF if diffusion else 1
            flops["prior"] = 2.0 * image * passes
    return flops
