"""CLIP through open_clip: built small from scratch, loaded from a run, or by architecture and tag.

Frozen CLIP stays outside the training engine: `FrozenClip` encodes, it is never trained. open_clip,
which takes seconds to import, is imported by those who build a model.
"""

import copy
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.architectures import find_architecture
from models.configs import ClipConfig, token_side
from models.convert import efficientnet
from models.networks.compiling import compiled
from models.networks.conv_tower import ConvTower, mean_parts
from models.networks.packing import Packing
from models.networks.transformer import attend_packed, trimmed_length
from models.tokenizers import VOCAB_SIZE, Tokenizer, TokenizerConfig, token_mask
from models.weights import digest

if TYPE_CHECKING:
    from open_clip import CLIP

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, as in open_clip's models
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5
LOGITS = ("logit_scale", "logit_bias")  # of a CLIP: they do not affect embeddings
MAX_ASPECT_RATIO = 8  # of an image that is resized before its middle is cut out
_OPTIONS = ("num_heads", "eps", "pool_type", "text_pool_type", "text_eos_id")  # open_clip's names
# open_clip's first and last layers, in any of its towers, by how a part of their name begins
_OUTER_LAYERS = ("token_embedding", "position", "text_projection", "query", "conv1", "proj")
RAW = "+raw"  # ends the name of an encoder whose embeddings keep their length


def is_clip_outer(name: str) -> bool:
    """Return whether a parameter of open_clip's is of a first or last layer: `outer_layers` of our
    own modules."""
    return any(part.startswith(_OUTER_LAYERS) for part in name.split("."))


def is_clip(model: nn.Module) -> "TypeGuard[CLIP]":
    """Return whether a model is one of open_clip's, which this does not import."""
    loaded = sys.modules.get("open_clip")  # by whoever built such a model
    return loaded is not None and isinstance(model, loaded.CLIP)


