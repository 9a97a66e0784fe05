"""What each model of a plan costs, counted on torch's meta device: parameters, multiplications, and
the bytes that a training step keeps.

Counting takes seconds a model, so the counts of the shipped presets are kept in counts.jsonl, by a
digest of the architecture. Its first line has a digest of the code that was counted. A model that
is not in the file is counted when it is asked for, and so are all after a change of that code.

python -c "from cluster.planning.counts import write_counts; write_counts()"    # after a change
"""

import ast
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from cluster.base.cli import parse
from cluster.base.files import Json, digest_of, write_text
from cluster.planning.request import CHAINS
from training.config import PRESETS, ClipRunConfig, DecoderRunConfig, PriorRunConfig

COUNTS = Path(__file__).parent / "counts.jsonl"
ROOT = COUNTS.parents[2]
SOURCES = (  # the code whose change makes stored counts wrong
    "models/clip.py", "models/configs.py", "models/costs.py", "models/decoder.py",
    "models/latents.py", "models/upsampler.py", "models/networks/*.py", "models/priors/*.py",
    "training/tasks/clip.py", "training/tasks/networks.py", "cluster/planning/counts.py",
)  # fmt: skip
TrainedConfig = ClipRunConfig | PriorRunConfig | DecoderRunConfig
CONFIGS: dict[str, type[TrainedConfig]] = {
    "clip": ClipRunConfig,
    "prior": PriorRunConfig,
    "decoder": DecoderRunConfig,
}
MAX_TOKENS = 256  # tokens of a caption that the paper's text encoders read
PROBE = 8  # samples on which the memory of a step is counted
BF16_BYTES = 2

Counts = Json  # one JSON object


def read_preset(kind: str, name: str, *flags: str) -> Any:
    """Return the configuration that a training script reads from a preset and flags."""
    return parse(CONFIGS[kind], presets=PRESETS / kind, argv=["--preset", name, *flags])


def architecture(config: TrainedConfig) -> tuple[str, Any]:
    """Return the name and value of the group of options that describes the network."""
    if isinstance(config, ClipRunConfig):
        return "model", config.model
    if isinstance(config, PriorRunConfig):
        return config.prior, getattr(config, config.prior)
    name = "base" if config.stage == "base" else "up"
    return name, getattr(config, name)


def encoder_counts(name: str) -> Counts:
    """Return the sizes of a CLIP, the multiply-accumulates of an image and of a caption, and the
    parameters that are left without its vision tower."""
    sizes: object = name
    if name.startswith("clip_"):
        sizes = dataclasses.asdict(read_preset("clip", name.removeprefix("clip_")).model)
    return _look_up({"encoder": name, "sizes": sizes}, lambda: _count_encoder(name))


def stage_counts(kind: str, config: TrainedConfig, encoder: Counts, tokens: int) -> Counts:
    """Return the counts of the model that a training script builds from `config`.

    tokens: of a caption, which the model reads. Returns `parameters` and their `tensors`; `macs` of
    a forward pass on one sample as it is trained; `text_macs`, the share of a text encoder of its
    own, which sampling runs once; `image_macs` on an image of full size; `activations`, as
    `count_model`.
    """
    sizes = {key: encoder[key] for key in ("embed_dim", "text_width", "context_length")}
    name, network = architecture(config)
    key = {
        "kind": kind, "network": name, "architecture": dataclasses.asdict(network),
        "sizes": sizes, "words": tokens,
    }  # fmt: skip
    if kind == "decoder":
        key |= {each: getattr(config, each) for each in ("image_size", "low_res_size", "crop_size")}
    return _look_up(key, lambda: _count_stage(config, sizes, tokens))


# -- the file of counts ----------------------------------------------------------------------------


@cache
def source_digest() -> str:
    """Return a digest of the code that is counted, without its comments and docstrings."""
    code = []
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None
        code.append(ast.dump(tree))
    return digest_of(code)[:16]


@cache
def _stored() -> dict[str, Counts]:
    """Return the counts of the file by digest; none where they are of other code than this."""
    text = COUNTS.read_text() if COUNTS.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    if lines[:1] != [{"sources": source_digest()}]:
        print(
            f"{COUNTS}: found no counts of this version of the models; they are counted again, "
            "which takes minutes (cluster.planning.counts.write_counts stores them)",
            file=sys.stderr,
        )
        return {}
    return {entry["digest"]: entry["counts"] for entry in lines[1:]}


def _look_up(key: Json, count: Callable[[], Counts]) -> Counts:
    digest = digest_of(key)[:16]
    if digest not in _stored():
        _stored()[digest] = count()
    return _stored()[digest]


def shipped() -> Iterator[Callable[[], Counts]]:
    """Yield a function for every model of a shipped chain, which looks its counts up."""
    for chain in CHAINS.values():
        encoder = encoder_counts(chain.encoder)
        yield partial(encoder_counts, chain.encoder)
        models: list[tuple[str, str, tuple[str, ...]]] = [("prior", chain.prior, ())]
        if chain.ar:
            models.append(("prior", chain.ar, ("--prior", "autoregressive")))
        models += [("decoder", name, ()) for name in chain.decoders]
        if chain.encoder.startswith("clip_"):
            models.append(("clip", chain.encoder.removeprefix("clip_"), ()))
        for kind, name, flags in models:
            config = read_preset(kind, name, *flags)
            tokens, _ = caption_tokens(config, encoder, MAX_TOKENS)
            yield partial(stage_counts, kind, config, encoder, tokens)


