"""Every model's sizes and choices, without torch: a script can print its help before anything
heavy is imported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

ScheduleName = Literal["cosine", "linear", "scaled_linear"]
Prediction = Literal["x0", "eps", "v"]
Weighting = Literal["simple", "v", "min_snr", "p2", "edm", "early"]
Spacing = Literal["trailing", "strided", "karras"]
SpacingChoice = Spacing | Literal["auto"]  # auto: see `default_spacing`
Degradation = Literal["none", "blur", "bsr"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an option has to do with the weights of a model.

    on_weights: false for an option of training or drawing alone: the same weights compute the same
    whatever it is; needs: an option without which this one has no effect.
    """

    on_weights: bool = True
    needs: str = ""


NOT_ON_WEIGHTS = Effect(on_weights=False)
NEEDS_ATTENTION = Effect(needs="attn_resolutions")
NEEDS_OWN_TEXT = Effect(needs="text_tokens")


def token_side(num_tokens: int) -> int:
    """Return the side of the grid of k tokens of an image, 1 for none but z_i; ValueError for a
    number that is no square."""
    side = math.isqrt(max(num_tokens, 0))
    if not side or side**2 != num_tokens:
        raise ValueError(
            f"image_tokens: found {num_tokens}, expected 1 for z_i alone, or a square as 4 or 16"
        )
    return side


def network_of(config: object) -> tuple[str, Any]:
    """Return the name of the network in a model and in its configuration, and that network's own
    configuration: ("", `config`) for a model that is one network, as a prior is."""
    name = getattr(config, "network", "unet")
    return (name, getattr(config, name)) if hasattr(config, name) else ("", config)


def weight_options(config_class: type, options: Mapping[str, Any], prefix: str = "") -> dict:
    """Return the options of a model that its weights are for, those of its network as unet.NAME
    or dit.NAME.

    options: as stored; those that an older model lacks have their defaults.
    """
    defaults, kept = vars(config_class()), {}
    hints = get_type_hints(config_class, include_extras=True)
    options = {**defaults, **options}
    for name, value in options.items():
        extras = getattr(hints.get(name), "__metadata__", ())
        effect = next((extra for extra in extras if isinstance(extra, Effect)), Effect())
        if is_dataclass(defaults.get(name)):
            if name != options.get("network", name):
                continue  # of the network that the model does not have
            stored = value if isinstance(value, dict) else {}
            nested = {**vars(defaults[name]), **stored}
            kept |= weight_options(type(defaults[name]), nested, f"{name}.")
        elif effect.on_weights and options.get(effect.needs, True):
            kept[prefix + name] = list(value) if isinstance(value, tuple) else value
    return kept


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of a CLIP; `architecture` takes an open_clip name instead of the other fields."""

    architecture: str = ""
    """name of an open_clip architecture; empty builds one from the sizes below"""
    embed_dim: int = 128
    """dimension of the joint embedding"""
    image_size: int = 32
    """side of the encoder's input in px"""
    vision: Literal["transformer", "convolutions"] = "transformer"
    """vision tower; convolutions need fewer small pictures and steps"""
    patch_size: int = 4
    """side of a vision transformer's patch in px"""
    vision_width: int = 128
    """channels of the vision tower; of convolutions, in the last stage"""
    vision_depth: int = 4
    """blocks of the vision tower; of convolutions, residual ones in each stage after the first"""
    text_width: int = 128
    """channels of the text tower"""
    text_depth: int = 3
    """blocks of the text tower"""
    head_channels: int = 32
    """channels of an attention head in both towers"""
    context_length: int = 24
    """tokens of a caption, start and end included"""
    temperature: float = 0.07
    """initial temperature of the contrastive loss; it is learned, but short runs hardly move it"""
    vocab_size: int = 49408
    """rows of the token table; fewer than CLIP's 49408 fold the vocabulary, which small data
    sets do not miss"""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a prior's transformer."""

    width: int = 512
    """channels of the transformer"""
    depth: int = 6
    """transformer blocks"""
    num_heads: int = 8
    """attention heads"""
    dropout: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """dropout probability in every block"""
    qk_norm: bool = True
    """normalise queries and keys: stable in bf16 at high learning rates"""


