"""What the benchmarks of training measure by, and that they run to their end without a GPU."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from _runs import done, script

from models.tokenizers import token_mask, tokenizer

ROOT = Path(__file__).parent.parent
LIST = ROOT.parent / "shared" / "data" / "laion" / "real_urls_10000.parquet"


@pytest.mark.skipif(not LIST.exists(), reason="the list is not here")
def test_captions_of_the_benchmarks_are_as_long_as_a_list_s():
    import pyarrow.parquet as pq
    import torch

    captions, tokenize = pq.read_table(LIST)["TEXT"].to_pylist(), tokenizer(77)
    lengths = [
        token_mask(torch.from_numpy(tokenize(captions[start : start + 500]))).sum(1)
        for start in range(0, len(captions), 500)
    ]
    counts = np.bincount(torch.cat(lengths).numpy(), minlength=78)
    assert tuple(counts) == runpy.run_path(str(ROOT / "benchmarks" / "_captions.py"))["COUNTS"]


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_timed_beside_one_on_the_disk():
    ended = done(script("benchmarks/bucket.py", "--quick"), 300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert len(found["disk_seconds"]) == len(found["bucket_seconds"]) == 1 and found["ratio"] > 0


@pytest.mark.slow
def test_what_a_gpu_is_measured_by_runs_on_a_cpu_and_keeps_what_it_has(tmp_path: Path):
    command = script(
        "benchmarks/gpu.py", "--all", "--quick", "--num-threads", "1",
        "--work", tmp_path / "work", "--out", tmp_path / "grid.png",
    )  # fmt: skip
    first = done(command, 900)
    assert first.returncode == 0, first.stderr[-3000:]
    found = json.loads(first.stdout.splitlines()[-1])
    assert not [name for name, line in found.items() if "failed" in line], found
    assert found["run"]["n_steps"] >= 30 and found["run"]["images_per_second"] > 0
    assert "passed" in found["tests tests/test_models_cuda.py"]["tests"]
    assert found["step decoder/debug:4 plain"]["samples_per_second"] > 0
    assert (tmp_path / "grid.png").stat().st_size > 1000

    # One result is lost: that one alone is made again
    file = tmp_path / "work" / "results.jsonl"
    lines = [line for line in file.read_text().splitlines(True) if "prior/debug" not in line]
    file.write_text("".join(lines))
    second = done(command, 300)
    assert "step prior/debug:4 plain" in second.stdout.splitlines()
    assert "run" not in second.stdout.splitlines()
    again = json.loads(second.stdout.splitlines()[-1])
    assert again["run"] == found["run"] and again.keys() == found.keys()
