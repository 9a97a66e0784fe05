"""Remote shards are read through local copies: the same samples, verified, within a limit."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ingest.shards import EmbedShard, ImageShard, load_snapshot
from ingest.store.commits import committed
from ingest.store.shard_cache import LocalCopies, local_file
from ingest.store.storage import storage_of
from training.data.datasets import PairDataset

REMOTE = "memory://shards"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    """Three small shards of drawn images, and their embeddings."""
    return write_data(tmp_path_factory.mktemp("data"), num_shards=3, samples_per_shard=8)


@pytest.fixture
def remote(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Copy the data to an object store; its copies go to `tmp_path`/cache."""
    monkeypatch.setenv("MINIDALLE2_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    for path in data.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/shards/{path.relative_to(data)}", path.read_bytes())
    yield REMOTE
    files.rm("/shards", recursive=True)


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_remote_samples_are_the_local_ones_and_come_once(data: Path, remote: str, tmp_path: Path):
    roots = [(data / "images", data / "embeds"), (f"{remote}/images", f"{remote}/embeds")]
    readers = [PairDataset(load_snapshot(a), load_snapshot(b), 32) for a, b in roots]
    index = np.random.default_rng(0).permutation(24)
    for name, expected in readers[0].read(index).items():
        assert np.array_equal(readers[1].read(index)[name], expected), name
    commits = [c for kind in ("images", "embeds") for c in committed(f"{remote}/{kind}").values()]
    digests = {file["sha256"] for commit in commits for file in commit.files.values()}
    assert copies(tmp_path) == sorted(digests)
    fsspec.filesystem("memory").rm("/shards/images/000000.tar")
    path = local_file(f"{remote}/images", commits[0], "000000.tar")  # it is not asked for again
    assert path.read_bytes() == (data / "images" / "000000.tar").read_bytes()


def test_a_remote_file_that_differs_from_its_commit_is_refused(remote: str, tmp_path: Path):
    storage = storage_of(f"{remote}/images")
    storage.replace("000001.tar", storage.read("000001.tar")[:-1] + b"x")
    with pytest.raises(ValueError, match="images/000001.tar: differs from its committed sha256"):
        ImageShard(f"{remote}/images", "000001")
    assert not any(name.startswith(".") for name in copies(tmp_path))
    assert len(ImageShard(f"{remote}/images", "000000")) == 8


def test_copies_used_longest_ago_make_room(remote: str, tmp_path: Path):
    root, folder = f"{remote}/embeds", tmp_path / "cache"
    files = [(c, f"{name}.tokens.npy") for name, c in committed(root).items()]
    sizes = [commit.files[name]["size"] for commit, name in files]
    cache = LocalCopies(folder, limit_bytes=2 * max(sizes))

    def fetch(number: int) -> Path:
        commit, name = files[number]
        entry = commit.files[name]
        return cache.path(root, name, sha256=entry["sha256"], size=entry["size"])

    def used(path: Path, seconds_ago: float) -> Path:
        then = time.time() - seconds_ago
        os.utime(path, (then, then))
        return path

    gone, kept = used(fetch(1), 200), used(fetch(0), 100)
    assert fetch(2).exists() and kept.exists() and not gone.exists()
    # used within the last minute: neither may go, though the limit is passed
    assert fetch(0) == kept and fetch(1).exists() and kept.exists() and fetch(2).exists()


def test_what_no_cache_can_hold_is_refused(remote: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINIDALLE2_CACHE_GIB", "0.000001")
    with pytest.raises(ValueError, match="the cache of local copies may hold 1073; raise"):
        EmbedShard(f"{remote}/embeds", "000000")
    monkeypatch.setenv("MINIDALLE2_CACHE_GIB", "much")
    with pytest.raises(ValueError, match="found 'much', expected a number"):
        EmbedShard(f"{remote}/embeds", "000000")


def test_half_copies_of_dead_processes_are_swept(remote: str, tmp_path: Path):
    (tmp_path / "cache").mkdir()
    left = tmp_path / "cache" / f".abc.999999999@{os.uname().nodename}.{'0' * 32}"
    left.write_bytes(b"half")
    EmbedShard(f"{remote}/embeds", "000000")
    assert not left.exists()
