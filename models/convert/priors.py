"""Priors to and from the folder layout of diffusers' `PriorTransformer`: Karlo's, Kandinsky 2.2's.

    <folder>/config.json                              sizes, under diffusers' names
    <folder>/diffusion_pytorch_model.safetensors      weights

diffusers itself is not needed. Its prior differs from ours in options alone: no QK-norm, z_t as it
is, as many sinusoids as channels. It has no learned null caption: pipelines guide away from CLIP's
encoding of the empty one, which `null` gives.
"""

import json
from functools import partial
from pathlib import Path

import torch

from models.configs import DiffusionPriorConfig
from models.convert.files import (
    option,
    read_folder,
    require,
    require_option,
    require_used,
    taken,
    write_folder,
)
from models.priors.base import PriorText
from models.priors.diffusion import NUM_EXTRA_TOKENS, DiffusionPrior

CLASS_NAME = "PriorTransformer"
HEAD_CHANNELS = "attention_head_dim"
CLIP_RANGE = 5.0
# what diffusers can vary and a prior of the paper's shape does not have
REQUIRED = {
    "added_emb_type": "prd",
    "encoder_hid_proj_type": "linear",
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "additional_embeddings": NUM_EXTRA_TOKENS,
}
_NAMES = {
    "position": "positional_embedding",
    "query": "prd_embedding",
    "time_in.0": "time_embedding.linear_1",
    "time_in.2": "time_embedding.linear_2",
    "x_in": "proj_in",
    "text_embed_in": "embedding_proj",
    "text_in.states": "encoder_hidden_states_proj",
    "norm_out": "norm_out",
    "out": "proj_to_clip_embeddings",
}
_BLOCK_NAMES = {
    "norm_1": "norm1",
    "attention.out": "attn1.to_out.0",
    "norm_2": "norm3",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def prior_from_diffusers(
    folder: Path | str, null: PriorText | None = None, *, unit_norm: bool = True
) -> DiffusionPrior:
    """Load a diffusion prior from diffusers' layout.

    null: the empty caption, one row; None keeps an untrained null, which guidance must not use;
    unit_norm: of the encoder's embeddings, which diffusers' own draws do not have.
    Raises ValueError for another class, shape of network or set of tensors.
    """
    folder = Path(folder)
    told, found = read_folder(folder, CLASS_NAME)
    require(folder, told, REQUIRED)
    heads, head, depth, dim, context = (
        option(folder, told, name)
        for name in (
            "num_attention_heads", HEAD_CHANNELS, "num_layers", "embedding_dim", "num_embeddings",
        )
    )  # fmt: skip
    sizes = DiffusionPriorConfig(
        width=heads * head, depth=depth, num_heads=heads,
        dropout=told.get("dropout", 0.0), qk_norm=False, scale_text=False,
        time_channels=heads * head, unit_norm=unit_norm, clip_x0=_clip_range(folder),
    )  # fmt: skip
    prior = DiffusionPrior(sizes, embed_dim=dim, text_width=dim, context_length=context)
    state, take = prior.state_dict(), partial(taken, folder, found)
    wanted = {name: take(other) for name, other in _pairs(depth)}
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [take(f"transformer_blocks.{i}.{part}.{kind}") for part in _QKV]
            wanted[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(parts)
    wanted["scale.mean"], wanted["scale.std"] = (take(f"clip_{n}")[0] for n in ("mean", "std"))
    wanted["scale.spectrum"] = torch.ones(dim)  # whitened
    require_used(folder, found)
    prior.load_state_dict({**state, **wanted})
    if null is not None:
        _set_null(prior, null)
    return prior.eval()


def _clip_range(folder: Path) -> float:
    """Return the bound on x0 that the pipeline's scheduler tells of; without one, UnCLIPScheduler's
    of Karlo."""
    path = folder.parent / "prior_scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    bound = told.get("clip_sample_range", CLIP_RANGE)
    return float(bound) if told.get("clip_sample", True) else 0.0


def _set_null(prior: DiffusionPrior, null: PriorText) -> None:
    """Let a dropped caption be read as `null` is: its states, its z_t, its mask."""
    count, room = int(null.token_mask.sum()), prior.null_text.shape[1]
    if count > room:
        raise ValueError(f"null: found a caption of {count} tokens, expected at most {room}")
    with torch.no_grad():
        prior.null_text[:, :count].copy_(prior.text_in(null.text[:, :count]))
        prior.null_text_embed.copy_(prior.text_embed_in(null.text_embed)[:, None])
    prior.null_length.fill_(count)


def prior_to_diffusers(prior: DiffusionPrior, folder: Path | str) -> None:
    """Write a diffusion prior in diffusers' layout; its null caption stays behind.

    Raises ValueError for a prior that diffusers' class cannot be, naming the option.
    """
    sizes, folder = prior.config, Path(folder)
    text_width = prior.text_in.states.in_features if prior.text_in.states is not None else 0
    for name, found, wanted in (
        ("qk_norm", sizes.qk_norm, False),
        ("scale_text", sizes.scale_text, False),
        ("time_channels", prior.time_in.sinusoids, sizes.width),
        ("text_width", text_width, prior.embed_dim),
        ("schedule", (sizes.schedule, sizes.zero_terminal), ("cosine", False)),
    ):
        require_option(folder, CLASS_NAME, name, found, wanted)
    state = prior.state_dict()
    tensors = {other: state[name] for name, other in _pairs(sizes.depth)}
    for i in range(sizes.depth):
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attention.qkv.{kind}"].chunk(3)
            names = [f"transformer_blocks.{i}.{part}.{kind}" for part in _QKV]
            tensors.update(zip(names, parts, strict=True))
    tensors["clip_mean"], tensors["clip_std"] = state["scale.mean"][None], state["scale.std"][None]
    told = {
        "_class_name": CLASS_NAME,
        "num_attention_heads": sizes.num_heads,
        HEAD_CHANNELS: sizes.width // sizes.num_heads,
        "num_layers": sizes.depth,
        "embedding_dim": prior.embed_dim,
        "num_embeddings": prior.length - NUM_EXTRA_TOKENS,
        "dropout": sizes.dropout,
        **REQUIRED,
    }
    write_folder(folder, told, tensors)


def _pairs(depth: int) -> list[tuple[str, str]]:
    """Return our names of tensors that differ in name alone, with diffusers'."""
    parameters = ("position", "query")
    pairs = [(name, _NAMES[name]) for name in parameters]
    layers = {name: other for name, other in _NAMES.items() if name not in parameters}
    for i in range(depth):
        for name, other in _BLOCK_NAMES.items():
            layers[f"blocks.{i}.{name}"] = f"transformer_blocks.{i}.{other}"
    return pairs + [
        (f"{name}.{kind}", f"{other}.{kind}")
        for name, other in layers.items()
        for kind in ("weight", "bias")
    ]
