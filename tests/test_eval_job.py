"""The same number from any number of workers, after any kill; and errors that name the image."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from cluster.base import ray_session
from cluster.base.ray_session import GROUPS
from eval import sample
from eval.features import workers
from eval.features.extractors import ExtractorSpec, clip_spec
from eval.features.store import FeatureExtraction, open_store
from eval.features.workers import ImageBlocks, Workers
from eval.sampling import sample_job
from eval.sampling.image_source import IncompleteError, open_images
from ingest.store.commits import committed
from ingest.store.shard_runner import UnitResult, WorkerDiedError
from models.convert.runs import load_clip

SECONDS = 600
NUM_IMAGES, BLOCK = 40, 4

# Run as a script of its own, which a test can kill: FOLDER IMAGES VICTIM NUM_WORKERS... It prints
# the distance, to the last bit, for each number of workers. Who finds the file VICTIM takes it away
# and kills whom it names: itself, or the driver.
RUNNER = """
import dataclasses, os, signal, sys
from pathlib import Path

import numpy as np

from eval.features.extractors import ExtractorSpec
from eval.distances.frechet import Moments, frechet_distance
from eval.features.store import FeatureExtraction
from eval.features.workers import Workers
from eval.sampling.image_source import open_images

@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadly(ExtractorSpec):
    victim: Path

    def build(self, device):
        victim, done = self.victim, []
        mixing = np.random.default_rng(0).normal(size=(300, 16))

        class Killer:
            def __call__(self, images):
                done.append(1)
                if len(done) == 3:
                    self.kill()
                pixels = np.stack([np.asarray(image, np.float64).ravel() for image in images])
                return np.tanh(pixels @ mixing / 1000)

            def kill(self):
                try:
                    taken = victim.rename(f"{victim}.taken")
                except FileNotFoundError:
                    return
                pid = taken.read_text()
                os.kill(os.getpid() if pid == "self" else int(pid), signal.SIGKILL)

        return Killer()

if __name__ == "__main__":
    folder, images, victim = map(Path, sys.argv[1:4])
    if victim.is_file() and victim.read_text() == "driver":
        victim.write_text(str(os.getpid()))
    spec = Deadly(space="inception", name="x", resize="none", any_size=False, official=False,
                  victim=victim)
    for number in map(int, sys.argv[4:]):
        extraction = FeatureExtraction(
            folder=folder / str(number), workers=Workers(num_workers=number), block_size=4
        )
        features, known = extraction.measured(open_images(str(images)), spec)
        half = Moments.of(features.all()[:20])
        print("RESULT", number, frechet_distance(known.moments, half).hex(), flush=True)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runner") / "run_features.py"
    path.write_text(RUNNER)
    return path


