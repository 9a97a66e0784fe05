"""A model card and a data card beside the exported weights: what a run recorded, in words.

    <run>/step_00001000/MODEL_CARD.md     what the weights are, how they were trained, their limits
    <run>/step_00001000/DATA_CARD.md      the snapshots they were trained on, filters, licences

Every line comes from a file that the run or its data left. What nobody recorded is said to be
absent, and a limit is named where such a record, or the lack of one, shows it.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.files import digest_file
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import METRICS_NAME, VALIDATION_NAME
from models.weights import FINAL_NAME, exported, load_config, num_elements
from training.runs.data_facts import DataFacts, data_facts

MODEL_CARD, DATA_CARD = "MODEL_CARD.md", "DATA_CARD.md"
CODE_NAME = "code.json"  # {"version", "commit"}: of the code that began the run
CONFIG_NAME = "config.yaml"
WEIGHTS = ("model.safetensors", "ema.safetensors")
TITLES = {
    "clip": "a CLIP: the encoder of images and captions",
    "diffusion_prior": "a diffusion prior: from a caption to a CLIP image embedding",
    "autoregressive_prior": "an autoregressive prior: from a caption to a CLIP image embedding",
    "regression_prior": "a regression prior: from a caption to a CLIP image embedding",
    "decoder": "a base decoder: from a CLIP image embedding, and the caption, to an image",
    "upsampler": "an upsampler: from an image to a larger one",
}


def code_here() -> dict[str, str]:
    """Return the version of this project and the commit of its checkout; "" where it is none."""
    from importlib.metadata import version

    root, git = Path(__file__).resolve().parents[2], shutil.which("git")
    commit = ""
    if git and (root / ".git").exists():
        told = subprocess.run(
            [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        commit = told.stdout.strip()
    return {"version": version("minidalle2"), "commit": commit}


def record_code(run: Path) -> None:
    """Write down, once, with which code a run begins."""
    if not (run / CODE_NAME).is_file():
        _write(run / CODE_NAME, json.dumps(code_here()))


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of an evaluation, in words: what it is, what it was, how and of how many."""

    name: str
    value: str
    method: str


def write_cards(run: Path, scores: Sequence[Score] = ()) -> list[Path]:
    """Write both cards of a finished run beside its weights, over earlier ones; return their paths.

    scores: none where nobody evaluated the weights.
    """
    step = exported(run)
    facts = data_facts(run)
    model = _model_facts(run, step)
    pages = {
        MODEL_CARD: _render(
            "model_card.md.j2", model=model, scores=scores, limits=_limits(model, facts)
        ),
        DATA_CARD: _render("data_card.md.j2", model=model, data=facts),
    }
    return [_write(step / name, text) for name, text in pages.items()]


def ensure_cards(run: Path) -> None:
    """Write the cards of a finished run that has none."""
    if not (exported(run) / DATA_CARD).is_file():  # the one written last
        write_cards(run)


def refresh_cards(folder: Path, scores: Sequence[Score]) -> list[Path]:
    """Write the cards of every finished run in `folder` anew, with the scores of its samples.

    A run's card gets them only if the samples say that these very weights drew them.
    """
    drawn = _read(folder / "samples" / "settings.json")
    marks = [*folder.glob(FINAL_NAME), *folder.glob(f"*/{FINAL_NAME}")]
    runs = sorted({path.parent for path in marks})
    return [card for run in runs for card in write_cards(run, scores if _drew(run, drawn) else ())]


def _drew(run: Path, settings: dict[str, Any]) -> bool:
    """Say whether the samples were drawn with a run's weights, or, of a CLIP, for its encoder."""
    step = exported(run)
    if load_config(step).get("kind") == "clip":
        prior = settings.get("prior") or ""
        if not prior or not (Path(prior) / FINAL_NAME).is_file():
            return False
        return Path(load_config(exported(Path(prior))).get("clip", "")).absolute() == run.absolute()
    told = [settings.get("prior_weights"), settings.get("decoder_weights")]
    told += settings.get("upsampler_weights") or []
    return digest_file(step / "ema.safetensors") in [(one or {}).get("sha256") for one in told]


def _model_facts(run: Path, step: Path) -> dict[str, Any]:
    config = load_config(step)
    record = _read(next(iter(sorted(step.glob("fragments/rank_*.json"))), step / "none"))
    lines, validated = read_lines(run / METRICS_NAME), read_lines(run / VALIDATION_NAME)
    weights = [step / name for name in WEIGHTS if (step / name).is_file()]
    yaml = run / CONFIG_NAME
    return {
        "name": run.resolve().name,
        "kind": config.get("kind", ""),
        "title": TITLES.get(config.get("kind", ""), "a model of an unknown kind"),
        "step": step.name,
        "state": _read(step / "state.json"),
        "config": config,
        "parameters": sum(num_elements(weights[-1]).values()) if weights else None,
        "weights": {path.name: digest_file(path) for path in weights},
        "code": {"version": record.get("version", ""), "commit": "", **_read(run / CODE_NAME)},
        "last": lines[-1] if lines else {},
        "validation": validated[-1] if validated else {},
        "yaml": yaml.read_text(encoding="utf-8") if yaml.is_file() else "",
    }


def _limits(model: dict[str, Any], data: list[DataFacts]) -> list[str]:
    """Name the limits that the records show."""
    found = [limit for one in data for limit in one.limits]
    config, seen = model["config"], model["state"].get("samples_seen")
    kinds = ("images", "embeds")  # of the same samples, where there are both
    known = max(sum(one.num_samples for one in data if one.kind == kind) for kind in kinds)
    if seen and known:
        found.append(
            f"It saw {seen:,} samples in training, from {known:,} different ones: each "
            f"{seen / known:.1f} times on average."
        )
    if config.get("image_size"):
        found.append(f"Its images have {config['image_size']} px a side.")
    context = config.get("model", {}).get("text_tokens") or config.get("context_length")
    if context:
        found.append(f"Of a caption it reads the first {context} tokens.")
    if model["kind"].endswith("_prior") and not model["validation"]:
        found.append("Nothing was held out to validate it on while it trained.")
    if str(config.get("clip", "")).endswith(":random"):
        found.append("Its encoder is untrained: the weights only show that the code runs.")
    return list(dict.fromkeys(found))


def _render(name: str, **facts: Any) -> str:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=False,  # Markdown: `code` and `words` keep what is quoted from being more
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(code=code, words=words, plain=plain)
    return templates.get_template(name).render(**facts)


def code(value: Any) -> str:
    """Quote a value in one line of Markdown, as code that it cannot leave."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (1 + max([0, *(len(run) for run in re.findall("`+", text))]))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def plain(value: Any) -> str:
    """Quote text in one line of Markdown, in which no sign of it means anything."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(str(value).split()))


def words(value: Any) -> str:
    """Show a number with its thousands, a share to four digits, anything else as code."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file holds no facts."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found a JSON {type(found).__name__}, expected an object")
    return found


def _write(path: Path, text: str) -> Path:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)
