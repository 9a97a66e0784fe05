"""Laws of the download: every row accounted for, equal bytes from equal answers, resumable."""

import io
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _lists import download_of, is_whole, write_list
from PIL import Image

from ingest.download import DownloadConfig, main
from ingest.fetching import shard_task
from ingest.fetching.fetch import Fetcher
from ingest.fetching.net import connect
from ingest.lists.filters import FilterConfig, normalise_caption
from ingest.shards import ImageShard, committed, load_snapshot, recover

NUM_IMAGES = 7
REAL_LIST = Path(__file__).parents[2] / "shared" / "data" / "laion" / "real_urls_10000.parquet"


@pytest.fixture
def config(site, canary, tmp_path) -> DownloadConfig:
    """A list of 12 rows: seven images, and one of each kind of trouble; shards of 5, 5 and 2."""
    urls = [site.put(f"/{i}.png", site.picture(60 + i, 40, 30 * i)) for i in range(NUM_IMAGES)]
    troubles = [
        site.url("/gone"),
        site.put("/page", b"<html>", kind="text/html"),
        canary.url("/"),
        site.put("/inside", status=302, headers={"Location": canary.url("/")}),
        site.put("/tiny", site.picture(8, 8)),
    ]
    captions = [f"caption é {i}" if i else None for i in range(12)]
    listed = write_list(
        tmp_path / "laion.parquet", [*urls[:3], *troubles[:2], *urls[3:], *troubles[2:]],
        text=captions, similarity=[i / 10 for i in range(12)],
    )  # fmt: skip
    return download_of(
        site, listed, tmp_path / "images", keep_columns=("similarity",), min_image_side=16,
        samples_per_shard=5, num_threads=4, timeout=10.0,
    )  # fmt: skip


def failing_at(shard: str, error: BaseException) -> Callable:
    """Return what makes shards, but raises at one of them."""
    real = shard_task.make_shard

    def make(job, name, *rest):
        if name == shard:
            raise error
        return real(job, name, *rest)

    return make


def rows_of(out: str) -> list[dict]:
    files = sorted(Path(out).glob("*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def data_of(out: str) -> dict[str, bytes]:
    names = [name for commit in committed(out).values() for name in commit.files]
    return {name: (Path(out) / name).read_bytes() for name in names}


def test_every_row_is_accounted_for_and_samples_are_the_images_of_their_rows(config, capsys):
    assert main(config) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        "12 rows = 7 stored + 1 filtered (too_small 1) + 4 failed "
        "(not_an_image 1, not_found 1, port_refused 2); snapshot "
    )
    rows = rows_of(config.out)
    assert [row["url"] for row in rows] == pq.read_table(config.urls)["url"].to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == 12 and all(re.fullmatch(r"\d{9}", key) for key in by_key)
    assert [row["key"] for row in rows[4:6]] == ["000000004", "000001000"]
    assert [row["similarity"] for row in rows] == [i / 10 for i in range(12)]
    snapshot = load_snapshot(config.out)
    assert snapshot.num_samples == NUM_IMAGES
    for entry in snapshot.shards:
        shard = ImageShard(config.out, entry.name, digest=entry.digest)
        for i, key in enumerate(shard.keys):
            row, served = by_key[key], int(re.sub(r"\D", "", by_key[key]["url"][-6:]))
            image = Image.open(io.BytesIO(shard.image_bytes(i)))
            red = image.getpixel((16, 16))[0]  # type: ignore[index]
            width = round((60 + served) * 32 / 40)
            assert image.size == (width, 32) and abs(red - 30 * served) < 8
            assert shard.caption(i) == row["caption"]
            assert (row["original_width"], row["width"]) == (60 + served, width)


def test_equal_bytes_whatever_the_order_of_arrival_and_nothing_is_fetched_again(
    config, site, tmp_path, capsys
):
    assert main(config) == 0
    again = replace(config, out=str(tmp_path / "again"), num_threads=1)
    assert main(again) == 0
    before, hits = data_of(config.out), len(site.hits)
    assert data_of(again.out) == before
    assert load_snapshot(config.out).digest == load_snapshot(again.out).digest
    assert main(config) == 0
    assert data_of(config.out) == before and len(site.hits) == hits
    assert "3 of them done already" in capsys.readouterr().out


def test_a_killed_run_continues_with_what_is_missing(config, tmp_path, monkeypatch, site):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_task, "make_shard", failing_at("000001", KeyboardInterrupt()))
        main(config)
    assert list(committed(config.out)) == ["000000"]
    hits = len(site.hits)
    assert main(config) == 0
    assert not {"/0.png", "/1.png", "/2.png"} & set(site.hits[hits:])
    whole = replace(config, out=str(tmp_path / "whole"))
    main(whole)
    assert data_of(config.out) == data_of(whole.out)


