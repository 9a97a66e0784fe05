"""Draw images for captions: caption -> prior -> decoder -> upsamplers.

    python eval/sample.py --prior runs/prior --decoder runs/base --prompts "a red cube"
    python eval/sample.py --prior runs/prior --decoder runs/base --captions data/test/images \\
        --limit 300

Sub-commands edit images: variations, interpolate, textdiff, inpaint, pca, guidance; each has a
--help of its own.
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction

from cluster.base.cli import parse, require_at_least, require_local, run_script
from cluster.base.machine import threads_for
from eval.sampling.options import DrawingOptions, SamplingSettings, SeededSampling
from training.engine.precision import settled


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingSettings, DrawingOptions):
    """Defaults are the demo's: quick, and mildly guided."""

    prior: str = "runs/prior"
    """finished run of training/prior.py"""
    clip: str = ""
    """encoder; empty = the one the prior was trained on"""
    guide: str = ""
    """finished run of a weaker decoder that guidance leads away from (autoguidance): smaller, or
    trained for less; empty = the decoder without its condition"""
    prompts: Annotated[tuple[str, ...], UseAppendAction] = ()
    """caption to draw; repeatable"""
    captions: str = ""
    """instead of --prompts: a text file, a caption a line; CSV, TSV or JSON with prompts, such as
    DrawBench's, PartiPrompts', GenEval's and COCO's; or a folder of committed image shards"""
    limit: int = 0
    """draw only the first captions; 0 = all"""
    out: str = "samples"
    """folder of the images"""
    seed: int = 0
    """of all noise: the same seed, caption and place in the list give the same image, in any
    batch"""
    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""
    fresh: bool = False
    """delete earlier samples in --out instead of continuing them"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, limit=0, batch_size=1, num_threads=1)
        if self.guide and self.cfg_scale == 1:
            raise ValueError(
                f"--guide: found {self.guide} with --cfg-scale 1, which guides nothing, expected "
                "another scale"
            )
        if self.upsampler_tile and not self.upsampler:
            raise ValueError("--upsampler-tile: found it without --upsampler, expected both")


def main(config: SampleConfig) -> int:
    """Draw what is missing in `config.out`, then write grid.png and samples.jsonl."""
    import torch

    from cluster.base.metrics import serve
    from cluster.base.progress import progress
    from eval.features.devices import device_named
    from eval.sampling import sample_job
    from eval.sampling.captions import read_captions
    from eval.sampling.chain import Model
    from eval.sampling.image_source import SAMPLES_NAME

    require_local("--out", config.out)
    started = time.perf_counter()
    device = device_named(config.device)
    config = replace(config, precision=settled(config.precision, device.type))
    serve(config.metrics_port)
    torch.set_num_threads(threads_for(config.num_threads))
    if bool(config.prompts) == bool(config.captions):
        raise ValueError("found both or none of --prompts and --captions, expected one of them")
    captions = list(config.prompts)[: config.limit or None]
    if config.captions:
        captions = read_captions(config.captions, config.limit)

    out = Path(config.out)
    model = Model(**{field.name: getattr(config, field.name) for field in fields(Model)})
    options = {f.name: getattr(config, f.name) for f in fields(SeededSampling)}
    settings = sample_job.settings_of(model, captions, options, config.device)
    chain = model.load(config.device)
    sample_job.open_samples(out, settings, fresh=config.fresh)

    # Draw the batches of which an image is missing
    made = 0
    with progress("sample", len(captions), unit="images") as advance:
        for start in range(0, len(captions), config.batch_size):
            batch = captions[start : start + config.batch_size]
            paths = [out / sample_job.image_name(start + i) for i in range(len(batch))]
            if not all(path.is_file() for path in paths):
                made += sample_job.draw_batch(out, chain, batch, start, settings)
            advance(len(batch))
    if made or not (out / SAMPLES_NAME).is_file():
        sample_job.finish_samples(out, captions, config.seed)
    seconds = time.perf_counter() - started
    print(
        f"sample: {made} images drawn, {len(captions) - made} were there, {seconds:.1f} s -> {out}"
    )
    return 0


def command(argv: list[str]) -> int:
    """Draw captions, or run the sub-command that the first argument names."""
    if not argv or argv[0].startswith("-"):
        return main(parse(SampleConfig, argv=argv))
    from eval.sampling.edits import COMMANDS, run_edit

    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ValueError(f"found {argv[0]!r}, expected options or one of {known}")
    config = parse(COMMANDS[argv[0]], argv=argv[1:])
    require_local("--out", config.out)
    return run_edit(argv[0], config)


if __name__ == "__main__":
    run_script(lambda: command(sys.argv[1:]))
