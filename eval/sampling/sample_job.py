"""Draws images for captions as a job, in committed blocks: a rerun makes only what is missing.

    samples/settings.json            what the images depend on: options, captions, weights
    samples/000000.png ...           an image a caption
    samples/_commits/000000.json     a block of 50 is whole, with the sha256 of each image
    samples/samples.jsonl            written last, a line an image

An image's noise is keyed by (seed, caption, its place in the list); with the blocks fixed, it does
not depend on how many workers there are, to the last bit.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.features.actor_pool import Workers
from eval.sampling.generate import SamplingSettings, render_all, sampling_of
from eval.sampling.image_source import SAMPLES_NAME, SETTINGS_NAME, Incomplete
from ingest.shards import shard_name
from ingest.store.commits import Attempt, committed, recover, withdraw_damaged
from training.engine.precision import settled
from training.tasks.pictures import grid, save_png

BLOCK_SIZE = 50  # captions: eval/sample.py's batch


@dataclass(frozen=True, kw_only=True)
class Model:
    """The finished runs that draw, and how they are guided."""

    prior: str
    decoder: str
    upsampler: tuple[str, ...] = ()
    guide: str = ""
    clip: str = ""

    def absolute(self) -> "Model":
        """Return the same runs by paths that mean the same in any process."""

        from models.clip import absolute_spec as whole

        return Model(
            prior=whole(self.prior),
            decoder=whole(self.decoder),
            upsampler=tuple(map(whole, self.upsampler)),
            guide=whole(self.guide),
            clip=whole(self.clip),
        )


def image_name(number: int) -> str:
    """Return the name of the file of image `number`."""
    return f"{number:06d}.png"


def open_samples(out: Path, settings: dict[str, Any], *, fresh: bool) -> None:
    """Create the folder, or reopen it if it holds samples of these very settings, or none yet.

    fresh: delete it first; only what bears settings of samples, as any tool may write a file of
    that name.
    """
    path, part = out / SETTINGS_NAME, out / "settings.part"
    found = _settings_in(path)
    if fresh and found:
        shutil.rmtree(out)
    others = [each for each in out.iterdir() if each not in (path, part)] if out.is_dir() else []
    if others and not found:
        raise ValueError(
            f"{out}: found a folder without {SETTINGS_NAME}, expected samples or nothing"
        )
    different = [name for name, value in settings.items() if others and found.get(name) != value]
    if different:
        name = different[0]
        told = f" ({found.get(name)!r}, expected {settings[name]!r})" if name != "captions" else ""
        raise ValueError(
            f"{out}: found samples of another {name}{told}; name another folder, or --fresh"
        )
    if not others:
        out.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(settings, indent=1))
        part.replace(path)


def _settings_in(path: Path) -> dict[str, Any]:
    """Return the settings of samples that a file holds; none if it is not there, or another's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    ours = isinstance(found, dict) and {"captions", "decoder_weights"} <= found.keys()
    return found if ours else {}


def list_samples(out: Path, captions: Sequence[str], seed: int) -> None:
    """Write samples.jsonl, by which a folder of samples is finished."""
    lines = [
        {"file": image_name(i), "caption": caption, "seed": seed}
        for i, caption in enumerate(captions)
    ]
    part = out / "samples.part"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(out / SAMPLES_NAME)