@dataclass(frozen=True, kw_only=True)
class DiffusionPriorConfig(TransformerConfig):
    """Sizes of a diffusion prior."""

    schedule: ScheduleName = "cosine"
    """noise schedule"""
    num_timesteps: int = 1000
    """timesteps of the schedule"""
    zero_terminal: bool = False
    """leave no signal at the last timestep"""
    weighting: Annotated[Weighting, NOT_ON_WEIGHTS] = "simple"
    """weight of the loss over timesteps"""
    text_drop: Annotated[float, NOT_ON_WEIGHTS] = 0.1
    """probability of dropping the caption and z_t together"""
    text_tokens: int = 0
    """tokens of the caption that an own token table reads (256 in the paper); 0 = CLIP's token
    states"""
    time_channels: int = 0
    """sinusoids of the timestep; 0 = the width, 256 at most"""
    scale_text: bool = True
    """scale z_t as z_i"""
    image_tokens: int = 1
    """predict the k tokens beside z_i that ingest/embed.py --image-tokens k made; 1 = z_i alone"""
    clip_x0: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """bound on predicted components in sampling, in scaled units; 0 = none"""
    unit_norm: bool = True
    """draw embeddings of unit norm; training sets false for an encoder that keeps their length"""
    checkpointing: Annotated[bool | None, NOT_ON_WEIGHTS] = False
    """recompute activations in the backward pass: less memory, a third more time; None: where a
    GPU's memory has no room for them, and on a CPU"""


@dataclass(frozen=True, kw_only=True)
class AutoregressivePriorConfig(TransformerConfig):
    """Sizes of an autoregressive prior."""

    num_prefix: int = 64
    """positions of z_t and the pooled caption"""
    num_codes: int = 0
    """principal components that are coded; 0 = as many as contain `energy`"""
    energy: Annotated[float, NOT_ON_WEIGHTS] = 0.99
    """share of the embeddings' variance that the coded components contain"""
    codebook_size: int = 1024
    """buckets of a component, and of the dot product"""
    tell_components: bool = False
    """add z_t's value of its component to each code's input; not in the paper"""
    text_drop: Annotated[float, NOT_ON_WEIGHTS] = 0.1
    """probability of dropping the caption and z_t together"""
    text_tokens: int = 0
    """tokens of the caption that a text encoder of its own reads (256 in the paper); 0 = pool
    CLIP's token states"""
    text_width: Annotated[int, NEEDS_OWN_TEXT] = 512
    """channels of the own text encoder"""
    text_depth: Annotated[int, NEEDS_OWN_TEXT] = 6
    """blocks of the own text encoder"""
    text_heads: Annotated[int, NEEDS_OWN_TEXT] = 8
    """attention heads of the own text encoder"""


