"""Opens a trained chain from its run folders."""

from collections.abc import Sequence
from pathlib import Path

from cluster.base.files import Json, digest_file
from eval.features.devices import device_named
from models.clip import load_clip
from models.unclip import UnClip
from models.weights import exported, load_config
from training.engine.precision import compute_whole_fp32


def load_chain(
    clip: str,
    prior: str,
    decoder: str,
    upsamplers: Sequence[str],
    *,
    guide: str = "",
    device: str = "cpu",
) -> UnClip:
    """Load finished runs; `clip` empty means the encoder that the prior, or without one the
    decoder, was trained on; `decoder` empty the prior alone, `prior` empty none."""
    compute_whole_fp32()
    where = device_named(device)
    spec = clip or load_config(exported(Path(prior or decoder)))["clip"]
    return UnClip.load(load_clip(spec), prior, decoder, tuple(upsamplers), guide).to(where)


def chain_weights(
    prior: str, decoder: str, upsamplers: Sequence[str], guide: str = ""
) -> Json:
    """Identify the weights of finished runs by content, since a path may be trained again.

    Returns {prior_weights, decoder_weights: {step, sha256}, upsampler_weights: a list of such}, and
    guide_weights where there is one: the exported step, and the sha256 of its averaged weights.
    """
    return {
        **({"guide_weights": run_weights(guide)} if guide else {}),
        "prior_weights": run_weights(prior),
        "decoder_weights": run_weights(decoder),
        "upsampler_weights": [run_weights(run) for run in upsamplers],
    }


def run_weights(run: str) -> dict[str, str]:
    """Identify the weights of one finished run: {step, sha256}, as `chain_weights` does."""
    step = exported(Path(run))
    return {"step": step.name, "sha256": digest_file(step / "ema.safetensors")}
