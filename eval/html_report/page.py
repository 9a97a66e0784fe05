"""One self-contained HTML page on what a run reached: pictures, scores, curves, timings.

The page loads nothing and runs nothing: images are inline, charts are inline SVG, and its own
security policy forbids the rest. Every text from a file is escaped. A section whose file is absent
is left out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from cluster.base.files import write_text
from cluster.base.run_dir import (
    CONFIG_NAME,
    DEMO_NAME,
    EVAL_NAME,
    METRICS_NAME,
    PROVENANCE_NAME,
    REPORT_NAME,
    SAMPLES_FOLDER,
    TIMINGS_NAME,
    WATCH_NAME,
)
from eval.html_report import charts, pictures
from eval.html_report import score_table as tables
from eval.html_report.formats import Scores, details, duration, flatten, note, number, size, table
from eval.html_report.pictures import read_json
from eval.sampling.image_source import SETTINGS_NAME

if TYPE_CHECKING:
    from training.runs.cards import CardScore


SECTIONS = {  # by name, in this order: title, explanation; "edits" holds titles of its own
    "samples": ("Samples", "Captions of the evaluated set, spread evenly over it and not chosen, "
                "and what the full chain makes of each."),
    "scores": ("Scores", "Every number with its method and count. Beside another run's value is "
               "ours minus it; scores that were made differently are not compared."),
    "drawings": ("Is the drawing what the caption says?", "Share of images scored right by reading "
                 "the drawing, ± its standard error, and what the same scorer gives true drawings. "
                 "“all” asks for every attribute and the relation at once; “attribute” is the mean "
                 "share of an image's colours, shapes and sizes."),
    "guidance": ("Scores over guidance", "The same captions and seeds at several scales of the "
                 "decoder's guidance, 1 being none (figure 11 of the paper: unCLIP loses little as "
                 "the scale grows)."),
    "ablation": ("Ablation: what the decoder is given", "The same captions and noise, with the "
                 "image embedding exchanged (section 5.1 of the paper): the true one bounds what a "
                 "better prior could give, the text embedding is what one has without a prior."),
    "edits": ("Edits", ""),
    "neighbours": ("Nearest training images", "The generated images that are nearest to a training "
                   "image, the closest pair first: a copy would show here."),
    "curves": ("Training curves", "Over samples seen; the strong line is a running mean. Scores of "
               "checkpoints are over steps."),
    "stages": ("Stages", ""),
    "provenance": ("What was run", ""),
}  # fmt: skip


def write_report(run_dir: Path, against: Sequence[Path] = ()) -> Path:
    """Write `run_dir`/report.html from what the stages left in `run_dir`, and return its path.

    against: earlier runs, or their eval.json, to show beside this one's scores. Reads eval.json,
    timings.json, provenance.json, samples/, edits/, sweep.jsonl, and config.yaml, metrics.jsonl,
    validation.jsonl and watch.jsonl of the folder and of every run folder in it. Raises ValueError
    if there is nothing to report, or a file is not what its name says.
    """
    scores = read_json(run_dir / EVAL_NAME, dict)
    curves = charts.curves(run_dir)
    if scores is None and not (run_dir / METRICS_NAME).is_file() and not curves:
        raise ValueError(
            f"{run_dir}: found no {EVAL_NAME} and no {METRICS_NAME} or {WATCH_NAME}, expected one; "
            "run eval/fid.py first, or name the folder of a run"
        )
    scores, samples = scores or {}, run_dir / SAMPLES_FOLDER
    title = run_dir.resolve().name
    # What is recorded of the run, and of its evaluation: code, versions, protocol
    provenance = flatten(read_json(run_dir / PROVENANCE_NAME, dict) or {})
    for key, name in (("provenance", "evaluation"), ("protocol",) * 2, ("sampling",) * 2):
        flat = flatten(scores.get(key) or {}, name)
        provenance |= {k: value for k, value in flat.items() if not isinstance(value, float)}

    # The sections
    nearest = (scores.get("memorisation") or {}).get("nearest") or []
    pairs = [(pair["fake"], pair["train"], pair["distance"]) for pair in nearest]
    timings = read_json(run_dir / TIMINGS_NAME, list) or []
    stages = [
        (row["stage"], duration(row["seconds"]), row.get("images_per_second"),
         size(row.get("peak_memory_bytes")), row.get("command") or "")
        for row in timings
    ]  # fmt: skip
    if stages:
        stages.append(("together", duration(sum(row["seconds"] for row in timings)), "", "", ""))
    contents = {
        "samples": pictures.gallery(samples)
        or pictures.sheet(samples, "grid", "Captions, in reading order", is_open=True),
        "scores": tables.score_tables(title, scores, _scores_of(against)),
        "drawings": tables.shape_table(scores.get("shapes") or {}),
        "guidance": charts.sweep_charts(run_dir),
        "ablation": tables.ablation_table(scores.get("ablation") or {})
        + pictures.sheet(samples, "ablation", "Captions of the columns"),
        "edits": pictures.edits(run_dir),
        "neighbours": pictures.sheet(samples, "neighbours", "Captions of the columns")
        + table(pairs, ("generated", "nearest in training", "distance")),
        "curves": curves,
        "stages": table(stages, ("stage", "time", "images/s", "peak memory", "command")),
        "provenance": _what_was_run(run_dir, scores, provenance),
    }
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("report.html.j2").render(
        title=title,
        commit=provenance.get("commit") or provenance.get("evaluation.commit"),
        headlines=tables.headlines(scores),
        sections=[(k, *SECTIONS[k], content) for k, content in contents.items() if content],
    )
    return write_text(run_dir / REPORT_NAME, page)


def _what_was_run(run: Path, scores: Scores, provenance: Scores) -> Markup:
    """Return code and versions, the samples' settings, configurations, and all of eval.json."""
    columns = ("name", "value")
    settings = flatten(read_json(run / SAMPLES_FOLDER / SETTINGS_NAME, dict) or {})
    settings.pop("captions", None)
    demo = read_json(run / DEMO_NAME, dict)
    configs = {"demo": json.dumps(demo, indent=1)} if demo else {}
    for path in (run / CONFIG_NAME, *sorted(run.glob(f"*/{CONFIG_NAME}"))):
        if path.is_file():
            configs[path.parent.resolve().name] = path.read_text(encoding="utf-8")
    absent = note("Neither provenance.json nor eval.json states the code.")
    return Markup().join([
        table(provenance.items(), columns) or absent,
        details("Weights and settings of the samples", table(settings.items(), columns)),
        *(
            details(f"Configuration of {name}", Markup("<pre>{}</pre>").format(text))
            for name, text in configs.items()
        ),
        details("Every number of eval.json", table(flatten(scores).items(), columns)),
    ])  # fmt: skip


def _scores_of(runs: Sequence[Path]) -> dict[str, Scores]:
    """Read the scores of earlier runs by a short name of each; ValueError for one without any."""
    found: dict[str, Scores] = {}
    for run in runs:
        path = run / EVAL_NAME if run.is_dir() else run
        scores = read_json(path, dict)
        if scores is None:
            raise ValueError(
                f"{path}: found no such file, expected the scores of an earlier run; run "
                "eval/fid.py there first"
            )
        name = path.parent.resolve().name
        found[str(run) if name in found else name] = scores
    return found


def card_scores(run_dir: Path) -> "list[CardScore]":
    """Return the scores of a folder's eval.json as text, for the cards of its runs."""
    from training.runs.cards import CardScore

    scores = read_json(run_dir / EVAL_NAME, dict) or {}
    found = []
    for entry in tables.entries({k: v for k, v in scores.items() if k not in tables.ELSEWHERE}):
        name, _, method = tables.described(entry.path, entry.made)
        texts = (entry.spread, method, tables.made_of(entry))
        name = f"{tables.group_title(entry.group)}, {name}"
        text = ", ".join(text for text in texts if text)
        found.append(CardScore(name=name, value=number(entry.value), method=text))
    return found
