"""Reconstruct an EMA of any width after training, from snapshots of power-function averages.

    python training/decoder.py --train.power-ema 0.05 0.10 --train.snapshot-every 500 --run runs/base ...
    python training/reconstruct_ema.py --run runs/base --sigma-rel 0.08 --out runs/base_ema008
    python eval/sample.py --decoder runs/base_ema008 ...

sigma_rel is the width of the average relative to the length of the training so far. The printed fit
error is the distance between the combination of snapshots and that profile. The output is a
finished run.
"""  # noqa: E501

from dataclasses import dataclass
from pathlib import Path

from cluster.base.cli import parse, require_local, run_script


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Options: the run and the average to reconstruct."""

    run: str = "runs/base"
    """folder or URL of a finished run with snapshots of its averages"""
    sigma_rel: float = 0.1
    """relative width: more than 0, at most 0.2887; between or near those of --train.power-ema"""
    step: int = 0
    """step at which the average ends; 0 = the step of the last snapshot"""
    out: str = ""
    """folder of the run to write; empty = the run's folder and the width: runs/base_ema008"""


def main(config: EmaConfig) -> int:
    """Reconstruct the average and write it as a run."""
    from training.checkpoints.post_hoc_ema import reconstruct

    width = f"{config.sigma_rel:.15f}".rstrip("0").replace(".", "")
    out = Path(config.out or f"{config.run.rstrip('/')}_ema{width}")
    require_local("--out", config.out or config.run)
    fit = reconstruct(config.run, config.sigma_rel, config.step, out)
    print(
        f"{out}: a finished run, sigma_rel {config.sigma_rel} at step {fit['step']} from "
        f"{fit['profiles']} averages in {fit['snapshots']} snapshots; fit error {fit['error']:.2e} "
        f"(of the profile's norm)"
    )
    return 0


if __name__ == "__main__":
    run_script(lambda: main(parse(EmaConfig)))
