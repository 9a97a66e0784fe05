"""Generate images for captions as a job, in committed blocks: a rerun makes what is missing.

    samples/settings.json            what the images depend on: options, captions, weights
    samples/000000.png ...           an image a caption
    samples/_commits/000000.json     commits a block of 50, with the sha256 of each image
    samples/samples.jsonl            written last, a line an image

An image's noise is keyed by (seed, caption, its place in the list), and the blocks are fixed, so
images do not depend on the number of workers, to the last bit.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cluster.base.files import Json, atomic_write, write_json, write_text
from cluster.base.options import merged
from eval.features.devices import device_named
from eval.features.workers import ImageBlocks, MakeBlock, Workers
from eval.sampling.chain import Model, chain_weights
from eval.sampling.generate import render_all, sampling_of
from eval.sampling.image_source import GRID_NAME, SAMPLES_NAME, SETTINGS_NAME, IncompleteError
from eval.sampling.options import SeededSampling
from ingest.shards import shard_name
from ingest.store.commits import Attempt, committed
from models.convert.runs import load_clip
from models.unclip import UnClip
from models.weights import exported, load_config
from training.engine.precision import settled
from training.tasks.pictures import grid, save_png

BLOCK_SIZE = 50  # captions: eval/sample.py's batch
GRID_IMAGES, GRID_COLUMNS = 24, 6  # of grid.png


def image_name(number: int) -> str:
    """Return the name of the file of image `number`."""
    return f"{number:06d}.png"


def open_samples(out: Path, settings: Json, *, fresh: bool) -> None:
    """Create the folder, or reopen it if it is empty or holds samples of these settings.

    fresh: delete it first; only a folder with settings of samples, as any tool may write a file of
    that name.
    """
    path = out / SETTINGS_NAME
    known = _settings_in(path)
    if fresh and known:
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    leftovers = {out / "settings.part", *out.glob(f".{SETTINGS_NAME}.*.part")}  # of killed runs
    if set(out.iterdir()) <= {path, *leftovers}:
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        write_json(path, settings, indent=1)
        return
    if not known:
        raise ValueError(
            f"{out}: found a folder without {SETTINGS_NAME}, expected samples or nothing"
        )
    for name, value in settings.items():
        if known.get(name) != value:
            values = f" ({known.get(name)!r}, expected {value!r})" if name != "captions" else ""
            raise ValueError(
                f"{out}: found samples of another {name}{values}; name another folder, or --fresh"
            )


def _settings_in(path: Path) -> Json:
    """Return the settings of samples in a file; empty if it is absent, or holds other things."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    ours = isinstance(settings, dict) and {"captions", "decoder_weights"} <= settings.keys()
    return settings if ours else {}


def draw_batch(
    folder: Path, chain: UnClip, captions: list[str], start: int, settings: Json
) -> int:
    """Draw captions at once, as files in a folder; return their number.

    start: place of the first caption in its list. A file that exists is complete.
    """
    from PIL import Image

    from cluster.base.metrics import counter

    images = render_all(
        chain, captions, None, sampling_of(settings),
        seed=settings["seed"], batch_size=len(captions), offset=start,
    )  # fmt: skip
    for number, image in enumerate(images, start):
        with atomic_write(folder / image_name(number)) as temporary:
            Image.fromarray(image).save(temporary, format="png")
    counter("minidalle2_samples_generated_total").inc(len(images))
    return len(images)


