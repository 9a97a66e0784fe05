"""Laws of trying again: what may pass is tried again, what is settled stays, and all adds up."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _lists import download_of, write_list

from ingest.download import DownloadConfig, main
from ingest.fetching import shard_task
from ingest.fetching.retries import DownloadPlan, RetryRound, pick
from ingest.lists.filters import FilterConfig
from ingest.shards import ImageShard, committed, load_snapshot

NUM_ROWS = 11


@pytest.fixture
def config(site, tmp_path) -> DownloadConfig:
    """Rows 0, 3, 6 and 9 have a passing trouble, row 4 a lasting one; shards of four."""
    urls = [site.put(f"/{i}.png", site.picture(40, 40, 20 * i)) for i in range(NUM_ROWS)]
    for i in (0, 3, 6, 9):
        site.put(f"/{i}.png", status=503)
    site.put("/4.png", status=404)
    listed = write_list(tmp_path / "list.parquet", urls, n=range(NUM_ROWS))
    fields = {"samples_per_shard": 4, "num_threads": 4, "keep_columns": ("n",)}
    return download_of(site, listed, tmp_path / "images", **fields)


def mend(site, *rows: int) -> None:
    for i in rows:
        site.put(f"/{i}.png", site.picture(40, 40, 20 * i))


def last_line(capsys) -> str:
    return [line for line in capsys.readouterr().out.splitlines() if " rows = " in line][-1]


def test_failures_that_pass_are_stored_in_a_round_of_their_own(config, site, capsys):
    assert main(config) == 0
    assert "6 stored + 0 filtered + 5 failed (not_found 1, server_error 4)" in last_line(capsys)
    first = load_snapshot(config.out)
    mend(site, 0, 3, 9)
    hits = len(site.hits)
    assert main(config) == 0 and len(site.hits) == hits, "without the flag nothing is tried again"
    assert main(replace(config, retry_failed=True)) == 0
    assert "9 stored + 0 filtered + 2 failed (not_found 1, server_error 1)" in last_line(capsys)
    assert sorted(site.hits[hits:]) == ["/0.png", "/3.png", "/6.png", "/9.png"]
    shard = ImageShard(config.out, "000003")
    assert [shard.caption(i) for i in range(3)] == ["caption 0", "caption 3", "caption 9"]
    rows = pq.ParquetFile(Path(config.out) / "000003.parquet").read().to_pylist()
    assert [row["n"] for row in rows] == [0, 3, 6, 9]
    assert [row["key"] for row in rows] == [f"00000300{i}" for i in range(4)]
    assert load_snapshot(config.out, first.digest) == first, "what a job has pinned stays"


def test_rounds_follow_each_other_until_nothing_is_left(config, site, capsys):
    main(config)
    retried = replace(config, retry_failed=True)
    for settled in ((0,), (3, 6), (9,)):
        mend(site, *settled)
        assert main(retried) == 0
    assert "10 stored + 0 filtered + 1 failed (not_found 1)" in last_line(capsys)
    hits = len(site.hits)
    assert main(retried) == 0
    assert "no row failed for a reason that may pass" in capsys.readouterr().out
    assert len(site.hits) == hits and len(committed(config.out)) == 6


def test_a_round_that_was_interrupted_is_finished_by_any_run(config, site, monkeypatch, capsys):
    main(config)
    mend(site, 0, 3, 6, 9)
    with monkeypatch.context() as patch:
        patch.setattr(shard_task, "make_shard", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        assert main(replace(config, retry_failed=True)) == 1
    assert "4 of 4" not in last_line(capsys)
    assert main(config) == 0
    assert "10 stored" in last_line(capsys)


def test_a_list_that_is_not_finished_is_finished_first(config, site, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(shard_task, "make_shard", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        assert main(replace(config, retry_failed=True)) == 1
    assert not (Path(config.out) / "_retries").exists()
    mend(site, 0, 3, 6, 9)
    assert main(replace(config, retry_failed=True)) == 0
    assert "10 stored" in last_line(capsys)


def test_repeated_urls_stay_out_of_rounds(config, site, capsys):
    table = pq.read_table(config.urls)
    pq.write_table(pa.concat_tables([table, table]), config.urls)
    once = replace(config, filters=FilterConfig(unique=("urls",)))
    assert main(once) == 0
    mend(site, 0, 3, 6, 9)
    assert main(replace(once, retry_failed=True)) == 0
    line = last_line(capsys)
    assert line.startswith("22 rows = 10 stored + 11 filtered (duplicate_url 11) + 1 failed")


def test_a_plan_gives_every_shard_its_rows():
    rounds = (
        RetryRound(number=1, rows=np.array([1, 4, 5, 9, 10]), reasons=tuple("abcde")),
        RetryRound(number=2, rows=np.array([4]), reasons=("f",)),
    )
    plan = DownloadPlan(num_rows=11, samples_per_shard=4, rounds=rounds)
    assert plan.num_shards == 3 + 2 + 1
    found = [plan.rows_of(n).tolist() for n in range(plan.num_shards)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [1, 4, 5, 9], [10], [4]]
    reasons = [plan.reasons_of(n) for n in range(plan.num_shards)]
    assert reasons == [[], [], [], ["a", "b", "c", "d"], ["e"], ["f"]]


@pytest.mark.parametrize("size", [1, 3, 50])
def test_picking_rows_keeps_their_order_whatever_the_tables(size: int):
    draw = np.random.default_rng(0)
    rows = np.flatnonzero(draw.random(1000) < 0.1)
    tables = (pa.table({"i": range(start, min(1000, start + 7))}) for start in range(0, 1000, 7))
    found = [table["i"].to_pylist() for table in pick(tables, rows, size)]
    assert [len(part) for part in found[:-1]] == [size] * (len(found) - 1)
    assert [*itertools.chain(*found)] == rows.tolist()