def test_a_shard_that_fails_is_reported_and_made_by_the_next_run(config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        full = OSError("no space left on device")
        patch.setattr(shard_task, "make_shard", failing_at("000001", full))
        assert main(config) == 1
    out = capsys.readouterr().out
    assert "shard 000001 failed: no space left" in out and "5 in 1 missing shards" in out
    assert main(config) == 0
    assert load_snapshot(config.out).num_samples == NUM_IMAGES


def test_an_error_that_is_no_fault_of_a_row_fails_the_shard(config, monkeypatch, capsys):
    def broken(self, data):
        raise OSError("no memory for a canvas")

    monkeypatch.setattr(shard_task.Resizer, "__call__", broken)
    assert main(config) == 1
    assert "shard 000000 failed: no memory for a canvas" in capsys.readouterr().out
    assert committed(config.out) == {} and os.listdir(Path(config.out) / "_attempts") == []


def test_a_truncated_shard_is_fetched_again(config, capsys):
    main(config)
    digest = load_snapshot(config.out).digest
    os.truncate(Path(config.out) / "000001.tar", 100)
    assert main(config) == 0
    assert "shard 000001 is damaged (000001.tar has 100 bytes" in capsys.readouterr().out
    assert load_snapshot(config.out).digest == digest and is_whole(config.out)


def test_resuming_with_anything_else_is_refused_naming_it(config, tmp_path):
    main(config)
    urls = pq.read_table(config.urls)["url"].to_pylist()
    other = {"text": ["x"] * 12, "similarity": [0.5] * 12}
    changes = {
        "image_size": 64, "samples_per_shard": 4, "resize_mode": "border", "min_image_side": 0,
        "keep_columns": (), "urls": write_list(tmp_path / "other.parquet", urls, **other),
    }  # fmt: skip
    before = data_of(config.out)
    for field, value in changes.items():
        named = "url_list_sha256" if field == "urls" else field
        with pytest.raises(ValueError, match=f"{named} = .*--fresh"):
            main(replace(config, **{field: value}))
    assert data_of(config.out) == before


def test_lists_of_texts_are_kept_as_further_captions(site, tmp_path):
    urls = [site.put(f"/{i}", site.picture(40, 40, i)) for i in range(3)]
    alt = [["a", "ü\n"], None, []]
    listed = write_list(tmp_path / "list.parquet", urls, alt=pa.array(alt, pa.list_(pa.string())))
    config = download_of(site, listed, tmp_path / "images", keep_columns=("alt",))
    assert main(config) == 0
    assert [row["alt"] for row in rows_of(config.out)] == alt
    shard = ImageShard(config.out, "000000")
    assert list(shard.further_captions("alt")) == [["a", "ü\n"], [], []]


def test_tracking_pixels_are_left_out_unless_the_folder_was_begun_with_them(site, tmp_path, capsys):
    sides = ((1, 1), (300, 15), (16, 16), (40, 30))
    urls = [site.put(f"/{i}", site.picture(*sides[i])) for i in range(len(sides))]
    listed = write_list(tmp_path / "list.parquet", urls)
    plain = download_of(site, listed, tmp_path / "plain")
    assert main(plain) == 0
    assert "2 stored + 2 filtered (too_small 2)" in capsys.readouterr().out
    begun = download_of(site, listed, tmp_path / "begun", min_image_side=0)
    assert main(begun) == 0 and main(replace(begun, min_image_side=None)) == 0
    assert "4 stored" in capsys.readouterr().out.splitlines()[-1]
    assert main(replace(begun, min_image_side=None, fresh=True)) == 0
    assert "2 filtered (too_small 2)" in capsys.readouterr().out


@pytest.mark.slow
def test_ray_tasks_make_the_same_bytes(config, tmp_path):
    main(config)
    spread = replace(config, out=str(tmp_path / "spread"), num_processes=2)
    assert main(spread) == 0
    assert data_of(spread.out) == data_of(config.out)
    recover(spread.out)
    assert os.listdir(Path(spread.out) / "_attempts") == []


# -- a real list -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL_LIST.is_file(), reason=f"{REAL_LIST} is absent")
def test_a_real_list_adds_up_and_nothing_leaves_the_machine(site, tmp_path, monkeypatch, capsys):
    """Every host of 10,000 real rows leads to a loopback server, whatever its port; https ends at
    the handshake, since that server has no certificate."""
    public, dialled = "93.184.215.14", Counter()

    def dial(address: str, port: int):
        assert address == public
        dialled[port] += 1
        return connect("127.0.0.1", site.port)

    def to_the_site(policy):
        return Fetcher(policy, resolve=lambda *_: [public], connect=dial)

    kinds = [site.picture(40, 30), site.picture(30, 90), b"<html>", None]
    monkeypatch.setattr(site, "answers", _AnyPath(site, kinds))
    monkeypatch.setattr(shard_task, "process_fetcher", lru_cache(to_the_site))
    config = DownloadConfig(
        urls=str(REAL_LIST), out=str(tmp_path / "images"), image_size=32, num_processes=0,
        samples_per_shard=2500, num_threads=8, retries=0, host_rate=0,
        filters=FilterConfig(min_caption_chars=20, unique=("urls",), max_aspect_ratio=2.0),
    )  # fmt: skip
    assert main(config) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    counts = {name: int(n) for name, n in re.findall(r"([a-z_]+) (\d+)[,)]", line)}
    stored = int(re.findall(r"(\d+) stored", line)[0])
    assert line.startswith("10000 rows = ") and stored + sum(counts.values()) == 10_000
    listed = pq.read_table(REAL_LIST).to_pylist()
    first = {row["URL"]: row for row in reversed(listed)}.values()  # a repetition is left out first
    short = sum(len(normalise_caption(row["TEXT"])) < 20 for row in first)
    assert counts["short_caption"] == short and counts["duplicate_url"] == 10_000 - len(first)
    assert set(dialled) >= {80, 443}
    assert stored > 500 and counts["not_found"] > 500 and counts["tls_failed"] > 3000
    assert [row["url"] for row in rows_of(config.out)] == [row["URL"] for row in listed]


class _AnyPath(dict):
    """Answers every path, each always alike: with one of some bodies, or 404."""

    def __init__(self, site, bodies: list[bytes | None]) -> None:
        super().__init__()
        self._site, self._bodies = site, bodies

    def get(self, path, default=None):
        body = self._bodies[zlib.crc32(path.encode()) % len(self._bodies)]
        if body is None:
            return default
        kind = "text/html" if body.startswith(b"<") else "image/png"
        return self._site.answer(body, kind=kind)
