"""A model card and a data card beside the exported weights: what a run recorded, as text.

    <run>/step_00001000/MODEL_CARD.md     what the weights are, how they were trained, their limits
    <run>/step_00001000/DATA_CARD.md      the snapshots they were trained on, filters, licences

Every line comes from a file that the run or its data left. What was not recorded is stated as
absent, and a limit is named where a record, or the lack of one, shows it.
"""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.base.cli import read_yaml
from cluster.base.files import Json, digest_file, write_text
from cluster.base.jsonl import read_lines
from cluster.base.run_dir import (
    CODE_NAME,
    CONFIG_NAME,
    LINE_KEYS,
    METRICS_NAME,
    SAMPLES_FOLDER,
    STATE_NAME,
    VALIDATION_NAME,
    record_path,
    snapshot_path,
)
from ingest.shards import STORED, ShardEntry, load_snapshot, read_commit, read_manifest
from ingest.store.storage import read_table
from models.weights import EMA_NAME, FINAL_NAME, MODEL_NAME, exported, load_config, num_elements

MODEL_CARD, DATA_CARD = "MODEL_CARD.md", "DATA_CARD.md"
TITLES = {
    "clip": "a CLIP: the encoder of images and captions",
    "diffusion_prior": "a diffusion prior: from a caption to a CLIP image embedding",
    "autoregressive_prior": "an autoregressive prior: from a caption to a CLIP image embedding",
    "regression_prior": "a regression prior: from a caption to a CLIP image embedding",
    "decoder": "a base decoder: from a CLIP image embedding, and the caption, to an image",
    "upsampler": "an upsampler: from an image to a larger one",
}
MAX_SHARDS = 1000  # of which licences and outcomes are counted: a card is written in seconds
SAFETY_FILTERS = ("nsfw", "max_punsafe")


def code_version() -> dict[str, str]:
    """Return the version of this project and the commit of its checkout; "" where it is none."""
    from importlib.metadata import version

    root, git, commit = Path(__file__).resolve().parents[2], shutil.which("git"), ""
    if git and (root / ".git").exists():
        command = [git, "-C", str(root), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"version": version("minidalle2"), "commit": commit}


# -- the cards -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CardScore:
    """One number of an evaluation as text: its name, its value, how it was measured."""

    name: str
    value: str
    method: str


def write_cards(run: Path, scores: Sequence[CardScore] = ()) -> list[Path]:
    """Write both cards of a finished run beside its weights, over earlier ones; return their paths.

    scores: none where nobody evaluated the weights.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=False,  # Markdown: the filters keep what is quoted from being more
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(code=quote_code, value=quote_value, plain=quote_plain)
    step, data = exported(run), describe_data(run)
    model = _describe_model(run, step)
    facts = {"model": model, "data": data, "scores": scores, "limits": _limits(model, data)}
    pages = {MODEL_CARD: "model_card.md.j2", DATA_CARD: "data_card.md.j2"}
    return [
        write_text(step / name, templates.get_template(template).render(**facts))
        for name, template in pages.items()
    ]


def ensure_cards(run: Path) -> None:
    """Write the cards of a finished run that has none."""
    if not (exported(run) / DATA_CARD).is_file():  # the one written last
        write_cards(run)


def refresh_cards(folder: Path, scores: Sequence[CardScore]) -> list[Path]:
    """Write the cards of every finished run in `folder` again, with the scores of its samples.

    A run's card gets them only if the samples record that these very weights made them.
    """
    settings = _read_object(folder / SAMPLES_FOLDER / "settings.json")
    marks = [*folder.glob(FINAL_NAME), *folder.glob(f"*/{FINAL_NAME}")]
    cards = []
    for run in sorted({path.parent for path in marks}):
        cards += write_cards(run, scores if _made_samples(run, settings) else ())
    return cards


def _made_samples(run: Path, settings: Json) -> bool:
    """Return whether samples were drawn with a run's weights, or, of a CLIP, for its encoder."""
    step = exported(run)
    if load_config(step).get("kind") == "clip":
        prior = settings.get("prior") or ""
        if not prior or not (Path(prior) / FINAL_NAME).is_file():
            return False
        return Path(load_config(exported(Path(prior))).get("clip", "")).absolute() == run.absolute()
    weights = [settings.get("prior_weights"), settings.get("decoder_weights")]
    weights += settings.get("upsampler_weights") or []
    return digest_file(step / EMA_NAME) in [(each or {}).get("sha256") for each in weights]


def _describe_model(run: Path, step: Path) -> Json:
    """Return what the model card's template shows of a run."""
    config, kind = load_config(step), load_config(step).get("kind", "")
    reports, validations = read_lines(run / METRICS_NAME), read_lines(run / VALIDATION_NAME)
    scored = validations[-1] if validations else {}
    weights = [step / name for name in (MODEL_NAME, EMA_NAME) if (step / name).is_file()]
    version, yaml = _read_object(record_path(step, 0)).get("version", ""), run / CONFIG_NAME
    return {
        "name": run.resolve().name,
        "kind": kind,
        "title": TITLES.get(kind, "a model of an unknown kind"),
        "step": step.name,
        "state": _read_object(step / STATE_NAME),
        "config": config,
        "parameters": sum(num_elements(weights[-1]).values()) if weights else None,
        "weights": {path.name: digest_file(path) for path in weights},
        "code": {"version": version, "commit": "", **_read_object(run / CODE_NAME)},
        "last": reports[-1] if reports else {},
        "validation": {n: v for n, v in scored.items() if n == "step" or n not in LINE_KEYS},
        "yaml": yaml.read_text(encoding="utf-8") if yaml.is_file() else "",
    }


