"""Verify, forget, drop repetitions: what is gone is gone, what is left is untouched."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _lists import digests, download_of, is_whole, write_list
from _runs import flip

from ingest.download import DownloadConfig, main
from ingest.lists.filters import FilterConfig
from ingest.shards import EmbedShard, ImageShard
from ingest.store import commits, maintenance
from ingest.store.accounts import Accounts
from ingest.store.commits import committed, exclusive
from ingest.store.removal import Forgotten, read_request, record_request
from ingest.store.snapshots import load_snapshot, publish_snapshot
from ingest.store.storage import storage_of
from training.data import datasets, demo_data
from training.data.datasets import ImageDataset, PairDataset

NUM_ROWS, SHARD = 12, 4


@pytest.fixture
def download(site, tmp_path) -> DownloadConfig:
    """Download 12 rows in 3 shards: row 6 is a 404, rows 1 and 9 have one image, all others their
    own."""
    for i in range(NUM_ROWS):
        body = site.picture(40 + (1 if i == 9 else i), 40, 1 if i == 9 else i)
        site.put(f"/{i}.png", body, status=404 if i == 6 else 200)
    urls = [site.url(f"/{i}.png") for i in range(NUM_ROWS)]
    licences = [f"licence {i}" for i in range(NUM_ROWS)]
    config = download_of(
        site, write_list(tmp_path / "list.parquet", urls, lic=licences), tmp_path / "images",
        keep_columns=("lic",), samples_per_shard=SHARD,
    )  # fmt: skip
    assert main(config) == 0
    return config


def table_of(root: str) -> dict[str, list]:
    tables = [pq.ParquetFile(Path(root) / f"{name}.parquet").read() for name in committed(root)]
    return pa.concat_tables(tables).to_pydict()


def files_with(root: str | Path, text: str) -> list[str]:
    """Return the files under `root` that hold a text, Parquet's pages included."""
    found = []
    for path in Path(root).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += repr(pq.ParquetFile(path).read().to_pydict()).encode()
            found += [path.name] if text.encode() in data else []
    return found


# -- verify --------------------------------------------------------------------------------------


