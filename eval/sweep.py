"""Score a chain at several scales of the decoder's guidance (figure 11 of the paper).

    python eval/sweep.py --run runs/demo --prior runs/demo/prior --decoder runs/demo/base \\
        --captions data/test/images --scales 1 1.5 2 3 4

Same captions, same seeds, another scale. A scale that is scored is not scored again unless the
weights or a flag changed. eval/report.py draws the curves.

    <run>/sweep.jsonl             {"cfg_scale", "settings", "scores"}
    <run>/sweep/scale_1.5/        eval.json, samples/grid.png
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.cli import parse, require_local, run_script
from cluster.base.jsonl import read_lines
from eval.html_report.run_curves import SWEEP_NAME as LINES_NAME
from eval.rounds import RoundConfig, begin, guide_of, play, publish, tidy

ASIDE = ("run", "scales", "keep_samples", "metrics_port")  # change nothing about the scores


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RoundConfig):
    """Which chain, over which scales."""

    run: str = "runs/demo"
    """folder that is reported, to write the sweep to"""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """scales of the decoder's guidance; 1 = off"""


def main(config: SweepConfig) -> int:
    """Score the scales that are not scored yet."""
    from cluster.base.metrics import serve
    from eval.sampling.chain import chain_weights

    if not config.scales or len(set(config.scales)) < len(config.scales):
        raise ValueError(f"--scales: found {config.scales}, expected different scales")
    require_local("--run", config.run)
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    serve(config.metrics_port)
    told = {k: v for k, v in dataclasses.asdict(config).items() if k not in ASIDE}
    guide = guide_of(config.sample_options)
    told |= chain_weights(config.prior, config.decoder, config.upsampler, guide)
    settings = json.loads(json.dumps(told))
    for scale in config.scales:
        if _is_scored(run, scale, settings):
            print(f"sweep: scale {scale:g} is scored")
            continue
        folder = run / "sweep" / f"scale_{scale:g}"
        begin(folder, settings)
        scores = play(config, folder, ["--cfg-scale", str(scale)])
        _replace_line(
            run / LINES_NAME, {"cfg_scale": scale, "settings": settings, "scores": scores}
        )
        publish(scores)
        tidy(folder, keep_samples=config.keep_samples)
    print(f"sweep: {len(config.scales)} scales in {run / LINES_NAME}; eval/report.py draws them")
    return 0


def _is_scored(run: Path, scale: float, settings: dict[str, Any]) -> bool:
    return any(
        line["cfg_scale"] == scale and line["settings"] == settings
        for line in read_lines(run / LINES_NAME)
    )


def _replace_line(path: Path, line: dict[str, Any]) -> None:
    """Write the line of a scale; an earlier one of it goes, and so do those of other settings,
    which one curve must not mix."""
    kept = [
        one
        for one in read_lines(path)
        if one["cfg_scale"] != line["cfg_scale"] and one["settings"] == line["settings"]
    ]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(one) + "\n" for one in [*kept, line]), encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    run_script(lambda: main(parse(SweepConfig)))
