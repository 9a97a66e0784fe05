"""Laws of commits, snapshots and shards: made once, valid by digest, never half there."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from _runs import flip, truncate

from ingest.embedding.statistics import EmbedStatistics
from ingest.shards import (
    Attempt,
    EmbedShard,
    ImageShard,
    Sample,
    committed,
    damage,
    load_snapshot,
    publish_snapshot,
    recover,
    remove_data_folder,
    withdraw,
    write_embed_shard,
    write_image_shard,
    write_manifest,
)
from ingest.store import commits


def samples(n: int = 4) -> list[Sample]:
    return [
        Sample(key=f"{i:09d}", image_bytes=bytes([i]) * (600 + i), caption=f"ein Bär {i}", json={})
        for i in range(n)
    ]


def write_images(folder: Path, n: int = 4) -> int:
    rows = [{"key": s.key, "status": "success", "url": "u"} for s in samples(n)]
    rows.append({"key": "999999999", "status": "failed", "error": "not_found"})
    return write_image_shard(folder, "000000", samples(n), rows)


def commit_images(root: Path, n: int = 4) -> commits.Commit:
    with Attempt(root, "000000") as attempt:
        n = write_images(attempt.path, n)
        return attempt.commit(num_samples=n, counts={"stored": n}, config_hash="c")


def commit_text(root: Path, text: str, shard: str = "000000") -> commits.Commit:
    with Attempt(root, shard) as attempt:
        (attempt.path / f"{shard}.txt").write_text(text)
        return attempt.commit(num_samples=1, counts={"stored": 1}, config_hash="c")


def attempts(root: Path) -> list[str]:
    return sorted(os.listdir(root / "_attempts"))


def test_equal_samples_give_equal_bytes(tmp_path):
    first, second = commit_images(tmp_path / "a"), commit_images(tmp_path / "b")
    assert first.files == second.files and first.digest == second.digest
    assert set(first.files) == {"000000.tar", "000000.parquet", "000000.idx.npy"}
    assert publish_snapshot(tmp_path / "a").digest == publish_snapshot(tmp_path / "b").digest


def test_index_reads_what_the_tar_holds(tmp_path):
    commit_images(tmp_path)
    shard = ImageShard(tmp_path, "000000")
    with tarfile.open(tmp_path / "000000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        assert {m.mtime for m in tar.getmembers()} == {0}
    assert len(shard) == 4 and shard.keys == [s.key for s in samples()]
    for i, key in enumerate(shard.keys):
        assert shard.image_bytes(i) == members[f"{key}.jpg"]
        assert shard.caption(i) == members[f"{key}.txt"].decode() == f"ein Bär {i}"


def test_the_tar_is_byte_for_byte_webdatasets_own(tmp_path):
    from webdataset.writer import TarWriter

    commit_images(tmp_path)
    with open(tmp_path / "theirs.tar", "wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for sample in samples():
            parts = {"jpg": sample.image_bytes, "txt": sample.caption.encode()}
            metadata = json.dumps(dict(sample.json), sort_keys=True, ensure_ascii=False).encode()
            writer.write({"__key__": sample.key, **parts, "json": metadata})
        writer.close()

    assert (tmp_path / "000000.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_an_empty_shard_is_a_shard(tmp_path):
    commit_images(tmp_path, 0)
    shard = ImageShard(tmp_path, "000000")
    assert len(shard) == 0 and shard.keys == []


def test_samples_must_be_the_stored_rows(tmp_path):
    with pytest.raises(ValueError, match="not the stored rows"):
        write_image_shard(tmp_path, "000000", samples(2), [{"key": "0", "status": "success"}])


def test_an_attempt_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"), Attempt(tmp_path, "000000") as attempt:
        (attempt.path / "000000.txt").write_text("part")
        raise OSError("disk full")
    assert committed(tmp_path) == {} and attempts(tmp_path) == []


@pytest.mark.parametrize("finish", ["recover", "read"])
@pytest.mark.parametrize("moved", [0, 1, 3])
def test_interrupted_publication_is_rolled_forward(tmp_path, monkeypatch, moved, finish):
    real, count = os.replace, 0

    def dying_replace(source, target):
        nonlocal count
        if Path(target).parent == tmp_path and "_attempts" in str(source):
            if count == moved:
                raise KeyboardInterrupt
            count += 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        if moved < 3:
            with pytest.raises(KeyboardInterrupt):
                commit_images(tmp_path)
        else:  # every file moved, killed before the attempt's folder went
            patch.setattr(commits, "_discard", lambda *_: None)
            commit_images(tmp_path)
    assert attempts(tmp_path) != [] and len(committed(tmp_path)) == 1
    if finish == "recover":
        recover(tmp_path)
        assert attempts(tmp_path) == []
    shard = ImageShard(tmp_path, "000000")
    assert shard.image_bytes(3) == samples()[3].image_bytes
    assert damage(tmp_path, shard.commit, deep=True) is None


def test_recover_removes_dead_attempts_and_leaves_the_living(tmp_path):
    code = (
        "import os, sys; from ingest.shards import Attempt; a = Attempt(sys.argv[1], '000001')\n"
        "a.__enter__(); (a.path / 'f').write_text('x'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9 and len(attempts(tmp_path)) == 2
    with Attempt(tmp_path, "000000") as alive:
        recover(tmp_path)
        assert attempts(tmp_path) == sorted([alive.id, f"{alive.id}.json"])


def test_another_process_under_the_same_pid_is_not_the_owner(tmp_path):
    with Attempt(tmp_path, "000000") as attempt:
        record = tmp_path / "_attempts" / f"{attempt.id}.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "birth": "1"}))
        recover(tmp_path)
        assert attempts(tmp_path) == []


@pytest.mark.parametrize("harm", ["truncate", "delete", "flip"])
def test_a_damaged_shard_is_noticed_and_can_be_made_again(tmp_path, harm):
    commit = commit_images(tmp_path)
    tar = tmp_path / "000000.tar"
    {"truncate": truncate, "delete": Path.unlink, "flip": flip}[harm](tar)
    assert "000000.tar" in (damage(tmp_path, commit, deep=True) or "")
    if harm == "flip":
        assert damage(tmp_path, commit) is None, "what only a digest shows"
    else:
        assert "000000.tar" in (damage(tmp_path, commit) or "")
        with pytest.raises(ValueError, match="000000.tar"):
            ImageShard(tmp_path, "000000")
    withdraw(tmp_path, commit)
    assert commit_images(tmp_path).digest == commit.digest
    assert len(ImageShard(tmp_path, "000000")) == 4


def test_a_snapshot_never_changes_under_its_reader(tmp_path):
    write_manifest(tmp_path, "images", {})
    commit_text(tmp_path, "a", "000000")
    first = publish_snapshot(tmp_path)
    commit_text(tmp_path, "b", "000001")
    assert load_snapshot(tmp_path) == first
    second = publish_snapshot(tmp_path)
    assert load_snapshot(tmp_path) == second and second.num_samples == 2
    assert load_snapshot(tmp_path, first.digest) == first
    assert publish_snapshot(tmp_path) == second


def test_a_pinned_digest_refuses_a_shard_made_anew(tmp_path):
    old = commit_images(tmp_path)
    withdraw(tmp_path, old)
    commit_images(tmp_path, 3)
    with pytest.raises(ValueError, match="made again"):
        ImageShard(tmp_path, "000000", digest=old.digest)


def test_an_altered_snapshot_is_refused(tmp_path):
    write_manifest(tmp_path, "images", {})
    first = publish_snapshot(tmp_path)
    commit_text(tmp_path, "a")
    second = publish_snapshot(tmp_path)
    folder = tmp_path / "_snapshots"
    os.replace(folder / f"{second.digest}.parquet", folder / f"{first.digest}.parquet")
    with pytest.raises(ValueError, match="does not match its name"):
        load_snapshot(tmp_path, first.digest)


def test_the_manifest_refuses_other_settings_naming_the_field(tmp_path):
    write_manifest(tmp_path, "images", {"image_size": 64, "columns": ("a", "b")})
    write_manifest(tmp_path, "images", {"image_size": 64, "columns": ("a", "b")})
    with pytest.raises(ValueError, match="image_size = 64, this run has 32"):
        write_manifest(tmp_path, "images", {"image_size": 32, "columns": ("a", "b")})
    with pytest.raises(ValueError, match="kind = 'images'"):
        write_manifest(tmp_path, "embeds", {"image_size": 64, "columns": ("a", "b")})


def test_only_our_folders_are_written_to_or_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="without our manifest"):
        write_manifest(tmp_path, "images", {})
    with pytest.raises(ValueError, match="no _manifest.json"):
        remove_data_folder(tmp_path, "images")
    assert (tmp_path / "thesis.tex").exists()


def test_fresh_empties_a_folder_of_its_kind(tmp_path):
    write_manifest(tmp_path, "images", {})
    commit_images(tmp_path)
    with pytest.raises(ValueError, match="refused"):
        remove_data_folder(tmp_path, "embeds")
    remove_data_folder(tmp_path, "images")
    assert list(tmp_path.iterdir()) == []


def commit_embeds(root: Path, name: str, embed: np.ndarray) -> None:
    keys = [f"{name}{i:03d}" for i in range(len(embed))]
    tokens = np.arange(len(embed) * 5).reshape(-1, 5)
    captions = [f"caption {key}" for key in keys]
    with Attempt(root, name) as attempt:
        n = write_embed_shard(
            attempt.path, name, image_embed=embed, text_embed=-embed, tokens=tokens, keys=keys,
            captions=captions,
        )  # fmt: skip
        attempt.commit(num_samples=n, counts={"stored": n}, config_hash="c")


def test_embeddings_come_back_by_row(tmp_path):
    embed = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float16)
    commit_embeds(tmp_path, "000000", embed)
    shard = EmbedShard(tmp_path, "000000")
    assert shard.image_embed.dtype == np.float16 and shard.tokens.dtype == np.int32
    np.testing.assert_array_equal(shard.image_embed, embed)
    np.testing.assert_array_equal(shard.text_embed, -embed)
    assert shard.captions == [f"caption {key}" for key in shard.keys]
    assert shard.tokens[2].tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_statistics_of_several_data_sets_are_those_of_their_mixture(tmp_path, weights):
    """Each is read back as it was written; the second has two shards."""
    rng = np.random.default_rng(0)
    sizes = ((0, 30), (1, 50))
    parts = [rng.normal(mean, 1 + mean, (n, 5)).astype(np.float16) for mean, n in sizes]
    commit_embeds(tmp_path / "0", "000000", parts[0])
    for name, part in {"000000": parts[1][:13], "000001": parts[1][13:]}.items():
        commit_embeds(tmp_path / "1", name, part)
    read = []
    for root in (tmp_path / "0", tmp_path / "1"):
        written = EmbedStatistics.compute(publish_snapshot(root))
        written.write(root)
        read.append(EmbedStatistics.read(root))
        assert read[-1].snapshot == written.snapshot != ""
    found = EmbedStatistics.merge(read, weights)
    whole = np.concatenate(parts).astype(np.float64)
    shares = weights or (30, 50)
    each = np.repeat(np.array(shares) / np.array([30, 50]), [30, 50])
    mean = np.average(whole, axis=0, weights=each)
    covariance = np.cov(whole.T, aweights=each, bias=True)
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.std, np.sqrt(np.diag(covariance)), atol=1e-12)
    rebuilt = found.basis @ np.diag(found.eigenvalues) @ found.basis.T
    np.testing.assert_allclose(rebuilt, covariance, atol=1e-12)
    assert (np.diff(found.eigenvalues) <= 0).all()
    assert found.count == 80 and found.cosines.sum() == 80