def _limits(model: Json, data: "list[DataDescription]") -> list[str]:
    """Return the limits that the records show, each once."""
    limits = []
    for each in data:
        filters = each.images.get("filters")
        if each.problem:
            limits.append(f"Its data is not described: {each.problem}.")
            continue
        if str(each.images.get("source", "")).startswith("shapes"):
            limits.append("It was trained on drawn shapes alone and knows nothing else.")
        elif not each.licences:
            limits.append("No licence column was kept: the licences of its images are not known.")
        if filters is not None and not any(filters.get(name) for name in SAFETY_FILTERS):
            limits.append("No filter on unsafe images is recorded for its data.")
        if filters is not None and not filters.get("opt_out"):
            limits.append("No list of opted-out sites is recorded for its data.")
    config, seen = model["config"], model["state"].get("samples_seen")
    # Images and embeddings are of the same samples, where a run has both
    known = max(sum(x.num_samples for x in data if x.kind == kind) for kind in ("images", "embeds"))
    if seen and known:
        limits.append(
            f"It saw {seen:,} samples in training, from {known:,} different ones: each "
            f"{seen / known:.1f} times on average."
        )
    if config.get("image_size"):
        limits.append(f"Its images have {config['image_size']} px a side.")
    context = config.get("model", {}).get("text_tokens") or config.get("context_length")
    if context:
        limits.append(f"It reads the first {context} tokens of a caption.")
    if model["kind"].endswith("_prior") and not model["validation"]:
        limits.append("No data was held out to validate it while it trained.")
    if str(config.get("clip", "")).endswith(":random"):
        limits.append("Its encoder is untrained: the weights only show that the code runs.")
    return list(dict.fromkeys(limits))


# -- the data of a run -----------------------------------------------------------------------------


@dataclass(kw_only=True)
class DataDescription:
    """One data set of a run, as its folder records it; problem: why it is not described.

    images: the manifest of its images, or of those that were embedded; described: another data set
    of the run is these very images; counted: shards whose outcomes and licences were counted.
    """

    kind: str
    root: str
    digest: str
    problem: str = ""
    num_samples: int = 0
    num_shards: int = 0
    manifest: Json = field(default_factory=dict)
    images: Json = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    licences: dict[str, dict[str, int]] = field(default_factory=dict)
    counted: int = 0
    described: bool = False


def describe_data(run: Path) -> list[DataDescription]:
    """Describe each data set whose snapshot a run pinned, images before embeddings."""
    path = run / CONFIG_NAME
    config = read_yaml(path) if path.is_file() else {}
    described: list[DataDescription] = []
    for kind in ("images", "embeds"):
        for number, root in enumerate(map(str, config.get(kind) or [])):
            pinned = snapshot_path(run, f"{kind}_{number + 1}" if number else kind)
            if pinned.is_file():
                digest = pinned.read_text().strip()
                described.append(_describe_data_set(kind, root, digest))
    of_images = {each.root for each in described if each.kind == "images"}
    for each in described:
        each.described = each.kind == "embeds" and each.manifest.get("images") in of_images
    return described


def _describe_data_set(kind: str, root: str, digest: str) -> DataDescription:
    """Describe one data set by its manifest, its snapshot and the commits of its images."""
    facts = DataDescription(kind=kind, root=root, digest=digest)
    try:
        facts.manifest, snapshot = read_manifest(root), load_snapshot(root, digest)
    except (ValueError, OSError) as error:
        facts.problem = str(error)
        return facts
    facts.num_samples, facts.num_shards = snapshot.num_samples, len(snapshot.shards)
    source, facts.images = root, facts.manifest
    if kind != "images":
        source = str(facts.manifest.get("images", ""))
        try:
            facts.images = read_manifest(source) if source else {}
        except (ValueError, OSError):  # the images may be gone, or never have been shards
            facts.images = {}

    # Outcomes, and the values of stored rows in the kept columns that have "licen" in their name
    shards = snapshot.shards[:MAX_SHARDS]
    facts.counted = len(shards)
    columns = [name for name in facts.images.get("keep_columns") or [] if "licen" in name.lower()]
    outcomes: Counter[str] = Counter()
    licences: dict[str, Counter[str]] = {name: Counter() for name in columns}
    for shard in shards if facts.images else ():
        commit = read_commit(source, shard.name)
        outcomes.update(commit.counts if commit else {"not committed any more": 1})
        if columns:
            _count_licences(licences, source, shard)
    facts.outcomes = dict(outcomes.most_common())
    facts.licences = {name: dict(column.most_common(20)) for name, column in licences.items()}
    return facts


def _count_licences(licences: dict[str, Counter[str]], root: str, shard: ShardEntry) -> None:
    try:
        rows = read_table(root, f"{shard.name}.parquet", *licences, "status").to_pylist()
        stored = [row for row in rows if row["status"] == STORED]
        licences_of = {name: [str(row[name]) for row in stored] for name in licences}
    except (OSError, ValueError, KeyError):  # the last for a shard without such a column
        for column in licences.values():
            column["in a shard that cannot be read"] += shard.num_samples
        return
    for name, column in licences.items():
        column.update(licences_of[name])


# -- text ------------------------------------------------------------------------------------------


def quote_code(value: object) -> str:
    """Quote a value in one line of Markdown, as code that it cannot leave."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (1 + max([0, *(len(run) for run in re.findall("`+", text))]))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def quote_plain(value: object) -> str:
    """Quote text in one line of Markdown, in which no character has a meaning."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(str(value).split()))


def quote_value(value: object) -> str:
    """Return a count with its thousands, a float to four digits, anything else as code."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return quote_code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _read_object(path: Path) -> Json:
    """Read a JSON object; an absent file is an empty one."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content
