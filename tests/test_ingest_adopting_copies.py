"""Shards that adoption makes: images, filters and removals as of a download, or the found bytes."""

import io
import json
import shlex
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from _adopting import CAPTIONS, adopted, picture, rows, stored
from _runs import done, script
from _tars import adoption, write_tar
from PIL import Image

from eval.sampling.image_source import open_images
from ingest import adopt, download
from ingest.download import DownloadConfig
from ingest.fetching.decode import Resizer
from ingest.lists.filters import FilterConfig
from ingest.shards import EmbedShard, ImageShard, load_snapshot, read_manifest
from ingest.store.commits import committed
from training.data import demo_data
from training.data.datasets import ImageDataset

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PICTURES = [picture(n, kind, (64, 48)) for n, kind in enumerate(KINDS)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Five pictures, one of each format, with captions, scores and addresses."""
    columns = {
        "image": PICTURES,
        "caption": CAPTIONS[:5],
        "aesthetic": [4.0, 5.0, None, 6.0, 7.0],
        "url": [f"https://a.example/{n}" for n in range(5)],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("mode", ["keep_ratio", "center_crop", "border"])
def test_images_are_resized_as_a_download_does(mode, table: Path, tmp_path: Path):
    assert adopted(table, tmp_path / "out", resize_mode=mode, image_size=24) == 0
    resizer = Resizer(image_size=24, resize_mode=mode, quality=95)
    assert [image for image, _ in stored(tmp_path / "out")] == [resizer(p).data for p in PICTURES]
    sizes = [(row["original_width"], row["original_height"]) for row in rows(tmp_path / "out")]
    assert sizes == [(64, 48)] * 5
    found = [row["sha256"] for row in rows(tmp_path / "out")]
    assert found == [sha256(image).hexdigest() for image in PICTURES]


def test_found_bytes_are_kept_under_their_own_name_and_read_by_webdataset(
    table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    resize, encoded = Resizer.__call__, []
    with monkeypatch.context() as patch:
        patch.setattr(Resizer, "__call__", lambda *args: encoded.append(args[1]) or resize(*args))
        assert adopted(table, tmp_path / "out") == 0
    assert encoded == PICTURES[3:]  # what is kept is not made a JPEG as well
    resizer = Resizer(image_size=256, resize_mode="no", quality=95)
    expected = [*PICTURES[:3], *(resizer(image).data for image in PICTURES[3:])]
    assert [image for image, _ in stored(tmp_path / "out")] == expected
    tar = tmp_path / "out" / "000000.tar"
    with tarfile.open(tar) as members:
        names = [name.rpartition(".")[2] for name in members.getnames()]
    assert [name for name in names if name not in ("txt", "json")] == [
        "jpg", "png", "webp", "jpg", "jpg",
    ]  # fmt: skip
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    images = [next(s[e] for e in ("jpg", "png", "webp") if e in s) for s in samples]
    assert images == expected and [s["txt"].decode() for s in samples] == CAPTIONS[:5]
    assert [json.loads(s["json"])["source_key"] for s in samples] == [
        f"a.parquet:{n}" for n in range(5)
    ]


def test_shards_of_one_format_are_what_hugging_face_reads_as_webdataset(table, tmp_path: Path):
    import datasets
    assert adopted(table, tmp_path / "out", resize_mode="keep_ratio", samples_per_shard=3) == 0
    tars = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    where = {"data_files": {"train": tars}, "cache_dir": tmp_path / "cache"}
    read = datasets.load_dataset("webdataset", split="train", **where)
    read = read.cast_column("jpg", datasets.Image(decode=False))
    pairs = [(row["jpg"]["bytes"], row["txt"]) for row in read]
    assert pairs == stored(tmp_path / "out")


@pytest.mark.parametrize(
    ("filters", "errors"),
    [
        ({"min_aesthetic": 5.0}, ["low_aesthetic", None, "null_score", None, None]),
        ({"min_caption_chars": 10}, [None, None, None, None, "short_caption"]),
        ({"min_pixels": 64 * 48 + 1}, ["too_few_pixels"] * 5),
        ({"max_aspect_ratio": 1.2}, ["aspect_ratio"] * 5),
    ],
)
def test_filters_are_those_of_a_download(filters, errors, table: Path, tmp_path: Path):
    assert adopted(table, tmp_path / "out", filters=FilterConfig(**filters)) == 0
    assert [row["error"] for row in rows(tmp_path / "out")] == errors
    assert load_snapshot(tmp_path / "out").num_samples == errors.count(None)


@pytest.mark.parametrize("samples_per_shard", [2, 10])
def test_repeated_images_are_left_out_within_a_shard_and_across(samples_per_shard, tmp_path: Path):
    images = [PICTURES[n] for n in (0, 1, 0, 2, 1, 0)]
    pq.write_table(pa.table({"image": images, "text": list("abcdef")}), tmp_path / "a.parquet")
    unique = FilterConfig(unique=("images",))
    out, number = tmp_path / "out", samples_per_shard
    assert adopted(tmp_path / "a.parquet", out, samples_per_shard=number, filters=unique) == 0
    assert [caption for _, caption in stored(out)] == ["a", "b", "d"]
    assert [row["error"] for row in rows(out)].count("duplicate_image") == 3


def test_what_was_forgotten_is_not_adopted_again(table: Path, tmp_path: Path):
    out, request = tmp_path / "out", tmp_path / "request.txt"
    assert adopted(table, out, keep_columns=("aesthetic",)) == 0
    request.write_text(f"https://a.example/1\n{sha256(PICTURES[3]).hexdigest()}\n")
    assert download.main(DownloadConfig(out=str(out), forget=str(request))) == 0
    left = [CAPTIONS[n] for n in (0, 2, 4)]
    assert [caption for _, caption in stored(out)] == left
    assert adopted(table, out, keep_columns=("aesthetic",), fresh=True) == 0
    assert [caption for _, caption in stored(out)] == left
    table_rows = rows(out)
    assert [row["error"] for row in table_rows] == [None, "forgotten", None, "forgotten", None]
    for row in (table_rows[1], table_rows[3]):
        assert set(row.values()) == {None, row["key"], "filtered", "forgotten"}


def test_an_interrupted_adoption_is_continued_to_the_same_snapshot(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"samples_per_shard": 2, "resize_mode": "keep_ratio"}
    assert adopted(table, tmp_path / "whole", **options) == 0
    with monkeypatch.context() as patch:
        resize, calls = Resizer.__call__, []

        def fail_at_the_fourth(self: Resizer, data: bytes) -> object:
            calls.append(data)
            if len(calls) == 4:
                raise MemoryError
            return resize(self, data)

        patch.setattr(Resizer, "__call__", fail_at_the_fourth)
        with pytest.raises(MemoryError):
            adopted(table, tmp_path / "out", **options)
    assert list(committed(tmp_path / "out")) == ["000000"]
    assert adopted(table, tmp_path / "out", **options) == 0
    digests = {load_snapshot(tmp_path / name).digest for name in ("whole", "out")}
    assert len(digests) == 1


def foreign() -> list[tuple[str, bytes]]:
    """Members of a tar with pictures as cameras and designers store them."""
    pixels = np.asarray(Image.open(io.BytesIO(picture(1, size=(48, 32)))))
    image, members = Image.fromarray(pixels), []
    exif = Image.Exif()
    exif[0x0112] = 8
    clear = image.convert("RGBA")
    clear.putalpha(90)
    for n, (each, kind, options) in enumerate(
        [
            (image, "JPEG", {"exif": exif.tobytes()}), (clear, "PNG", {}),
            (image.convert("P"), "PNG", {"transparency": 3}), (image.convert("CMYK"), "JPEG", {}),
            (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
            (image.convert("L"), "JPEG", {}), (clear, "WEBP", {"lossless": True}),
        ]
    ):  # fmt: skip
        file = io.BytesIO()
        each.save(file, kind, **options)
        members += [(f"{n}.{kind.lower()}", file.getvalue()), (f"{n}.txt", f"{n}".encode())]
    return members


def test_foreign_pictures_give_equal_batches_embeddings_and_features_in_place_and_copied(
    tmp_path: Path,
):
    """The oracle is the download's own: the upright RGB picture that it would store."""
    members = foreign()
    source = write_tar(tmp_path / "a.tar", members)
    batches, embeds, pictures = [], [], []
    for copy in (False, True):
        out = tmp_path / f"copy-{copy}"
        mode = {"resize_mode": "no"} if copy else {}
        assert adopt.main(adoption(source, out, copy=copy, **mode)) == 0
        batches.append(ImageDataset(load_snapshot(out), 32).read(np.arange(7))["image"])
        demo_data.embed_here(str(out), tmp_path / f"embeds-{copy}", "tiny:random")
        embeds.append(EmbedShard(tmp_path / f"embeds-{copy}", "000000").image_embed)
        images = open_images(str(out))
        assert [image.size for image in images] == [images.size(n) for n in range(7)]
        pictures.append([np.asarray(image) for image in images])
    assert np.array_equal(*batches) and np.array_equal(*embeds)
    resizer = Resizer(image_size=1, resize_mode="no", quality=100)
    for n, (ours, same) in enumerate(zip(*pictures, strict=True)):
        assert np.array_equal(ours, same)
        downloaded = Image.open(io.BytesIO(resizer(members[2 * n][1]).data))
        assert ours.shape == np.asarray(downloaded).shape
        assert (
            np.abs(ours.astype(int) - np.asarray(downloaded)).mean() < 25
        )  # not 31 or more, as turned


@pytest.mark.parametrize("what", ["a.tar", "x/b.tar.gz", "a.parquet", "x/b.png", "images.parquet"])
def test_a_folder_that_is_none_of_ours_says_the_command_that_makes_one(
    what: str, tmp_path: Path, run_here
):
    given = tmp_path / "my data"
    path = given / what
    path.parent.mkdir(parents=True)
    if ".tar" in what:
        write_tar(path, [("a.png", PICTURES[1]), ("a.txt", b"x")], "w:gz" if "gz" in what else "w")
    elif what.endswith(".parquet"):
        pq.write_table(pa.table({"image": PICTURES[:1], "text": ["x"]}), path)
    else:
        path.write_bytes(PICTURES[1])
        path.with_suffix(".txt").write_text("x")
    images = path if what == "images.parquet" else given
    with pytest.raises(ValueError, match="make one of what is there by: python ") as error:
        read_manifest(images)
    command = shlex.split(str(error.value).split("python ")[1].split(";")[0])
    command[command.index("data/images")] = str(tmp_path / "out")
    code, _, _ = run_here(*command, "--num-processes", "0")
    assert code == 0 and load_snapshot(tmp_path / "out").num_samples == 1
    code, _, message = run_here("ingest/embed.py", "--images", str(images), "--out", str(tmp_path))
    assert code == 2 and "python ingest/adopt.py --source " in message
    if not what.endswith(".png") and what != "images.parquet":
        with pytest.raises(ValueError, match="found no images, .*python ingest/adopt.py --source"):
            open_images(str(given))


@pytest.mark.slow
def test_on_ray_a_folder_goes_in_and_ends_in_the_same_snapshot(tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:03d}.png").write_bytes(picture(n))
        (folder / f"{n:03d}.txt").write_text(f"caption {n}")
    assert adopted(folder, tmp_path / "here", samples_per_shard=7, resize_mode="keep_ratio") == 0
    out = tmp_path / "out"
    finished = done(
        script(
            "ingest/adopt.py", "--source", folder, "--out", out, "--samples-per-shard", 7,
            "--num-processes", 2,
        )
    )  # fmt: skip
    assert finished.returncode == 0 and "40 rows = 40 stored" in finished.stdout
    assert load_snapshot(out).digest == load_snapshot(tmp_path / "here").digest
    assert ImageShard(out, "000005").caption(4) == "caption 39"
