"""Training steps of the presets on this device: samples/s, MFU, and memory beside the plan's.

    python benchmarks/preset_step.py                                    # minutes, on a GPU or not
    python benchmarks/preset_step.py --stages decoder/karlo:64 --variants plain channels_last

A step is a whole one of the plain engine: noise, conditioning drops, forward, loss, backward, the
clipped norm, AdamW and EMA, on pictures, embeddings and token states of noise that are on the
device already. Captions are as long as LAION's, 15.5 tokens in the mean, packed for a prior. A
frozen CLIP's text tower, data and networks are not in it. MFU counts the model's own FLOPs (six a
multiply-accumulate) on real tokens against the data sheet's dense bf16.
Memory is the most that torch's allocator gave out, on a GPU, beside what cluster/plan.py reckons
with. A batch that does not fit is halved until it does. `--jsonl FILE` appends the lines that plans
read.
"""

import gc
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from _captions import caption_lengths
from _common import BenchmarkConfig, run_benchmark

WARMING_STEPS = 3
GPU_STAGES = (
    "decoder/mini:256", "decoder/karlo:64", "prior/paper:128", "decoder/modern:128",
    "decoder/paper_up256:64", "prior/paper_ar:64", "decoder/paper_up1024:8", "prior/modern:512",
    "prior/mini:1024", "decoder/mini_up:256", "decoder/paper:16", "clip/ViT-B-32:512",
)  # fmt: skip
CPU_STAGES = ("prior/demo:64", "decoder/demo:64", "decoder/demo_up:64", "clip/demo:64")
# channels-last or not, whether it is compiled, and whether with the kernel for group norm
VARIANTS: dict[str, tuple[bool, bool, bool]] = {
    "plain": (False, False, False),
    "channels_last": (True, False, True),
    "compiled": (False, True, False),
    "channels_last_compiled": (True, True, True),
    "channels_last_compiled_without_kernel": (True, True, False),
}


