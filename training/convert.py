"""Published pipelines in diffusers' layout, to and from finished runs.

python training/convert.py --diffusers karlo/ --part decoder --clip ViT-L-14-quickgelu:clip.safetensors+raw --run runs/karlo_base
python training/decoder.py --init runs/karlo_base ...           # fine-tune it
python training/convert.py --export --run runs/tuned --part decoder --diffusers karlo_tuned/

    <diffusers>/prior/  decoder/  text_proj/  super_res_first/  super_res_last/

Published pipelines were trained on embeddings as CLIP's towers make them, not brought to unit norm:
+raw says so. Embed images anew with the same name before fine-tuning.

Karlo's last step of its upsampler is a network of its own, which stays behind: `--part upsampler`
reads the first, and writes what it has as both.
"""  # noqa: E501

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.base.cli import parse, require_local, run_script

STEP = "step_00000000"
FOLDERS = {  # of a pipeline, that each part is written to
    "prior": ("prior",),
    "decoder": ("decoder", "text_proj"),
    "upsampler": ("super_res_first", "super_res_last"),
}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """One part of a pipeline, in one direction."""

    part: Literal["prior", "decoder", "upsampler"] = "decoder"
    """which part"""
    diffusers: str = ""
    """folder of the pipeline"""
    run: str = ""
    """folder of the run: written new, or with --export a finished one"""
    clip: str = ""
    """encoder that the part was trained on, as in ingest/embed.py, with +raw behind where it was
    trained on embeddings of other than unit norm; not for upsamplers"""
    factor: int = 4
    """by which an upsampler enlarges"""
    export: bool = False
    """write the pipeline's part from the run"""


def main(config: ConvertConfig) -> int:
    """Convert one part."""
    for name in ("diffusers", "run"):
        if not getattr(config, name):
            raise ValueError(f"--{name}: found none, expected a folder")
    written = "diffusers" if config.export else "run"
    require_local(f"--{written}", getattr(config, written))
    if config.export:
        _export(config)
        print(f"{config.diffusers}: {config.part} of {config.run}")
    else:
        _take_in(config)
        print(f"{config.run}: a finished run; draw from it, or fine-tune it with --init")
    return 0


def _take_in(config: ConvertConfig) -> None:
    """Write a finished run from a pipeline's part."""
    from models.weights import FINAL_NAME, save_config, save_weights

    run = Path(config.run)
    if run.is_dir() and any(run.iterdir()):
        raise ValueError(f"{run}: found a folder with files, expected none; name another --run")
    if (config.part == "upsampler") == bool(config.clip):
        wanted = "none" if config.clip else "the encoder that the part was trained on"
        raise ValueError(
            f"--clip: found {config.clip or 'none'} for {config.part}, expected {wanted}"
        )
    model, told = _upsampler(config) if config.part == "upsampler" else _of_encoder(config)
    folder = run / STEP
    folder.mkdir(parents=True)
    state = model.state_dict()
    for name in ("model.safetensors", "ema.safetensors"):
        save_weights(folder / name, state)
    save_config(folder, {"model": dataclasses.asdict(model.config), **told})
    (run / FINAL_NAME).write_text(json.dumps({"step": STEP}))


def _of_encoder(config: ConvertConfig) -> tuple[Any, dict[str, Any]]:
    """Load a prior or a decoder, and say for which encoder; ValueError for one of other sizes."""
    import torch

    from models.clip import absolute_spec, load_clip, token_mask
    from models.convert.priors import prior_from_diffusers
    from models.convert.unets import decoder_from_diffusers
    from models.priors.base import PriorText

    encoder, folder = load_clip(config.clip), Path(config.diffusers)
    if encoder.unit_norm:
        print(
            f"{config.clip}: embeddings of unit norm; for a pipeline that was trained on them as "
            f"CLIP makes them take --clip {config.clip}+raw"
        )
    told = {"encoder_id": encoder.encoder_id, "clip": absolute_spec(config.clip)}
    if config.part == "decoder":
        model: Any = decoder_from_diffusers(folder)
        found = len(model.null_image_embed)
        told |= {"kind": "decoder", "image_size": model.image_size}
    else:
        words = torch.from_numpy(encoder.tokenize([""]))
        embed, states = encoder.encode_text(words)
        null = PriorText(text_embed=embed, text=states, token_mask=token_mask(words))
        model = prior_from_diffusers(folder / "prior", null, unit_norm=encoder.unit_norm)
        found = model.embed_dim
        told |= {"kind": "diffusion_prior", "context_length": encoder.context_length}
    if (found, found) != (encoder.embed_dim, encoder.text_width):
        raise ValueError(
            f"{folder}: found a {config.part} for embeddings and states of {found} dimensions, "
            f"expected {encoder.embed_dim} and {encoder.text_width}, as --clip has"
        )
    return model, {**told, "embed_dim": found, "text_width": found}


def _upsampler(config: ConvertConfig) -> tuple[Any, dict[str, Any]]:
    from models.convert.unets import upsampler_from_diffusers

    folder = Path(config.diffusers) / "super_res_first"
    model = upsampler_from_diffusers(folder, config.factor)
    size = json.loads((folder / "config.json").read_text())["sample_size"]
    told = {"kind": "upsampler", "image_size": size, "factor": config.factor}
    return model, {**told, "crop_size": size // config.factor}


def _export(config: ConvertConfig) -> None:
    """Write a finished run as a pipeline's part."""
    from models.convert.priors import prior_to_diffusers
    from models.convert.unets import decoder_to_diffusers, upsampler_to_diffusers
    from models.unclip import load_model

    kind = "diffusion_prior" if config.part == "prior" else config.part
    model: Any
    model, told = load_model(config.run, kind)
    folder = Path(config.diffusers)
    for name in FOLDERS[config.part]:
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            raise ValueError(
                f"{folder / name}: found a folder with files, expected none: what is there would "
                "be lost; name another --diffusers"
            )
    if config.part == "prior":
        prior_to_diffusers(model, folder / "prior")
    elif config.part == "decoder":
        decoder_to_diffusers(model, folder)
    else:
        for part in FOLDERS["upsampler"]:
            upsampler_to_diffusers(model, folder / part, told["image_size"])


if __name__ == "__main__":
    run_script(lambda: main(parse(ConvertConfig)))