def run(runner: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(runner), *map(str, arguments)], capture_output=True, text=True,
        timeout=SECONDS, cwd=runner.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def results(done: subprocess.CompletedProcess) -> dict[int, str]:
    """The distance by number of workers."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return {int(number): distance for _, number, distance in lines}


@pytest.fixture(scope="module")
def expected(runner: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("expected")
    return results(run(runner, folder, images, "absent", 0))[0]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bits_also_if_one_is_killed(
    runner: Path, images: Path, expected: str, tmp_path: Path
):
    (tmp_path / "victim").write_text("self")
    done = run(runner, tmp_path / "features", images, tmp_path / "victim", 2, 1, 4)
    assert results(done) == {2: expected, 1: expected, 4: expected}
    assert (tmp_path / "victim.taken").exists(), "a worker was killed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2])
def test_a_killed_driver_loses_nothing_that_was_committed(
    number: int, runner: Path, images: Path, expected: str, tmp_path: Path
):
    """The rerun, with another number of workers, makes only what is missing."""
    (tmp_path / "victim").write_text("driver")
    features = tmp_path / "features"
    done = run(runner, features, images, tmp_path / "victim", number)
    assert done.returncode == -signal.SIGKILL and "RESULT" not in done.stdout
    (features / str(number)).rename(features / "other")
    (store,) = (features / "other").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in store.glob("*.npy")}
    assert 0 < len(before) < NUM_IMAGES // BLOCK
    (features / "other").rename(features / "0")
    assert results(run(runner, features, images, "absent", 0)) == {0: expected}
    (store,) = (features / "0").iterdir()
    after = {p.name: p.stat().st_mtime_ns for p in store.glob("*.npy")}
    assert before.items() <= after.items() and len(after) == NUM_IMAGES // BLOCK


def test_a_block_that_kills_every_worker_is_at_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    died = UnitResult(name="0", error=WorkerDiedError("the actor died"))
    monkeypatch.setattr(workers, "run_units", lambda *_: (result for result in [died]))
    with pytest.raises(IncompleteError, match="block 0: 3 workers died under it .the actor died"):
        Workers().run("features", lambda: len, ImageBlocks(root=tmp_path, count=4, size=4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "free", "total", "gpus"),
    [
        ("auto", {"CPU": 4.0}, {}, 0),
        ("auto", {"CPU": 4.0, "GPU": 1.0}, {}, 0.5),
        ("auto", {"CPU": 4.0, "GPU": 0.5}, {"GPU": 1.0}, 0.25),
        ("auto", {"CPU": 4.0}, {"GPU": 1.0}, 0.5),
        ("auto", {"CPU": 4.0, GROUPS: 1.0}, {}, 1),  # all scaled away
        ("auto", {"CPU": 4.0, "GPU": 1.0, GROUPS: 1.0}, {}, 0.5),
        ("cpu", {"CPU": 4.0, "GPU": 1.0, GROUPS: 1.0}, {}, 0),
    ],
)
def test_workers_share_what_is_free_and_say_what_they_wait_for(
    device: str, free: dict, total: dict, gpus: float,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
):  # fmt: skip
    monkeypatch.setattr(ray_session, "ensure_ray", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {**free, **total})
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    pool = Workers(num_workers=2, device=device).pool(num_blocks=1)
    assert (pool.number, pool.num_cpus, pool.num_gpus, pool.group) == (1, 1, gpus, "gpu_group")
    waits = total.get("GPU", 0) > 0 and not free.get("GPU")
    assert ("wait for a GPU: all 1 are held" in capsys.readouterr().out) is waits


# -- the store, in this process --------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec() -> ExtractorSpec:
    return clip_spec(load_clip("tiny:random"), "tiny:random")


def extraction(folder: Path) -> FeatureExtraction:
    return FeatureExtraction(folder=folder, workers=Workers(), block_size=BLOCK)


def test_damaged_and_missing_blocks_are_made_again(
    images: Path, spec: ExtractorSpec, tmp_path: Path, capsys: pytest.CaptureFixture
):
    features, known = extraction(tmp_path).measured(open_images(str(images)), spec)
    (store,) = tmp_path.iterdir()
    (store / "000003.features.npy").write_bytes(b"short")
    (store / "000005.features.npy").unlink()
    again, same = extraction(tmp_path).measured(open_images(str(images)), spec)
    assert "block 000003 is made again" in capsys.readouterr().out
    assert known.moments.scatter.tobytes() == same.moments.scatter.tobytes()
    np.testing.assert_array_equal(features.all(), again.all())


def test_too_few_features_are_incomplete(images: Path, spec: ExtractorSpec, tmp_path: Path):
    store = open_store(tmp_path, open_images(str(images)), spec, BLOCK)
    store.make(0, spec.build("cpu"))
    with pytest.raises(IncompleteError, match=f"found features of {BLOCK} images, expected 40"):
        store.features()


def test_images_of_a_larger_set_are_not_extracted_twice(
    images: Path, spec: ExtractorSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = open_images(str(images))
    picked = whole.picked([7, 3, 30, 31, 2], "some")
    all_features, _ = extraction(tmp_path).measured(whole, spec)
    monkeypatch.setattr(ExtractorSpec, "build", lambda self, device: pytest.fail("built"))
    features, known = extraction(tmp_path).measured(picked, spec)
    np.testing.assert_array_equal(features.all(), all_features.all()[[7, 3, 30, 31, 2]])
    assert known.source == "some" and known.moments.count == 5


def mean_colours(images: list[Image.Image]) -> np.ndarray:
    """Features that are not finite for bright red images."""
    means = np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])
    means[means[:, 0] > 250] = np.nan
    return means


def means_spec(any_size: bool) -> Any:
    class MeansSpec(ExtractorSpec):
        def build(self, device: Any) -> Any:
            return mean_colours

    return MeansSpec(space="inception", name="means", resize="none", any_size=any_size,
                     official=False)  # fmt: skip


def test_sizes_may_differ_only_where_the_extractor_takes_them(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (8, 8) if i < 6 else (12, 9), (i, 0, 0)).save(folder / f"{i}.png")
    images = open_images(str(folder))
    assert len(extraction(tmp_path / "a").measured(images, means_spec(True))[0]) == 7
    with pytest.raises(ValueError) as error:
        extraction(tmp_path / "b").measured(images, means_spec(False))
    assert str(error.value).startswith(
        f"{folder}: found image 6 of 12 x 9 px after images of 8 x 8 px, expected one size"
    )
    fitted = images.fitted(4)
    known = extraction(tmp_path / "c").measured(fitted, means_spec(False))[1]
    assert known.resolution == "4 x 4 px, centre crop, bicubic to 4 px"


def test_features_that_are_not_finite_name_the_image(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (255 if i == 5 else 0, 0, 0)).save(folder / f"{i}.png")
    with pytest.raises(ValueError, match="5.png: found features that are not finite by means"):
        extraction(tmp_path / "a").measured(open_images(str(folder)), means_spec(True))



# -- drawing as a job ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, write_chain: Callable) -> Any:

    runs = write_chain(tmp_path_factory.mktemp("runs"), load_clip("tiny:random"), 8)
    return sample_job.Model(prior=str(runs["prior"]), decoder=str(runs["decoder"]))


CAPTIONS = [f"a {colour} thing, number {i}" for i in range(60) for colour in ("red", "blue")]
OPTIONS = {"prior_steps": 1, "decoder_steps": 1, "best_of": 1, "seed": 3, "precision": "fp32"}


def pictures(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.glob("0*.png"))]


def drawn(out: Path, chain: Any, number: int = 0) -> list[bytes]:
    sample_job.draw(out, chain, CAPTIONS, OPTIONS, Workers(num_workers=number))
    return pictures(out)


@pytest.fixture(scope="module")
def ours(chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of samples that a job in this process has drawn."""
    out = tmp_path_factory.mktemp("ours") / "samples"
    drawn(out, chain)
    return out


