"""A data folder on the local disk and in an S3 server: the same promises, the same bytes."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from _lists import ROOT, digests, download_command, download_of, finished, is_whole, write_list
from _s3 import AWS, s3_server

from ingest.download import DownloadConfig, main
from ingest.embedding.statistics import EmbedStatistics
from ingest.store import storage
from ingest.store.commits import Attempt, committed, recover
from ingest.store.snapshots import load_snapshot
from ingest.store.storage import absolute_root, storage_of
from training.data import demo_data


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Run an S3 server in a process of its own; return its address."""
    with s3_server(tmp_path_factory.mktemp("moto")) as address:
        yield address


@pytest.fixture
def bucket(server, monkeypatch, request):
    """Return the URL of an empty bucket; the environment leads to its server."""
    import s3fs

    for name, value in {**AWS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{abs(hash(request.node.name)):x}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "folder")
    return f"{request.getfixturevalue('bucket')}/some/folder"


def test_a_storage_keeps_what_commits_need(root):
    storage = storage_of(root)
    assert storage.names() == [] and storage.names("a") == [] and storage.size("a/b") is None
    with pytest.raises(FileNotFoundError):
        storage.read("a/b")
    storage.replace("a/b", b"first")
    storage.replace("a/b", b"second")
    assert storage.read("a/b") == b"second" and storage.size("a/b") == 6
    with storage.open("a/b") as file:
        file.seek(2)
        assert file.read() == b"cond"
    assert storage.create("a/c", b"mine") and not storage.create("a/c", b"yours")
    assert storage.read("a/c") == b"mine"
    assert storage.names() == ["a"] and storage.names("a") == ["b", "c"]
    storage.move("a/b", "a/c")
    assert storage.read("a/c") == b"second" and storage.names("a") == ["c"]
    with pytest.raises(FileNotFoundError):
        storage.move("a/b", "a/c")
    storage.delete("a/none")
    storage.delete("a")
    assert storage.names() == []


def test_of_many_that_create_a_name_one_succeeds(root):
    storage = storage_of(root)
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            created = list(
                pool.map(lambda i, n=number: storage.create(f"{n}", b"%d" % i), range(8))
            )
            assert sum(created) == 1
            assert storage.read(f"{number}") == b"%d" % created.index(True)


def test_the_loser_of_a_race_leaves_the_winner_alone(root):
    with Attempt(root, "000000") as slow, Attempt(root, "000000") as fast:
        for attempt, text in ((slow, "slow"), (fast, "fast")):
            (attempt.path / "000000.txt").write_text(text)
        winner = fast.commit(num_samples=1, counts={}, config_hash="c")
        assert slow.commit(num_samples=9, counts={}, config_hash="c") == winner
    storage = storage_of(root)
    assert storage.read("000000.txt") == b"fast" and storage.names("_attempts") == []
    assert not fast.path.exists() and not slow.path.exists()


def test_half_written_files_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    code = (
        "import os, sys\n"
        "from ingest.store import storage\n"
        "storage.os.replace = storage.os.link = lambda *_: os.kill(os.getpid(), 9)\n"
        "getattr(storage.storage_of(sys.argv[1]), sys.argv[2])('_commits/a.json', b'text')"
    )
    for write in ("replace", "create"):
        command = [sys.executable, "-c", code, str(tmp_path), write]
        assert subprocess.run(command, check=False).returncode == -9
    half = list((tmp_path / "_commits").iterdir())
    assert len(half) == 2 and committed(tmp_path) == {}
    mine = half[0].with_name(f".a.json.{os.getpid()}@{socket.gethostname()}.{'0' * 32}")
    theirs = half[0].with_name(f".a.json.1@elsewhere.{'0' * 32}")
    for path in (mine, theirs):
        path.write_text("part")
    recover(tmp_path)
    assert set((tmp_path / "_commits").iterdir()) == {mine, theirs}


def test_a_process_whose_birth_cannot_be_read_counts_as_alive(tmp_path, monkeypatch):
    """As on a host without /proc, or one that hides other users' processes."""
    birth = storage.process_birth(os.getpid())
    assert not storage.has_ended(os.getpid(), birth) and storage.has_ended(os.getpid(), "1")
    half = tmp_path / f".a.json.{os.getpid()}@{socket.gethostname()}.{'0' * 32}"
    half.write_text("half")
    monkeypatch.setattr(storage, "_process_fields", lambda _: [])
    storage_of(tmp_path).sweep()
    assert half.exists() and not storage.has_ended(os.getpid(), birth)
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert not storage.has_ended(1, "1")
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(ProcessLookupError()))
    assert storage.has_ended(1, "1")


@pytest.mark.parametrize("moved", [0, 1])
def test_an_interrupted_publication_is_finished_by_the_next_run(root, monkeypatch, moved):
    storage, count = storage_of(root), 0
    real = type(storage).move

    def dying(self, name, target):
        nonlocal count
        if count == moved:
            raise KeyboardInterrupt
        count += 1
        real(self, name, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(storage), "move", dying)
        with Attempt(root, "000000") as attempt:
            for name in ("000000.a", "000000.b"):
                (attempt.path / name).write_text(name)
            attempt.commit(num_samples=1, counts={}, config_hash="c")
    assert storage.names("_attempts") != []
    recover(root)
    assert storage.names("_attempts") == []
    assert is_whole(root) and list(committed(root)) == ["000000"]