@dataclass(frozen=True, kw_only=True)
class RegressionPriorConfig(TransformerConfig):
    """Sizes of a regression prior."""

    depth: int = 4
    """transformer blocks"""
    contrastive_weight: Annotated[float, NOT_ON_WEIGHTS] = 0.2
    """weight of the contrastive term beside the squared error"""
    text_tokens: int = 0
    """tokens of the caption that an own token table reads; 0 = CLIP's token states"""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of a U-Net."""

    channels: int = 128
    """channels at the first resolution"""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """multiplier of the channels at each resolution"""
    num_res_blocks: int = 2
    """residual blocks per resolution"""
    attn_resolutions: tuple[int, ...] = (16, 8)
    """sides in cells, counted after patching, that get attention; in images of the training size"""
    head_channels: Annotated[int, NEEDS_ATTENTION] = 64
    """channels of an attention head"""
    dropout: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """dropout probability in residual blocks"""
    qk_norm: Annotated[bool, NEEDS_ATTENTION] = False
    """normalise queries and keys of attention"""
    checkpointing: Annotated[bool | None, NOT_ON_WEIGHTS] = False
    """recompute the blocks' activations in the backward pass: less memory, a third more time; None:
    where a GPU's memory has no room for them, and on a CPU"""
    patch_size: int = 1
    """side in px of the patches folded into channels before the first layer; 4 turns 32 px into
    8 x 8 cells"""
    refine_channels: int = 0
    """channels of two last convolutions over the unfolded pixels and the input, which smooth the
    borders of patches; 0 = none"""
    magnitude_preserving: bool = False
    """blocks that preserve unit magnitude of activations by normalised weights, without group norms
    and biases (Karras et al. 2024, EDM2); their attention is normalised without qk_norm"""
    channels_last: Annotated[bool, NOT_ON_WEIGHTS] = False
    """keep activations channels-last in memory, as compiled networks on GPUs do in any case; on the
    CPU group norms take up to ten times as long"""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a diffusion transformer over patches of pixels."""

    width: int = 384
    """channels of the transformer"""
    depth: int = 12
    """transformer blocks"""
    num_heads: int = 6
    """attention heads, of a multiple of 4 channels each"""
    patch_size: int = 4
    """side in px of a patch, which is one token"""
    bottleneck_channels: int = 0
    """channels between a patch's pixels and the width, fewer than both; 0 = no such layer"""
    refine_channels: int = 0
    """channels of two last convolutions over the unfolded pixels and the input, which smooth the
    borders of patches; 0 = none"""
    dropout: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """dropout probability in every block"""
    checkpointing: Annotated[bool | None, NOT_ON_WEIGHTS] = False
    """recompute the blocks' activations in the backward pass: less memory, a third more time; None:
    where a GPU's memory has no room for them, and on a CPU"""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and objective of the base decoder."""

    network: Literal["unet", "dit"] = "unet"
    """the paper's U-Net, or a transformer over patches"""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """sizes of the U-Net"""
    dit: DiTConfig = field(default_factory=DiTConfig)
    """sizes of the transformer"""
    num_embed_tokens: int = 4
    """tokens z_i is projected into (the paper's 4)"""
    embed_grid: bool = False
    """also map z_i to the first layer's cells: gives a small network positions"""
    image_tokens: int = 1
    """let attention read the k tokens beside z_i that ingest/embed.py --image-tokens k made; 1 =
    z_i alone"""
    image_tokens_drop: Annotated[float, NOT_ON_WEIGHTS] = 0.1
    """probability of hiding them where z_i stays, so that the decoder draws from z_i alone too"""
    use_text: bool = True
    """let attention read the caption's CLIP text states"""
    context_width: int = 256
    """width of the tokens that attention reads"""
    norm_embed_tokens: bool = True
    """normalise the tokens of z_i as those of the caption are"""
    text_embed_cond: bool = False
    """add z_t, projected, to the timestep embedding"""
    text_tokens: int = 0
    """tokens of the caption that an own text transformer of width context_width reads (256 in the
    paper); 0 = CLIP's token states"""
    text_depth: Annotated[int, NEEDS_OWN_TEXT] = 6
    """blocks of the own text transformer"""
    text_heads: Annotated[int, NEEDS_OWN_TEXT] = 8
    """attention heads of the own text transformer"""
    empty_caption: bool = False
    """replace a dropped caption by the empty one, as in diffusers' pipelines; false hides it"""
    schedule: ScheduleName = "cosine"
    """noise schedule"""
    num_timesteps: int = 1000
    """timesteps of the schedule"""
    zero_terminal: bool = False
    """leave no signal at the last timestep; needs prediction v or x0"""
    prediction: Prediction = "v"
    """what the network predicts"""
    learned_variance: bool = False
    """learn the variance of each step as well, for the sampler learned_ddpm"""
    bound_weight: Annotated[float, NOT_ON_WEIGHTS] = 1e-3
    """weight of the variational bound, from which the variance learns"""
    weighting: Annotated[Weighting, NOT_ON_WEIGHTS] = "min_snr"
    """weight of the loss over timesteps"""
    noise_bias: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """0 draws timesteps uniformly; larger draws them toward high noise"""
    image_embed_drop: Annotated[float, NOT_ON_WEIGHTS] = 0.1
    """probability of dropping z_i"""
    text_drop: Annotated[float, NOT_ON_WEIGHTS] = 0.5
    """probability of dropping the caption, independent of z_i"""
    embed_noise: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """largest standard deviation, in units of z_i's norm, of noise added to z_i in training"""


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Sizes and objective of an upsampler."""

    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            channels=64, attn_resolutions=(), channel_mult=(1, 2, 3, 4)
        )
    )
    """the network; as in the paper without attention, so that it runs at any size"""
    schedule: ScheduleName = "cosine"
    """noise schedule"""
    num_timesteps: int = 1000
    """timesteps of the schedule"""
    prediction: Prediction = "v"
    """what the network predicts"""
    weighting: Annotated[Weighting, NOT_ON_WEIGHTS] = "min_snr"
    """weight of the loss over timesteps"""
    noise_bias: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """0 draws timesteps uniformly; larger draws them toward high noise"""
    zero_terminal: bool = False
    """leave no signal at the last timestep; needs prediction v or x0"""
    degradation: Annotated[Degradation, NOT_ON_WEIGHTS] = "blur"
    """corruption of the low resolution in training: the first upsampler's blur, or the second's bsr
    (models/degradation.py); none: averages of pixels, as a base draws"""
    interpolation: Interpolation = "bilinear"
    """how the low resolution is raised to the network's"""
    residual: bool = False
    """the network predicts what the raised low resolution lacks; needs prediction x0"""
    low_res_noise: Annotated[float, NOT_ON_WEIGHTS] = 0.0
    """largest standard deviation of noise added to the low resolution in training"""
    tell_noise: bool = False
    """condition the network on the level of that noise; samplers add none and pass level 0"""
