"""Laws of the drawn set: captions invert, held out stays out, rows repeat, negatives are hard."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from ingest.shapes import (
    BACKGROUNDS,
    BLOCK,
    CANVAS,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    UNIT_AREA,
    UNIT_CENTROID_Y,
    Scene,
    Thing,
    describe,
    draw,
    is_held_out,
    make_pairs,
    parse,
    sample_scene,
    shape_mask,
)

THINGS = [
    Thing(colour=colour, shape=shape, size=size)
    for colour, shape, size in itertools.product(PALETTE, SHAPES, SIZES)
]
RED = Thing(colour="red", shape="circle", size="small")
BLUE = Thing(colour="blue", shape="triangle", size="large")


def scenes(num_scenes: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, i % 4 == 0, 1 + i % 3 % 2) for i in range(num_scenes)]


def meaning(scene: Scene) -> tuple:
    """Name the picture: mirrored relations with swapped things show the same."""
    mirrored = {"right of": "left of", "below": "above"}
    if scene.relation in mirrored:
        return scene.things[::-1], mirrored[scene.relation]
    return scene.things, scene.relation


def differences(a: Scene, b: Scene) -> int:
    """Count the attributes in which two scenes differ; the order of things is one."""
    if a.things != b.things and a.things == b.things[::-1]:
        return 1 + (a.relation != b.relation)
    pairs = zip(a.things, b.things, strict=True)
    unlike = sum(
        getattr(one, name) != getattr(other, name)
        for one, other in pairs
        for name in ("colour", "shape", "size")
    )
    return unlike + (a.relation != b.relation)


def test_parse_inverts_every_phrasing():
    rng = np.random.default_rng(1)
    for scene in scenes(150):
        for caption in {describe(scene, rng) for _ in range(12)}:
            found = parse(caption)
            assert (found.things, found.relation) == (scene.things, scene.relation), caption
            assert found.background is None


def test_captions_have_several_phrasings_and_parse_reads_loosely():
    rng = np.random.default_rng(1)
    scene = Scene(things=(RED, BLUE), relation="left of")
    assert len({describe(scene, rng) for _ in range(200)}) == 4
    assert parse("  A small red circle to the left of a large blue triangle. ") == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a red circle",
        "a small red circle above",
        "a small red circle near a large blue triangle",
        "a small red circle above a large red triangle",
        "a large red circle inside a small blue triangle",
        "a small red circle inside a large blue cross",
    ],
)
def test_parse_names_the_caption_it_cannot_read(caption):
    with pytest.raises(ValueError) as error:
        parse(caption)
    assert repr(caption) in str(error.value) and "\n" not in str(error.value)


def test_captions_have_at_most_17_clip_tokens():
    tokenizer = pytest.importorskip("open_clip").get_tokenizer("ViT-B-32")
    rng = np.random.default_rng(2)
    captions = [describe(scene, rng) for scene in scenes(300)]
    assert int((tokenizer(captions) != 0).sum(1).max()) <= 19


def test_nothing_held_out_is_in_training():
    for pair in make_pairs(800, 0, "train"):
        assert not is_held_out(pair.scene), pair.caption
        for thing in pair.scene.things:
            assert not is_held_out(Scene(things=(thing,))), pair.caption


def test_splits_hold_what_they_say():
    for split, num_things, held_out in (
        ("single", 1, True),
        ("seen", 2, False),
        ("held_out", 2, True),
    ):
        for pair in make_pairs(60, 0, split):
            assert pair.split == split and len(pair.scene.things) == num_things
            assert is_held_out(pair.scene) == held_out
            if num_things == 2:  # only the combination is new, never a thing
                assert not any(is_held_out(Scene(things=(t,))) for t in pair.scene.things)


def test_a_tenth_is_held_out_in_either_order():
    held_out = [is_held_out(Scene(things=(thing,))) for thing in THINGS]
    assert 0.07 <= np.mean(held_out) <= 0.13
    # Each (colour, shape) of a held-out thing is trained on in its other size.
    names = [(t.colour, t.shape) for t, out in zip(THINGS, held_out, strict=True) if out]
    assert len(set(names)) == len(names)

    trained = [thing for thing, out in zip(THINGS, held_out, strict=True) if not out]
    pairs = {}
    for a, b in itertools.permutations(trained, 2):
        if a.colour != b.colour:
            key = (a.colour, a.shape, b.colour, b.shape)
            pairs.setdefault(key, set()).add(is_held_out(Scene(things=(a, b), relation="above")))
    assert all(len(answers) == 1 for answers in pairs.values())  # whatever the sizes
    out = {key for key, answers in pairs.items() if True in answers}
    assert 0.07 <= len(out) / len(pairs) <= 0.13
    assert out == {key[2:] + key[:2] for key in out}


def test_rows_depend_on_seed_split_and_index_alone():
    for split in SPLITS:
        rows = list(make_pairs(10, 3, split))
        assert rows == list(make_pairs(10, 3, split))
        assert rows[:6] == list(make_pairs(6, 3, split))
        assert rows != list(make_pairs(10, 4, split))


def test_hard_negatives_differ_in_exactly_one_attribute():
    rows = [pair.scene for pair in make_pairs(600, 0, "train")]
    for start in range(0, len(rows), BLOCK):
        first, *others = rows[start : start + BLOCK]
        assert [differences(first, other) for other in others] == [1, 1, 1]
        assert len({meaning(scene) for scene in (first, *others)}) == BLOCK
        assert {scene.background for scene in others} == {first.background}


def test_training_mixes_one_and_two_things_and_every_word():
    rows = [pair.scene for pair in make_pairs(1200, 0, "train")]
    assert 0.25 <= np.mean([len(scene.things) == 1 for scene in rows]) <= 0.42
    things = {thing for scene in rows for thing in scene.things}
    assert things == {thing for thing in THINGS if not is_held_out(Scene(things=(thing,)))}
    assert {scene.relation for scene in rows} == {None, *RELATIONS}
    assert {scene.background for scene in rows} == set(BACKGROUNDS)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_have_the_declared_area_and_centroid(shape):
    diameter, centre = 21.3, (30.2, 33.7)
    mask = shape_mask(shape, diameter, centre, CANVAS)
    assert mask.dtype == np.float32 and mask.min() == 0 and mask.max() == 1
    assert mask.sum() == pytest.approx(UNIT_AREA[shape] * (diameter / 2) ** 2, rel=0.02)
    ys, xs = np.mgrid[:CANVAS, :CANVAS] + 0.5
    assert (mask * xs).sum() / mask.sum() == pytest.approx(centre[0], abs=0.15)
    expected = centre[1] + UNIT_CENTROID_Y[shape] * diameter / 2
    assert (mask * ys).sum() / mask.sum() == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_cut_at_the_edge_of_the_canvas(shape):
    whole = shape_mask(shape, 20.0, (52.0, 50.0), 96)
    np.testing.assert_array_equal(shape_mask(shape, 20.0, (-12.0, -14.0), 32), np.zeros((32, 32)))
    np.testing.assert_array_equal(shape_mask(shape, 20.0, (20.0, 18.0), 32), whole[32:64, 32:64])


def test_drawings_keep_their_margin_and_their_parts_apart():
    rng = np.random.default_rng(5)
    for scene in scenes(200, seed=5):
        image = draw(scene, rng)
        assert image.shape == (CANVAS, CANVAS, 3) and image.dtype == np.uint8
        ground = BACKGROUNDS[scene.background or ""]
        border = np.ones((CANVAS, CANVAS), bool)
        border[1:-1, 1:-1] = False
        assert (image[border] == ground).all(), scene
        for thing in scene.things:
            solid = (image == PALETTE[thing.colour]).all(-1).sum()
            assert solid >= 80, (scene, solid)


def test_drawing_scales_with_the_canvas():
    scene = Scene(things=(RED, BLUE), relation="inside", background="white")
    large = draw(scene, np.random.default_rng(0), size=128)
    reduced = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(reduced - draw(scene, np.random.default_rng(0))).mean() < 1


def test_image_bytes_decode_to_the_drawing_within_jpeg_error():
    for pair in make_pairs(8, 0, "seen"):
        image = np.asarray(Image.open(io.BytesIO(pair.image_bytes)))
        for thing in pair.scene.things:
            nearest = np.abs(image.astype(int) - PALETTE[thing.colour]).max(-1).min()
            assert nearest <= 6


@pytest.mark.parametrize(
    "build",
    [
        lambda: Thing(colour="pink", shape="circle", size="small"),
        lambda: Scene(things=(RED,), relation="above"),
        lambda: Scene(things=(RED, BLUE)),
        lambda: Scene(things=(RED, BLUE), relation="near"),
        lambda: Scene(things=(RED,), background="pink"),
        lambda: make_pairs(4, 0, "test"),
        lambda: make_pairs(-1, 0, "train"),
        lambda: sample_scene(np.random.default_rng(0), False, 3),
        lambda: shape_mask("star", 10.0, (5.0, 5.0), 10),
    ],
)
def test_what_cannot_be_is_a_one_line_error(build):
    with pytest.raises(ValueError, match="expected") as error:
        build()
    assert "\n" not in str(error.value)