def grid_of_samples(out: Path, captions: Sequence[str], most: int = 24, columns: int = 6) -> None:
    """Write grid.png of images spread over the captions, and grid.json with theirs."""
    from PIL import Image

    step = max(1, len(captions) // most)
    chosen = list(range(0, len(captions), step))[:most]
    images = [np.asarray(Image.open(out / image_name(i)).convert("RGB")) for i in chosen]
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    save_png(out / "grid.png", grid(rows, [], []))
    (out / "grid.json").write_text(json.dumps([captions[i] for i in chosen]))


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The work of `draw`: a block is drawn and committed by whoever is given it."""

    out: Path
    model: Model
    captions: list[str]
    settings: dict[str, Any]
    device: str

    def build(self) -> Callable[[int], int]:
        """Load the chain."""
        from eval.sampling.chain import load_chain

        model = self.model
        chain = load_chain(
            model.clip, model.prior, model.decoder, model.upsampler,
            guide=model.guide, device=self.device,
        )  # fmt: skip
        return lambda block: self._draw(chain, block)

    def _draw(self, chain: Any, block: int) -> int:
        from PIL import Image

        from cluster.base.metrics import counter

        start = block * BLOCK_SIZE
        part = self.captions[start : start + BLOCK_SIZE]
        images = render_all(
            chain, part, None, sampling_of(self.settings),
            seed=self.settings["seed"], offset=start,
        )  # fmt: skip
        with Attempt(self.out, shard_name(block)) as attempt:
            for row, image in enumerate(images):
                Image.fromarray(image).save(attempt.path / image_name(start + row))
            attempt.commit(num_samples=len(images), counts={}, config_hash="")
        counter("minidalle2_samples_generated_total").inc(len(images))
        return len(images)


def draw(
    out: Path,
    model: Model,
    captions: list[str],
    options: dict[str, Any],
    workers: Workers,
    *,
    fresh: bool = False,
) -> int:
    """Draw what is missing of `captions` into `out`; returns the number of images drawn.

    options: of eval/sample.py, as in a settings.json; those left out are its defaults. Raises
    ValueError for a folder of other samples, Incomplete if images are missing in the end.
    """
    settings = _settings(model, captions, options, workers.device)
    sampling_of(settings)  # what it refuses leaves the folder as it is
    open_samples(out, settings, fresh=fresh)
    if (out / SAMPLES_NAME).is_file() and not committed(out):  # eval/sample.py finished it
        return 0
    recover(out)
    for name, problem in withdraw_damaged(out).items():
        print(f"samples: block {name} is drawn again: {problem}", flush=True)
    done = committed(out)
    blocks = [b for b in range(-(-len(captions) // BLOCK_SIZE)) if shard_name(b) not in done]
    if blocks:
        (out / SAMPLES_NAME).unlink(missing_ok=True)
    count = sum(len(captions[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE]) for b in blocks)
    work = Drawing(
        out=out.absolute(),
        model=model.absolute(),
        captions=captions,
        settings=settings,
        device=workers.device,
    )
    made = workers.run("sample", work, blocks, count)
    found = sum(commit.num_samples for commit in committed(out).values())
    if found != len(captions):
        raise Incomplete(f"{out}: found {found} samples, expected {len(captions)}")
    if not (out / SAMPLES_NAME).is_file():
        grid_of_samples(out, captions)
        list_samples(out, captions, settings["seed"])
    return made


def _settings(
    model: Model, captions: list[str], options: dict[str, Any], device: str
) -> dict[str, Any]:
    """Return what the images depend on: options, captions, and the weights that draw them."""
    from eval.features.devices import device_named
    from eval.sampling.chain import chain_weights
    from models.clip import load_clip
    from models.weights import exported, load_config

    defaults = {**asdict(SamplingSettings()), "seed": 0}
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"--sampling: found {unknown[0]!r}, expected some of {', '.join(defaults)}"
        )
    settings = {**defaults, **options}
    settings["precision"] = settled(settings["precision"], device_named(device).type)
    clip = model.clip or load_config(exported(Path(model.prior)))["clip"]
    weights = chain_weights(model.prior, model.decoder, model.upsampler, model.guide)
    settings |= {"encoder_id": load_clip(clip).encoder_id, **asdict(model), **weights}
    return json.loads(json.dumps({**settings, "captions": captions}))


def model_in(folder: Path) -> Model:
    """Return the model of a folder with the finished runs prior, base and up, up256, ...

    Raises ValueError if there is no prior or no base.
    """
    from models.weights import FINAL_NAME

    for name in ("prior", "base"):
        if not (folder / name / FINAL_NAME).is_file():
            raise ValueError(
                f"--model: found no finished run {folder / name}, expected prior and base; name "
                "the runs by --prior, --decoder and --upsampler"
            )
    runs = [path.parent for path in folder.glob(f"up*/{FINAL_NAME}")]
    order = sorted(runs, key=lambda run: (len(run.name), run.name))  # up256 before up1024
    return Model(
        prior=str(folder / "prior"),
        decoder=str(folder / "base"),
        upsampler=tuple(map(str, order)),
    )


def read_options(source: str) -> tuple[dict[str, Any], str]:
    """Return sampling options, and the run that guides, of a JSON file or a settings.json.

    Raises ValueError for another file, or an option that there is not.
    """
    known = {*asdict(SamplingSettings()), "seed"}
    told = {*asdict(Model(prior="", decoder="")), "encoder_id", "captions"}
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--sampling: {source}: found {error}, expected JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"--sampling: {source}: found a {type(found).__name__}, expected options")
    rest = [n for n in found if n not in known | told and not n.endswith("_weights")]
    if rest:
        raise ValueError(
            f"--sampling: {source}: found {rest[0]!r}, expected some of {', '.join(sorted(known))}"
        )
    options = {name: found[name] for name in found if name in known}
    for name, value in options.items():
        _require_type(source, name, value, {**asdict(SamplingSettings()), "seed": 0}[name])
    return options, str(found.get("guide", ""))


def _require_type(source: str, name: str, value: Any, default: Any) -> None:
    """Raise ValueError for an option whose value is not of the type of its default."""
    wanted = "a number" if isinstance(default, int | float) else f"a {type(default).__name__}"
    if isinstance(default, tuple):
        numbers = isinstance(value, list) and all(map(_is_number, value))
        right = numbers and len(value) == len(default)
        wanted = f"{len(default)} numbers"
    elif isinstance(default, float):
        right = _is_number(value)
    else:
        right = type(value) is type(default)
        wanted = "a whole number" if isinstance(default, int) else wanted
    if not right:
        raise ValueError(f"--sampling: {source}: {name}: found {value!r}, expected {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
