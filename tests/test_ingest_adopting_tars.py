"""Laws of reading tars by anyone: samples, keys and captions are webdataset's, byte for byte."""

import io
import json
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from _tars import REAL_TAR, adoption, pairs, picture, write_tar, write_tars
from PIL import Image

from ingest.adopt import main
from ingest.adopting.sources import open_source
from ingest.adopting.tar_reader import MEMBER_NAME
from ingest.adopting.tars import list_tars, open_tars
from ingest.fetching.decode import DecodeError, ImageLimits, verify_image
from ingest.shards import ImageShard, load_snapshot

LONG = "ä word, " * (5 << 20 >> 3)
CAPTIONS = ["two\nlines\r\n", "\N{CAT FACE} and \N{ZERO WIDTH JOINER}", "NUL \0 inside", "", LONG]


def read_back(out: Path | str) -> list[tuple[bytes, str]]:
    """Every sample as readers of a data folder see it."""
    shards = [
        ImageShard(out, entry.name, digest=entry.digest) for entry in load_snapshot(out).shards
    ]
    return [(shard.image_bytes(i), shard.caption(i)) for shard in shards for i in range(len(shard))]


def table(out: Path | str, name: str = "000000") -> list[dict]:
    return pq.read_table(Path(out) / f"{name}.parquet").to_pylist()


def errors(out: Path | str) -> Counter:
    return Counter(row["error"] for row in table(out))


def by_webdataset(*paths: str, image: str = "jpg") -> list[tuple[str, bytes, bytes]]:
    samples = webdataset.WebDataset(list(paths), shardshuffle=False, empty_check=False)
    return [(each["__key__"], each[image], each.get("txt", b"")) for each in samples]


def test_samples_keys_and_captions_are_those_that_webdataset_reads(tmp_path):
    members = []
    for i, caption in enumerate(CAPTIONS):
        key = ("a/b.c/0", "0001", "./sub/x y", "ünï", "z")[i]
        members += [(f"{key}.jpg", picture(red=i)), (f"{key}.TXT", caption.encode())]
    members += [("none.JPG", picture(red=99)), ("none.seg.png", picture(kind="PNG"))]
    path = write_tar(tmp_path / "tars" / "any.tar", members)
    assert main(adoption(path, tmp_path / "out")) == 0
    expected = by_webdataset(path)
    assert len(expected) == 6
    assert read_back(tmp_path / "out") == [(image, txt.decode()) for _, image, txt in expected]
    assert [row["source_key"] for row in table(tmp_path / "out")] == [key for key, *_ in expected]
    assert table(tmp_path / "out")[4]["caption"] == LONG


@pytest.mark.skipif(not REAL_TAR.exists(), reason="needs ../shared/data")
def test_a_real_tar_of_img2dataset_reads_as_webdataset_reads_it(tmp_path):
    assert main(adoption(REAL_TAR, tmp_path / "out")) == 0
    expected = by_webdataset(str(REAL_TAR))
    assert read_back(tmp_path / "out") == [(image, txt.decode()) for _, image, txt in expected]


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "a/b.c.txt", "./a/b.jpg", "a.b/c.JPG", "/etc/x.txt", ".hidden", "a/.x", "noext",
     "a b.c", "__x__", "a.", "..", "a/../b.jpg", "d.e/f"],
)  # fmt: skip
def test_a_name_is_split_as_webdataset_splits_it(name):
    match = MEMBER_NAME.fullmatch(name)
    expected = webdataset.tariterators.base_plus_ext(name)
    assert (match.groups() if match else (None, None)) == expected


def test_an_image_is_found_by_its_content_whatever_it_is_called(tmp_path):
    kinds = {"jpg": "PNG", "JPEG": "WEBP", "img": "GIF", "webp": "BMP", "bin": "JPEG", "dat": "PNG"}
    members = [(f"{i}.{end}", picture(i, kinds[end])) for i, end in enumerate(kinds)]
    members += [("7.jpg", b"no image"), ("7.orig.png", picture(7, "PNG"))]  # .jpg says it is one
    members += [("8.png", b"no image"), ("8.jpg", picture(8))]
    path = write_tar(tmp_path / "any.tar", members)
    assert main(adoption(path, tmp_path / "out")) == 0
    stored = [members[i][1] for i in range(6)] + [members[9][1]]
    assert [image for image, _ in read_back(tmp_path / "out")] == stored
    assert errors(tmp_path / "out") == {None: 7, "not_an_image": 1}


