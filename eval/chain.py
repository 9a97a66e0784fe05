"""Opens a trained chain from its run folders."""

from collections.abc import Sequence
from pathlib import Path

from models.clip import load_clip
from models.unclip import UnClip
from models.weights import exported, load_config


def load_chain(clip: str, prior: str, decoder: str, upsamplers: Sequence[str]) -> UnClip:
    """Load finished runs; `clip` empty means the encoder that the prior was trained on."""
    spec = clip or load_config(exported(Path(prior)))["clip"]
    return UnClip.load(load_clip(spec), prior, decoder, tuple(upsamplers))
