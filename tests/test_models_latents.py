"""Laws of the two latents: end points, norms, and what a decoder under them does."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval import sample
from eval.sampling import edits
from eval.sampling.generate import sampling_of
from models.configs import Spacing
from models.convert.runs import load_clip
from models.latents import (
    Latents,
    blends,
    embed_images,
    encode,
    pca_images,
    pixels_of,
    reconstructions,
    slerp,
    text_diffs,
)
from models.unclip import UnClip

HOW = sampling_of({"decoder_steps": 4, "precision": "fp32", "upsampler_steps": 2})
SIZE = 32
QUICK = ["--decoder-steps", "3", "--num-threads", "1"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, write_chain) -> UnClip:
    clip = load_clip("tiny:random")
    runs = write_chain(tmp_path_factory.mktemp("runs"), clip, SIZE)
    return UnClip.load(clip, "", str(runs["decoder"]), (str(runs["upsampler"]),))


def pictures(count: int = 2) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (count, 5, 7, 3)).astype(np.uint8)
    return [Image.fromarray(each).resize((70, 50)) for each in small]


def unit(*shape: int, seed: int = 0) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(found.flatten(1), dim=1).reshape(shape)


def latents(seed: int = 0) -> Latents:
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(1, 3, SIZE, SIZE, generator=rng)
    return Latents(image_embed=unit(1, 32, seed=seed), start=start)


def test_slerp_goes_along_the_great_circle():
    a, b = unit(3, 8, seed=1), unit(3, 8, seed=2)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    whole = F.cosine_similarity(a, b).acos()
    for theta in (0.1, 0.5, 0.8):
        point = slerp(a, b, theta)
        torch.testing.assert_close(point.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(F.cosine_similarity(a, point).acos(), theta * whole)


@pytest.mark.parametrize("other", [1.0, 3.0])
def test_slerp_of_parallel_vectors_is_a_line(other: float):
    a = unit(2, 4, 5)
    torch.testing.assert_close(slerp(a, other * a, 0.25), (1 + 0.25 * (other - 1)) * a)


def test_slerp_keeps_the_spread_of_noise():
    """A straight line would shrink it to 1 / sqrt(2) half-way."""
    a, b = (torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    spread = slerp(a, b, 0.5).std((1, 2, 3))
    torch.testing.assert_close(spread, torch.ones(4), atol=0.05, rtol=0)


def test_blends_end_in_the_images_where_the_noise_blends_too():
    one, other = latents(1), latents(2)
    for noise in (True, False):
        found = blends(one, other, (0.0, 0.5, 1.0), noise=noise)
        torch.testing.assert_close(found.row(0).image_embed, one.image_embed)
        torch.testing.assert_close(found.row(2).image_embed, other.image_embed)
        torch.testing.assert_close(found.row(0).start, one.start)
        last = other.start if noise else one.start
        torch.testing.assert_close(found.row(2).start, last)


def test_a_text_diff_begins_with_the_image_and_turns_toward_the_difference(chain: UnClip):
    one = latents()
    found = text_diffs(chain, one, "a red cube", "a blue cube", (0.0, 0.3, 1.0))
    torch.testing.assert_close(found.row(0).image_embed, one.image_embed)
    texts = chain.clip.encode_text(
        torch.from_numpy(chain.clip.tokenize(["a red cube", "a blue cube"]))
    )[0]
    difference = F.normalize(texts[:1] - texts[1:], dim=1)
    torch.testing.assert_close(found.row(2).image_embed, difference, atol=1e-5, rtol=0)
    alone = text_diffs(chain, one, "a red cube", "", (1.0,))
    torch.testing.assert_close(alone.image_embed, texts[:1], atol=1e-5, rtol=0)
    assert torch.equal(found.start[0], found.start[2])
    with pytest.raises(ValueError, match="'a cube' and 'A cube', which are the same to the enc"):
        text_diffs(chain, one, "a cube", "A cube", (0.5,))


def test_all_components_are_the_embedding_and_fewer_the_nearest_of_their_span():
    one = latents()
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(4)))
    mean = unit(1, 32, seed=5)[0] * 0.3
    found = pca_images(one, mean, basis, (1, 8, 32)).image_embed
    torch.testing.assert_close(found[2:], one.image_embed, atol=1e-5, rtol=0)
    cosines = F.cosine_similarity(found, one.image_embed)
    assert cosines[0] < cosines[1] < cosines[2]
    kept = mean + basis[:, :8] @ (basis[:, :8].T @ (one.image_embed[0] - mean))
    torch.testing.assert_close(found[1], F.normalize(kept, dim=0), atol=1e-5, rtol=0)


def test_pictures_are_prepared_as_training_and_the_encoder_prepare_them(chain: UnClip):
    found = pixels_of(pictures(), SIZE)
    assert found.shape == (2, 3, SIZE, SIZE) and found.abs().max() <= 1
    expected = np.asarray(pictures()[0].resize((44, 32), Image.Resampling.BICUBIC))[:, 6:38]
    wanted = torch.tensor(expected).permute(2, 0, 1).float()
    torch.testing.assert_close((found[0] + 1) * 127.5, wanted, atol=1.0, rtol=0)
    embed = embed_images(chain, pictures())
    alone = chain.clip.encode_image(torch.from_numpy(chain.clip.preprocess(pictures()[1]))[None])
    torch.testing.assert_close(embed[1:], alone, atol=1e-5, rtol=0)


def test_reconstructions_are_of_the_start_and_variations_of_the_keys(chain: UnClip):
    keys, found = torch.arange(2), encode(chain, pictures(), HOW)
    exact = reconstructions(chain, keys, found, HOW)
    torch.testing.assert_close(reconstructions(chain, keys + 5, found, HOW), exact)
    varied = [reconstructions(chain, keys + n, found, HOW, eta=1.0) for n in (0, 5)]
    assert not torch.allclose(varied[0], varied[1], atol=1e-2)
    assert not torch.allclose(varied[0], exact, atol=1e-2)
    other = Latents(image_embed=found.image_embed.flip(0), start=found.start)
    assert not torch.allclose(reconstructions(chain, keys, other, HOW), exact, atol=1e-3)
    assert math.isfinite(exact.sum()) and exact.abs().max() <= 1


@pytest.mark.parametrize("spacing", get_args(Spacing))
def test_the_way_back_visits_the_timesteps_of_the_way_there(chain: UnClip, spacing: Spacing):
    small, keys = replace(chain, upsamplers=()), torch.arange(2)
    settings = {"decoder_steps": 12, "precision": "fp32"}
    how = sampling_of({**settings, "spacing": spacing})
    error = {}
    for way in get_args(Spacing):
        found = encode(chain, pictures(), sampling_of({**settings, "spacing": way}))
        back = reconstructions(small, keys, found, how)
        error[way] = (back - pixels_of(pictures(), SIZE)).square().mean().item()
    assert error[spacing] < 1e-3
    other = "trailing" if spacing == "karras" else "karras"  # the other two differ by little
    assert error[other] > 2e-3


# -- the sub-commands ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_chain, write_data) -> dict[str, Any]:
    """Runs, two pictures, a mask, and embeddings of the same encoder."""
    root = tmp_path_factory.mktemp("files")
    runs = write_chain(root / "runs", load_clip("tiny:random"), SIZE)
    for name, picture in zip("ab", pictures(), strict=True):
        picture.save(root / f"{name}.png")
    Image.fromarray(np.repeat([[0] * 20 + [255] * 20], 30, 0).astype(np.uint8)).save(root / "m.png")
    data = write_data(root / "data", num_shards=1, samples_per_shard=40)
    names = [str(root / f"{name}.png") for name in "ab"]
    return {"root": root, "runs": runs, "images": names, "embeds": str(data / "embeds")}


def edited(
    files: dict[str, Any], out: Path, command: str, *arguments: str, enlarge: bool = True
) -> list[list[Any]]:
    """Run a sub-command; return its images by row, and check the grid and the list."""
    runs = files["runs"]
    settings = ["--decoder", str(runs["decoder"]), "--out", str(out), *QUICK]
    if enlarge:
        settings += ["--upsampler", str(runs["upsampler"]), "--upsampler-steps", "2"]
    assert sample.command([command, *settings, *arguments]) == 0
    lines = [json.loads(line) for line in (out / "edits.jsonl").read_text().splitlines()]
    assert {path.name for path in out.glob("*_*.png")} == {line["file"] for line in lines}
    assert all(line["settings"]["seed"] == 0 and line["command"] == command for line in lines)
    assert Image.open(out / "grid.png").width > 0
    width = len({line["column"] for line in lines})
    images = [np.asarray(Image.open(out / line["file"]), np.int16) for line in lines]
    side = 2 * SIZE if enlarge else SIZE
    assert all(image.shape == (side, side, 3) for image in images)
    return [images[start : start + width] for start in range(0, len(images), width)]


FOUR_PROMPTS = [word for n in range(4) for word in ("--prompts", f"{n} hats")]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("variations", ["--count", "2"]),
        ("inpaint", ["--count", "2"]),
        ("inpaint", ["--count", "2", "--caption", "a hat"]),
        ("guidance", ["--scales", "2", *FOUR_PROMPTS]),
    ],
)
def test_no_split_into_batches_changes_an_edit(command, arguments, files, tmp_path, monkeypatch):
    rows, most, draw, enlarge = {}, [], UnClip.sample_base, UnClip.upsample
    for name, real in (("sample_base", draw), ("upsample", enlarge)):
        def seen(chain, keys, *others, real=real, **more):  # fmt: skip
            most.append(len(keys))
            return real(chain, keys, *others, **more)

        monkeypatch.setattr(UnClip, name, seen)
    more = [] if command == "guidance" else ["--images", *files["images"]]
    more += ["--mask", str(files["root"] / "m.png")] if command == "inpaint" else []
    more += ["--prior", str(files["runs"]["prior"])] if "hat" in " ".join(arguments) else []
    for size in (3, 50):
        most.clear()
        split = ["--batch-size", str(size)]
        rows[size] = edited(files, tmp_path / str(size), command, *arguments, *more, *split)
        assert max(most) <= size and (size < 50 or max(most) > 3)
    for found, whole in zip(itertools.chain(*rows[3]), itertools.chain(*rows[50]), strict=True):
        assert abs(found - whole).max() <= 1


def test_every_edit_writes_its_rows_and_the_image_itself_is_the_same_in_all(files, tmp_path):
    """A variation's first, a blend's ends, theta 0 and all components are one reconstruction."""
    images = ["--images", *files["images"]]
    first = edited(files, tmp_path / "v", "variations", *images, "--count", "2", enlarge=False)
    blend = edited(files, tmp_path / "i", "interpolate", *images, "--count", "3")
    options = ["--caption", "a red cube", "--without", "a photo", "--count", "2"]
    turned = edited(files, tmp_path / "t", "textdiff", *images, *options, enlarge=False)
    more = ["--embeds", files["embeds"], "--components", "2", "5", "500"]
    whole = edited(files, tmp_path / "p", "pca", *images, *more, enlarge=False)
    prior = ["--prior", str(files["runs"]["prior"])]
    options = ["--prompts", "a red cube", "--prompts", "a hat", "--scales", "1", "3"]
    guided = edited(files, tmp_path / "g", "guidance", *prior, *options)
    sizes = [[len(row) for row in rows] for rows in (first, blend, turned, whole, guided)]
    assert sizes == [[3, 3], [3], [2, 2], [3, 3], [2, 2]]  # of pca: 2, 5 and all 32
    ends = edited(files, tmp_path / "e", "interpolate", *images, "--count", "2", enlarge=False)[0]
    pairs = [(ends[0], 0), (ends[1], 1), (turned[0][0], 0), (turned[1][0], 1), (whole[1][-1], 1)]
    for found, number in pairs:
        assert abs(found - first[number][0]).max() <= 1
        assert abs(found - first[1 - number][0]).max() > 8


def test_inpainting_keeps_what_is_masked_out(files, tmp_path):
    runs = files["runs"]
    settings = ["--decoder", str(runs["decoder"]), *QUICK, "--out"]
    mask = ["--mask", str(files["root"] / "m.png"), "--count", "2"]
    given = ["inpaint", "--images", files["images"][0], *mask, *settings]
    assert sample.command([*given, str(tmp_path / "a")]) == 0
    options = ["--caption", "a hat", "--prior", str(runs["prior"])]
    assert sample.command([*given, str(tmp_path / "b"), *options]) == 0
    for name in "ab":
        image, *drawn = (np.asarray(Image.open(tmp_path / name / f"000_00{n}.png"), np.int16)
                         for n in range(3))  # fmt: skip
        for each in drawn:
            assert np.array_equal(each[:, :15], image[:, :15])
            assert abs(each[:, 17:] - image[:, 17:]).mean() > 5
        assert not np.array_equal(drawn[0], drawn[1])


def test_transparency_is_white_in_an_image_and_drawn_in_a_mask(tmp_path):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (4, 0, 8, 8))
    clear.save(tmp_path / "a.png")
    image = np.asarray(edits.open_images([str(tmp_path / "a.png")])[0])
    assert (image[:, :4] == 255).all() and (image[:, 4:] == (255, 0, 0)).all()
    mask = np.asarray(edits.open_mask(str(tmp_path / "a.png")))
    assert (mask[:, :4] == 255).all() and (mask[:, 4:] == 0).all()
    opaque = Image.new("RGBA", (8, 8), "black")
    opaque.paste((255, 255, 255, 255), (0, 0, 8, 4))
    opaque.save(tmp_path / "m.png")
    mask = np.asarray(edits.open_mask(str(tmp_path / "m.png")))
    assert (mask[:4] == 255).all() and (mask[4:] == 0).all()


def test_a_mask_with_nothing_to_draw_is_refused(files, tmp_path):
    Image.new("L", (64, 64), 0).save(tmp_path / "m.png")
    given = ["inpaint", "--images", files["images"][0], "--mask", str(tmp_path / "m.png")]
    with pytest.raises(ValueError, match="m.png: found nothing white"):
        sample.command([*given, "--decoder", str(files["runs"]["decoder"]), *QUICK,
                        "--out", str(tmp_path / "a")])  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["varations"], "found 'varations', expected options or one of variations"),
        (["variations"], "--images: found none"),
        (["variations", "--images", "none.png"], "none.png: found no such file"),
        (["interpolate", "--images", "a.png"], "expected two or more"),
        (["textdiff", "--images", "a.png"], "--caption: found none"),
        (["inpaint", "--images", "a.png"], "--mask: found none"),
        (["inpaint", "--images", "a", "--mask", "m", "--caption", "x"], "one of --caption and"),
        (["guidance"], "--prompts: found none"),
        (["guidance", "--prompts", "a", "--scales"], "--scales: found none"),
        (["pca", "--images", "a.png", "--components", "-3"], "--components: found -3"),
        (["variations", "--images", "broken.png"], "broken.png: found no image"),
        (["variations", "--images", "a.png", "--count", "0"], "--count: found 0, expected 1"),
        (["textdiff", "--images", "a.png", "--caption", "x", "--max-theta", "3"],
         "--max-theta: found 3, expected more than 0"),
        (["variations", "--images", "a.png", "--batch-size", "0"], "--batch-size: found 0, expect"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line(files, tmp_path, monkeypatch, arguments, problem):
    monkeypatch.chdir(files["root"])
    (files["root"] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    more = [] if arguments == ["varations"] else ["--decoder", str(files["runs"]["decoder"])]
    with pytest.raises(ValueError, match=problem):
        sample.command([*arguments, *more])


def test_a_folder_of_something_else_is_spared(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files["root"])
    (tmp_path / "thesis.tex").write_text("dear")
    options = ["--decoder", str(files["runs"]["decoder"]), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="found a folder without edits.jsonl"):
        sample.command(["variations", "--images", "a.png", *options])
    assert (tmp_path / "thesis.tex").exists()
