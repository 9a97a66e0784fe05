"""The demo, whole and small, every part real; killed at every stage, it still ends alike."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each stage, and the first thing that it leaves behind: what a kill in its middle finds.
STAGES = {
    "ingest/download.py": "data/train/images/_commits/*",
    "training/clip.py": "clip/step_*",
    "ingest/embed.py": "data/train/embeds/_commits/*",
    "training/prior.py": "prior/step_*",
    "training/decoder.py": "base/step_*",
    "eval/sample.py": "samples/0*.png",
    "eval/fid.py": "samples/grid.png",
}
SECONDS_A_RUN = 900


def command(run: Path) -> list[str]:
    sizes = ["--size", "debug", "--num-train", "256", "--num-test", "8"]
    return [sys.executable, str(ROOT / "cluster" / "demo.py"), *sizes, "--run", str(run)]


def run_demo(run: Path) -> str:
    done = subprocess.run(
        command(run), capture_output=True, text=True, timeout=SECONDS_A_RUN, cwd=run.parent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def kill_during(run: Path, stage: str, product: str = "", after_seconds: float = 0.0) -> None:
    """Start the demo and kill -9 its driver once `stage` has begun and left the first `product`."""
    log = run.parent / "killed.log"
    with log.open("w") as file:
        demo = subprocess.Popen(command(run), stdout=file, stderr=subprocess.STDOUT, cwd=run.parent)
        deadline = time.monotonic() + SECONDS_A_RUN
        while f"$ python {stage}" not in log.read_text() or not any(run.glob(product or "*")):
            assert demo.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        time.sleep(after_seconds)
        os.kill(demo.pid, signal.SIGKILL)
        demo.wait()


def fingerprint(run: Path) -> dict[str, str]:
    """Name what a run made by its content: keys and embeddings in order, weights, images.

    Image shards are left out: they hold their URLs, and so the port of the demo's server.
    """
    found = {}
    parts = ("data/*/embeds/*.npy", "data/*/embeds/*.parquet", "*/step_*/ema.safetensors")
    for pattern in (*parts, "samples/0*.png"):
        for path in sorted(run.glob(pattern)):
            found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("demo") / "run"
    return run, run_demo(run)


@pytest.mark.slow
def test_the_demo_ends_with_scores_and_a_report(undisturbed: tuple[Path, str]):
    run, said = undisturbed
    scores = json.loads((run / "eval.json").read_text())
    for part, names in {
        "clip": ("retrieval_at_1",),
        "prior": ("cos", "cos_shuffled", "retrieval_at_1"),
        "images": (
            "n", "fd_clip", "fd_clip_real_halves", "clip_score", "clip_score_shuffled", "judge",
        ),
        "shapes": ("single", "seen", "held_out"),
        "ablation": ("true_image_embed", "prior", "text_embed"),
    }.items():  # fmt: skip
        assert set(names) <= scores[part].keys(), part
    assert {"clip", "prior", "base", "up", "sample", "evaluate"} <= scores["seconds"].keys()
    assert "relation" not in scores["shapes"]["single"]
    assert scores["shapes"]["held_out"]["real"] >= 0.9, "true drawings are right"
    assert scores["images"]["n"] == 24
    assert "<html" in (run / "report.html").read_text()
    for stage in STAGES:
        assert f"$ python {stage}" in said, "each stage shows the command that it is"


@pytest.mark.slow
def test_a_second_run_does_nothing_again(undisturbed: tuple[Path, str]):
    run, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/step_*/ema.safetensors")}
    before |= {p: p.stat().st_mtime_ns for p in run.glob("data/*/*/*.npy")}
    before |= {p: p.stat().st_mtime_ns for p in (run / "scores.json", run / "timings.json")}
    scores = (run / "eval.json").read_text()
    said = run_demo(run)
    assert said.count("finished already") == 4
    assert (run / "eval.json").read_text() == scores, "its seconds included"
    assert before and before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.slow
def test_a_demo_of_another_data_set_is_refused(undisturbed: tuple[Path, str]):
    run, _ = undisturbed
    other = [*command(run), "--seed", "7"]
    done = subprocess.run(other, capture_output=True, text=True, timeout=60, cwd=run.parent)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "seed" in done.stderr


@pytest.mark.slow
def test_killed_while_training_it_ends_as_if_undisturbed(
    undisturbed: tuple[Path, str], tmp_path: Path
):
    run = tmp_path / "run"
    kill_during(run, "training/decoder.py", STAGES["training/decoder.py"])
    assert not (run / "base" / "final.json").exists(), "the kill came in the middle"
    run_demo(run)
    assert fingerprint(run) == fingerprint(undisturbed[0])


@pytest.mark.soak
def test_killed_at_every_stage_it_ends_as_if_undisturbed(
    undisturbed: tuple[Path, str], tmp_path: Path
):
    """Every stage is killed twice: while it starts, and once it has left its first product."""
    run = tmp_path / "run"
    for number, (stage, product) in enumerate(STAGES.items()):
        kill_during(run, stage, after_seconds=0.5 + 2.5 * (number % 4))
        kill_during(run, stage, product)
    run_demo(run)
    assert fingerprint(run) == fingerprint(undisturbed[0])