def caption_tokens(config: TrainedConfig, encoder: Counts, most: int) -> tuple[int, bool]:
    """Return how many tokens of a caption a model reads, and whether it reads them as states of the
    encoder's frozen text tower."""
    _, network = architecture(config)
    if isinstance(config, ClipRunConfig):
        return most, False
    has_text = hasattr(network, "text_tokens") and getattr(network, "use_text", True)
    own = network.text_tokens if has_text else 0
    return min(most, own or encoder["context_length"]), bool(has_text and not own)


def write_counts() -> None:
    """Count every shipped model again and replace the file."""
    _stored().clear()
    for look_up in shipped():
        look_up()
    lines = [{"digest": key, "counts": value} for key, value in _stored().items()]
    lines.insert(0, {"sources": source_digest()})
    write_text(COUNTS, "".join(f"{json.dumps(line)}\n" for line in lines))


# -- counting --------------------------------------------------------------------------------------


def build_encoder(name: str) -> Any:
    """Build a preset's CLIP ("clip_paper"), or one of open_clip's architectures, on the meta
    device."""
    import open_clip
    import torch

    from models.clip import build_clip

    with torch.device("meta"):
        if name.startswith("clip_"):
            return build_clip(read_preset("clip", name.removeprefix("clip_")).model)
        sizes = open_clip.get_model_config(name)
        if sizes is None:
            raise ValueError(f"encoder: found {name!r}, expected an architecture of open_clip")
        vision = open_clip.CLIPVisionCfg(**sizes["vision_cfg"])
        text = open_clip.CLIPTextCfg(**sizes["text_cfg"])
        return open_clip.CLIP(sizes["embed_dim"], vision, text)


def build_model(config: TrainedConfig, sizes: dict[str, int]) -> Any:
    """Build what a training script trains, for an encoder of these sizes, on the meta device."""
    import torch

    from training.tasks.clip import clip_model
    from training.tasks.networks import decoder_model, prior_model

    with torch.device("meta"):
        if isinstance(config, ClipRunConfig):
            return clip_model(config)
        if isinstance(config, PriorRunConfig):
            return prior_model(config, sizes)
        return decoder_model(config, sizes)


def _count_encoder(name: str) -> Counts:
    import torch

    from models.clip import model_sizes
    from models.costs import forward_macs, num_parameters

    model = build_encoder(name).eval()
    size, context = model_sizes(model)
    with torch.device("meta"):
        image, tokens = torch.zeros(1, 3, size, size), torch.ones(1, context, dtype=torch.long)
        image_macs = forward_macs(lambda: model.encode_image(image))
        caption_macs = forward_macs(lambda: model.encode_text(tokens))
    return {
        "embed_dim": int(model.text_projection.shape[1]),
        "text_width": int(model.token_embedding.weight.shape[1]),
        "context_length": context,
        "image_macs": image_macs, "caption_macs": caption_macs,
        "text_parameters": num_parameters(model) - num_parameters(model.visual),
    }  # fmt: skip


def _count_stage(config: TrainedConfig, sizes: dict[str, int], num_tokens: int) -> Counts:
    import torch

    from models.costs import forward_macs, forward_of

    model = build_model(config, sizes)
    counts = count_model(model, num_tokens)

    # A text encoder of a decoder's own, and an upsampler's whole image
    text_macs, image_macs = 0, counts["macs"]
    model.eval()
    if isinstance(config, DecoderRunConfig) and config.stage != "base":
        model.crop_size = config.image_size
        forward = forward_of(model, num_tokens)
        with torch.device("meta"):
            image_macs = forward_macs(forward)
    elif isinstance(config, DecoderRunConfig) and model.text_encoder is not None:
        tokens = torch.ones(1, num_tokens, dtype=torch.long, device="meta")
        text_macs = forward_macs(lambda: model.text_encoder(tokens, tokens > 0))
    return {**counts, "text_macs": text_macs, "image_macs": image_macs}


def count_model(model: Any, num_tokens: int) -> Counts:
    """Return `parameters`, their `tensors`, `macs` and `activations` of a model on the meta device.

    activations: by "kept" and "checkpointed", the bytes that a step holds beside its state: `fixed`
    (autocast's bf16 copies of weights) and `each` for every sample of a micro-batch.
    """
    import torch

    from models.configs import network_of
    from models.costs import forward_macs, forward_of, num_parameters, peak_bytes

    parameters = num_parameters(model)
    forward = forward_of(model.eval(), num_tokens)
    with torch.device("meta"):
        macs = forward_macs(forward)
    name, own_config = network_of(getattr(model, "config", None))
    network = getattr(model, name, model)
    may_checkpoint = hasattr(own_config, "checkpointing")
    activations = {}
    for name in ("kept", "checkpointed") if may_checkpoint else ("kept",):
        if may_checkpoint:
            checkpointing = name == "checkpointed"
            network.config = dataclasses.replace(own_config, checkpointing=checkpointing)
        fixed = BF16_BYTES * parameters
        peak = peak_bytes(model.train(), forward_of(model, num_tokens, PROBE))
        activations[name] = {"fixed": fixed, "each": max(0, peak - fixed) / PROBE}
    if may_checkpoint:
        network.config = own_config
    tensors = sum(p.requires_grad for p in model.parameters())
    return {"parameters": parameters, "tensors": tensors, "macs": macs, "activations": activations}
