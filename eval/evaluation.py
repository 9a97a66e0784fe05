"""An evaluation from its request to its scores: draw, extract features, compare."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from cluster.base.files import digest_of
from cluster.base.machine import threads_for
from eval.distances.measure import QUOTABLE, ImageSource, memorisation, open_source, space_scores
from eval.features.devices import device_named
from eval.features.extractors import (
    ExtractorSpec,
    clip_spec,
    dinov2_spec,
    efficientnet_spec,
    inception_spec,
)
from eval.features.store import FeatureExtraction
from eval.features.weights import DINOV2, INCEPTION, find_weights
from eval.features.workers import Workers
from eval.html_report.formats import CAPTIONS_KEY, Scores
from eval.protocol import Prepared, prepare
from eval.request import EvalRequest
from eval.sampling.captions import read_captions
from eval.sampling.chain import Model
from eval.sampling.image_source import ImageSet, IncompleteError, open_images
from eval.sampling.sample_job import draw, read_options
from ingest.store.snapshots import remove_data_folder
from models.clip import RAW, FrozenClip
from models.convert import efficientnet
from models.convert.runs import absolute_spec, load_clip
from models.weights import exported, load_config

DEFAULT_CLIP = "runs/clip"
SCORER_RELATIONS = {  # by whether the CLIP that scores is the model's own
    True: "the CLIP that the model was trained on",
    False: "another CLIP than the model was trained on",
    None: "unknown: the images name no model",
}
NETWORK_RELATIONS = {  # likewise of a published network
    True: "the image tower that the model was trained on",
    False: "a network that the model was not trained on",
}


class Evaluation:
    """Generated and real images, the spaces in which they are compared, and the CLIP that scores.

    real: by the protocol's reference, the headline's first; specs: of `spaces`, and of "clip" where
    there is an encoder; facts: what eval.json states of the protocol and of the sampling.
    """

    def __init__(self, request: EvalRequest, model: Model) -> None:
        """Find everything before anything is computed, then draw what is to be drawn.

        Raises ValueError for what is absent or does not fit, IncompleteError for too few images.
        """
        self.request, self.model = request, model
        out = Path(request.out)
        folder = Path(request.features_dir or out.with_name(f"{out.stem}_features")).absolute()
        threads = threads_for(request.num_threads, request.num_workers)
        self.workers = Workers(
            num_workers=request.num_workers, num_threads=threads, device=request.device
        )
        self.extraction = FeatureExtraction(folder=folder, workers=self.workers)
        if request.fresh:
            for manifest in folder.glob("*/_manifest.json"):  # only folders with our manifest
                remove_data_folder(manifest.parent, "features")
                manifest.parent.rmdir()
        protocol = None
        if request.protocol:
            protocol = prepare(request.protocol, request.protocol_data, folder)

        # Spaces, and the CLIP that scores
        spaces = request.features or (protocol and protocol.features) or ("clip",)
        self.spaces = tuple(dict.fromkeys(spaces))
        self.specs: dict[str, ExtractorSpec] = {
            space: network_spec(request, space) for space in self.spaces if space != "clip"
        }
        clip = request.scorer or request.clip or (DEFAULT_CLIP if "clip" in spaces else "")
        self.encoder: FrozenClip | None = None
        if clip:
            clip = absolute_spec(clip.removesuffix(RAW))  # scores compare directions alone
            self.encoder = load_clip(clip).to(device_named(request.device))
            self.specs["clip"] = clip_spec(self.encoder, clip)

        # Images
        size = protocol.image_size if protocol else request.image_size
        if protocol is None:
            self.real = {"": open_source(request.real, size)}
        elif request.image_size in (0, size):
            self.real = {
                name: ImageSource(source=images.source, images=images)
                for name, images in protocol.references.items()
            }
        else:
            raise ValueError(
                f"image_size: found {request.image_size} with the protocol {request.protocol}, "
                f"expected none: its pictures are of {size} px"
            )
        self.train = open_images(request.train).fitted(size) if request.train else None
        self.facts = self._draw_samples(protocol) if model.decoder else {}
        self.fake = open_source(request.fake, size)
        if protocol is not None:
            self.facts["protocol"] = protocol.about
            _require_captions(self.fake, protocol.captions)

    def _draw_samples(self, protocol: Prepared | None) -> Scores:
        """Draw the captions of the request or of the protocol, if any; return how."""
        request = self.request
        if not request.captions and protocol is None:
            return {}
        captions = protocol.captions if protocol else read_captions(request.captions, request.limit)
        options, guide = read_options(request.sampling) if request.sampling else ({}, "")
        seed = protocol.seed if protocol and request.seed is None else request.seed
        options = options if seed is None else {**options, "seed": seed}
        captions = captions[: request.limit or None]
        out, guided = Path(request.fake), replace(self.model, guide=guide)
        made = draw(out, guided, captions, options, self.workers, fresh=request.fresh)
        print(f"sample: {made} images drawn, {len(captions) - made} were there -> {out}")
        return {"sampling": {
            "n": len(captions), "seed": options.get("seed", 0),
            "captions": request.captions or request.protocol,
            "captions_sha256": digest_of(captions), "options": options,
        }}  # fmt: skip

    def scores(self) -> Scores:
        """Return all scores by their paths in eval.json."""
        from eval.scores.scorecard import chain_scores, is_drawn, shapes_with_real

        (headline, *references), spaces = self.real, self.spaces
        fake, real = self.fake.images, self.real[headline].images

        # Distances in each space, and what they and a CLIP say of the images
        features = {space: self._compared(space, headline) for space in spaces}
        scores: Scores = {"images": self._image_scores(features), "features": features}
        if fake and real and is_drawn(fake.captions) and is_drawn(real.captions):
            scores["shapes"] = shapes_with_real(fake, real)
        if fake and self.train:
            spec = self.specs[spaces[0]]
            scores["memorisation"] = memorisation(fake, real, self.train, spec, self.extraction)
            _draw_neighbours(scores["memorisation"], fake, self.train, self.extraction.folder)

        # The chain's parts, on embeddings of the real images
        if self.request.embeds and fake:
            device, embeds = self.request.device, self.request.embeds
            scores |= chain_scores(embeds, self.model, fake, self.encoder, device)

        # The method
        scores |= {key: self.facts[key] for key in ("protocol", "sampling") if key in self.facts}
        if references:
            others = {
                name: {space: self._compared(space, name) for space in spaces}
                for name in references
            }
            scores["protocol"] = {**scores["protocol"], "references": others}
        names = ("torch", "numpy", "torch-fidelity", "open-clip-torch", "timm", "pillow")
        scores["provenance"] = {
            "device": device_named(self.request.device).type,
            "num_threads": self.workers.num_threads,
            "versions": {name: version(name) for name in names},
        }
        return scores

    def _compared(self, space: str, reference: str) -> Scores:
        """Return the distances of the generated images to a reference in one space."""
        spec, real = self.specs[space], self.real[reference]
        both = [source.measured(spec, self.extraction) for source in (self.fake, real)]
        scores = space_scores(both[0], both[1], spec, self.request.num_resamples)
        least = min(scores["n"], scores["n_real"])
        if least < QUOTABLE and space not in ("clip", "efficientnet_lite0"):
            print(f"warning: {least} images are too few to quote an FID; it takes {QUOTABLE}")
        return scores | {"judge_relation": self._relation(space)} | self._captions_digest()

    def _captions_digest(self) -> dict[str, str]:
        fake = self.fake.images
        return {CAPTIONS_KEY: digest_of(fake.captions)} if fake and fake.captions else {}

    def _image_scores(self, features: dict[str, Scores]) -> Scores:
        """Return the headline distances, the CLIP score, and which CLIP gave it."""
        from eval.scores.scorecard import embed_scores

        first = features[min(features, key=lambda space: space == "clip")]  # whose distance is fd
        scores = {"n": first["n"], "n_real": first["n_real"], "features": first["extractor"]}
        scores |= self._captions_digest()
        for space, distances in reversed(features.items()):
            name = "fd_clip" if space == "clip" else "fd"
            scores[name] = distances["fd"]
            if "fd_real_halves" in distances:
                scores[f"{name}_real_halves"] = distances["fd_real_halves"]
                scores["n_real_halves"] = distances["n_real_halves"]
        if self.encoder is not None:
            scores["judge"] = self.specs["clip"].name
            scores["judge_relation"] = self._relation("clip")
        fake = self.fake.images
        if fake is None or not fake.captions:
            return scores
        if self.encoder is None:
            print("clip_score: left out: no --clip")
            return scores
        _, embeds = self.extraction.extracted(fake, self.specs["clip"])
        return scores | embed_scores(embeds.all(), fake.captions, self.encoder)

    def _relation(self, space: str) -> str:
        """State whether the model was trained on what a space is of."""
        settings = self.fake.images.settings if self.fake.images is not None else {}
        own = settings.get("encoder_id")
        if own is None and self.model.prior:
            own = load_config(exported(self.model.prior)).get("encoder_id")
        if space != "clip":
            part_of_it = space == "efficientnet_lite0" and efficientnet.IDENTITY in (own or "")
            return NETWORK_RELATIONS[part_of_it]
        if own is None or self.encoder is None:
            return SCORER_RELATIONS[None]
        return SCORER_RELATIONS[own == self.encoder.encoder_id]

    def save_statistics(self, folder: Path) -> None:
        """Write the statistics of the real images, an npz a space."""
        real = next(iter(self.real.values()))
        for space in self.spaces:
            path = real.measured(self.specs[space], self.extraction)[1].save(folder)
            print(f"{path}: statistics of {real.source} for {space}")


def network_spec(request: EvalRequest, space: str) -> ExtractorSpec:
    """Describe the extractor of a space that takes weights; ValueError if they are absent."""
    if space == "efficientnet_lite0":
        return efficientnet_spec()
    if space == "dinov2":
        other = (request.dinov2_weights, request.dinov2_sha256)
        return dinov2_spec(
            find_weights(DINOV2, request.weights_dir, "dinov2", *other), request.dinov2_model
        )
    other = (request.inception_weights, request.inception_sha256)
    weights = find_weights(INCEPTION, request.weights_dir, "inception", *other)
    return inception_spec(weights, clean=space == "inception_clean")


def _require_captions(fake: ImageSource, captions: list[str]) -> None:
    """Refuse images that are not one for each of the protocol's captions."""
    if fake.images is None:
        count = next(iter(fake.statistics.values())).moments.count
    else:
        count, own = len(fake.images), fake.images.captions
        if own and own != captions[: len(own)]:
            raise ValueError(f"{fake.source}: found images of other captions than the protocol's")
    if count != len(captions):
        raise IncompleteError(
            f"{fake.source}: found {count} images, expected {len(captions)}, one for each caption "
            "of the protocol"
        )


def _draw_neighbours(scores: Scores, fake: ImageSet, train: ImageSet, folder: Path) -> None:
    """Write neighbours.png: generated images above their nearest training images."""
    import numpy as np

    from training.tasks.pictures import grid, save_png

    pairs = scores["nearest"]
    if not pairs:
        return
    rows = [
        [np.asarray(images.fitted(images.side or 64)[pair[f"{kind}_number"]]) for pair in pairs]
        for kind, images in (("fake", fake), ("train", train))
    ]
    beside = fake.paths[0].parent if fake.settings else folder
    save_png(beside / "neighbours.png", grid(rows, ["generated", "nearest in training"], []))
    captions = [fake.captions[pair["fake_number"]] if fake.captions else "" for pair in pairs]
    labels = [
        f"{caption} {pair['distance']:.3f}".strip()
        for caption, pair in zip(captions, pairs, strict=True)
    ]
    (beside / "neighbours.json").write_text(json.dumps(labels))