def test_drawing_continues_where_it_was(
    chain: Any, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A damaged block is drawn again and is as it was; the whole ones are left alone."""
    shutil.copytree(ours, tmp_path / "s")
    before = pictures(tmp_path / "s")
    assert len(before) == len(CAPTIONS) and len(committed(tmp_path / "s")) == 3
    (tmp_path / "s" / "000060.png").write_bytes(b"damaged")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("0*.png")}
    assert drawn(tmp_path / "s", chain) == before
    for path in (tmp_path / "s").glob("0*.png"):
        again = path.stat().st_mtime_ns != times[path.name]
        assert again == (50 <= int(path.stem) < 100), path
    assert open_images(str(tmp_path / "s")).captions == CAPTIONS
    monkeypatch.setattr(sample_job.SampleBlocks, "make", lambda self, block, chain: 0)
    with pytest.raises(IncompleteError, match="found 0 samples, expected 120"):
        drawn(tmp_path / "t", chain)


def test_drawing_is_eval_samples(chain: Any, ours: Path, tmp_path: Path):
    """The script, in batches of the same size, draws the same bytes; its folder is taken as is."""
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    config = sample.SampleConfig(
        prior=chain.prior, decoder=chain.decoder, captions=str(tmp_path / "captions.txt"),
        out=str(tmp_path / "theirs"), num_threads=1, **OPTIONS,
    )  # fmt: skip
    assert sample.main(config) == 0
    assert pictures(tmp_path / "theirs") == pictures(ours)


@pytest.mark.slow
def test_workers_draw_the_same_bytes(chain: Any, ours: Path, tmp_path: Path):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        assert drawn(tmp_path / "two", chain, 2) == pictures(ours)
        lines = (tmp_path / "two" / "samples.jsonl").read_text().splitlines()
        assert json.loads(lines[7]) == {"file": "000007.png", "caption": CAPTIONS[7], "seed": 3}
    finally:
        ray.shutdown()
