"""Score a CLIP by its embeddings: retrieval both ways, zero-shot classes, a linear probe.

    python eval/clip.py --embeds data/test/embeds
    python eval/clip.py --embeds data/test/embeds --images data/test/images --label-column class \\
        --train-embeds data/embeds --train-images data/images --out scores.json
    python eval/clip.py --export clip.safetensors --clip runs/clip          # weights for open_clip
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.base.cli import DONE, parse, require_local, run_script
from cluster.base.files import Json, write_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClipScoreConfig:
    """Score the encoder that made a folder of embeddings."""

    embeds: str = ""
    """folder of committed embeddings to score on"""
    images: str = ""
    """folder of the images they are of; for classes only"""
    label_column: str = ""
    """column of the images' tables that names each one's class; empty = no classes"""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """sentences for a class's name, whose embeddings are averaged"""
    train_embeds: str = ""
    """folder of embeddings to train a linear probe on; empty = no probe"""
    train_images: str = ""
    """folder of the images those are of"""
    probe_weight_decay: float = 1e-3
    """of the linear probe, in units of its mean loss"""
    clip: str = ""
    """encoder; empty = the one that the embeddings name"""
    out: str = ""
    """file to write the scores to as JSON; empty = none"""
    export: str = ""
    """write the encoder's weights as open_clip's safetensors to this file, and stop"""


def main(config: ClipScoreConfig) -> int:
    """Print the scores, one a line, and write them; or export the encoder's weights."""
    require_local("--out", config.out)
    require_local("--export", config.export)
    if config.export:
        from models.convert.runs import load_clip
        from models.weights import save_weights

        encoder = load_clip(config.clip)
        state = dict(encoder.clip.state_dict())
        state["logit_scale"] = state["logit_scale"].reshape(())  # as open_clip saves it
        save_weights(Path(config.export), state)
        print(f"{config.export}: weights of {encoder.encoder_id}")
        return DONE
    if not config.embeds:
        raise ValueError("embeds: found nothing, expected a folder of embeddings to score")
    from eval.scores.scorecard import read_embeds
    from models.scores import retrieval_both_ways

    captions, image, text = read_embeds(config.embeds)
    scores: Json = {"n": len(captions), **retrieval_both_ways(image, text, captions)}
    if config.label_column:
        scores |= _class_scores(config, image)
    for name, value in scores.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    if config.out:
        write_text(config.out, json.dumps(scores, indent=1) + "\n")
    return DONE


def _class_scores(config: ClipScoreConfig, image: "Tensor") -> Json:
    """Return the accuracy of zero-shot classification, and of a probe where it can be trained.

    image: embeddings [N, E]. A class's embedding is the mean over its sentences (Radford et al.
    2021, section 3.1.4).
    """
    import torch

    from eval.scores.scorecard import read_embeds
    from ingest.shards import read_manifest
    from models.convert.runs import load_clip
    from models.scores import linear_probe, zero_shot

    # Classes, by number
    labels = _labels(config.embeds, config.images, config.label_column)
    train_labels: list[str] = []
    if config.train_embeds:
        train_labels = _labels(config.train_embeds, config.train_images, config.label_column)
    names = sorted({*labels, *train_labels})
    numbers = {name: number for number, name in enumerate(names)}
    target = torch.tensor([numbers[label] for label in labels])  # [N]

    # Zero-shot: the nearest class embedding
    encoder = load_clip(config.clip or read_manifest(config.embeds)["clip"])
    sentences = [[template.format(name) for template in config.templates] for name in names]
    tokens = [torch.from_numpy(encoder.tokenize(of_class)) for of_class in sentences]
    classes = torch.stack([encoder.encode_text(of_class)[0] for of_class in tokens])  # [C, T, E]
    scores: Json = {
        "num_classes": len(names),
        "zero_shot_accuracy": zero_shot(image, classes, target),
    }

    # A linear probe
    if config.train_embeds:
        _, train_image, _ = read_embeds(config.train_embeds)
        train_target = torch.tensor([numbers[label] for label in train_labels])
        scores["linear_probe_accuracy"] = linear_probe(
            (train_image, train_target), (image, target), weight_decay=config.probe_weight_decay
        )
        scores["n_probe_train"] = len(train_labels)
    return scores


def _labels(embeds: str, images: str, column: str) -> list[str]:
    """Return the class of each embedding, from the tables of the images."""
    import pyarrow.parquet as pq

    from ingest.shards import STORED, load_snapshot
    from ingest.store.storage import storage_of

    if not images:
        raise ValueError("images: found nothing, expected the folder that the embeddings are of")
    labels: list[str] = []
    for entry in load_snapshot(embeds).shards:
        with storage_of(images).open(f"{entry.name}.parquet") as file:
            table = pq.read_table(file)
        if column not in table.column_names:
            columns = ", ".join(table.column_names)
            raise ValueError(f"{images}: label_column: found {columns}, expected {column!r} too")
        pairs = zip(table["status"].to_pylist(), table[column].to_pylist(), strict=True)
        stored = [str(label) for status, label in pairs if status == STORED]
        if len(stored) != entry.num_samples:
            raise ValueError(f"{images}: shard {entry.name} is not what {embeds} was made of")
        excluded = set(entry.excluded)
        labels += [label for row, label in enumerate(stored) if row not in excluded]
    return labels


if __name__ == "__main__":
    run_script(lambda: main(parse(ClipScoreConfig)))