class ImageTower(nn.Module):
    """A published network that stays as it is, under a projection that learns: locked-image tuning
    (Zhai et al. 2022).

    Its weights are no part of this module: they are installed on every machine, never change, and
    would make each checkpoint 14 MB larger. A run's config.json has their digest. They are loaded
    when the first pixels come; training sees the features alone, each computed once.
    """

    image_size = efficientnet.SIDE
    image_mean = (efficientnet.MEAN / 255,) * 3
    image_std = (efficientnet.SCALE / 255,) * 3

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.output_dim = embed_dim
        self.proj = nn.Linear(efficientnet.DIM, embed_dim)
        self._frozen: list[efficientnet.EfficientNetLite0] = []  # in a list: no submodule

    def features(self, pixels: Tensor) -> Tensor:
        """Return what the projection takes, float32 [B, 1280], of uint8 or float [B, 3, 224, 224]
        in [0, 255]."""
        return self._network(pixels)(pixels)

    def _network(self, like: Tensor) -> efficientnet.EfficientNetLite0:
        if not self._frozen:
            self._frozen.append(efficientnet.EfficientNetLite0())
        return self._frozen[0].to(like.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection [B, E] of features [B, 1280], or of standardised pixels
        [B, 3, 224, 224]."""
        if x.ndim == 4:
            x = self.features(x * efficientnet.SCALE + efficientnet.MEAN)
        return self.proj(F.layer_norm(x, x.shape[-1:]))

    def with_tokens(self, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return the embeddings [B, E] of standardised pixels [B, 3, 224, 224], and tokens
        [B, E, side, side], each the projection of the features of a part of the image."""
        network = self._network(x)
        maps = network.maps(x * efficientnet.SCALE + efficientnet.MEAN)  # [B, 1280, 7, 7]
        parts = mean_parts(maps, side).movedim(1, -1).float()  # [B, side, side, 1280]
        tokens = self(parts.flatten(0, 2)).unflatten(0, parts.shape[:3])  # [B, side, side, E]
        return self(network.pooled(maps).float()), tokens.movedim(-1, 1)


def _with_tokens(tower: Any, pixels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the embeddings [B, E] of standardised pixels [B, 3, S, S] by an image tower, and its
    tokens [B, E, side, side]: means over parts of its last map, projected as the embedding is.

    Raises ValueError for a tower that is neither a plain vision transformer nor one of this
    project: what pools by attention has its map in another space, and timm's towers project in
    several ways.
    """
    if isinstance(tower, ImageTower | ConvTower):
        return tower.with_tokens(pixels, side)
    projection = getattr(tower, "proj", None)
    pools_by_attention = getattr(tower, "attn_pool", None) is not None
    if isinstance(projection, Tensor) and not pools_by_attention:
        output = tower.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, output_fmt="NCHW"
        )
        embed, maps = output["image_features"], output["image_intermediates"][-1]  # [B, C, h, w]
        maps = mean_parts(maps.float(), side)  # [B, C, side, side]
        return embed, torch.einsum("bchw,ce->behw", maps, projection.float())
    raise ValueError(
        f"image_tokens: found {side**2} for a {type(tower).__name__}, expected 1, z_i alone: the "
        "places of its last map are not projected as its embedding is"
    )


def build_clip(config: ClipConfig, image_tower: str = "") -> "CLIP":
    """Build an untrained open_clip model; ValueError for an unknown architecture.

    image_tower: "efficientnet_lite0" takes an `ImageTower` in the place of the vision tower.
    """
    clip = _build_towers(config)
    projection = clip.text_projection
    if image_tower:
        assert isinstance(projection, nn.Parameter)
        clip.add_module("visual", ImageTower(int(projection.shape[1])))
    elif config.vision == "convolutions" and not config.architecture:
        size, width, depth = config.image_size, config.vision_width, config.vision_depth
        clip.add_module("visual", ConvTower(size, width, depth, config.embed_dim))
    return clip


def _build_towers(config: ClipConfig) -> "CLIP":
    import open_clip

    if config.architecture:
        architecture = find_architecture(config.architecture)
        clip = architecture.create()
        if not isinstance(clip, open_clip.CLIP) or architecture.tokenizer.source:
            kind = f"{type(clip).__name__} of tokenizer {architecture.tokenizer.source or 'CLIP'}"
            raise ValueError(
                f"clip architecture: found {config.architecture}, a {kind}, expected a CLIP of "
                "CLIP's own tokenizer: others embed, with weights that are there, and are not "
                "trained here"
            )
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
        return clip
    vision = open_clip.CLIPVisionCfg(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.vision_width,
        layers=config.vision_depth,
        head_width=config.head_channels,
    )
    text = open_clip.CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.text_width,
        layers=config.text_depth,
        heads=config.text_width // config.head_channels,
    )
    return open_clip.CLIP(
        config.embed_dim,
        vision,
        text,
        init_logit_scale=-math.log(config.temperature),
        nonscalar_logit_scale=True,  # DeepSpeed cannot broadcast a parameter without dimensions
    )


def normalise_pixels(
    image: Tensor,
    pixel_mean: tuple[float, ...] = PIXEL_MEAN,
    pixel_std: tuple[float, ...] = PIXEL_STD,
) -> Tensor:
    """Map uint8 [B, 3, S, S] to standardised float32; mean and deviation of pixels in [0, 1]."""
    # filled in on the device: a copy from the host would wait for it
    mean, std = (
        torch.stack([torch.full((1, 1), value, device=image.device) for value in values])
        for values in (pixel_mean, pixel_std)
    )
    return (image.float() / 255 - mean) / std


def preprocess(
    image: Image.Image, size: int, interpolation: str = "bicubic", resize_mode: str = "shortest"
) -> np.ndarray:
    """Resize the short side to `size` (antialiased) and crop the centre: uint8 [3, size, size].

    interpolation: bicubic or bilinear; resize_mode: squash resizes both sides instead. Rounded as
    torchvision rounds, whose transforms open_clip's weights were trained with. Of an image longer
    than `MAX_ASPECT_RATIO`, only the middle is resized: all of it may take gigabytes.
    """
    image = image.convert("RGB")
    short, most = min(image.size), MAX_ASPECT_RATIO * min(image.size)
    method = Image.Resampling[interpolation.upper()]
    if max(image.size) > most and resize_mode != "squash":
        left, top = (max(0, side - most) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    if resize_mode == "squash":
        image = image.resize((size, size), method) if image.size != (size, size) else image
    elif short != size:
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        image = image.resize((width, height), method)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1).copy()


def model_sizes(clip: "CLIP") -> tuple[int, int]:
    """Return the side of the input in px and the length of a caption in tokens."""
    size = clip.visual.image_size
    return int(size if isinstance(size, int) else size[0]), int(clip.context_length)


def model_options(clip: "CLIP") -> dict[str, object]:
    """Return what determines a CLIP's outputs beside its weights: "module.option" -> value.

    The type of each module, such as GELU or QuickGELU, and the options that no weight's shape
    determines, such as the number of heads.
    """
    options: dict[str, object] = {}
    for name, module in clip.named_modules():
        prefix = f"{name}." if name else ""
        options[f"{prefix}type"] = type(module).__name__
        for option in _OPTIONS:
            if (value := getattr(module, option, None)) is not None:
                options[f"{prefix}{option}"] = value
    return options


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a pair becomes an encoder's input. image_size: px; interpolation, resize_mode: see
    `preprocess`."""

    image_size: int
    tokenizer: TokenizerConfig
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return `image` as the encoder's input, uint8 [3, S, S]."""
        return preprocess(image, self.image_size, self.interpolation, self.resize_mode)

    @property
    def name(self) -> str:
        """What of this an encoder's id says."""
        crop = "centre" if self.resize_mode == "shortest" else self.resize_mode
        return f"{self.interpolation}-{crop}-{self.image_size}"


class FrozenClip(nn.Module):
    """One of open_clip's models that only encodes: a CLIP, a CustomTextCLIP (SigLIP, EVA, ...) or a
    CoCa.

    encoder_id: architecture, weights digest and preprocessing; encoded tensors carry it, and mixing
    two is an error. Pixels are standardised as the weights' own configuration says: some of
    open_clip's were trained with other statistics than OpenAI's. unit_norm: False leaves embeddings
    as long as the towers make them, which published unCLIP pipelines were trained on. text: its
    tokenizer, None = CLIP's, of the model's own sizes.
    """

    def __init__(
        self, clip: nn.Module, name: str, *, unit_norm: bool = True,
        text: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unit_norm = unit_norm
        # open_clip annotates its modules as Tensor | Module
        self.clip: Any = clip.eval().requires_grad_(False)
        image_size, context_length = model_sizes(self.clip)
        tower, is_clip = self._text, self._text is self.clip
        if text is None:
            vocab_size = min(VOCAB_SIZE, int(tower.vocab_size))
            sizes = TokenizerConfig(context_length=context_length, vocab_size=vocab_size)
            text = Tokenizer(sizes)
        self.tokenize, self.context_length = text, text.config.context_length

        # Three kinds of text towers: of Hugging Face, with a class token as CoCa's, and plain ones
        self._is_hugging_face = isinstance(getattr(tower, "pooler", None), nn.Module)
        self._has_class_token = getattr(tower, "cls_emb", None) is not None
        if self._has_class_token:
            tower.output_tokens = True  # beside the embedding
        self._pool_type = tower.text_pool_type if is_clip else getattr(tower, "pool_type", "")
        self._eos_id = tower.text_eos_id if is_clip else getattr(tower, "eos_id", None)
        if self._is_hugging_face:
            self.text_width = int(tower.config.hidden_size)
        else:
            self.text_width = int(tower.ln_final.weight.shape[0])
        if is_clip and isinstance(tower.text_projection, Tensor):
            self.embed_dim = int(tower.text_projection.shape[1])
        else:
            self.embed_dim = int(
                tower.text_projection.out_features if is_clip else tower.output_dim
            )

        # Its identity, without what does not affect embeddings
        state = clip.state_dict()
        others = (*LOGITS, "text_decoder.")  # the last one writes a CoCa's captions
        weights = digest({k: v for k, v in state.items() if not k.startswith(others)})[:16]
        visual = self.clip.visual
        options = getattr(visual, "preprocess_cfg", None) or {}
        self.preprocessing = Preprocessing(
            image_size=image_size,
            tokenizer=text.config,
            interpolation=options.get("interpolation") or "bicubic",
            resize_mode=options.get("resize_mode") or "shortest",
        )
        if self.preprocessing.resize_mode not in ("shortest", "squash"):
            raise ValueError(
                f"clip {name}: found resize_mode {self.preprocessing.resize_mode}, expected "
                "shortest or squash"
            )
        self.pixel_mean = tuple(getattr(visual, "image_mean", None) or PIXEL_MEAN)
        self.pixel_std = tuple(getattr(visual, "image_std", None) or PIXEL_STD)
        self.encoder_id = f"{name}@{weights}/{self.preprocessing.name}"
        if (self.pixel_mean, self.pixel_std) != (PIXEL_MEAN, PIXEL_STD):
            statistics = (*self.pixel_mean, *self.pixel_std)
            self.encoder_id += "".join(f"-{value:g}" for value in statistics)
        if not unit_norm:
            self.encoder_id += RAW
        self._bf16_blocks: list[nn.Module] = []  # not registered: a copy, see `encode_packed`

    @property
    def image_size(self) -> int:
        """Side of the input in px."""
        return self.preprocessing.image_size

    @property
    def _text(self) -> Any:
        """What has the parts of the text tower: a CLIP itself."""
        return getattr(self.clip, "text", self.clip)

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Return `image` as this encoder's input, uint8 [3, S, S]."""
        return self.preprocessing.pixels(image)

    @property
    def device(self) -> torch.device:
        """The device that inputs are moved to and results are on."""
        return self.clip.logit_scale.device

    def on(self, device: torch.device) -> "FrozenClip":
        """Move to a device, once: `to` would look at every weight in every step."""
        if self.device != device:
            self._bf16_blocks = []
            self.to(device)
        return self

    def drop_vision(self) -> None:
        """Free the vision tower, most of the weights, where only captions are encoded, as in
        training; and the part of a CoCa that writes captions."""
        self.clip.visual = None
        if hasattr(self.clip, "text_decoder"):
            self.clip.text_decoder = None

    @torch.no_grad()
    def encode_image(self, image: Tensor, num_tokens: int = 1) -> Tensor:
        """Encode uint8 [B, 3, S, S] to float32 [B, E], of unit norm if `unit_norm`.

        num_tokens: k = s^2 > 1 for [B, 1 + k, E]: behind each embedding k tokens of unit norm, of
        s x s parts of the image, row by row. Raises ValueError after `drop_vision`, and for a tower
        whose tokens have another width.
        """
        if self.clip.visual is None:
            raise ValueError("encoder: found no vision tower any more, expected one; load it again")
        pixels = normalise_pixels(image.to(self.device), self.pixel_mean, self.pixel_std)
        if num_tokens == 1:
            return self._of_length(self.clip.encode_image(pixels, normalize=False).float())
        embed, maps = _with_tokens(self.clip.visual, pixels, token_side(num_tokens))
        tokens = F.normalize(maps.flatten(2).transpose(1, 2).float(), dim=-1)  # [B, k, E]
        return torch.cat([self._of_length(embed.float())[:, None], tokens], dim=1)

    def _of_length(self, embed: Tensor) -> Tensor:
        return F.normalize(embed, dim=-1) if self.unit_norm else embed

    def trimmed(self, tokens: Tensor) -> Tensor:
        """Return tokens int [B, L] without the columns that are padding in every row, if the tower
        does not read them: a causal one that pools at a caption's end.

        Most captions fill a fifth of the context. Tokens on a GPU stay as they are: to read their
        lengths would be to wait for it.
        """
        may_trim = self.is_causal and not tokens.is_cuda
        return tokens[:, : trimmed_length(token_mask(tokens))] if may_trim else tokens

    @property
    def is_causal(self) -> bool:
        """Whether the text tower reads no padding: a causal one that pools at a caption's end."""
        is_plain = not self._is_hugging_face and not self._has_class_token
        pools_at_end = self._pool_type in ("argmax", "eos")
        return is_plain and self._text.attn_mask is not None and pools_at_end

    @property
    def packs_text(self) -> bool:
        """Whether `encode_packed` knows the text tower: a causal one of open_clip's plain blocks.

        Towers of other blocks (QK-norm, scaled cosine) encode padded captions.
        """
        from open_clip.transformer import ResidualAttentionBlock

        return self.is_causal and all(
            type(block) is ResidualAttentionBlock for block in self._text.transformer.resblocks
        )

    @torch.no_grad()
    def encode_packed(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Encode packed captions, int64 [S], to text_states float32 [S, W], those of
        `encode_text`.

        Under bf16 autocast on a GPU the linear layers are a bf16 copy, where autocast would convert
        frozen weights again at every call. For towers that `packs_text` names.
        """
        text = self._text
        x = text.token_embedding(self.tokenize.ids(tokens))
        x = x + F.embedding(packing.position, text.positional_embedding)
        for block in self._text_blocks(x) if len(x) else ():
            x = self._packed_block(block, x, packing)  # [S, W]
        return text.ln_final(x).float()

    @compiled(dynamic=None)
    def _packed_block(self, block: Any, x: Tensor, packing: Packing) -> Tensor:
        """Run a block of open_clip's on packed tokens [S, W], each caption for itself."""
        attention = block.attn
        qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)  # [S, 3 W]
        q, k, v = (y.unflatten(-1, (attention.num_heads, -1)) for y in qkv.chunk(3, dim=-1))
        y = attend_packed(q, k, v, packing).flatten(1)  # [S, W]
        x = x + block.ls_1(attention.out_proj(y))
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def _text_blocks(self, like: Tensor) -> Iterable[Any]:
        """Return the tower's blocks in the precision of a call."""
        if not like.is_cuda or not torch.is_autocast_enabled():
            return self._text.transformer.resblocks
        if not self._bf16_blocks:
            blocks = copy.deepcopy(self._text.transformer.resblocks)
            kinds = nn.Linear | nn.MultiheadAttention
            layers = [module for module in blocks.modules() if isinstance(module, kinds)]
            for parameter in (p for layer in layers for p in layer.parameters(recurse=False)):
                parameter.data = parameter.to(torch.get_autocast_dtype(like.device.type))
            self._bf16_blocks = list(blocks)
        return self._bf16_blocks

    @torch.no_grad()
    def pool_packed(self, states: Tensor, tokens: Tensor, packing: Packing) -> Tensor:
        """Return text_embed float32 [B, E], of unit norm if `unit_norm`, of packed text_states
        float32 [S, W] and their tokens int64 [S]; no caption may be empty."""
        ids = self.tokenize.ids(packing.pad(tokens, self.context_length))  # [B, L]
        is_end = ids if self._pool_type == "argmax" else ids == self._eos_id
        end = packing.offsets[:-1] + is_end.int().argmax(1)  # [B]
        return self._projected(states.index_select(0, end))

    def _projected(self, pooled: Tensor) -> Tensor:
        projection = self._text.text_projection
        if projection is not None:
            linear = isinstance(projection, nn.Linear)
            pooled = projection(pooled) if linear else pooled @ projection
        return self._of_length(pooled.float())

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode int [B, L] to text_embed float32 [B, E], of unit norm if `unit_norm`, and
        text_states float32 [B, L, W], the last layer's after the tower's final norm.

        L may be less than the context: see `trimmed`.
        """
        from open_clip.transformer import text_global_pool

        text, ids = self._text, self.tokenize.ids(tokens.to(self.device).long())
        if self._is_hugging_face:
            keep = (ids != text.config.pad_token_id).long()
            output = text.transformer(input_ids=ids, attention_mask=keep)
            embed = text.proj(text.pooler(output, keep))
            return self._of_length(embed.float()), output.last_hidden_state.float()
        if self._has_class_token:
            embed, states = text(ids)  # without the class token, before the norm
            return self._of_length(embed.float()), text.ln_final(states).float()
        length = ids.shape[1]
        x = text.token_embedding(ids) + text.positional_embedding[:length]
        mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
        states = text.ln_final(text.transformer(x, attn_mask=mask))
        pooled = text_global_pool(states, ids, self._pool_type, eos_token_id=self._eos_id)
        return self._projected(pooled), states.float()