@dataclass(frozen=True, kw_only=True)
class Config(BenchmarkConfig):
    """What to measure."""

    stages: tuple[str, ...] = ()
    """script/preset:batch, of CLIP also script/architecture:batch, one of open_clip's; empty = all
    presets of a GPU, or the demo's on a CPU"""
    variants: tuple[str, ...] = ("plain",)
    """of plain, channels_last, compiled, channels_last_compiled (what training on a GPU does) and
    channels_last_compiled_without_kernel; the decoder alone has channels"""
    num_steps: int = 8
    """steps of a measurement, after three that warm up"""
    repeats: int = 3
    """parts of a measurement, of so many steps each: the middle one counts"""
    num_threads: int = 2
    """threads on the CPU"""
    jsonl: str = ""
    """file to append a line for each measurement to"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    unknown = set(config.variants) - set(VARIANTS)
    if unknown:
        names = ", ".join(VARIANTS)
        raise ValueError(f"variants: found {min(unknown)!r}, expected some of {names}")
    for stage in config.stages:
        if not re.fullmatch(r"(clip|prior|decoder)/[^:/]+:[1-9]\d*", stage):
            raise ValueError(f"stages: found {stage!r}, expected such as decoder/mini:256")
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(config.num_threads)
    stages = config.stages or (GPU_STAGES if torch.cuda.is_available() else CPU_STAGES)
    columns = (
        "stage", "variant", "parameters", "batch", "ms a step", "spread", "samples/s", "MFU",
        "memory, GiB", "predicted",
    )  # fmt: skip
    pairs = [
        (stage, variant)
        for stage in stages
        for variant in config.variants
        if stage.startswith("decoder") or not VARIANTS[variant][0]
    ]
    table, results = Table(*columns), []
    for stage, variant in pairs:
        result = _largest_that_fits(config, stage, variant)
        print(json.dumps(result), flush=True)
        results.append(result)
        table.add_row(*_row(result))
        if config.jsonl and "mfu" in result:
            with Path(config.jsonl).open("a") as file:
                file.write(json.dumps(result) + "\n")
    Console(width=140).print(table)
    print(json.dumps({"measured": results}))
    return 0


def _row(result: dict[str, Any]) -> list[str]:
    head = [f"{result['script']}/{result['preset']}", result["variant"]]
    if "mfu" not in result:
        return [*head, "does not fit"]
    mfu = "" if result["mfu"] is None else f"{100 * result['mfu']:.1f} %"
    memory = "" if result["memory_bytes"] is None else f"{result['memory_bytes'] / 2**30:.2f}"
    return [
        *head, f"{result['parameters']:,}", str(result["batch"]), f"{result['ms']:.1f}",
        f"{result['ms_spread']:.1f}", f"{result['samples_per_second']:,.1f}", mfu, memory,
        f"{result['predicted_bytes'] / 2**30:.2f}",
    ]  # fmt: skip


def _largest_that_fits(config: Config, stage: str, variant: str) -> dict[str, Any]:
    """Measure a stage, at half the batch where it does not fit."""
    import torch

    name, batch = stage.split(":")
    script, preset = name.split("/")
    size = int(batch)
    while size:
        try:
            return _figures(config, script, preset, variant, size)
        except torch.cuda.OutOfMemoryError:
            size //= 2
        finally:
            _let_go()
    return {"script": script, "preset": preset, "variant": variant}


def _let_go() -> None:
    """Free what a measurement held, compiled code too, so that the next one starts alike."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _figures(config: Config, script: str, preset: str, variant: str, batch: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from cluster.planning.counts import encoder_counts
    from cluster.planning.request import CHAINS
    from models.costs import num_parameters
    from models.networks import group_norm
    from training.engine.precision import settled
    from training.runs.profiling import peak_tflops
    from training.runs.worker import compile_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channels_last, compiled, kernel = VARIANTS[variant]
    chain = next(
        (c for c in CHAINS.values() if preset in (c.prior, c.ar, *c.decoders)), CHAINS["mini"]
    )
    encoder = encoder_counts(chain.encoder)
    sizes = {key: encoder[key] for key in ("embed_dim", "text_width", "context_length")}
    options, build = _config(script, preset, sizes)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with device:
        model = build()
    predicted = _predicted(model, encoder, batch)
    columns = _columns(model, sizes, batch, device)
    flops = float(np.mean(_flops(model, caption_lengths(batch, sizes["context_length"]))))
    if compiled:
        compile_model(model, device)
    if hasattr(model, "unet"):
        model.unet.channels_last = channels_last
    torch.backends.cudnn.benchmark = True
    if kernel:
        parts = _times(config, model, columns, options.train, device)
    else:
        with mock.patch.object(group_norm, "has_kernel", lambda x, scale: False):
            parts = _times(config, model, columns, options.train, device)
    peak = peak_tflops(device) * 1e12
    rate, on_gpu = batch / float(np.median(parts)), device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "script": script, "preset": preset, "variant": variant, "compiled": compiled,
        "network": _network(model), "parameters": num_parameters(model), "batch": batch,
        "ms": 1000 * batch / rate, "ms_spread": 1000 * float(np.ptp(parts)),
        "samples_per_second": rate, "tflops": rate * flops / 1e12,
        "mfu": rate * flops / peak if peak else None,
        "memory_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else None,
        "predicted_bytes": predicted,
        "precision": settled(options.train.workers.precision, device.type),
        "torch": torch.__version__,
    }  # fmt: skip


def _times(config: Config, model: Any, columns: Any, settings: Any, device: Any) -> list[float]:
    """Return the seconds of a step, by parts of `num_steps` steps."""
    from training.engine.ema import Ema
    from training.engine.engines import PlainEngine

    engine = PlainEngine(model, _objective, settings, device)
    averages = Ema(engine.fragments(), settings.averages.ema_decay)
    model.train()

    def step(number: int) -> None:
        engine.backward(engine.losses(columns)["loss"].mean())
        engine.step(1e-3)
        averages.update(number, 0)

    for number in range(WARMING_STEPS):
        step(number)
    parts = []
    for _ in range(config.repeats):
        _wait(device)
        started = time.perf_counter()
        for number in range(config.num_steps):
            step(number)
        _wait(device)
        parts.append((time.perf_counter() - started) / config.num_steps)
    return parts


def _config(script: str, preset: str, sizes: dict[str, int]) -> Any:
    """Return a preset's configuration for one process, and what builds its model."""
    from cluster.planning.counts import read_preset
    from training.config import PRESETS
    from training.tasks.clip import clip_model
    from training.tasks.networks import decoder_model, prior_model

    more = ["--train.num-workers", "0", "--train.zero-stage", "0"]
    if script == "clip" and not (PRESETS / script / f"{preset}.yaml").is_file():
        preset, more = "debug", [*more, "--model.architecture", preset]
    options = read_preset(script, preset, *more)
    if script == "clip":
        return options, lambda: clip_model(options)
    if script == "prior":
        return options, lambda: prior_model(options, sizes)
    return options, lambda: decoder_model(options, sizes)


