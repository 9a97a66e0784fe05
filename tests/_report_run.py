"""A run folder with everything that the report shows, made without training anything."""

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ingest.shapes import make_pairs

HOSTILE = '<script>alert("1")</script> & a "red" cube'
CELL = {"all": 0.512, "attribute": 0.913, "relation": 0.987}
SCORES: dict[str, Any] = {
    "seconds": {"download": 7.25, "prior": 81.5},
    "clip": {"retrieval_at_1": 0.876, "n": 500},
    "prior": {"cos": 0.765, "cos_shuffled": 0.123, "retrieval_at_1": 0.432, "n": 500},
    "images": {
        "n": 1024, "n_real": 2000, "fd_clip": 0.0987, "fd_clip_real_halves": 0.0123,
        "clip_score": 0.654, "clip_score_shuffled": 0.321,
        "judge": "the CLIP the model was trained on",
    },
    "features": {
        "inception": {
            "name": "inception-2015-12-05 pool3, TF1 bilinear", "quotable": True,
            "n": 5000, "n_real": 4000, "digest": "f4c3" * 16,
            "fd": 12.34, "fd_ci95_low": 12.1, "fd_ci95_high": 12.6, "kid": 0.00456,
            "kid_std": 0.0002,
        },
    },
    "memorisation": {
        "n": 1024, "share_closer": 0.047,
        "nearest": [{"fake": "000001.png", "train": "000000017", "distance": 0.031}],
    },
    "provenance": {"commit": "c0ffee", "versions": {"torch": "2.14.1"}},
    "novel_measure": {"something_new": 0.777, "n": 31},
    "shapes": {
        "single": {
            "all": 0.75, "attribute": 0.9, "attribute_error": 0.0171, "real": 0.97, "n": 100,
        },
        "seen": {**CELL, "real": 0.96, "n": 100},
        "held_out": {**CELL, "real": {"all": 0.951, "attribute": 0.99, "relation": 1.0}, "n": 100},
    },
    "ablation": {
        "true_image_embed": {"single": {"all": 0.811}, "seen": CELL, "held_out": CELL},
        "prior": {"single": {"all": 0.75}, "seen": CELL, "held_out": CELL},
        "text_embed": {"single": {"all": 0.399}, "seen": CELL, "held_out": CELL},
    },
}  # fmt: skip


def picture(seed: int) -> bytes:
    """Return a small PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_plain_run(root: Path) -> Path:
    """Write a run whose pictures are two grids."""
    run = root / "demo"
    (run / "samples").mkdir(parents=True)
    (run / "eval.json").write_text(json.dumps(SCORES))
    command = "python training/prior.py --run 'runs/<demo>'"
    rows = [
        {
            "stage": "prior",
            "seconds": 81.5,
            "images_per_second": 1234.5,
            "peak_memory_bytes": 3 * 2**30,
            "command": command,
        },
        {"stage": "download", "seconds": 725, "images_per_second": None},
    ]
    (run / "timings.json").write_text(json.dumps(rows))
    provenance = {"commit": "abc123", "snapshots": {"images": "f00d"}, "config_hash": HOSTILE}
    (run / "provenance.json").write_text(json.dumps(provenance))
    (run / "samples" / "grid.png").write_bytes(picture(0))
    (run / "samples" / "grid.json").write_text(json.dumps({"captions": [HOSTILE, "a blue ring"]}))
    (run / "samples" / "ablation.png").write_bytes(picture(1))
    for name in ("prior", "clip", "extra"):
        lines = [_line(i) for i in range(1, 40)]
        write_lines(run / name / "metrics.jsonl", lines)
        with (run / name / "metrics.jsonl").open("a") as file:
            file.write('{"step": 40, "samp')
    return run


def _line(i: int) -> dict[str, Any]:
    noise = 1 + 0.2 * math.sin(12.9898 * i)
    rate = 100 + 10 * math.sin(i)
    return {"step": i, "samples_seen": 64 * i, "loss": noise / i, "samples_per_second": rate}


def write_rich_run(root: Path, count: int = 24) -> Path:
    """Write a run with every part of the page: drawn samples, edits, sweeps, neighbours."""
    run = write_plain_run(root)
    samples, pairs = run / "samples", list(make_pairs(count, 3, "held_out"))
    lines = []
    for number, pair in enumerate(pairs):
        _save(samples / f"{number:06d}.png", pair.image_bytes)
        caption = HOSTILE if number == 1 else pair.caption
        lines.append({"file": f"{number:06d}.png", "caption": caption, "seed": 0})
    write_lines(samples / "samples.jsonl", lines)
    settings = {"prior": "runs/prior", "prior_weights": {"step": "step_1", "sha256": "ab" * 32}}
    (samples / "settings.json").write_text(json.dumps({**settings, "captions": ["left out"]}))
    sheet = np.concatenate([np.asarray(Image.open(samples / f"{i:06d}.png")) for i in range(8)], 1)
    for name in ("ablation", "neighbours"):
        Image.fromarray(np.concatenate([sheet, sheet[:, ::-1]])).save(samples / f"{name}.png")
        (samples / f"{name}.json").write_text(json.dumps([HOSTILE, "a blue ring"]))
    for command, heads in (("guidance", "1234"), ("pca", ("20", "40", "80", "160", "320", "512"))):
        _edits(run / "edits" / command, command, heads, pairs)
    for name, steps in (("base", range(1, 9)), ("prior", range(10, 40, 10))):
        record = [_scored(step, 2 / step) for step in steps]
        write_lines(run / name / "metrics.jsonl", [_line(i) for i in range(1, 40)])
        write_lines(run / name / "watch.jsonl", record)
        (run / name / "config.yaml").write_text(
            f"run: {name}\ntrain:\n  num_steps: 39 # {HOSTILE}\n"
        )
    sweep = [(1, 14.0), (1.5, 11.2), (2, 10.6), (3, 11.5), (4, 13.1)]
    record = [{"cfg_scale": scale, "scores": _scored(0, fd)["scores"]} for scale, fd in sweep]
    write_lines(run / "sweep.jsonl", record)
    return run


def _scored(step: int, fd: float) -> dict[str, Any]:
    scores = {"images": {"fd_clip": fd, "clip_score": 1 / (1 + fd), "n": 100}}
    return {"step": step, "samples_seen": 64 * step, "scores": scores}


def _save(path: Path, image_bytes: bytes) -> None:
    with Image.open(BytesIO(image_bytes)) as image:
        image.save(path)


def _edits(folder: Path, command: str, heads: Any, pairs: list) -> None:
    folder.mkdir(parents=True)
    lines = []
    for row, pair in enumerate(pairs[:3]):
        for column, head in enumerate(heads):
            name = f"{row:03d}_{column:03d}.png"
            _save(folder / name, pair.image_bytes)
            record = {"file": name, "row": HOSTILE if row == 1 else pair.caption, "column": head}
            lines.append({**record, "command": command, "settings": {"seed": 0, "out": HOSTILE}})
    write_lines(folder / "edits.jsonl", lines)