@pytest.fixture
def config(site, tmp_path) -> DownloadConfig:
    """Describe a download of 6 rows in 2 shards, one of them a failure."""
    for i in range(6):
        site.put(f"/{i}.png", site.picture(40 + i, 40, i), status=404 if i == 2 else 200)
    urls = [site.url(f"/{i}.png") for i in range(6)]
    listed = write_list(tmp_path / "list.parquet", urls)
    return download_of(site, listed, tmp_path / "local", samples_per_shard=3, robots=True)


def remote(config: DownloadConfig, bucket: str) -> DownloadConfig:
    return replace(config, out=f"{bucket}/images")


def contents(root: str) -> dict[str, bytes]:
    """Return the data files of all commits; their digests are checked."""
    assert is_whole(root)
    storage = storage_of(root)
    return {n: storage.read(n) for commit in committed(root).values() for n in commit.files}


def test_a_download_to_s3_writes_the_same_bytes(config, bucket, site):
    assert main(config) == 0
    there = remote(config, bucket)
    assert main(there) == 0
    assert contents(there.out) == contents(config.out) and len(contents(there.out)) == 6
    assert load_snapshot(there.out).digest == load_snapshot(config.out).digest
    assert storage_of(there.out).names("_attempts") == []
    hits = len(site.hits)
    assert main(there) == 0 and len(site.hits) == hits
    with pytest.raises(ValueError, match="image_size = 32, this run has 16"):
        main(replace(there, image_size=16))
    assert main(replace(there, image_size=16, fresh=True)) == 0
    assert digests(there.out)["000000"] != digests(config.out)["000000"]


def test_rows_are_tried_again_into_s3(config, bucket, site):
    there = remote(config, bucket)
    site.put("/5.png", status=503)
    assert main(there) == 0
    site.put("/5.png", site.picture(45, 40, 5))
    assert main(replace(there, retry_failed=True)) == 0
    assert sum(commit.num_samples for commit in committed(there.out).values()) == 5


def test_s3_is_verified_and_forgets_as_the_local_disk_does(config, bucket, site, tmp_path):
    (tmp_path / "forget.txt").write_text(site.url("/4.png"))
    there = remote(config, bucket)
    for one in (config, there):
        assert main(one) == 0
        assert main(replace(one, urls="", forget=str(tmp_path / "forget.txt"))) == 0
        assert main(replace(one, urls="", verify=True)) == 0
    assert contents(there.out) == contents(config.out)
    storage = storage_of(there.out)
    storage.replace("000001.tar", storage.read("000001.tar")[:-1] + b"x")
    assert main(replace(there, urls="", verify=True)) == 1
    assert "000001" not in committed(there.out) and len(storage.names("_quarantine")) == 1
    assert main(there) == 0 and contents(there.out) == contents(config.out)


@pytest.mark.slow
def test_a_killed_download_to_s3_is_continued(config, bucket, site):
    assert main(config) == 0
    there = remote(config, bucket)
    command = download_command(
        site, there.urls, there.out, "--image-size", 32, "--samples-per-shard", 3,
        "--num-processes", 0,
    )  # fmt: skip
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not storage_of(there.out).names("_commits"):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    finished(command)
    assert contents(there.out) == contents(config.out)
    assert storage_of(there.out).names("_attempts") == []


def test_what_cannot_be_reached_is_one_line(config, bucket):
    def refused(out: str, **environment: str) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "ingest" / "download.py"), "--out", out]
        command += ["--urls", config.urls, "--num-processes", "0"]
        given = {**os.environ, **environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=given)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stderr

    nowhere = "http://127.0.0.1:9"
    code, text = refused(f"{bucket}/images", AWS_ENDPOINT_URL=nowhere, AWS_MAX_ATTEMPTS="1")
    assert code == 1 and "127.0.0.1:9" in text
    for out in ("s3://no-such-bucket/images", "nosuch://bucket/images"):
        with pytest.raises((ValueError, FileNotFoundError), match="no-?such"):
            main(replace(config, out=out))


def test_roots_mean_the_same_in_any_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_root("data") == str(tmp_path / "data")
    assert absolute_root(f"file://{tmp_path}/x") == f"{tmp_path}/x"
    assert absolute_root("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.slow
def test_images_in_s3_are_embedded_into_s3(bucket, tmp_path, monkeypatch):
    """By the script and its Ray: the bytes that one process makes of local files."""
    monkeypatch.setenv("MINIDALLE2_CACHE", str(tmp_path / "cache"))
    demo_data.draw_images(tmp_path / "images", num_shards=2, samples_per_shard=10)
    demo_data.embed_here(str(tmp_path / "images"), tmp_path / "embeds", "tiny:random")
    there = storage_of(bucket)
    for path in (tmp_path / "images").rglob("*"):
        if path.is_file():
            there.replace(str(path.relative_to(tmp_path)), path.read_bytes())
    command = [
        sys.executable, str(ROOT / "ingest" / "embed.py"), "--images", f"{bucket}/images",
        "--clip", "tiny:random", "--out", f"{bucket}/embeds", "--num-threads", "1",
        "--batch-size", "128",
    ]  # fmt: skip
    finished(command)
    assert contents(f"{bucket}/embeds") == contents(str(tmp_path / "embeds"))
    assert load_snapshot(f"{bucket}/embeds").digest == load_snapshot(tmp_path / "embeds").digest
    remote = EmbedStatistics.read(f"{bucket}/embeds")
    assert (remote.mean == EmbedStatistics.read(tmp_path / "embeds").mean).all()
