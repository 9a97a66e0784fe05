"""Laws of adoption in place: exactly once, resumable, and no file of the user's is ever touched."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
import wids
from _lists import digests
from _runs import HERE, clip_run, done, environment, script
from _tars import REAL_TAR, adoption, pairs, picture, write_tar, write_tars

from ingest import download
from ingest.adopt import main
from ingest.download import DownloadConfig
from ingest.shards import ImageShard, load_snapshot
from ingest.store.commits import committed, damage
from ingest.store.maintenance import orphan_files
from ingest.store.shard_cache import local_file
from training import clip
from training.config import TrainConfig
from training.data import demo_data
from training.data.datasets import PairDataset

NUM_TARS, SAMPLES = 3, 4


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The content and time of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of four samples; whatever a test changes there, it changes by itself."""
    write_tars(tmp_path / "tars", NUM_TARS, SAMPLES)
    return tmp_path / "tars"


def images_of(out: Path | str) -> list[bytes]:
    shards = [ImageShard(out, each.name, digest=each.digest) for each in load_snapshot(out).shards]
    return [shard.image_bytes(i) for shard in shards for i in range(len(shard))]


def adopt(tars: Path, **fields) -> int:
    return main(adoption(tars / "*.tar", tars.parent / "out", **fields))


def test_a_shard_refers_to_its_tar_and_copies_nothing_of_it(tars, capsys):
    before, out = state(tars), tars.parent / "out"
    assert adopt(tars) == 0
    assert "12 rows = 12 stored" in capsys.readouterr().out
    assert state(tars) == before and not list(out.glob("*.tar"))
    assert images_of(out) == [picture(i) for i in range(12)]
    for name, commit in committed(out).items():
        url = commit.files[f"{name}.tar"].get("url", "")
        assert url == str(tars / f"{int(name):05d}.tar")
        assert local_file(out, commit, f"{name}.tar") == Path(url)
        assert commit.files[f"{name}.tar"]["sha256"] == sha256(Path(url).read_bytes()).hexdigest()
        assert damage(out, commit, deep=True) is None
    assert orphan_files(out) == []


def test_a_digest_does_not_depend_on_where_the_bytes_are(tars):
    assert adopt(tars) == 0
    moved = tars.parent / "elsewhere" / "tars"
    shutil.copytree(tars, moved, copy_function=shutil.copyfile)  # other times as well
    assert adopt(moved) == 0
    ours = [load_snapshot(folder.parent / "out").digest for folder in (tars, moved)]
    assert ours[0] == ours[1]


def test_a_rerun_makes_what_is_new_and_changed_and_nothing_else(tars, capsys):
    assert adopt(tars) == 0
    first, written = digests(tars.parent / "out"), state(tars.parent / "out")
    assert adopt(tars) == 0
    assert "3 shards, 3 of them done already" in capsys.readouterr().out
    assert digests(tars.parent / "out") == first

    # A changed tar is made again, a new one, which sorts before, comes last
    write_tar(tars / "00001.tar", pairs(50, 2))
    write_tar(tars / "00000-new.tar", pairs(60, 1))
    before = state(tars)
    assert adopt(tars) == 0
    printed, after = capsys.readouterr().out, digests(tars.parent / "out")
    assert f"shard 000001 is made again: {tars}/00001.tar has 10240 bytes" in printed
    assert {name for name in after if after[name] != first.get(name)} == {"000001", "000003"}
    expected = [*range(4), 50, 51, *range(8, 12), 60]
    assert images_of(tars.parent / "out") == [picture(i) for i in expected]
    assert state(tars) == before
    kept = [name for name in written if "/out/000000" in name]
    assert kept and all(state(tars.parent / "out")[name] == written[name] for name in kept)


def test_a_change_that_keeps_the_size_is_noticed_by_readers_and_by_the_next_run(tars, capsys):
    assert adopt(tars) == 0
    out, path = tars.parent / "out", tars / "00002.tar"
    snapshot = load_snapshot(out)
    write_tar(path, [(name, data.replace(b"caption", b"CAPTION")) for name, data in pairs(8, 4)])
    with pytest.raises(ValueError, match=r"00002.tar was changed .* rerun ingest/adopt.py"):
        ImageShard(out, "000002", digest=snapshot.shards[2].digest)
    assert adopt(tars) == 0
    assert "shard 000002 is made again" in capsys.readouterr().out
    with pytest.raises(ValueError, match="it was made again since"):
        ImageShard(out, "000002", digest=snapshot.shards[2].digest)
    assert ImageShard(out, "000002").caption(0) == "CAPTION 8"


