"""What the prior is worth: the full chain against the text embedding in the prior's place.

    python benchmarks/chain_against_text.py        # after make demo; some five minutes on two cores

Draws scenes that the demo has never drawn, of the held-out kinds, and decodes three embeddings of
each with the same noise. The difference is paired, so its error is smaller than each score's.
"""

import io
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from _common import BenchmarkConfig, run_benchmark


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """Of a finished demo."""

    run: str = "runs/demo"
    """folder of a demo on the drawn set"""
    num_samples: int = 500
    """captions of each kind"""
    seed: int = 1_000
    """of the drawings; the demo's own is 0"""
    num_threads: int = 2
    """threads on the CPU"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from eval.sampling.chain import load_chain

    torch.set_num_threads(config.num_threads)
    run = config.run
    if not Path(run, "eval.json").is_file():
        raise ValueError(f"{run}: found no finished demo, expected one; run make demo first")
    chain = load_chain(f"{run}/clip", f"{run}/prior", f"{run}/base", (f"{run}/up",))
    figures = {}
    for split in ("single", "held_out"):
        right = _right(chain, split, config)
        gain = right["prior"] - right["text_embed"]
        error = float(gain.std(ddof=1) / len(gain) ** 0.5)
        shares = {name: float(values.mean()) for name, values in right.items()}
        figures[split] = {**shares, "gain": float(gain.mean()), "gain_standard_error": error}
    table = Table("kind", *figures["held_out"])
    for split, values in figures.items():
        table.add_row(split, *(f"{value:.3f}" for value in values.values()))
    Console().print(table)
    pairs = figures["held_out"]
    summary = {"ratio": pairs["prior"] / pairs["text_embed"], "n": config.num_samples, **figures}
    print(json.dumps(summary))
    return 0


def _right(chain, split: str, config: Config) -> dict[str, np.ndarray]:
    """Say for each variant which of its drawings are right in everything, as 0 or 1 [N]."""
    import torch
    from PIL import Image

    from eval.features.extractors import clip_features, extract
    from eval.sampling.generate import default_sampling, render_all
    from eval.scores.shapes import score
    from ingest.shapes import make_pairs

    pairs = list(make_pairs(config.num_samples, config.seed, split))
    captions = [pair.caption for pair in pairs]
    pictures = [Image.open(io.BytesIO(pair.image_bytes)).convert("RGB") for pair in pairs]
    image = torch.from_numpy(extract(partial(clip_features, chain.clip), pictures))
    _, text, _, _ = chain.encode_captions(captions)
    scored = {}
    for name, embed in {"prior": None, "text_embed": text, "true_image_embed": image}.items():
        images = render_all(chain, captions, embed, default_sampling(), seed=config.seed)
        scores = (score(drawn, caption) for drawn, caption in zip(images, captions, strict=True))
        scored[name] = np.array([float(each.all) for each in scores])
    return scored


if __name__ == "__main__":
    run_benchmark(Config, main, num_samples=20)
