"""Write a page of a run: its images, scores and curves, beside those of other runs.

    python eval/report.py --run runs/demo
    python eval/report.py --run runs/demo --against runs/last_week --against runs/other/eval.json
    python eval/report.py --run runs/base                       # one training run: its curves

It shows what is there. These commands leave more to show:

    python eval/sample.py ... --captions data/test/images --out runs/demo/samples
    python eval/fid.py --real data/test/images --fake runs/demo/samples --out runs/demo/eval.json
    python eval/sample.py guidance --prompts "a red cube" ... --out runs/demo/edits/guidance
    python eval/sample.py pca --images cat.png --embeds data/embeds ... --out runs/demo/edits/pca
    python eval/sweep.py --run runs/demo --prior runs/demo/prior --decoder runs/demo/base ...
    python eval/watch.py --run runs/demo/base --prior runs/demo/prior ...
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction

from cluster.base.cli import parse, run_script


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The page is one file, which loads nothing."""

    run: str = "runs/demo"
    """folder of what is reported: with eval.json, or a training run's"""
    against: Annotated[tuple[str, ...], UseAppendAction] = ()
    """earlier run, or its eval.json, whose scores stand beside this one's; repeatable"""


def main(config: ReportConfig) -> int:
    """Write report.html, and the scores into the cards of the runs that the folder holds."""
    from eval.html_report.page import card_scores, write_report
    from training.runs.cards import refresh_cards

    run = Path(config.run)
    if not run.is_dir():
        raise ValueError(f"--run: found no folder {run}, expected one with eval.json or a run's")
    path = write_report(run, tuple(Path(other) for other in config.against))
    for card in refresh_cards(run, card_scores(run)):
        print(f"card: {card}")
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    run_script(lambda: main(parse(ReportConfig)))