def finish_samples(out: Path, captions: Sequence[str], seed: int) -> None:
    """Write grid.png of images spread over the captions, grid.json with their captions, and then
    samples.jsonl, which marks a folder of samples as finished."""
    from PIL import Image

    step = max(1, len(captions) // GRID_IMAGES)
    chosen = list(range(0, len(captions), step))[:GRID_IMAGES]
    images = [np.asarray(Image.open(out / image_name(i)).convert("RGB")) for i in chosen]
    rows = [images[i : i + GRID_COLUMNS] for i in range(0, len(images), GRID_COLUMNS)]
    save_png(out / GRID_NAME, grid(rows, [], []))
    write_json(out / "grid.json", [captions[i] for i in chosen])
    lines = (
        json.dumps({"file": image_name(i), "caption": caption, "seed": seed})
        for i, caption in enumerate(captions)
    )
    write_text(out / SAMPLES_NAME, "".join(f"{line}\n" for line in lines))


@dataclass(frozen=True, kw_only=True)
class SampleBlocks(ImageBlocks):
    """The blocks of `draw`: an image a caption, as `settings` state them."""

    captions: list[str]
    settings: Json

    def make(self, block: int, chain: UnClip) -> int:
        """Draw and commit a block; return its number of images."""
        numbers = self.numbers(block)
        captions = self.captions[numbers.start : numbers.stop]
        with Attempt(self.root, shard_name(block)) as attempt:
            draw_batch(attempt.path, chain, captions, numbers.start, self.settings)
            attempt.commit(num_samples=len(captions), counts={}, config_hash="")
        return len(captions)


def load_model(blocks: SampleBlocks, model: Model, device: str) -> MakeBlock:
    """Return what draws and commits a block, with the chain on `device`."""
    return partial(blocks.make, chain=model.load(device))


def draw(
    out: Path, model: Model, captions: list[str], options: Json, workers: Workers, *,
    fresh: bool = False,
) -> int:  # fmt: skip
    """Generate what is missing of `captions` into `out`; return the number of new images.

    options: of eval/sample.py, as in a settings.json; others have its defaults. Raises ValueError
    for a folder of other samples, IncompleteError if images are missing in the end.
    """
    settings = settings_of(model, captions, options, workers.device)
    open_samples(out, settings, fresh=fresh)
    if (out / SAMPLES_NAME).is_file() and not committed(out):  # eval/sample.py finished it
        return 0

    # Make what is missing
    blocks = SampleBlocks(
        root=out.absolute(), count=len(captions), size=BLOCK_SIZE, captions=captions,
        settings=settings,
    )  # fmt: skip
    blocks.repair("samples")
    if blocks.pending():
        (out / SAMPLES_NAME).unlink(missing_ok=True)
    load = partial(load_model, blocks, model.absolute(), workers.device)
    made = workers.run("sample", load, blocks)

    # Finish the folder
    total = blocks.num_committed()
    if total != len(captions):
        raise IncompleteError(f"{out}: found {total} samples, expected {len(captions)}")
    if not (out / SAMPLES_NAME).is_file():
        finish_samples(out, captions, settings["seed"])
    return made


def settings_of(model: Model, captions: list[str], options: Json, device: str) -> Json:
    """Return what the images depend on: options, captions, and the weights of the model.

    Warns of captions that are longer than the encoder's context. Raises ValueError for an unknown
    option.
    """
    settings = asdict(merged(SeededSampling(), options, "--sampling"))
    sampling_of(settings)  # refuses bad options before a folder changes
    settings["precision"] = settled(settings["precision"], device_named(device).type)
    clip = model.clip or load_config(exported(model.prior))["clip"]
    weights = chain_weights(*model.runs)
    encoder = load_clip(clip)
    if cut := encoder.tokenize.num_cut(captions):
        print(
            f"warning: {cut} of {len(captions)} captions have more than the "
            f"{encoder.context_length} tokens that the encoder reads; their ends are ignored",
            flush=True,
        )
    settings |= {"encoder_id": encoder.encoder_id, **asdict(model), **weights}
    return json.loads(json.dumps({**settings, "captions": captions}))


def read_options(source: str) -> tuple[Json, str]:
    """Return the sampling options, and the guiding run, of a JSON file or a settings.json.

    Raises ValueError for another file, an unknown option, or a value of another type.
    """
    try:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--sampling: {source}: found {error}, expected JSON") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"--sampling: {source}: found a {type(content).__name__}, expected options"
        )
    others = {*asdict(Model()), "encoder_id", "captions"}
    options = {
        name: value for name, value in content.items()
        if name not in others and not name.endswith("_weights")
    }  # fmt: skip
    checked = merged(SeededSampling(), options, f"--sampling: {source}")
    return {name: getattr(checked, name) for name in options}, str(content.get("guide", ""))
