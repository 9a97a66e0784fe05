"""The layout of a shard against img2dataset's own, and against those who read it."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from _lists import download_of, write_list

from ingest.download import main
from ingest.shards import index_tar

REAL_TAR = Path(__file__).parents[2] / "shared" / "data" / "webdataset" / "cc12m-train-0000.tar"


@pytest.fixture
def urls(site, tmp_path) -> str:
    pictures = [site.put(f"/{i}.png", site.picture(60 + i, 40, 30 * i)) for i in range(5)]
    listed = [*pictures[:3], site.url("/gone"), *pictures[3:]]
    captions = [f"Bär {i}" for i in range(6)]
    return write_list(
        tmp_path / "list.parquet", listed, caption=captions, similarity=[0.5] * 6
    )


@pytest.fixture
def ours(site, urls, tmp_path) -> Path:
    kept = {"keep_columns": ("similarity",), "samples_per_shard": 1000}
    assert main(download_of(site, urls, tmp_path / "ours", **kept)) == 0
    return tmp_path / "ours"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


@pytest.mark.slow
def test_it_is_img2datasets_own(urls: str, ours: Path, tmp_path: Path):
    command = [
        str(Path(sys.executable).parent / "img2dataset"), f"--url_list={urls}",
        "--input_format=parquet", "--caption_col=caption", "--output_format=webdataset",
        f"--output_folder={tmp_path / 'theirs'}", "--image_size=32", "--resize_mode=keep_ratio",
        "--processes_count=1", "--thread_count=1", "--save_additional_columns=['similarity']",
        "--oom_shard_count=6", "--number_sample_per_shard=1000", "--retries=0",
        "--enable_wandb=False",
    ]  # fmt: skip
    quiet = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = tmp_path / "theirs"
    found, expected = members(ours / "000000.tar"), members(theirs / "000000.tar")
    assert set(found) == set(expected)
    for name in found:
        if name.endswith(".txt"):
            assert found[name] == expected[name]
        if name.endswith(".json"):
            mine, other = json.loads(found[name]), json.loads(expected[name])
            assert other.keys() - mine.keys() <= {"error_message", "exif"}
            same = ("key", "caption", "url", "similarity", "sha256", "width", "height")
            assert {n: mine[n] for n in same} == {n: other[n] for n in same}
    mine, other = pq.read_table(ours / "000000.parquet"), pq.read_table(theirs / "000000.parquet")
    assert set(other.column_names) - set(mine.column_names) <= {"error_message", "exif"}
    by_key = {row["key"]: row for row in other.to_pylist()}
    for row in mine.to_pylist():
        assert row["sha256"] == by_key[row["key"]]["sha256"]
        assert (row["status"] == "success") == (by_key[row["key"]]["status"] == "success")
    stats = [json.loads((root / "000000_stats.json").read_text()) for root in (ours, theirs)]
    assert stats[0].keys() == stats[1].keys()
    assert [s["successes"] for s in stats] == [5, 5] and [s["count"] for s in stats] == [6, 6]


def test_the_webdataset_library_reads_it(ours: Path):
    import webdataset

    found = list(webdataset.WebDataset(str(ours / "000000.tar"), shardshuffle=False))
    assert [s["txt"].decode() for s in found] == [f"Bär {i}" for i in (0, 1, 2, 4, 5)]
    assert all(s["jpg"].startswith(b"\xff\xd8") and json.loads(s["json"]) for s in found)


@pytest.mark.slow
def test_ray_data_reads_it(ours: Path):
    import ray

    from cluster.base.ray_session import ensure_ray

    ensure_ray()
    rows = ray.data.read_webdataset(str(ours / "000000.tar")).take_all()
    assert sorted(row["txt"] for row in rows) == [f"Bär {i}" for i in (0, 1, 2, 4, 5)]
    assert all(row["jpg"].shape[0] == 32 and row["json"]["status"] == "success" for row in rows)


@pytest.mark.skipif(not REAL_TAR.is_file(), reason=f"{REAL_TAR} is absent")
def test_shards_that_img2dataset_wrote_are_indexed():
    """32 samples of CC12M as the real img2dataset left them."""
    found, index, data = members(REAL_TAR), index_tar(REAL_TAR), REAL_TAR.read_bytes()
    keys = list(dict.fromkeys(name.partition(".")[0] for name in found))
    assert len(index) == len(keys) == 32
    for key, (offset, length, text_offset, text_length) in zip(keys, index, strict=True):
        assert data[offset : offset + length] == found[f"{key}.jpg"]
        assert data[text_offset : text_offset + text_length] == found[f"{key}.txt"]
