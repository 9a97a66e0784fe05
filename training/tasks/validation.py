"""What a checkpoint of a stage of the cascade does with held-out pairs: its loss, and a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoder import Condition, ImageSampling
from models.degradation import shrink
from models.diffusion.samplers import dpmpp_2m
from models.weights import load_weights
from training.data.dataloader import Batch, as_batch
from training.data.datasets import ColumnDataset
from training.engine.precision import device_of_run
from training.tasks.pictures import grid, pixels, save_png, to_uint8

FOLDER = "validation"
MAX_VALIDATED = 512  # held-out images, the first ones
VALIDATED_AT_ONCE = 32
NUM_DRAWN = 8
DRAWING = ImageSampling(sampler=dpmpp_2m, sample_steps=16, spacing="karras")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What scoring a checkpoint takes beside its weights.

    build: makes the model; objective: training's; condition: what the base decoder is told of a
    batch, None for an upsampler; reader: of the held-out samples, as many as it has at most 512;
    device: as of training.
    """

    build: Callable[[], nn.Module]
    objective: Callable[[Any, Batch], dict[str, Tensor]]
    condition: Callable[[Batch], Condition] | None
    reader: ColumnDataset
    device: Literal["auto", "cpu", "cuda"]

    @torch.no_grad()
    def __call__(self, folder: Path) -> dict[str, float]:
        """Return {"loss"} of a checkpoint's averaged weights, with the same noise at each, and draw
        <run>/validation/<step>.png: images, and below what the base decoder draws under their
        embeddings and captions, or an upsampler of them made small."""
        model: Any = load_weights(self.build(), folder / "ema.safetensors")
        device = device_of_run(self.device)
        model.to(device)
        count = min(MAX_VALIDATED, sum(sum(sizes) for sizes in self.reader.data_sets))
        losses = []
        for start in range(0, count, VALIDATED_AT_ONCE):
            index = np.arange(start, min(start + VALIDATED_AT_ONCE, count))
            batch = as_batch(self.reader.read(index), torch.from_numpy(index)).to(device)
            losses.append(self.objective(model, batch)["loss"].cpu())
            if start == 0:
                self._draw(model, batch, folder)
        return {"loss": float(torch.cat(losses).mean())}

    def _draw(self, model: Any, batch: Batch, folder: Path) -> None:
        first = batch.part(NUM_DRAWN)
        image, draw = pixels(first["image"]), partial(model.sample, first.keys)
        rows = {"image": image}
        if self.condition is not None:
            rows["drawn"] = draw(self.condition(first), DRAWING)
        else:
            low_res = shrink(image, model.factor)
            rows["small"] = F.interpolate(low_res, scale_factor=model.factor, mode="nearest")
            rows["drawn"] = draw(low_res, DRAWING)
        picture = grid([list(to_uint8(row)) for row in rows.values()], list(rows), [])
        save_png(folder.parent / FOLDER / f"{folder.name}.png", picture)