def test_hostile_members_are_never_run_followed_or_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    path, bomb = tmp_path / "hostile.tar", pickle.dumps(Bomb())
    with tarfile.open(path, "w") as tar:
        for name, kind in [("0.jpg", tarfile.SYMTYPE), ("1.jpg", tarfile.LNKTYPE),
                           ("2.jpg", tarfile.CHRTYPE), ("3.jpg", tarfile.FIFOTYPE)]:  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        for name, data in [
            ("4.pyd", bomb), ("5.pkl", bomb), ("5.pickle", bomb), ("/etc/6.jpg", picture(6)),
            ("../../7.jpg", picture(7)), ("8.jpg", picture(1)), ("8.jpg", picture(2)),
            ("9.jpg", picture(size=(400, 400))[:-99]), ("10.jpg", picture()), ("10.txt", b"\xff"),
            ("__meta__/0.jpg", picture()), ("11.txt", b"no image"), ("8.jpg", picture(8)),
            ("n" * 300 + ".jpg", picture(9)),
        ]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert main(adoption(path, tmp_path / "out")) == 0
    assert not (tmp_path / "exploded").exists()
    assert errors(tmp_path / "out") == {
        None: 4, "no_image": 3, "duplicate_member": 1, "undecodable": 1, "bad_caption": 1,
    }  # fmt: skip
    stored = [row["source_key"] for row in table(tmp_path / "out") if row["error"] is None]
    assert stored == ["/etc/6", "../../7", "8", "n" * 300]


def test_no_command_is_run(tmp_path, run_here):
    for source in (f"pipe:touch {tmp_path}/x.tar", "a.tar::pipe:b.tar"):
        code, _, error = run_here(
            "ingest/adopt.py", "--source", source, "--out", str(tmp_path / "o")
        )
        assert code == 2 and "no command is run" in error


def test_captions_and_fields_come_from_json_or_from_the_table_beside_a_tar(tmp_path):
    texts: list[object] = [["long", "short"], ["one"], [], None, 7, ["x", 3]]
    members = []
    for i, value in enumerate(texts):
        record = {"meta": {"texts": value}, "url": f"https://h/{i}", "score": i, "tag": {"a": 1}}
        members += [(f"{i}.jpg", picture(i)), (f"{i}.json", json.dumps(record).encode())]
    path = write_tar(tmp_path / "a" / "00000.tar", members)
    config = adoption(
        path, tmp_path / "out", caption_key="meta.texts", keep_columns=("score", "tag")
    )
    assert main(config) == 0
    rows = table(tmp_path / "out")
    assert [row["caption"] for row in rows[:4]] == ["long", "one", "", ""]
    assert [row["captions_more"] for row in rows[:4]] == [["short"], [], [], []]
    assert [row["error"] for row in rows] == [None] * 4 + ["bad_caption"] * 2
    assert rows[2]["score"] == 2.0 and rows[2]["tag"] == '{"a": 1}'
    assert rows[2]["url"] == "https://h/2"

    # The table beside it comes first, and filters use its columns
    columns = {"key": [str(i) for i in range(6)], "alt": [f"alt {i}" for i in range(6)]}
    pq.write_table(pa.table(columns | {"similarity": [i / 10 for i in range(6)]}),
                   tmp_path / "a" / "00000.parquet")  # fmt: skip
    filters = type(config.filters)(min_similarity=0.25)
    assert main(adoption(path, tmp_path / "two", caption_key="alt", filters=filters)) == 0
    assert [text for _, text in read_back(tmp_path / "two")] == ["alt 3", "alt 4", "alt 5"]
    assert errors(tmp_path / "two") == {"low_similarity": 3, None: 3}


