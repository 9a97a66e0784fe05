"""An evaluation from its request to its scores: what is drawn, what is compared, and by whom."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.base.files import digest_of
from eval.distances.measure import QUOTABLE, ImageSource, memorisation, space_scores
from eval.distances.reference import load_statistics
from eval.features.actor_pool import Place
from eval.features.extractors import ExtractorSpec, clip_spec, dinov2_spec, inception_spec
from eval.features.weights import DINOV2, INCEPTION, find_weights, require_local_clip
from eval.html_report.formats import CAPTIONS_KEY
from eval.protocol import Prepared, prepare
from eval.sampling.captions import read_captions
from eval.sampling.image_source import ImageSet, Incomplete, open_images
from eval.sampling.sample_job import Model, draw, read_options
from models.clip import RAW, FrozenClip, absolute_spec, load_clip

DEFAULT_CLIP = "runs/clip"
JUDGES = {  # whether the judge is the model's own CLIP
    True: "the CLIP that the model was trained on",
    False: "another CLIP than the model was trained on",
    None: "unknown: the images name no model",
}


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What is to be compared, as on the command line."""

    real: str
    fake: str
    captions: str = ""
    limit: int = 0
    protocol: str = ""
    protocol_data: str = ""
    sampling: str = ""
    seed: int | None = None
    image_size: int = 0
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where weights are: a folder of published ones, or (file, sha256) of others."""

    folder: str = ""
    inception: tuple[str, str] = ("", "")
    dinov2: tuple[str, str] = ("", "")
    dinov2_model: str = ""

    def spec(self, space: str) -> ExtractorSpec:
        """Describe the extractor of a space that takes weights; ValueError if they are not here."""
        if space == "dinov2":
            found = find_weights(DINOV2, self.folder, "dinov2", *self.dinov2)
            return dinov2_spec(found, self.dinov2_model)
        found = find_weights(INCEPTION, self.folder, "inception", *self.inception)
        return inception_spec(found, clean=space == "inception_clean")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Two sides, the spaces in which they are compared, and who judges.

    real: by reference, the first one being the headline's; specs: of the spaces, and of the judge.
    """

    fake: ImageSource
    real: dict[str, ImageSource]
    spaces: tuple[str, ...]
    specs: dict[str, ExtractorSpec]
    place: Place
    model: Model
    encoder: FrozenClip | None = None
    train: ImageSet | None = None
    num_resamples: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def opened(
        cls,
        request: EvalRequest,
        model: Model,
        place: Place,
        *,
        weights: Weights,
        spaces: Sequence[str],
        clip: str,
        train: str,
        num_resamples: int,
    ) -> "Evaluation":
        """Find everything before anything is computed, then draw what is to be drawn.

        Raises ValueError for what is not here or does not fit, Incomplete for too few images.
        """
        if request.fresh:
            _forget(place.folder)
        prepared = None
        if request.protocol:
            prepared = prepare(request.protocol, request.protocol_data, place.folder)
        spaces = tuple(dict.fromkeys(spaces or (prepared and prepared.features) or ("clip",)))
        specs = {space: weights.spec(space) for space in spaces if space != "clip"}
        encoder = _encoder(clip or (DEFAULT_CLIP if "clip" in spaces else ""), specs, place)
        if prepared and request.image_size not in (0, prepared.image_size):
            raise ValueError(
                f"image_size: found {request.image_size} with the protocol {request.protocol}, "
                f"expected none: its pictures are of {prepared.image_size} px"
            )
        size = prepared.image_size if prepared else request.image_size
        if prepared is None:
            real = {"": _side(request.real, size)}
        else:
            real = {
                name: ImageSource(source=images.source, images=images, statistics={})
                for name, images in prepared.references.items()
            }
        training = open_images(train).fitted(size) if train else None
        about = _drawn(request, model, place, prepared) if model.decoder else {}
        if prepared is not None:
            about["protocol"] = prepared.about
        fake = _side(request.fake, size)
        _require_count(fake, prepared)
        return cls(
            fake=fake,
            real=real,
            spaces=spaces,
            specs=specs,
            place=place,
            model=model,
            encoder=encoder,
            train=training,
            num_resamples=num_resamples,
            about=about,
        )

    def scores(self, embeds: str) -> dict[str, Any]:
        """Return all scores by their paths in eval.json."""
        from eval.scores.chain_scores import chain_scores

        (first, *others), spaces = self.real, self.spaces
        features = {space: self._compared(space, first) for space in spaces}
        found: dict[str, Any] = {"images": self._images(features), "features": features}
        fake, real = self.fake.images, self.real[first].images
        if fake is not None and real is not None:
            found |= _shapes(fake, real)
        if fake is not None and self.train is not None:
            spec = self.specs[spaces[0]]
            found["memorisation"] = memorisation(fake, real, self.train, spec, self.place)
            _picture(found["memorisation"], fake, self.train, self.place.folder)
        if embeds and fake is not None:
            device = self.place.workers.device
            found |= chain_scores(embeds, self.model, fake, self.encoder, device)
        found |= {name: self.about[name] for name in ("protocol", "sampling") if name in self.about}
        if others:
            found["protocol"] = {
                **found["protocol"],
                "references": {
                    name: {space: self._compared(space, name) for space in spaces}
                    for name in others
                },
            }
        return found | {"provenance": _provenance(self.place)}

    def _compared(self, space: str, reference: str) -> dict[str, Any]:
        spec, real = self.specs[space], self.real[reference]
        sides = [side.measured(spec, self.place) for side in (self.fake, real)]
        scores = space_scores(sides[0], sides[1], spec, self.num_resamples)
        least = min(scores["n"], scores["n_real"])
        if least < QUOTABLE and space != "clip":
            print(f"warning: {least} images are too few to quote an FID; it takes {QUOTABLE}")
        return scores | self._words()

    def _words(self) -> dict[str, str]:
        """Name the captions of the generated images, where they have any."""
        fake = self.fake.images
        return {CAPTIONS_KEY: digest_of(fake.captions)} if fake and fake.captions else {}

    def _images(self, features: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return what is said of the images as such, and of the judge."""
        from eval.scores.scorecard import embed_scores

        main = next(iter(features.values()))
        found = {"n": main["n"], "n_real": main["n_real"], "features": main["extractor"]}
        found |= self._words()
        for space, scores in reversed(features.items()):
            name = "fd_clip" if space == "clip" else "fd"
            found[name] = scores["fd"]
            if "fd_real_halves" in scores:
                found[f"{name}_real_halves"] = scores["fd_real_halves"]
                found["n_real_halves"] = scores["n_real_halves"]
        fake = self.fake.images
        if self.encoder is not None:
            found["judge"] = self.specs["clip"].name
            found["judge_relation"] = JUDGES[self._own_judge()]
        if fake is None or not fake.captions:
            return found
        if self.encoder is None:
            print("clip_score: left out: no --clip")
            return found
        _, embeds = self.place.extracted(fake, self.specs["clip"])
        return found | embed_scores(embeds.all(), fake.captions, self.encoder)

    def _own_judge(self) -> bool | None:
        """Say whether the judge is what the model was trained on; None if nobody knows."""
        from models.weights import exported, load_config

        settings = self.fake.images.settings if self.fake.images is not None else {}
        own = settings.get("encoder_id")
        if own is None and self.model.prior:
            own = load_config(exported(Path(self.model.prior))).get("encoder_id")
        if own is None or self.encoder is None:
            return None
        return own == self.encoder.encoder_id

    def save_statistics(self, folder: Path) -> None:
        """Write what was measured of the real images, an npz a space."""
        side = next(iter(self.real.values()))
        for space in self.spaces:
            path = side.measured(self.specs[space], self.place)[1].save(folder)
            print(f"{path}: statistics of {side.source} for {space}")


def _encoder(clip: str, specs: dict[str, ExtractorSpec], place: Place) -> FrozenClip | None:
    """Load the judge, where there is one, and add its image tower to `specs`."""
    from eval.features.devices import device_named

    if not clip:
        return None
    chosen = absolute_spec(clip.removesuffix(RAW))  # judges compare directions alone
    require_local_clip(chosen)
    encoder = load_clip(chosen).to(device_named(place.workers.device))
    specs["clip"] = clip_spec(encoder, chosen)
    return encoder


def _side(source: str, size: int) -> ImageSource:
    """Open images, or statistics: a file of them, or a folder of such files and nothing else."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else []
    if path.suffix == ".npz" or files and all(file.suffix == ".npz" for file in files):
        found = [load_statistics(file) for file in files or [path]]
        statistics = {known.space: known for known in found}
        if len(statistics) < len(found):
            spaces = ", ".join(known.space for known in found)
            raise ValueError(f"{source}: space: found {spaces}, expected each once")
        return ImageSource(source=source, images=None, statistics=statistics)
    images = open_images(source).fitted(size)
    return ImageSource(source=source, images=images, statistics={})


def _drawn(
    request: EvalRequest, model: Model, place: Place, prepared: Prepared | None
) -> dict[str, Any]:
    """Draw the captions of the request or of the protocol, if it has any; say how."""
    if not request.captions and prepared is None:
        return {}
    captions = prepared.captions if prepared else read_captions(request.captions, request.limit)
    options, guide = read_options(request.sampling) if request.sampling else ({}, "")
    seed = prepared.seed if prepared and request.seed is None else request.seed
    options = options if seed is None else {**options, "seed": seed}
    guided = replace(model, guide=guide)
    drawing = captions[: request.limit or None]
    made = draw(Path(request.fake), guided, drawing, options, place.workers, fresh=request.fresh)
    print(f"sample: {made} images drawn, {len(drawing) - made} were there -> {request.fake}")
    return {
        "sampling": {
            "n": len(drawing),
            "seed": options.get("seed", 0),
            "captions": request.captions or request.protocol,
            "captions_sha256": digest_of(drawing),
            "options": options,
        }
    }


def _require_count(fake: ImageSource, prepared: Prepared | None) -> None:
    """Raise Incomplete for a protocol's images that are fewer, ValueError for those of others."""
    if prepared is None:
        return
    if fake.images is None:
        found = next(iter(fake.statistics.values())).moments.count
    else:
        found = len(fake.images)
        captions = fake.images.captions
        if captions and captions != prepared.captions[: len(captions)]:
            raise ValueError(f"{fake.source}: found images of other captions than the protocol's")
    if found != len(prepared.captions):
        raise Incomplete(
            f"{fake.source}: found {found} images, expected {len(prepared.captions)}, one for each "
            "caption of the protocol"
        )


def _shapes(fake: ImageSet, real: ImageSet) -> dict[str, Any]:
    from eval.scores.scorecard import is_drawn, shapes_with_real

    if is_drawn(fake.captions) and is_drawn(real.captions):
        return {"shapes": shapes_with_real(fake, real)}
    return {}


def _picture(found: dict[str, Any], fake: ImageSet, train: ImageSet, folder: Path) -> None:
    """Write neighbours.png: generated images above their nearest training images."""
    import numpy as np

    from training.tasks.pictures import grid, save_png

    pairs = found["nearest"]
    if not pairs:
        return
    rows = [
        [np.asarray(images.fitted(images.side or 64)[pair[f"{kind}_number"]]) for pair in pairs]
        for kind, images in (("fake", fake), ("train", train))
    ]
    beside = fake.paths[0].parent if fake.settings else folder
    save_png(beside / "neighbours.png", grid(rows, ["generated", "nearest in training"], []))
    words = [f"{p['distance']:.3f}" for p in pairs]
    captions = [fake.captions[p["fake_number"]] if fake.captions else "" for p in pairs]
    told = [" ".join(both).strip() for both in zip(captions, words, strict=True)]
    (beside / "neighbours.json").write_text(json.dumps(told))


def _forget(folder: Path) -> None:
    """Delete the features of earlier runs: only what bears our manifest."""
    from ingest.store.snapshots import remove_data_folder

    for manifest in folder.glob("*/_manifest.json"):
        remove_data_folder(manifest.parent, "features")
        manifest.parent.rmdir()


def _provenance(place: Place) -> dict[str, Any]:
    from importlib.metadata import version

    from eval.features.devices import device_named

    workers = place.workers
    names = ("torch", "numpy", "torch-fidelity", "open-clip-torch", "timm", "pillow")
    return {
        "device": device_named(workers.device).type,
        "num_threads": workers.num_threads,
        "versions": {name: version(name) for name in names},
    }
