"""What is no plain picture is named, in one line, with the remedy."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from eval.distances.measure import open_source
from eval.features.decoding import fitted, picture_size, read_picture
from eval.sampling.image_source import IncompleteError, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        read_picture(path, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_plain_picture_is_its_pixels(tmp_path: Path):
    PICTURE.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png", "a")), PIXELS)
    PICTURE.convert("L").save(tmp_path / "grey.png")
    grey = np.asarray(read_picture(tmp_path / "grey.png", "grey"))
    assert grey.shape == (12, 16, 3) and (grey[..., 0] == grey[..., 2]).all()


def test_a_truncated_picture_is_named(tmp_path: Path):
    for name in ("a.png", "a.jpg"):
        PICTURE.resize((200, 200)).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert "does not decode" in refused(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"")
    assert "no picture" in refused(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("<html>not found</html>")
    assert "no picture" in refused(tmp_path / "a.png")


def test_other_pixels_than_8_bit_ones_are_named(tmp_path: Path):
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(tmp_path / "a.tiff")
    assert "found float pixels, expected 8-bit RGB or grey" in refused(tmp_path / "a.tiff")
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert "found 16-bit pixels, expected 8-bit RGB or grey" in refused(tmp_path / "a.png")


def test_transparency_is_named_and_an_opaque_alpha_is_not(tmp_path: Path):
    clear = PICTURE.convert("RGBA")
    clear.save(tmp_path / "opaque.png")
    found = np.asarray(read_picture(tmp_path / "opaque.png", "opaque"))
    np.testing.assert_array_equal(found, PIXELS)
    clear.putalpha(128)
    clear.save(tmp_path / "clear.png")
    assert "mode RGBA with transparency" in refused(tmp_path / "clear.png")
    palette = PICTURE.convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert "mode P with transparency" in refused(tmp_path / "palette.png")


def test_a_png_with_a_long_text_and_a_jpeg_without_its_end_are_read(tmp_path: Path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    PICTURE.save(tmp_path / "a.png", pnginfo=texts)
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png", "a")), PIXELS)
    PICTURE.save(tmp_path / "whole.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-2])
    found, whole = (np.asarray(read_picture(tmp_path / f"{n}.jpg", n)) for n in ("a", "whole"))
    np.testing.assert_array_equal(found, whole)


def test_a_photo_that_a_phone_has_turned_is_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    PICTURE.save(tmp_path / "a.png", exif=exif)
    assert picture_size(tmp_path / "a.png", "a") == (12, 16)
    found = np.asarray(read_picture(tmp_path / "a.png", "a"))
    np.testing.assert_array_equal(found, np.rot90(PIXELS, -1))


def test_a_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    PICTURE.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "does not decode" in refused(tmp_path / "a.png")


def test_fitting_crops_the_centre():
    wide = Image.fromarray(np.pad(PIXELS, ((0, 0), (20, 20), (0, 0))))  # 12 x 56
    found = np.asarray(fitted(wide, 12))
    np.testing.assert_array_equal(found, PIXELS[:, 2:14])
    assert fitted(PICTURE, 8).size == (8, 8)


# -- sets of them ----------------------------------------------------------------------------------


def test_a_plain_folder_is_read_with_its_folders_and_what_is_left_out_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "cats" / "old").mkdir(parents=True)
    (tmp_path / "cats" / "again").symlink_to(tmp_path)  # a circle
    for name in ("b.gif", "cats/a.JPG", "cats/old/c.webp"):
        PICTURE.save(tmp_path / name)
    assert [Path(path).name for path in open_images(str(tmp_path)).paths] == [
        "b.gif", "a.JPG", "c.webp",
    ]  # fmt: skip
    assert "3 images in 3 folders; left out 0" in capsys.readouterr().out
    for name in ("._b.gif", ".DS_Store", "Thumbs.db", "cats/._a.JPG"):
        (tmp_path / name).write_bytes(b"no picture")
    assert len(open_images(str(tmp_path))) == 3
    assert "3 images in 3 folders; left out 4 files" in capsys.readouterr().out


def test_one_image_alone_is_no_set_and_says_on_which_side_it_is(tmp_path: Path):
    PICTURE.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"{tmp_path}: found one image, expected two or more"):
        open_source(str(tmp_path), 0)


def test_the_grid_beside_edits_is_no_image_of_theirs(tmp_path: Path):
    for name in ("000_000.png", "grid.png"):
        PICTURE.save(tmp_path / name)
    assert len(open_images(str(tmp_path))) == 2
    (tmp_path / "edits.jsonl").write_text("{}\n")
    assert [path.name for path in open_images(str(tmp_path)).paths] == ["000_000.png"]


def test_a_listed_sample_that_is_missing_is_incomplete(tmp_path: Path):
    PICTURE.save(tmp_path / "000000.png")
    lines = '{"file": "000000.png", "caption": "a"}\n{"file": "000001.png", "caption": "b"}\n'
    (tmp_path / "samples.jsonl").write_text(lines)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(IncompleteError, match="found 1 of 2 samples, without 000001.png"):
        open_images(str(tmp_path))


def test_the_digest_is_of_names_and_bytes(tmp_path: Path):
    for name in ("a", "b"):
        PICTURE.save(tmp_path / f"{name}.png")
    before = open_images(str(tmp_path))
    assert before.digest == open_images(str(tmp_path)).digest
    PICTURE.rotate(90).save(tmp_path / "b.png")
    changed = open_images(str(tmp_path))
    assert changed.digest != before.digest
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert open_images(str(tmp_path)).digest != changed.digest


def test_images_are_picked_and_fitted_by_number(tmp_path: Path):
    for i in range(4):
        Image.new("RGB", (10, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    images = open_images(str(tmp_path)).fitted(4)
    picked = images.picked([2, 0], "some")
    assert [np.asarray(image)[0, 0, 0] for image in picked] == [2, 0]
    assert picked.size(0) == (4, 4) and picked[0].size == (4, 4)
