"""Held-out images at each checkpoint of a stage of the cascade: their loss, and a picture."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from _networks import DIT
from _runs import HERE, base_run, embeds_of, images_of, up_run
from PIL import Image

from cluster.base.cli import with_options
from cluster.base.jsonl import read_lines
from models.configs import DecoderConfig
from models.convert.runs import load_model
from models.convert.unets import decoder_to_diffusers
from models.decoder import Decoder
from training.config import DecoderRunConfig, TrainConfig
from training.data.dataloader import as_batch
from training.data.inputs import prepare_data
from training.engine.precision import device_of_run
from training.runs.worker import launch
from training.tasks import decoder as jobs
from training.tasks.decoder import Validation

TRAIN = TrainConfig.of(
    **HERE, num_steps=2, checkpoint_every=1, global_batch_size=8, precision="fp32"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=10)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("held_out"), num_shards=1, samples_per_shard=12)



def base(data: Path, held_out: Path, run: Path) -> DecoderRunConfig:
    held = {"validation": images_of(held_out), "validation_embeds": embeds_of(held_out)}
    return base_run(data, run, TRAIN, **held)


def transformer(data: Path, held_out: Path, run: Path) -> DecoderRunConfig:
    model = DecoderConfig(
        network="dit", dit=DIT, context_width=8, prediction="x0", weighting="v"
    )  # fmt: skip
    return dataclasses.replace(base(data, held_out, run), base=model)


def upsampler(data: Path, held_out: Path, run: Path) -> DecoderRunConfig:
    return up_run(data, run, TRAIN, validation=images_of(held_out))


@pytest.mark.parametrize(
    ("make", "num_rows", "size"), [(base, 2, 16), (transformer, 2, 16), (upsampler, 3, 32)]
)
def test_each_checkpoint_tells_the_loss_on_held_out_images_and_draws(
    make: Callable, num_rows: int, size: int, data: Path, held_out: Path, tmp_path: Path
):
    config = prepare_data(make(data, held_out, tmp_path / "run"))
    assert launch(config, config.run, jobs.build_decoder, "decoder") == 0
    run = Path(config.run)
    records = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in records] == [1, 2]
    for line in records:
        with Image.open(run / "validation" / f"step_{line['step']:08d}.png") as picture:
            assert picture.height > num_rows * size and picture.width > 8 * size
    job = jobs.build_decoder(dataclasses.replace(config, validation=(), validation_embeds=()))
    model, _ = load_model(run, "upsampler" if make is upsampler else "decoder")
    images, embeds = jobs.latest(config.validation), jobs.latest(config.validation_embeds)
    reader = jobs.stage_dataset(config, images, embeds)
    index = torch.arange(12)
    with torch.no_grad():
        batch = job.collate(as_batch(reader.read(index.numpy()), index))
        losses = job.objective(model, batch)["loss"]
    assert records[-1]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_a_transformer_is_fine_tuned_as_itself_alone(
    data: Path, held_out: Path, tmp_path: Path
):
    config = prepare_data(transformer(data, held_out, tmp_path / "run"))
    assert launch(config, config.run, jobs.build_decoder, "decoder") == 0
    model, _ = load_model(tmp_path / "run", "decoder")
    tuned = dataclasses.replace(config, run=str(tmp_path / "tuned"), init=config.run)
    started = jobs.build_decoder(tuned).model.state_dict()
    assert all(torch.equal(started[name], value) for name, value in model.state_dict().items())
    wider = dataclasses.replace(DIT, width=32)
    for changed, message in (
        (base(data, held_out, Path(tuned.run)).base, "network: found 'dit', expected 'unet'; pass"),
        (dataclasses.replace(config.base, dit=wider), "dit.width: found 16, expected 32; pass"),
    ):
        with pytest.raises(ValueError, match=message):
            jobs.build_decoder(dataclasses.replace(tuned, base=changed))
    with pytest.raises(ValueError, match="network: found 'dit', expected 'unet'"):
        decoder_to_diffusers(cast(Decoder, model), tmp_path / "pipeline")


def test_a_kill_during_validation_loses_no_scores(data: Path, held_out: Path, tmp_path: Path):
    """What a run killed there leaves: a whole checkpoint, no line of it, no mark of the end."""
    config = prepare_data(base(data, held_out, tmp_path / "run"))
    run, lines = tmp_path / "run", tmp_path / "run" / "validation.jsonl"
    assert launch(config, config.run, jobs.build_decoder, "decoder") == 0
    expected = [(line["step"], line["loss"]) for line in read_lines(lines)]
    lines.write_text(lines.read_text().splitlines(keepends=True)[0])
    (run / "final.json").unlink()
    assert launch(config, config.run, jobs.build_decoder, "decoder") == 0
    assert [(line["step"], line["loss"]) for line in read_lines(lines)] == expected
    assert (run / "final.json").is_file()


def test_validation_is_where_training_is(data: Path, held_out: Path, tmp_path: Path):
    config = base(data, held_out, tmp_path / "run")
    train = with_options(TRAIN, device="cpu")
    job = jobs.build_decoder(prepare_data(dataclasses.replace(config, train=train)))
    assert isinstance(job.validate, Validation) and job.validate.device == "cpu"
    assert device_of_run("cpu").type == "cpu"


def test_held_out_embeddings_are_of_the_run_s_encoder_and_one_folder_for_each_of_images(
    data: Path, held_out: Path, tmp_path: Path
):
    config = base(data, held_out, tmp_path / "run")
    with pytest.raises(ValueError, match="validation_embeds: found 0 folders for 1 of images"):
        prepare_data(dataclasses.replace(config, validation_embeds=()))
    with pytest.raises(ValueError, match="validation_embeds: found 1 .* upsampler"):
        changed = {"validation_embeds": config.validation_embeds}
        prepare_data(dataclasses.replace(upsampler(data, held_out, tmp_path / "up"), **changed))
    manifest = held_out / "embeds" / "_manifest.json"
    original = manifest.read_text()
    content = json.loads(original)
    content["encoder_id"] = "another"
    manifest.write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match="found embeddings of encoder another"):
            jobs.build_decoder(config)
    finally:
        manifest.write_text(original)