def test_a_kept_list_of_texts_stays_one_whatever_its_first_values_are(tmp_path):
    values: list[object] = [None, [], ["one", "two"], "alone", ["x", 3, None], ["\ud800"]]
    members = []
    for i, value in enumerate(values):
        members += [(f"{i}.jpg", picture(i)), (f"{i}.txt", b"main")]
        members.append((f"{i}.json", json.dumps({"alt": value}).encode()))
    path = write_tar(tmp_path / "a.tar", members)
    assert main(adoption(path, tmp_path / "out", keep_columns=("alt",))) == 0
    expected = [None, [], ["one", "two"], ["alone"], ["x"], ["?"]]
    assert [row["alt"] for row in table(tmp_path / "out")] == expected
    shard = ImageShard(tmp_path / "out", "000000")
    assert shard.further_captions("alt") == [each or [] for each in expected]


def test_a_member_that_is_too_large_is_never_read(tmp_path, monkeypatch):
    members = [("0.jpg", picture(0)), ("0.json", json.dumps({"text": "a" * 2000}).encode()),
               ("1.jpg", picture(1)), ("1.json", b'{"text": "b"}')]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    monkeypatch.setattr("ingest.adopting.tars.MAX_MEMBER_BYTES", 1900)
    assert main(adoption(path, tmp_path / "out", caption_key="text")) == 0
    assert [row["error"] for row in table(tmp_path / "out")] == ["too_large", None]
    assert [text for _, text in read_back(tmp_path / "out")] == ["b"]


def test_a_table_beside_a_tar_may_have_any_order_types_and_row_groups(tmp_path):
    path = write_tar(tmp_path / "00000.tar", pairs(0, 9))
    keys = [7, 3, 99, 8, 0, 1, 2, 5, 6]  # no row of 4
    texts = pa.array([f"alt {key % 2}" for key in keys]).dictionary_encode()
    columns = {"key": [f"{key:05d}" for key in keys], "alt": texts}
    columns["more"] = [[str(key)] for key in keys]
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet", row_group_size=2)
    assert main(adoption(path, tmp_path / "out", keep_columns=("alt", "more"))) == 0
    kept = [(row["alt"], row["more"]) for row in table(tmp_path / "out")]
    assert kept == [(f"alt {i % 2}", [str(i)]) if i != 4 else (None, None) for i in range(9)]


@pytest.mark.parametrize("first", ["BZ_photo.jpg", "BZh91AY&SY.jpg", "\x1f\x8b.jpg", "(\xb5/.jpg"])
def test_a_plain_tar_may_begin_with_any_name(tmp_path, first):
    path = write_tar(tmp_path / "a.tar", [(first, picture(1)), *pairs(0, 1)])
    assert main(adoption(path, tmp_path / "out")) == 0
    assert [image for image, _ in read_back(tmp_path / "out")] == [picture(1), picture(0)]
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_tar_that_is_cut_is_named_and_the_rest_goes_in(tmp_path, capsys, compression):
    for name in ("0", "1"):
        write_tar(tmp_path / "t" / f"{name}.tar.{compression}", pairs(0, 40), f"w:{compression}")
    broken = tmp_path / "t" / f"1.tar.{compression}"
    broken.write_bytes(broken.read_bytes()[:-30])
    assert main(adoption(tmp_path / "t" / f"*.tar.{compression}", tmp_path / "out")) == 1
    assert f"failed: {broken}: " in capsys.readouterr().out
    assert load_snapshot(tmp_path / "out").num_samples == 40


