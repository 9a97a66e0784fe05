"""Score a chain at several scales of the decoder's guidance (figure 11 of the paper).

    python eval/sweep.py --run runs/demo --prior runs/demo/prior --decoder runs/demo/base \\
        --captions data/test/images --scales 1 1.5 2 3 4

All scales use the same captions and seeds. A scale is scored again only if the weights or a flag
changed. eval/report.py draws the curves.

    <run>/sweep.jsonl             {"cfg_scale", "settings", "scores"}
    <run>/sweep/scale_1.5/        eval.json, samples/grid.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.base.cli import parse, require_local, run_script
from cluster.base.files import write_text
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import SWEEP_NAME
from eval.sample_and_score import (
    SampleAndScoreConfig,
    finish,
    guide_of,
    sample_and_score,
    settings_of,
)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SampleAndScoreConfig):
    """Which chain, over which scales."""

    run: str = "runs/demo"
    """folder of the report, to write the sweep to"""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """scales of the decoder's guidance; 1 = off"""


def main(config: SweepConfig) -> int:
    """Score the scales that have no scores of these settings."""
    from cluster.base.metrics import serve
    from eval.sampling.chain import chain_weights

    if not config.scales or len(set(config.scales)) < len(config.scales):
        raise ValueError(f"--scales: found {config.scales}, expected different scales")
    require_local("--run", config.run)
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    serve(config.metrics_port)

    guide = guide_of(config.sample_options)
    weights = chain_weights(config.prior, config.decoder, config.upsampler, guide)
    settings = settings_of(config, weights)
    path = run / SWEEP_NAME
    for scale in config.scales:
        # One curve holds one setting: lines of others are dropped when the first scale is scored.
        lines = [line for line in read_lines(path) if line["settings"] == settings]
        if any(line["cfg_scale"] == scale for line in lines):
            print(f"sweep: scale {scale:g} is scored")
            continue
        folder = run / "sweep" / f"scale_{scale:g}"
        scores = sample_and_score(config, folder, settings, ["--cfg-scale", str(scale)])
        lines.append({"cfg_scale": scale, "settings": settings, "scores": scores})
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        finish(config, folder, scores)
    print(f"sweep: {len(config.scales)} scales in {path}; eval/report.py draws them")
    return 0


if __name__ == "__main__":
    run_script(lambda: main(parse(SweepConfig)))
