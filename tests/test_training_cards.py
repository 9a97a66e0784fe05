"""Laws of the cards: every line comes from a record, what is quoted stays a quotation, and scores
stand only on the card of the weights that drew the samples."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from _runs import HERE, embeds_of, prior_run

from cluster.base.files import digest_file
from cluster.base.run_dir import CODE_NAME
from ingest.shapes import make_pairs
from ingest.shards import Attempt, Sample, publish_snapshot, write_image_shard, write_manifest
from models.weights import exported
from training.config import TrainConfig
from training.runs.cards import (
    DATA_CARD,
    MODEL_CARD,
    CardScore,
    describe_data,
    quote_code,
    quote_plain,
    refresh_cards,
    write_cards,
)
from training.runs.worker import launch
from training.tasks.prior import build_prior

HOSTILE = "`x` \n# <script>alert(1)</script> | [a](http://b)"
TRAIN = TrainConfig.of(
    **HERE, num_steps=3, global_batch_size=4, precision="fp32", checkpoint_every=2, warmup=0.3
)
SCORE = CardScore(name="Images, CLIP score", value="0.310", method="n = 30, *cosine*")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_data: Callable[..., Path]) -> Path:
    """A prior that was trained for three steps, with a validation."""
    root = write_data(tmp_path_factory.mktemp("cards"), num_shards=2, samples_per_shard=8)
    config = prior_run(root, root / "prior", TRAIN, validation=embeds_of(root))
    assert launch(config, config.run, build_prior, "prior") == 0
    return Path(config.run)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "prior"))


def card(run: Path, name: str) -> str:
    return (exported(run) / name).read_text(encoding="utf-8")


def test_a_finished_training_leaves_both_cards_beside_its_weights(finished: Path):
    text = card(finished, MODEL_CARD)
    step = exported(finished)
    assert "a diffusion prior" in text
    assert "3 optimizer steps, 12 samples seen, 0 steps skipped" in text
    for name in ("model.safetensors", "ema.safetensors"):
        assert digest_file(step / name) in text
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"Last report, at step 3: loss {last['loss']:.4g}" in text
    validated = json.loads((finished / "validation.jsonl").read_text().splitlines()[-1])
    assert f"retrieval_at_5 {validated['retrieval_at_5']:.4g}" in text
    code = json.loads((finished / CODE_NAME).read_text())
    assert f"version `{code['version']}`, commit `{code['commit'] or 'not recorded'}`" in text
    assert "None are recorded for these weights" in text
    assert "Its encoder is untrained" in text and "12 samples in training, from 16" in text
    assert (finished / "config.yaml").read_text().splitlines()[3] in text
    data = card(finished, DATA_CARD)
    digest = (finished / "snapshot_embeds.txt").read_text().strip()
    assert digest in data and "Samples: 16, in 2 shards" in data
    assert "`source`: `shapes train 0`" in data and "`stored`: 16" in data
    assert "these images were not downloaded" in data
    assert not list(step.glob("*.part"))


def test_a_rerun_of_a_finished_run_writes_the_cards_it_lacks(run: Path, capsys):
    for name in (MODEL_CARD, DATA_CARD):
        (exported(run) / name).unlink()
    config = prior_run(run, run, TRAIN, embeds=data_roots(run), validation=data_roots(run))
    assert launch(config, str(run), build_prior, "prior") == 0
    assert "finished already" in capsys.readouterr().out
    assert "a diffusion prior" in card(run, MODEL_CARD)


def data_roots(run: Path) -> tuple[str, ...]:
    return tuple(each.root for each in describe_data(run) if each.kind == "embeds")


def test_what_is_not_recorded_is_said_to_be_absent(run: Path):
    for name in ("metrics.jsonl", "validation.jsonl", CODE_NAME, "config.yaml"):
        (run / name).unlink()
    shutil.rmtree(exported(run) / "fragments")
    write_cards(run)
    text = card(run, MODEL_CARD)
    assert "version `not recorded`, commit `not recorded`" in text
    assert "No metrics were recorded" in text and "No validation was recorded" in text
    assert "No data was held out to validate it" in text
    assert "## Configuration\n\nNot recorded." in text
    assert "No snapshot is recorded with this run" in card(run, DATA_CARD)


def test_data_that_is_gone_is_named_and_does_not_stop_the_card(run: Path):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(data_roots(run)[0], "/nowhere/embeds"))
    write_cards(run)
    assert "Not described: `/nowhere/embeds" in card(run, DATA_CARD)
    assert "Its data is not described: /nowhere/embeds" in card(run, MODEL_CARD)


def test_scores_stand_on_the_card_of_the_weights_that_drew_them_alone(run: Path):
    folder = run.parent
    (folder / "samples").mkdir()
    settings = folder / "samples" / "settings.json"
    digest = digest_file(exported(run) / "ema.safetensors")
    settings.write_text(json.dumps({"prior_weights": {"sha256": "of another"}}))
    refresh_cards(folder, [SCORE])
    assert "None are recorded" in card(run, MODEL_CARD)
    settings.write_text(json.dumps({"prior_weights": {"sha256": digest}}))
    cards = refresh_cards(folder, [SCORE])
    assert cards == [exported(run) / MODEL_CARD, exported(run) / DATA_CARD]
    assert "- Images, CLIP score: 0.310 (n = 30, \\*cosine\\*)" in card(run, MODEL_CARD)
    refresh_cards(folder, [])
    assert "None are recorded" in card(run, MODEL_CARD)


def test_licences_and_outcomes_are_counted(run: Path, tmp_path: Path):
    images = tmp_path / "images"
    settings = {
        "keep_columns": ["Licence", "author"], "url_list_sha256": HOSTILE,
        "filters": {"nsfw": ["UNLIKELY"], "max_punsafe": None, "opt_out": ""},
    }  # fmt: skip
    write_manifest(images, "images", settings)
    kept = pa.schema([("Licence", pa.string()), ("author", pa.string())])
    words = ["CC0", HOSTILE, "CC0", "CC-BY"]  # of the last, nothing was stored
    rows, samples = [], []
    for i, (pair, licence) in enumerate(zip(make_pairs(4, 0, "train"), words, strict=True)):
        status = "success" if i < 3 else "failed"
        rows.append({"key": f"{i:09d}", "status": status, "Licence": licence, "author": "x"})
        if i < 3:
            samples.append(
                Sample(key=f"{i:09d}", image_bytes=pair.image_bytes, caption="", json={})
            )
    rows = [{**dict.fromkeys(("url", "caption", "error", "sha256", "width", "height",
             "original_width", "original_height")), **row} for row in rows]  # fmt: skip
    with Attempt(images, "000000") as attempt:
        write_image_shard(attempt.path, "000000", samples, rows, kept=kept)
        counts = {"stored": 3, "failed:http_404": 1}
        attempt.commit(num_samples=3, counts=counts, config_hash="")
    digest = publish_snapshot(images).digest
    (run / "config.yaml").write_text(f"images: [{images}]\nembeds: []\n")
    (run / "snapshot_images.txt").write_text(digest + "\n")
    (facts,) = describe_data(run)
    assert facts.licences == {"Licence": {"CC0": 2, HOSTILE: 1}}
    assert facts.outcomes == {"stored": 3, "failed:http_404": 1}
    write_cards(run)
    data, model = card(run, DATA_CARD), card(run, MODEL_CARD)
    assert "- `nsfw`: `['UNLIKELY']`\n\n" in data, "the other filters were off"
    assert "No list of opted-out sites" in model and "No filter on unsafe images" not in model
    assert "- `Licence` `CC0`: 2" in data and "`failed:http_404`: 1" in data
    assert "\n# <script>" not in data and f"- `Licence` {quote_code(HOSTILE)}: 1" in data
    (images / "000000.parquet").write_bytes(b"damaged")
    assert describe_data(run)[0].licences == {"Licence": {"in a shard that cannot be read": 3}}


def test_quoted_text_cannot_leave_its_line():
    assert quote_code("a\n# b") == "`a # b`"
    assert (
        quote_code("`a`") == "`` `a` ``"
        and quote_code("a``b") == "```a``b```"
        and quote_code("") == "` `"
    )
    assert quote_plain("a|b\n<c> *d*") == "a\\|b \\<c\\> \\*d\\*"