def test_a_tar_compressed_by_zstandard_says_what_it_needs(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
    with pytest.raises(ValueError, match=r"--source: .*a.tar.zst is compressed by zstd: install"):
        main(adoption(path, tmp_path / "out"))
    plain = Path(write_tar(tmp_path / "b.tar", pairs(0, 2))).read_bytes()
    monkeypatch.setitem(fsspec.compression.compr, "zstd", lambda *_, **__: io.BytesIO(plain))
    assert main(adoption(path, tmp_path / "out", resize_mode="no")) == 0
    assert [image for image, _ in read_back(tmp_path / "out")] == [picture(0), picture(1)]


def test_every_way_to_name_tars_names_the_same(tmp_path):
    write_tars(tmp_path / "t")
    names = [str(tmp_path / "t" / f"{i:05d}.tar") for i in range(3)]
    (tmp_path / "list.txt").write_text("# tars\n\nt/{00000..00001}.tar\n" + names[2] + "\n")
    index = {"wids_version": 1, "shardlist": [{"url": n, "nsamples": 4} for n in names]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    sources = ("t/*.tar", "t/{00000..00002}.tar", "list.txt", "index.json", "t/0000[0-2].tar")
    for source in sources:
        assert list_tars(str(tmp_path / source)) == names
    assert list_tars(f"file://{tmp_path}/t/*.tar") == names
    with pytest.raises(ValueError, match="found no tar"):
        open_tars(adoption(tmp_path / "none*.tar", tmp_path / "out"))
    with pytest.raises(ValueError, match="inside of --out"):
        open_tars(adoption(tmp_path / "t/*.tar", tmp_path / "t"))
    with pytest.raises(ValueError, match=r"\.tar, .*wids index.*\.parquet, .*folder of"):
        open_source(adoption(tmp_path / "nowhere", tmp_path / "out"))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: data[:-10240], "truncated"),
        (lambda data: data[: len(data) // 2], "truncated|not a complete tar"),
        (lambda data: data + data, "several tars"),
        (lambda data: data[:1536] + b"x" * 512 + data[2048:], "not a complete tar"),
        (lambda data: b"", "not a complete tar"),
        (lambda data: b"x" * 4096, "not a complete tar"),
    ],
)
def test_a_tar_that_is_no_complete_one_is_named_and_the_rest_goes_in(
    tmp_path, capsys, damage, problem
):
    source = write_tars(tmp_path / "t")
    broken = tmp_path / "t" / "00001.tar"
    pristine = broken.read_bytes()
    broken.write_bytes(damage(pristine))
    assert main(adoption(source, tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert f"failed: {broken}: " in printed and "8 rows = 8 stored" in printed
    assert re.search(problem, printed)
    broken.write_bytes(pristine)
    assert main(adoption(source, tmp_path / "out")) == 0
    assert load_snapshot(tmp_path / "out").num_samples == 12


def test_an_empty_tar_is_a_shard_of_no_sample(tmp_path):
    path = write_tar(tmp_path / "t" / "empty.tar", [])
    write_tar(tmp_path / "t" / "full.tar", pairs(0, 2))
    assert main(adoption(tmp_path / "t" / "*.tar", tmp_path / "out")) == 0
    assert (
        len(read_back(tmp_path / "out")) == 2 and len(ImageShard(tmp_path / "out", "000000")) == 0
    )
    assert Path(path).stat().st_size == 10240


def size_in_full(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.size
    except Exception:
        return None


def size_by_verifying(data: bytes) -> tuple[int, int] | None:
    try:
        return verify_image(data, ImageLimits())
    except DecodeError:
        return None


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "GIF", "BMP"])
def test_what_verifies_an_image_agrees_with_decoding_it_in_full(kind):
    """With damage anywhere: the cheap decode finds it, or none does."""
    rng, file, num_damaged = np.random.default_rng(0), io.BytesIO(), 0
    noise = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    noise.save(file, "JPEG" if kind == "progressive" else kind, progressive=kind == "progressive")
    for _ in range(60):
        data = bytearray(file.getvalue())
        for place in rng.integers(0, len(data), rng.integers(0, 4)):
            data[place] = rng.integers(0, 256)
        if rng.random() < 0.4:
            del data[int(rng.integers(1, len(data))) :]
        expected = size_in_full(bytes(data))
        assert size_by_verifying(bytes(data)) == expected
        num_damaged += expected is None
    assert num_damaged > 10


def test_limits_are_those_of_a_download(tmp_path):
    members = [("0.png", picture(size=(1, 1), kind="PNG")), ("1.jpg", picture(size=(64, 15))),
               ("2.jpg", picture(size=(400, 20))), ("3.jpg", picture(size=(16, 16)))]  # fmt: skip
    path = write_tar(tmp_path / "any.tar", members)
    config = adoption(path, tmp_path / "out")
    filters = type(config.filters)(max_aspect_ratio=10)
    assert main(adoption(path, tmp_path / "out", filters=filters)) == 0
    assert [row["error"] for row in table(tmp_path / "out")] == [
        "too_small", "too_small", "aspect_ratio", None,
    ]  # fmt: skip
