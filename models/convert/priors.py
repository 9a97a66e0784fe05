"""Priors to and from the folder layout of diffusers' `PriorTransformer`: Karlo's, Kandinsky 2.2's.

    <folder>/config.json                              sizes, under diffusers' names
    <folder>/diffusion_pytorch_model.safetensors      weights

diffusers itself is not needed. Its prior differs from ours in options alone: no QK-norm, unscaled
z_t, as many sinusoids as channels. It has no learned null caption: pipelines guide away from CLIP's
encoding of the empty caption, which `null` gives.
"""

import json
from pathlib import Path

import torch

from models.configs import DiffusionPriorConfig
from models.convert.files import DiffusersModel, require_convertible, write_folder
from models.priors.base import PriorText
from models.priors.diffusion import NUM_EXTRA_TOKENS, DiffusionPrior

CLASS_NAME = "PriorTransformer"
CLIP_RANGE = 5.0  # of Karlo's UnCLIPScheduler
# The options of diffusers' class that a prior of the paper's shape does not have
REQUIRED = {
    "added_emb_type": "prd",
    "encoder_hid_proj_type": "linear",
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "additional_embeddings": NUM_EXTRA_TOKENS,
}
_PARAMETERS = {"position": "positional_embedding", "query": "prd_embedding"}
_LAYERS = {
    "time_in.0": "time_embedding.linear_1",
    "time_in.2": "time_embedding.linear_2",
    "x_in": "proj_in",
    "text_embed_in": "embedding_proj",
    "text_in.states": "encoder_hidden_states_proj",
    "norm_out": "norm_out",
    "out": "proj_to_clip_embeddings",
}
_BLOCK_LAYERS = {
    "norm_1": ["norm1"],
    "attention.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attention.out": ["attn1.to_out.0"],
    "norm_2": ["norm3"],
    "mlp.0": ["ff.net.0.proj"],
    "mlp.2": ["ff.net.2"],
}


def _places(depth: int) -> dict[str, list[str]]:
    """Return for each of our tensors diffusers' tensors that it is the concatenation of."""
    layers = {name: [other] for name, other in _LAYERS.items()}
    for i in range(depth):
        for name, others in _BLOCK_LAYERS.items():
            names = [f"transformer_blocks.{i}.{other}" for other in others]
            layers[f"blocks.{i}.{name}"] = names
    places = {name: [other] for name, other in _PARAMETERS.items()}
    for name, others in layers.items():
        for kind in ("weight", "bias"):
            places[f"{name}.{kind}"] = [f"{other}.{kind}" for other in others]
    return places


def prior_from_diffusers(
    folder: Path | str, null: PriorText | None = None, *, unit_norm: bool = True
) -> DiffusionPrior:
    """Load a diffusion prior from diffusers' layout.

    null: the empty caption, one row; None keeps an untrained null, which guidance must not use.
    unit_norm: whether the encoder's embeddings have unit norm; diffusers' own draws do not.
    Raises ValueError for another class, shape of network or set of tensors.
    """
    folder = Path(folder)
    source = DiffusersModel(folder, CLASS_NAME)
    source.require(REQUIRED)

    # Without a scheduler's file, Karlo's bound on x0
    path = folder.parent / "prior_scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) if path.is_file() else {}
    clip_x0 = 0.0
    if scheduler.get("clip_sample", True):
        clip_x0 = float(scheduler.get("clip_sample_range", CLIP_RANGE))

    heads, depth = source.option("num_attention_heads"), source.option("num_layers")
    width, embed_dim = heads * source.option("attention_head_dim"), source.option("embedding_dim")
    config = DiffusionPriorConfig(
        width=width, depth=depth, num_heads=heads, dropout=source.config.get("dropout", 0.0),
        qk_norm=False, scale_text=False, time_channels=width, unit_norm=unit_norm, clip_x0=clip_x0,
    )  # fmt: skip
    prior = DiffusionPrior(
        config,
        embed_dim=embed_dim,
        text_width=embed_dim,
        context_length=source.option("num_embeddings"),
    )
    state = prior.state_dict()
    for name, others in _places(depth).items():
        state[name] = torch.cat([source.take(other) for other in others])
    for name in ("mean", "std"):
        state[f"scale.{name}"] = source.take(f"clip_{name}")[0]
    state["scale.spectrum"] = torch.ones(embed_dim)  # whitened
    source.require_empty()
    prior.load_state_dict(state)

    if null is not None:
        # a dropped caption becomes `null`: its states, its z_t, its mask
        count, room = int(null.token_mask.sum()), prior.null_text.shape[1]
        if count > room:
            raise ValueError(f"null: found a caption of {count} tokens, expected at most {room}")
        with torch.no_grad():
            prior.null_text[:, :count].copy_(prior.text_in(null.text[:, :count]))
            prior.null_text_embed.copy_(prior.text_embed_in(null.text_embed)[:, None])
        prior.null_length.fill_(count)
    return prior.eval()


def prior_to_diffusers(prior: DiffusionPrior, folder: Path | str) -> None:
    """Write a diffusion prior in diffusers' layout, without its null caption.

    Raises ValueError for a prior that diffusers' class cannot be, naming the option.
    """
    config, folder = prior.config, Path(folder)
    text_width = prior.text_in.states.in_features if prior.text_in.states is not None else 0
    options = {
        "image_tokens": (config.image_tokens, 1),
        "qk_norm": (config.qk_norm, False),
        "scale_text": (config.scale_text, False),
        "time_channels": (prior.time_in.sinusoids, config.width),
        "text_width": (text_width, prior.embed_dim),
        "schedule": ((config.schedule, config.zero_terminal), ("cosine", False)),
    }
    require_convertible(folder, CLASS_NAME, options)
    state, tensors = prior.state_dict(), {}
    for name, others in _places(config.depth).items():
        tensors.update(zip(others, state[name].chunk(len(others)), strict=True))
    tensors["clip_mean"], tensors["clip_std"] = state["scale.mean"][None], state["scale.std"][None]
    target = {
        "_class_name": CLASS_NAME,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.width // config.num_heads,
        "num_layers": config.depth,
        "embedding_dim": prior.embed_dim,
        "num_embeddings": prior.length - NUM_EXTRA_TOKENS,
        "dropout": config.dropout,
        **REQUIRED,
    }
    write_folder(folder, target, tensors)