def test_a_vanished_tar_is_named_and_the_others_are_published(tars, capsys):
    assert adopt(tars) == 0
    shutil.move(tars / "00001.tar", tars.parent / "kept")
    assert adopt(tars) == 1
    printed = capsys.readouterr().out
    assert f"shard 000001 failed: {tars}/00001.tar: " in printed and "8 rows = 8 stored" in printed
    assert [entry.name for entry in load_snapshot(tars.parent / "out").shards] == [
        "000000", "000002",
    ]  # fmt: skip
    shutil.move(tars.parent / "kept", tars / "00001.tar")
    assert adopt(tars) == 0 and load_snapshot(tars.parent / "out").num_samples == 12


def test_a_tar_that_is_cut_while_it_is_read_is_an_error_and_no_crash(tars):
    assert adopt(tars) == 0
    shard = ImageShard(tars.parent / "out", "000000")
    os.truncate(tars / "00000.tar", 100)
    with pytest.raises(ValueError, match=r"00000.tar: was cut .* rerun ingest/adopt.py"):
        shard.image_bytes(3)


def test_verify_fresh_and_a_withdrawn_shard_leave_the_tars_alone(tars, capsys):
    out = tars.parent / "out"
    assert adopt(tars) == 0
    data = bytearray((tars / "00001.tar").read_bytes())
    stat = (tars / "00001.tar").stat()
    data[-1] = 1  # the same size and time: found by its digest alone
    (tars / "00001.tar").write_bytes(data)
    os.utime(tars / "00001.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = state(tars)
    verify = DownloadConfig(out=str(out), verify=True)
    assert download.main(verify) == 1
    printed = capsys.readouterr().out
    assert "00001.tar differs from its committed sha256; rerun ingest/adopt.py" in printed
    assert not list((out / "_quarantine").rglob("*.tar"))
    assert adopt(tars, fresh=True) == 1  # its end is no block of zeros any more
    assert state(tars) == before and len(committed(out)) == 2
    assert download.main(verify) == 0


def test_what_was_forgotten_leaves_the_index_and_its_bytes_are_named(tars, capsys):
    out = tars.parent / "out"
    assert adopt(tars) == 0
    snapshot, before = load_snapshot(out), state(tars)
    demo_data.embed_here(str(out), tars.parent / "embeds", "tiny:random")
    (tars.parent / "request.txt").write_text(
        f"https://host/5.jpg\n{sha256(picture(9)).hexdigest()}\n"
    )
    request = str(tars.parent / "request.txt")
    assert download.main(DownloadConfig(out=str(out), forget=request)) == 0
    printed = capsys.readouterr().out
    assert "forgotten: 2 samples, 2 rows, in 2 rewritten shards" in printed
    assert "bytes are still in your own files" in printed
    assert f"{tars}/00001.tar, {tars}/00002.tar" in printed and "00000.tar" not in printed

    left = [i for i in range(12) if i not in (5, 9)]
    assert images_of(out) == [picture(i) for i in left]
    shards = [ImageShard(out, entry.name) for entry in load_snapshot(out).shards]
    captions = [shard.caption(i) for shard in shards for i in range(len(shard))]
    assert captions == [f"caption {i}" for i in left]
    old = ImageShard(out, "000001", digest=snapshot.shards[1].digest)  # a neighbour in its place
    assert len(old) == 4 and old.image_bytes(1) == picture(6)
    assert load_snapshot(tars.parent / "embeds").num_samples == 10
    assert state(tars) == before and not list(out.glob("*.tar"))
    assert b"caption 5" not in (out / "000001.captions").read_bytes()

    # Nor does a later adoption bring it back
    assert adopt(tars, fresh=True) == 0
    assert images_of(out) == [picture(i) for i in left]
    assert "2 filtered (forgotten 2)" in capsys.readouterr().out


def test_repeated_images_are_dropped_without_touching_a_tar(tars):
    write_tar(tars / "00003.tar", [("a.jpg", picture(2)), ("b.jpg", picture(77))])
    before = state(tars)
    config = adoption(tars / "*.tar", tars.parent / "out")
    assert adopt(tars, filters=type(config.filters)(unique=("images",))) == 0
    assert images_of(tars.parent / "out") == [picture(i) for i in [*range(12), 77]]
    assert state(tars) == before


def test_another_source_or_option_is_refused_and_named(tars, run_here):
    assert adopt(tars) == 0
    arguments = ["--out", str(tars.parent / "out"), "--num-processes", "0", "--source"]
    for more, name in [([str(tars / "0000*.tar")], "source"),
                       ([str(tars / "*.tar"), "--min-image-side", "3"], "min_image_side"),
                       ([str(tars / "*.tar"), "--caption-key", "x"], "source_digest")]:  # fmt: skip
        code, _, error = run_here("ingest/adopt.py", *arguments, *more)
        assert code == 2 and f"was made with {name} = " in error


def test_a_folder_of_tars_is_its_tars_although_it_has_tables_and_pictures(tars, capsys):
    """As img2dataset writes it: a table beside each tar."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert adopt(tars) == 0
    pq.write_table(pa.table({"key": ["x"], "url": ["y"]}), tars / "000000.parquet")
    (tars / "logo.png").write_bytes(picture(kind="PNG"))
    assert main(adoption(tars, tars.parent / "folder")) == 0
    assert f"{tars}: {NUM_TARS} tars are adopted, and nothing else of it" in capsys.readouterr().out
    assert images_of(tars.parent / "folder") == images_of(tars.parent / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 16}, "--image-size: changes nothing of .*; drop it, or add --copy"),
        ({"resize_mode": "border"}, "--resize-mode: changes nothing"),
        ({"samples_per_shard": 2}, "--samples-per-shard: changes nothing of .*; drop it$"),
        ({"copy": True, "samples_per_shard": 2}, "--samples-per-shard: changes nothing"),
        ({"image_column": "jpg"}, "--image-column: changes nothing"),
        ({"captions": "txt"}, "--captions: changes nothing"),
    ],
)
def test_an_option_that_changes_nothing_is_refused(tars, changes, message):
    with pytest.raises(ValueError, match=message):
        adopt(tars, **changes)
    assert not (tars.parent / "images").exists()


def test_where_nothing_can_be_read_nothing_is_published(tars, tmp_path, capsys):
    with pytest.raises(ValueError, match="--source s4://bucket/a.tar: .*s4"):
        main(adoption("s4://bucket/a.tar", tmp_path / "out"))
    assert main(adoption(tmp_path / "absent.tar", tmp_path / "out")) == 1
    assert "nothing is stored" in capsys.readouterr().out
    assert not (tmp_path / "out" / "_snapshots").exists()


@pytest.fixture
def remote(tars: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The tars in an object store."""
    monkeypatch.setenv("MINIDALLE2_CACHE", str(tars.parent / "cache"))
    files = fsspec.filesystem("memory")
    for path in tars.iterdir():
        files.pipe_file(f"/adopted/{path.name}", path.read_bytes())
    yield "memory://adopted"
    files.rm("/adopted", recursive=True)


def test_tars_of_an_object_store_are_adopted_and_read_through_local_copies(tars, remote, capsys):
    assert adopt(tars) == 0
    expected, out = load_snapshot(tars.parent / "out").digest, tars.parent / "second"
    for source in (f"{remote}/*.tar", f"{remote}/{{00000..00002}}.tar"):
        config = adoption(source, out, fresh=True)
        assert main(config) == 0
        assert load_snapshot(out).digest == expected
    assert images_of(out) == [picture(i) for i in range(12)]
    assert len(list((tars.parent / "cache").iterdir())) == 3 * 4 - 3 * 3
    time.sleep(0.01)
    fsspec.filesystem("memory").pipe_file("/adopted/00001.tar", (tars / "00001.tar").read_bytes())
    with pytest.raises(ValueError, match=f"{remote}/00001.tar was changed"):
        ImageShard(out, "000001")
    fsspec.filesystem("memory").rm("/adopted/00001.tar")
    assert main(adoption(f"{remote}/{{00000..00002}}.tar", out)) == 1
    assert f"failed: {remote}/00001.tar" in capsys.readouterr().out


def test_compressed_tars_need_a_copy(tars, capsys):
    assert adopt(tars) == 0
    write_tar(tars / "00009.tar", pairs(0, 2), "w:gz")
    assert adopt(tars) == 1
    assert "00009.tar: is compressed, so it needs --copy" in capsys.readouterr().out


def test_a_source_without_captions_says_which_fields_there_are(tars, capsys):
    write_tar(tars / "0.tar", [("0.jpg", picture()), ("0.json", b'{"alt": "a", "url": "u"}')])
    config = adoption(tars / "0.tar", tars.parent / "out")
    assert main(config) == 0
    assert "first samples have no .txt or .caption; for --caption-key there are: alt, url" in (
        capsys.readouterr().out
    )


def test_a_compressed_source_is_copied(tars):
    for path in tars.glob("*.tar"):
        write_tar(path, pairs(4 * int(path.stem), SAMPLES), "w:gz")
    assert adopt(tars, resize_mode="no") == 0
    assert images_of(tars.parent / "out") == [picture(i) for i in range(12)]
    assert len(list((tars.parent / "out").glob("*.tar"))) == 3


def test_batches_in_place_are_those_of_a_copy_bit_for_bit(tars):
    folders = [tars.parent / "out", tars.parent / "copied"]
    assert adopt(tars) == 0
    assert main(adoption(tars / "*.tar", folders[1], copy=True, resize_mode="no")) == 0
    readers = []
    for out in folders:
        demo_data.embed_here(str(out), tars.parent / f"{out.name}-embeds", "tiny:random")
        embeds = load_snapshot(tars.parent / f"{out.name}-embeds")
        readers.append(PairDataset(load_snapshot(out), embeds, 32))
    index = np.random.default_rng(0).permutation(12)
    batches = [reader.read(index) for reader in readers]
    assert batches[0].keys() == batches[1].keys()
    for name, expected in batches[1].items():
        assert np.array_equal(batches[0][name], expected), name
    tables = [ImageShard(out, "000001").keys for out in folders]
    assert tables[0] == tables[1]


def test_the_index_is_what_wids_and_webdataset_read(tars, tmp_path):
    assert adopt(tars) == 0
    index = tars.parent / "out" / "index.json"
    data = wids.ShardListDataset(str(index))
    assert [data[i][".jpg"].size for i in range(len(data))] == [(40, 32)] * 12
    assert [data[i][".txt"] for i in range(len(data))] == [f"caption {i}" for i in range(12)]
    urls = [entry["url"] for entry in json.loads(index.read_text())["shardlist"]]
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False))) == 12

    # Shards of our own are named relative to the index
    demo_data.draw_images(tmp_path / "own", num_shards=2, samples_per_shard=3)
    own = wids.ShardListDataset(str(tmp_path / "own" / "index.json"))
    texts = [ImageShard(tmp_path / "own", f"00000{n}").caption(i) for n in (0, 1) for i in range(3)]
    assert [own[i][".txt"] for i in range(len(own))] == texts
    assert orphan_files(tmp_path / "own") == []


