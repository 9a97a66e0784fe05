"""Convert published pipelines, in diffusers' layout, to finished runs and back.

    python training/convert.py --diffusers karlo/ --part decoder --clip ViT-L-14-quickgelu:clip.safetensors+raw --run runs/karlo_base
    python training/decoder.py --init runs/karlo_base ...           # fine-tune it
    python training/convert.py --export --run runs/tuned --part decoder --diffusers karlo_tuned/
    python training/convert.py --run runs/tuned --push hf://someone/tuned --clip hf://someone/clip

    <diffusers>/prior/  decoder/  text_proj/  super_res_first/  super_res_last/

Published pipelines were trained on embeddings as CLIP's towers return them, without normalisation:
+raw selects these. Before fine-tuning, embed the images again with the same encoder and +raw.

--push writes a finished run to the Hub or another storage: its averaged weights, config.json and
cards. --init, --clip, --prior and the like read it there. With --export it writes the pipeline.

Karlo's upsampler uses a second network, super_res_last, for its last step. `--part upsampler` reads
super_res_first only; with --export it writes the same weights to both folders.
"""  # noqa: E501

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.base.cli import parse, require_local, run_script
from cluster.base.files import Json, write_json

if TYPE_CHECKING:
    from models.decoder import Decoder
    from models.priors.diffusion import DiffusionPrior
    from models.upsampler import Upsampler