def _flops(model: Any, lengths: Any) -> Any:
    """Return the FLOPs of training on samples with captions of `lengths` tokens."""
    import numpy as np

    from models.costs import training_flops

    places = np.unique(np.quantile(lengths, (0, 0.5, 0.9, 1)).astype(int))
    return np.interp(lengths, places, [training_flops(model, int(place)) for place in places])


def _predicted(model: Any, encoder: dict[str, Any], batch: int) -> float:
    """Return the bytes that a plan reckons with: state, and activations of the batch."""
    from cluster.planning.counts import count_model
    from models.configs import network_of
    from models.costs import meta_copy, state_bytes

    length = int(caption_lengths(batch, encoder["context_length"]).mean())
    counts = count_model(meta_copy(model).requires_grad_(), length)
    network = getattr(model, network_of(getattr(model, "config", None))[0], model)
    checkpointed = getattr(getattr(network, "config", None), "checkpointing", False)
    activations = counts["activations"]["checkpointed" if checkpointed else "kept"]
    return state_bytes(model) + activations["fixed"] + activations["each"] * batch


def _columns(model: Any, sizes: dict[str, int], count: int, device: Any) -> Any:
    """Return a batch of noise: pictures, unit embeddings, captions as long as LAION's."""
    import torch
    import torch.nn.functional as F

    from models.clip import model_sizes
    from models.networks.packing import PackedTokens
    from training.data.dataloader import Batch

    side, context = getattr(model, "image_size", None) or getattr(model, "crop_size", 1), None
    if hasattr(model, "visual"):
        side, context = model_sizes(model)
    dim, context = sizes["embed_dim"], context or sizes["context_length"]
    lengths = torch.from_numpy(caption_lengths(count, context))
    mask = torch.arange(context) < lengths[:, None]
    keys, tokens = torch.arange(count), torch.randint(1, 1000, (count, context)) * mask
    columns = {
        "image": torch.randint(256, (count, 3, side, side), dtype=torch.uint8),
        "image_embed": F.normalize(torch.randn(count, dim), dim=1),
        "text_embed": F.normalize(torch.randn(count, dim), dim=1),
        "tokens": tokens,
    }
    captions = None
    if hasattr(model, "pack"):
        captions = PackedTokens.of(tokens, model.pack(lengths, keys))
        columns["states"] = torch.randn(len(captions.tokens), sizes["text_width"])
    else:
        columns["states"] = torch.randn(count, context, sizes["text_width"])
    return Batch(
        keys=keys, weight=torch.ones(count), num_real=count, columns=columns, captions=captions
    ).to(device)


def _objective(model: Any, batch: Any) -> dict[str, Any]:
    """Return a model's own losses of a batch of noise."""
    from models.decoder import Condition
    from models.priors.base import PackedText
    from models.upsampler import Upsampler
    from training.tasks.clip import clip_objective
    from training.tasks.pictures import pixels

    if hasattr(model, "visual"):
        return clip_objective(model, batch)
    if isinstance(model, Upsampler):
        return model.losses(batch.keys, pixels(batch["image"]))
    own = model.config.text_tokens
    if batch.captions is not None:
        text = batch.captions.tokens if own else batch["states"]
        packing = batch.captions.packing
        text = PackedText(text_embed=batch["text_embed"], text=text, packing=packing)
        return model.losses(batch.keys, batch["image_embed"], text)
    text = {"tokens": batch["tokens"]} if own else {"text_states": batch["states"]}
    condition = Condition(
        image_embed=batch["image_embed"], text_embed=batch["text_embed"],
        token_mask=batch["tokens"] > 0, **text,
    )  # fmt: skip
    return model.losses(batch.keys, pixels(batch["image"]), condition)


def _network(model: Any) -> str:
    """Return the kind of network whose efficiency a plan takes this for."""
    unet = getattr(model, "unet", None)
    if unet is None:
        return "transformer"
    return "unet_channels_last" if unet.channels_last else "unet"


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_benchmark(Config, main, num_steps=1, repeats=1)
