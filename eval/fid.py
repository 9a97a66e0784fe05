"""The evaluation job: how far generated images are from real ones, and how well they fit their
captions.

    python eval/fid.py --real data/test/images --fake samples --clip runs/clip
    python eval/fid.py --real photos/ --fake samples --features inception inception_clean \\
        --weights-dir weights/ --num-workers 4
    python eval/fid.py --real data/test/images --model runs/demo --captions prompts.txt \\
        --fake samples --judge ViT-B-32:open_clip_pytorch_model.safetensors
    python eval/fid.py --protocol shapes --model runs/demo --fake samples
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.base.cli import DONE, parse, run_script
from cluster.base.files import write_json
from cluster.base.machine import threads_for
from eval.request import EvalRequest
from eval.sample_and_score import publish


@dataclass(frozen=True, kw_only=True)
class FidConfig(EvalRequest):
    """Every score is written with its features and its number of images."""

    metrics_port: int | None = None
    """serve Prometheus metrics on this loopback port; 0 = any free one"""


def main(config: FidConfig) -> int:
    """Draw what is to be drawn, score, write the scores and print them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights are never downloaded here
    import torch
    from rich.console import Console
    from rich.table import Table

    from cluster.base.metrics import serve
    from eval.evaluation import Evaluation
    from eval.html_report.formats import flatten

    model = config.check()
    serve(config.metrics_port)
    torch.set_num_threads(threads_for(config.num_threads))
    evaluation = Evaluation(config, model)
    scores = evaluation.scores()
    if config.save_statistics:
        evaluation.save_statistics(Path(config.save_statistics))
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, scores, indent=1)
    table = Table("score", "value")
    for name, value in flatten({k: v for k, v in scores.items() if k != "sampling"}).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    publish(scores)
    return DONE


if __name__ == "__main__":
    run_script(lambda: main(parse(FidConfig, check=FidConfig.check)))