STEP = "step_00000000"
FOLDERS = {  # of a pipeline that hold each network
    "prior": ("prior",),
    "decoder": ("decoder", "text_proj"),
    "upsampler": ("super_res_first", "super_res_last"),
}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options: one network of a pipeline, and the direction."""

    part: Literal["prior", "decoder", "upsampler"] = "decoder"
    """network to convert"""
    diffusers: str = ""
    """folder of the pipeline"""
    run: str = ""
    """folder of the run: a new one to write; with --export, a finished one to read"""
    clip: str = ""
    """encoder that the network was trained on, named as in ingest/embed.py; append +raw if its
    embeddings were not normalised; not for upsamplers; with --push, where others find it"""
    factor: int = 4
    """factor by which an upsampler enlarges"""
    export: bool = False
    """convert from the run to the pipeline"""
    push: str = ""
    """URL to write to, hf://user/name or such as s3://bucket/name: the finished run, or with
    --export the pipeline; on the Hub it is private until you open it"""


def main(config: ConvertConfig) -> int:
    """Convert one network."""
    for name in ("run",) if config.push and not config.export else ("diffusers", "run"):
        if not getattr(config, name):
            raise ValueError(f"--{name}: found none, expected a folder")
    if config.push and not config.export:
        push_run(config)
        return 0
    written = "diffusers" if config.export else "run"
    require_local(f"--{written}", getattr(config, written))
    if config.export:
        export_run(config)
        print(f"{config.diffusers}: {config.part} of {config.run}")
        if config.push:
            push_pipeline(config)
    else:
        import_pipeline(config)
        print(f"{config.run}: a finished run; sample from it, or fine-tune it with --init")
    return 0


def import_pipeline(config: ConvertConfig) -> None:
    """Write a finished run from one network of a pipeline.

    Raises ValueError where the run exists, or --clip does not fit the network.
    """
    from models.weights import EMA_NAME, FINAL_NAME, MODEL_NAME, save_config, save_weights

    run, is_upsampler = Path(config.run), config.part == "upsampler"
    if run.is_dir() and any(run.iterdir()):
        raise ValueError(f"{run}: found a folder with files, expected none; name another --run")
    if is_upsampler == bool(config.clip):
        expected = "none" if config.clip else "the encoder that the network was trained on"
        raise ValueError(
            f"--clip: found {config.clip or 'none'} for {config.part}, expected {expected}"
        )
    model, export = load_upsampler(config) if is_upsampler else load_conditioned(config)
    folder = run / STEP
    folder.mkdir(parents=True)
    state = model.state_dict()
    for name in (MODEL_NAME, EMA_NAME):
        save_weights(folder / name, state)
    save_config(folder, {"model": dataclasses.asdict(model.config), **export})
    write_json(run / FINAL_NAME, {"step": STEP})


def load_conditioned(config: ConvertConfig) -> "tuple[Decoder | DiffusionPrior, Json]":
    """Load a prior or a decoder; return it with what config.json states beside its sizes.

    Raises ValueError where its dimensions are not those of --clip.
    """
    import torch

    from models.convert.priors import prior_from_diffusers
    from models.convert.runs import absolute_spec, load_clip
    from models.convert.unets import decoder_from_diffusers
    from models.priors.base import PriorText
    from models.tokenizers import token_mask

    encoder, folder = load_clip(config.clip), Path(config.diffusers)
    if encoder.unit_norm:
        print(
            f"{config.clip}: embeddings of unit norm; if the pipeline was trained on embeddings as "
            f"CLIP's towers return them, use --clip {config.clip}+raw"
        )
    export = {"encoder_id": encoder.encoder_id, "clip": absolute_spec(config.clip)}
    if config.part == "decoder":
        model = decoder_from_diffusers(folder)
        dimension = len(model.null_image_embed)
        export |= {"kind": "decoder", "image_size": model.image_size}
    else:
        tokens = torch.from_numpy(encoder.tokenize([""]))
        embed, states = encoder.encode_text(tokens)
        null = PriorText(text_embed=embed, text=states, token_mask=token_mask(tokens))
        model = prior_from_diffusers(folder / "prior", null, unit_norm=encoder.unit_norm)
        dimension = model.embed_dim
        export |= {"kind": "diffusion_prior", "context_length": encoder.context_length}
    if (dimension, dimension) != (encoder.embed_dim, encoder.text_width):
        raise ValueError(
            f"{folder}: found a {config.part} for embeddings and token states of {dimension} "
            f"dimensions, expected {encoder.embed_dim} and {encoder.text_width}, as --clip has"
        )
    return model, {**export, "embed_dim": dimension, "text_width": dimension}


def load_upsampler(config: ConvertConfig) -> "tuple[Upsampler, Json]":
    """Load an upsampler; return it with what config.json states beside its sizes."""
    from models.convert.unets import upsampler_from_diffusers

    folder = Path(config.diffusers) / "super_res_first"
    model = upsampler_from_diffusers(folder, config.factor)
    size = json.loads((folder / "config.json").read_text())["sample_size"]
    export = {"kind": "upsampler", "image_size": size, "factor": config.factor}
    return model, {**export, "crop_size": size // config.factor}


def export_run(config: ConvertConfig) -> None:
    """Write a finished run as one network of a pipeline; ValueError where its folder has files."""
    from models.convert.priors import prior_to_diffusers
    from models.convert.runs import load_model
    from models.convert.unets import decoder_to_diffusers, upsampler_to_diffusers
    from models.decoder import Decoder
    from models.priors.diffusion import DiffusionPrior
    from models.upsampler import Upsampler

    kind = "diffusion_prior" if config.part == "prior" else config.part
    model, stored = load_model(config.run, kind)
    folder = Path(config.diffusers)
    for name in FOLDERS[config.part]:
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            raise ValueError(
                f"{folder / name}: found a folder with files, expected none: they would be "
                "overwritten; name another --diffusers"
            )
    if isinstance(model, DiffusionPrior):
        prior_to_diffusers(model, folder / "prior")
    elif isinstance(model, Decoder):
        decoder_to_diffusers(model, folder)
    elif isinstance(model, Upsampler):
        for name in FOLDERS["upsampler"]:
            upsampler_to_diffusers(model, folder / name, stored["image_size"])


def push_run(config: ConvertConfig) -> None:
    """Write a finished run to a URL, where it can be used as it can here.

    Raises ValueError where its encoder is a folder of this machine that --clip does not replace.
    """
    from models.convert.remote_runs import push_files
    from models.weights import CONFIG_NAME as MODEL_CONFIG_NAME
    from models.weights import EMA_NAME, FINAL_NAME, exported, load_config

    step = exported(config.run)
    stored = load_config(step)
    if "clip" in stored:
        stored["clip"] = config.clip or stored["clip"]
        if stored["clip"].startswith("/"):
            raise ValueError(
                f"--clip: found the encoder {stored['clip']}, a folder of this machine, expected "
                "where others find it: push that run first, and name its URL"
            )
    push_files(
        {
            "README.md": _readme(config.run),
            f"{step.name}/{MODEL_CONFIG_NAME}": json.dumps(stored, indent=1).encode(),
            f"{step.name}/{EMA_NAME}": step / EMA_NAME,
            FINAL_NAME: json.dumps({"step": step.name}).encode(),
        },
        config.push, message=f"{stored['kind']}, {step.name}",
    )  # fmt: skip
    print(f"{config.push}: {config.run}, {step.name}")


def push_pipeline(config: ConvertConfig) -> None:
    """Write all files of the pipeline to a URL, with the card of this run."""
    from models.convert.remote_runs import push_files

    folder = Path(config.diffusers)
    files: dict[str, bytes | Path] = {
        str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()
    }
    files["README.md"] = _readme(config.run)
    push_files(files, config.push, message=f"{config.part} of a pipeline")
    print(f"{config.push}: {config.diffusers}")


def _readme(run: str) -> bytes:
    """Return a run's cards as one page, with the header that the Hub reads."""
    from models.weights import exported
    from training.runs.cards import DATA_CARD, MODEL_CARD, ensure_cards

    ensure_cards(Path(run))
    cards = [(exported(run) / name).read_text() for name in (MODEL_CARD, DATA_CARD)]
    header = "---\npipeline_tag: text-to-image\ntags: [unclip, minidalle2]\n---\n"
    return "\n".join((header, *cards)).encode()


if __name__ == "__main__":
    run_script(lambda: main(parse(ConvertConfig)))