def test_verify_sets_damaged_shards_aside_and_the_download_makes_them_again(download, capsys):
    root, before = Path(download.out), digests(download.out)
    snapshot = load_snapshot(root)
    check = replace(download, urls="", verify=True)
    assert main(check) == 0 and load_snapshot(root) == snapshot
    flip(root / "000000.tar")
    os.truncate(root / "000001.parquet", 100)
    (root / "000002.idx.npy").unlink()
    (root / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(check) == 1
    output = capsys.readouterr().out
    for message in ("000000.tar differs", "100 bytes", "000002.idx.npy is miss", "rerun"):
        assert message in output
    assert "of no commit: notes.txt" in output
    assert committed(root) == {} and load_snapshot(root).shards == ()
    aside = sorted(path.name for path in (root / "_quarantine").iterdir())
    assert [name[:6] for name in aside] == ["000000", "000001", "000002"]
    assert main(download) == 0 and digests(root) == before and main(check) == 0
    assert load_snapshot(root) == snapshot


# -- forget --------------------------------------------------------------------------------------


def request(folder: Path, *lines: str) -> str:
    path = folder / "forget.txt"
    path.write_text("\n".join(["# asked by mail", "", *lines]) + "\n")
    return str(path)


def sha_of(root: str, row: int) -> str:
    return table_of(root)["sha256"][row]


def forgetting(download: DownloadConfig, site, folder: Path) -> DownloadConfig:
    """Ask for row 5 by URL, row 6 (a failure) by URL, and the image that rows 1 and 9 have."""
    asked = [site.url("/5.png"), site.url("/6.png"), sha_of(download.out, 1)]
    return replace(download, urls="", forget=request(folder, *asked))


def test_what_is_forgotten_is_in_no_file_and_the_rest_is_as_it_was(download, site, tmp_path):
    root, before = download.out, table_of(download.out)
    pictures = {key: ImageShard(root, key[:6]).keys.index(key) for key in keys_of(root)}
    pictures = {key: ImageShard(root, key[:6]).image_bytes(i) for key, i in pictures.items()}
    assert main(forgetting(download, site, tmp_path)) == 0
    after, gone = table_of(root), [1, 5, 9]
    assert after["key"] == before["key"] and is_whole(root)
    for row in range(NUM_ROWS):
        if row in [*gone, 6]:
            assert {after[n][row] for n in set(after) - {"key", "status", "error"}} == {None}
        else:
            assert {n: v[row] for n, v in after.items()} == {n: v[row] for n, v in before.items()}
    assert [after["error"][row] for row in [*gone, 6]] == ["forgotten"] * 3 + ["not_found"]
    for text in ("/5.png", "caption 5", "caption 9", "licence 1", "licence 6"):
        assert files_with(root, text + '"') + files_with(root, text + "'") == []
    kept = {k: p for k, p in pictures.items() if k not in [before["key"][row] for row in gone]}
    for name, commit in committed(root).items():
        shard = ImageShard(root, name)
        assert {k: shard.image_bytes(i) for i, k in enumerate(shard.keys)} == {
            k: p for k, p in kept.items() if k.startswith(name)
        }
        with tarfile.open(Path(root) / f"{name}.tar") as tar:
            assert sum(n.endswith(".jpg") for n in tar.getnames()) == commit.num_samples
    accounts = Accounts.of(committed(root).values())
    assert accounts.counts.total() == NUM_ROWS and accounts.reasons("filtered") == {"forgotten": 3}
    assert load_snapshot(root).num_samples == 8


def keys_of(root: str) -> list[str]:
    return [key for name in committed(root) for key in ImageShard(root, name).keys]


def test_no_later_download_stores_what_was_forgotten(download, site, tmp_path, capsys):
    ask = request(tmp_path, site.url("/5.png"), sha_of(download.out, 1))
    forget = replace(download, urls="", forget=ask)
    assert main(forget) == 0
    expected = digests(download.out)
    (Path(download.out) / "000001.tar").unlink()  # row 5 is in it
    site.hits.clear()
    assert main(download) == 0 and digests(download.out) == expected
    assert sorted(site.hits) == ["/4.png", "/6.png", "/7.png"]
    site.hits.clear()
    assert main(replace(download, fresh=True)) == 0
    assert "/5.png" not in site.hits and "/1.png" in site.hits  # the image is known when fetched
    assert load_snapshot(download.out).num_samples == 8
    assert main(forget) == 0
    assert "forgotten: 0 samples, 0 rows" in capsys.readouterr().out


def test_a_request_covers_a_host_and_says_what_no_row_has(download, tmp_path, capsys):
    """A spreadsheet of Windows, in the place of a list of URLs."""
    ask = tmp_path / "forget.csv"
    ask.write_bytes("url;reason\r\nhttp://127.0.0.1/;by mail\r\nb.org;x\r\n".encode("utf-16"))
    assert main(replace(download, urls="", forget=str(ask))) == 0
    out = capsys.readouterr().out
    assert "forgotten: 11 samples, 12 rows" in out
    assert "no row here: 1 of the requested hosts" in out
    assert load_snapshot(download.out).num_samples == 0


def test_a_request_that_comes_while_fetching_is_honoured(download, site, tmp_path):
    ask = request(tmp_path, site.url("/10.png"), site.url("/0.png"))
    there = replace(download, out=str(tmp_path / "second"))
    answer = site.answers["/10.png"]

    def asking(handler) -> None:
        maintenance.forget(there.out, read_request(ask))
        answer(handler)

    site.answers["/10.png"] = asking
    assert main(there) == 0
    errors = table_of(there.out)["error"]
    assert errors[0] == errors[10] == "forgotten" and is_whole(there.out)


def test_an_order_pinned_before_stays_with_neighbours_in_the_gaps(download, site, tmp_path):
    root = download.out
    pinned = load_snapshot(root)
    shards = {e.name: ImageShard(root, e.name, digest=e.digest) for e in pinned.shards}
    old = {n: [(s.keys[i], s.image_bytes(i)) for i in range(len(s))] for n, s in shards.items()}
    for row, expected in ((0, [1, 1, 2, 3]), (2, [1, 1, 3, 3]), (3, [1, 1, 1, 1])):
        ask = request(tmp_path, table_of(root)["url"][row])
        assert main(replace(download, urls="", forget=ask)) == 0
        shard = ImageShard(root, "000000", digest=pinned.shards[0].digest)
        assert len(shard) == 4
        found = [(shard.keys[i], shard.image_bytes(i)) for i in range(4)]
        assert found == [old["000000"][i] for i in expected]
    assert [shards["000000"].image_bytes(i) for i in range(4)] == [p for _, p in old["000000"]]
    ask = request(tmp_path, table_of(root)["url"][1])
    assert main(replace(download, urls="", forget=ask)) == 0
    assert len(ImageShard(root, "000000")) == 0
    with pytest.raises(ValueError, match="all its samples were forgotten"):
        ImageShard(root, "000000", digest=pinned.shards[0].digest)


def test_open_readers_drop_what_was_forgotten(download, site, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CHECK_SECONDS", 0.0)
    root, snapshot = download.out, load_snapshot(download.out)
    reader = ImageDataset(snapshot, 32)
    rows = np.arange(snapshot.num_samples)
    before = reader.read(rows)["image"]
    ask = request(tmp_path, *table_of(root)["url"][1:3])
    assert main(replace(download, urls="", forget=ask)) == 0
    expected = before.copy()
    expected[[1, 2]] = before[3]
    assert np.array_equal(reader.read(rows)["image"], expected)
    shard = ImageShard(root, "000000", digest=snapshot.shards[0].digest)
    with pytest.raises(ValueError, match="forgotten"):
        shard.require_complete()


def test_tombstones_of_an_earlier_version_are_honoured_until_the_next_run(download):
    """It wrote them before it rewrote shards, and may have been killed in between; a completed
    removal left only `_changed`."""
    root, pinned = download.out, load_snapshot(download.out).shards[0]
    images = [ImageShard(root, "000000").image_bytes(i) for i in range(4)]
    storage = storage_of(root)
    storage.replace("_tombstones/_changed", b"{}")
    assert not maintenance.is_forgetting(root)
    tombstone = {"digest": pinned.digest, "removed": [1, 2]}
    storage.replace("_tombstones/000000.json", json.dumps(tombstone).encode())
    shard = ImageShard(root, "000000", digest=pinned.digest)
    assert [shard.image_bytes(i) for i in range(4)] == [images[i] for i in (0, 3, 3, 3)]
    assert maintenance.is_forgetting(root)
    maintenance.forget(root, Forgotten())
    assert not (Path(root) / "_tombstones").exists()


def test_a_killed_removal_is_completed_by_the_next_download(download, site, tmp_path, monkeypatch):
    """Its request is on record already: that alone would not say that samples are still there."""
    forget = forgetting(download, site, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "remove_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(forget)
    assert maintenance.is_forgetting(download.out)
    assert files_with(Path(download.out), "caption 5'") != []
    main(download)
    assert not maintenance.is_forgetting(download.out)
    assert files_with(Path(download.out), "caption 5'") == []


@pytest.fixture
def embedded(download) -> Path:
    embeds = Path(download.out).with_name("embeds")
    demo_data.embed_here(download.out, embeds, "tiny:random")
    return embeds


def test_a_removal_that_published_nothing_is_published_by_the_next(
    download, site, embedded, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "publish_embeds", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(forgetting(download, site, tmp_path))
    main(download)
    commits = {commit.shard: commit.digest for commit in committed(str(embedded)).values()}
    assert {e.name: e.digest for e in load_snapshot(embedded).shards} == commits


def test_embeddings_follow_their_images(download, site, embedded, tmp_path):
    images, pinned = load_snapshot(download.out), load_snapshot(embedded)
    old = {key: i for e in pinned.shards for i, key in enumerate(EmbedShard(embedded, e.name).keys)}
    vectors = {key: EmbedShard(embedded, key[:6]).image_embed[i].copy() for key, i in old.items()}
    PairDataset(images, pinned, 32)
    assert main(forgetting(download, site, tmp_path)) == 0
    assert is_whole(embedded)
    for name in committed(download.out):
        shard = EmbedShard(embedded, name)
        assert shard.keys == ImageShard(download.out, name).keys
        for i, key in enumerate(shard.keys):
            assert np.array_equal(shard.image_embed[i], vectors[key])
    assert files_with(embedded, "caption 5'") == []
    for a, b in ((images, pinned), (load_snapshot(download.out), load_snapshot(embedded))):
        read = PairDataset(a, b, 32).read(np.arange(b.num_samples))
        assert len(read["image"]) == len(read["image_embed"]) == b.num_samples
    assert load_snapshot(embedded).num_samples == 8
    before = digests(embedded)
    demo_data.embed_here(download.out, embedded, "tiny:random")
    assert digests(embedded) == before and committed(embedded)["000000"].generation == 1


def test_embeddings_that_were_away_follow_when_back(download, site, embedded, tmp_path, capsys):
    away = embedded.with_name("away")
    embedded.rename(away)
    assert main(forgetting(download, site, tmp_path)) == 0
    assert f"embeddings in {embedded} are not there" in capsys.readouterr().out
    away.rename(embedded)
    demo_data.embed_here(download.out, embedded, "tiny:random")
    assert all(commit.generation == 1 for commit in committed(embedded).values())
    assert load_snapshot(embedded).num_samples == 8


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def dying_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], int]:
    """Let the storage die at its `steps`-th change; return what counts them."""
    local, count = type(storage_of("local")), 0

    def counted(name: str):
        real = getattr(local, name)

        def change(self, *arguments):
            nonlocal count
            if count == steps:
                raise Killed
            count += 1
            return real(self, *arguments)

        return change

    for name in ("replace", "create", "move", "delete", "workplace", "upload"):
        monkeypatch.setattr(local, name, counted(name))
    return lambda: count


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_and_rerun_it_ends_as_if_undisturbed(
    download, site, embedded, tmp_path, monkeypatch, stride: int
):
    forget = forgetting(download, site, tmp_path)
    kept = tmp_path / "kept"
    shutil.copytree(download.out, kept / "images")
    shutil.copytree(embedded, kept / "embeds")

    def restore() -> None:
        for folder in (Path(download.out), embedded):
            shutil.rmtree(folder)
            shutil.copytree(kept / folder.name, folder)

    assert main(forget) == 0
    expected = digests(download.out), digests(embedded)
    steps = 0
    for steps in range(0, 1000, stride):
        restore()
        with monkeypatch.context() as patch:
            dying_after(patch, steps)
            # what dies here is another process than what runs afterwards
            patch.setattr(commits, "process_birth", lambda _: "an earlier life")
            try:
                main(forget)
                break
            except Killed:
                pass
        assert main(forget) == 0
        assert (digests(download.out), digests(embedded)) == expected, steps
        assert is_whole(download.out) and is_whole(embedded), steps
        for root in (download.out, embedded):
            assert os.listdir(Path(root) / "_attempts") == [], steps
    assert 30 < steps < 990


def test_one_at_a_time_and_the_lock_of_the_dead_is_taken(download, tmp_path):
    with exclusive(download.out, "--forget"), pytest.raises(ValueError, match="held for --forget"):
        maintenance.forget(download.out, Forgotten())
    code = (
        "import os, sys; from ingest.store.commits import exclusive\n"
        "exclusive(sys.argv[1], 'x').__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, download.out], check=False).returncode == -9
    maintenance.forget(download.out, Forgotten())
    assert not (Path(download.out) / "_held.json").exists()


# -- repetitions ---------------------------------------------------------------------------------


def test_an_image_that_came_before_is_stored_once_whatever_its_url(download, site, tmp_path):
    once = replace(download, out=str(tmp_path / "once"), filters=FilterConfig(unique=("images",)))
    assert main(once) == 0
    table = table_of(once.out)
    assert [row for row, e in enumerate(table["error"]) if e == "duplicate_image"] == [9]
    assert table["caption"][9] == "caption 9" and is_whole(once.out)
    pairs = zip(table["sha256"], table["status"], strict=True)
    shas = [sha for sha, status in pairs if status == "success"]
    assert len(set(shas)) == len(shas) == 10
    before = digests(once.out), load_snapshot(once.out)
    assert main(once) == 0 and (digests(once.out), load_snapshot(once.out)) == before
    commits.withdraw(once.out, committed(once.out)["000000"])  # the first of the two goes
    publish_snapshot(once.out)
    assert main(once) == 0 and (digests(once.out), load_snapshot(once.out)) == before


def test_the_shard_made_anew_is_the_one_that_would_have_been_written(download, site, tmp_path):
    """Byte for byte: dropping a row later, or never storing it, comes to the same."""
    ask = request(tmp_path, sha_of(download.out, 1))
    assert main(replace(download, urls="", forget=ask)) == 0
    other = replace(download, out=str(tmp_path / "other"))
    record_request(other.out, read_request(ask))
    assert main(other) == 0
    assert digests(other.out) == digests(download.out)


def test_reading_while_a_shard_is_made_anew_gives_one_generation(download, site, tmp_path):
    """Readers open a shard all the while; each sees the files of one generation."""
    root, ended, seen = download.out, threading.Event(), set()

    def read() -> None:
        while not ended.is_set():
            shard = ImageShard(root, "000002")
            keys = shard.keys
            assert all(shard.image_bytes(i)[:2] == b"\xff\xd8" for i in range(len(keys)))
            assert len(keys) == len(shard) == shard.commit.num_samples
            seen.add(len(keys))

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read) for _ in range(2)]
        for row in (8, 9, 10):
            ask = request(tmp_path, site.url(f"/{row}.png"))
            assert main(replace(download, urls="", forget=ask)) == 0
        ended.set()
        for one in reading:
            one.result()
    assert committed(root)["000002"].generation == 3 and is_whole(root) and 4 in seen