def test_hugging_face_datasets_reads_the_tars_of_the_index(tars, tmp_path, monkeypatch):
    import datasets
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert adopt(tars) == 0
    index = json.loads((tars.parent / "out" / "index.json").read_text())
    files = {"train": [entry["url"] for entry in index["shardlist"]]}
    data = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    rows = list(data.cast_column("jpg", datasets.Image(decode=False)))
    assert [row["jpg"]["bytes"] for row in rows] == images_of(tars.parent / "out")
    assert [row["txt"] for row in rows] == [f"caption {i}" for i in range(12)]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_snapshot(tmp_path):
    source = write_tars(tmp_path / "tars", 16, 40)
    assert main(adoption(source, tmp_path / "whole")) == 0
    expected, before = load_snapshot(tmp_path / "whole").digest, state(tmp_path / "tars")
    command = script("ingest/adopt.py", "--source", source, "--num-processes", 0, "--out")
    rng, caught = random.Random(0), 0
    out = str(tmp_path / "out")
    for _ in range(10):
        with subprocess.Popen([*command, out], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = re.match(r"16 shards, (\d+) of", process.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        caught += found is not None and process.returncode == -signal.SIGKILL
    assert caught >= 5
    assert done([*command, out]).returncode == 0
    assert load_snapshot(out).digest == expected and state(tmp_path / "tars") == before
    assert os.listdir(f"{out}/_attempts") == []


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TAR.exists(), reason="needs ../shared/data")
def test_a_real_tar_goes_in_with_one_command_embeds_and_trains(tmp_path):
    command = script("ingest/adopt.py", "--source", REAL_TAR, "--out", tmp_path / "images")
    finished = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert finished.returncode == 0, finished.stderr
    assert "32 rows = 32 stored + 0 filtered + 0 failed" in finished.stdout
    demo_data.embed_here(str(tmp_path / "images"), tmp_path / "embeds", "tiny:random")
    steps = TrainConfig.of(**HERE, num_steps=3, global_batch_size=8, precision="fp32")
    assert clip.main(clip_run(tmp_path, tmp_path / "run", steps)) == 0
