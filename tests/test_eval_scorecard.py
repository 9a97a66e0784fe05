"""Laws of the scorecard: sets that are not there, captions in batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.sampling.generate import default_sampling
from eval.sampling.image_source import ImageSet
from eval.scores import scorecard
from eval.scores.scorecard import caption_scores, prior_scores, shape_scores, shapes_with_real
from ingest.shapes import make_pairs
from models.convert.runs import load_clip

COUNT = 7


def drawn(folder: Path, *splits: str) -> ImageSet:
    """True drawings of some splits, with their captions."""
    folder.mkdir()
    pairs = [pair for split in splits for pair in make_pairs(3, 0, split)]
    paths = tuple(folder / f"{i:06d}.jpg" for i in range(len(pairs)))
    for path, pair in zip(paths, pairs, strict=True):
        path.write_bytes(pair.image_bytes)
    return ImageSet(source=str(folder), captions=[p.caption for p in pairs], paths=paths)


def test_a_set_of_shapes_without_true_drawings_has_none_to_compare(tmp_path: Path):
    fake = drawn(tmp_path / "fake", "single", "seen", "held_out")
    found = shapes_with_real(fake, drawn(tmp_path / "real", "single", "seen"))
    assert {name: cell["real"] for name, cell in found.items()} == {
        "single": 1.0, "seen": 1.0, "held_out": None,
    }  # fmt: skip
    assert found["held_out"]["all"] == 1.0


def test_drawings_of_a_base_decoder_s_size_are_read(tmp_path: Path):
    drawings = drawn(tmp_path / "drawings", "single", "seen")
    small = (np.asarray(image.resize((32, 32), Image.Resampling.BOX)) for image in drawings)
    found = shape_scores(drawings.captions, small)
    assert {name: cell["all"] for name, cell in found.items()} == {"single": 1.0, "seen": 1.0}
    oblong = [np.zeros((32, 48, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"found uint8 \[32, 48, 3\]"):
        shape_scores(drawings.captions[:1], oblong)


# -- captions in batches ---------------------------------------------------------------------------


@pytest.fixture
def captions() -> list[str]:
    return [pair.caption for pair in make_pairs(COUNT, 0, "seen")]


def pictures() -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    for _ in range(COUNT):
        yield Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def test_captions_are_encoded_in_batches(captions: list[str], monkeypatch: pytest.MonkeyPatch):
    encoder, seen = load_clip("tiny:random"), []
    encode = encoder.encode_text
    monkeypatch.setattr(encoder, "encode_text", lambda t: (seen.append(len(t)), encode(t))[1])
    whole = caption_scores(pictures(), captions, encoder)
    monkeypatch.setattr(scorecard, "BATCH_SIZE", 3)
    assert caption_scores(pictures(), captions, encoder) == pytest.approx(whole, abs=1e-6)
    assert seen == [COUNT, 3, 3, 1]


def test_the_prior_draws_in_batches(captions: list[str], monkeypatch: pytest.MonkeyPatch):
    """Each caption keeps the key of its place."""
    seen: list[tuple[list[int], list[str]]] = []

    class Chain:
        def sample_prior(self, keys: torch.Tensor, part: list[str], sampling: Any) -> torch.Tensor:
            seen.append((keys.tolist(), part))
            return torch.eye(COUNT)[: len(part)]

    image = torch.nn.functional.normalize(torch.ones(COUNT, COUNT), dim=1)
    chain: Any = Chain()
    for size in (COUNT, 3):
        monkeypatch.setattr(scorecard, "BATCH_SIZE", size)
        assert prior_scores(chain, captions, image, image, default_sampling())["n"] == COUNT
    (keys, all_captions), *parts = seen
    assert [len(part) for _, part in parts] == [3, 3, 1]
    assert [key for keys, _ in parts for key in keys] == keys and all_captions == captions
