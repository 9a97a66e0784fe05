"""Samples, and the scores of the chain that drew them: seeded, resumable, and of one setting."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eval import fid, sample
from eval.features.extractors import Extractor, ExtractorSpec
from eval.fid import FidConfig
from eval.sample import SampleConfig
from eval.sampling.chain import Model
from eval.sampling.generate import default_sampling, sampling_of
from eval.sampling.image_source import open_images
from eval.sampling.sample_job import settings_of
from models.convert.runs import load_clip
from models.diffusion.samplers import analytic_ddpm, learned_ddpm
from models.unclip import UnClip
from models.weights import exported, save_weights

CAPTIONS = ("a red cube", "a blue cone", "a red cube", "two dogs", "a hat")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_chain: Callable) -> SampleConfig:
    runs = write_chain(tmp_path_factory.mktemp("runs"), load_clip("tiny:random"), 32)
    return SampleConfig(
        prior=str(runs["prior"]), decoder=str(runs["decoder"]), upsampler=(str(runs["upsampler"]),),
        prompts=CAPTIONS, batch_size=2, prior_steps=2, decoder_steps=2, upsampler_steps=2,
        precision="fp32", num_threads=1,
    )  # fmt: skip


def drawn(config: SampleConfig, out: Path, **changes) -> list[np.ndarray]:
    """Sample into `out`; returns the images."""
    assert sample.main(dataclasses.replace(config, out=str(out), **changes)) == 0
    return pixels_of(out)


@pytest.fixture(scope="module")
def samples(config: SampleConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "samples"
    drawn(config, out)
    return out


@pytest.fixture
def drawn_once(samples: Path, tmp_path: Path) -> Path:
    """A copy of the samples of `config`, to be changed."""
    return Path(shutil.copytree(samples, tmp_path / "samples"))


def pixels_of(samples: Path) -> list[np.ndarray]:
    """uint8 images [64, 64, 3]."""
    return [np.asarray(image, np.int16) for image in open_images(str(samples))]


def test_an_image_depends_on_seed_and_caption_and_not_on_its_batch(
    config: SampleConfig, samples: Path, tmp_path: Path
):
    pairs = pixels_of(samples)
    alone = drawn(config, tmp_path / "b", batch_size=1)
    assert all(abs(x - y).max() <= 1 for x, y in zip(pairs, alone, strict=True))
    assert abs(pairs[0] - pairs[2]).max() > 8, "repeats of a caption differ"
    other = drawn(config, tmp_path / "c", seed=1)
    assert all(abs(x - y).max() > 8 for x, y in zip(pairs, other, strict=True))


def test_bf16_is_fp32_up_to_rounding(config: SampleConfig, samples: Path, tmp_path: Path):
    exact = pixels_of(samples)
    rounded = drawn(config, tmp_path / "b", precision="bf16")
    assert 0 < np.mean([abs(x - y).mean() for x, y in zip(exact, rounded, strict=True)]) < 4


def test_a_rerun_draws_what_is_missing_as_it_was(
    config: SampleConfig, drawn_once: Path, capsys: pytest.CaptureFixture
):
    before = pixels_of(drawn_once)
    (drawn_once / "000003.png").unlink()
    (drawn_once / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match="found unfinished samples; rerun eval/sample.py"):
        open_images(str(drawn_once))
    capsys.readouterr()
    after = drawn(config, drawn_once)
    assert "2 images drawn, 3 were there" in capsys.readouterr().out, "the batch of the lost one"
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_guide_leads_away_from_itself(
    config: SampleConfig, own_chain: SampleConfig, tmp_path: Path
):
    """The chain's own decoder as its guide leads nowhere, whatever the scale; another one does."""
    strong = {"cfg_scale": 4.0, "upsampler": ()}
    plain = drawn(config, tmp_path / "plain", cfg_scale=1.0, upsampler=())
    itself = drawn(config, tmp_path / "itself", guide=config.decoder, **strong)
    assert all(abs(x - y).max() <= 1 for x, y in zip(plain, itself, strict=True))
    trained_again(own_chain.decoder)
    other = drawn(config, tmp_path / "other", guide=own_chain.decoder, **strong)
    assert any(abs(x - y).max() > 8 for x, y in zip(plain, other, strict=True))
    with pytest.raises(ValueError, match="found samples of another guide"):
        drawn(config, tmp_path / "itself", guide=own_chain.decoder, **strong)


def test_guidance_keeps_to_its_interval(config: SampleConfig, tmp_path: Path):
    """Two trailing steps are at the end and in the middle of the noising time."""
    config = dataclasses.replace(config, spacing="trailing")
    plain = drawn(config, tmp_path / "plain", cfg_scale=1.0)
    never = drawn(config, tmp_path / "never", cfg_scale=4.0, guidance_interval=(0.1, 0.3))
    always = drawn(config, tmp_path / "always", cfg_scale=4.0)
    assert all(np.array_equal(x, y) for x, y in zip(plain, never, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(plain, always, strict=True))
    with pytest.raises(ValueError, match="guidance_interval: found 0.5 0.2, expected 0 <= low"):
        drawn(config, tmp_path / "wrong", guidance_interval=(0.5, 0.2))


def test_as_many_are_drawn_at_once_as_is_said(
    config: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = list[int]()
    render = UnClip.render

    def counted(self: UnClip, keys: torch.Tensor, *rest, **more) -> torch.Tensor:
        sizes.append(len(keys))
        return render(self, keys, *rest, **more)

    monkeypatch.setattr(UnClip, "render", counted)
    quick = {"decoder_steps": 1, "prior_steps": 1, "upsampler": ()}
    drawn(config, tmp_path, prompts=("a cube",) * 70, batch_size=60, **quick)
    assert sizes == [60, 10]


def test_a_device_that_is_not_here_is_refused(config: SampleConfig, tmp_path: Path):
    with pytest.raises(ValueError, match="device: found 'cuda:99' on a machine with"):
        drawn(config, tmp_path, device="cuda:99")
    for name in ("gpu", "mps"):
        with pytest.raises(ValueError, match=f"device: found '{name}', expected auto, cpu, cuda"):
            drawn(config, tmp_path, device=name)


def test_samples_of_other_settings_are_refused_unless_fresh(drawn_once: Path, config: SampleConfig):
    changes = {
        "cfg_scale": 9.0, "precision": "bf16", "captions": ("another",), "seed": 3,
    }  # fmt: skip
    for field, value in changes.items():
        other = {"prompts" if field == "captions" else field: value}
        with pytest.raises(ValueError, match=f"found samples of another {field}"):
            drawn(config, drawn_once, **other)
    assert len(drawn(config, drawn_once, fresh=True, seed=3)) == len(CAPTIONS)


def trained_again(run: str) -> None:
    """Change one weight of a finished run, in place."""
    path = exported(Path(run)) / "ema.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
    tensors[max(tensors)].view(-1)[0] += 1
    save_weights(path, tensors)


@pytest.fixture
def own_chain(config: SampleConfig, tmp_path: Path) -> SampleConfig:
    """The chain in folders that the test may change."""
    copies = {}
    for part, run in (("prior", config.prior), ("decoder", config.decoder),
                      ("upsampler", config.upsampler[0])):  # fmt: skip
        copies[part] = str(shutil.copytree(run, tmp_path / "chain" / part))
    return dataclasses.replace(config, **{**copies, "upsampler": (copies["upsampler"],)})


def test_samples_of_a_part_that_was_trained_again_are_refused_unless_fresh(
    own_chain: SampleConfig, tmp_path: Path
):
    out = tmp_path / "out"
    drawn(own_chain, out)
    for part in ("prior", "decoder", "upsampler"):
        run = tmp_path / "chain" / part
        weights = exported(run) / "ema.safetensors"
        before = weights.read_bytes()
        trained_again(str(run))
        with pytest.raises(ValueError, match=f"found samples of another {part}_weights .*sha256"):
            drawn(own_chain, out)
        weights.write_bytes(before)
    trained_again(own_chain.decoder)
    drawn(own_chain, out, fresh=True)


def test_settings_tell_step_and_weights_of_every_part(config: SampleConfig, samples: Path):
    settings = json.loads((samples / "settings.json").read_text())
    assert settings["encoder_id"] == load_clip("tiny:random").encoder_id
    parts = [settings["prior_weights"], settings["decoder_weights"], *settings["upsampler_weights"]]
    for part, run in zip(parts, (config.prior, config.decoder, *config.upsampler), strict=True):
        content = (Path(run) / "step_00000004" / "ema.safetensors").read_bytes()
        assert part == {"step": "step_00000004", "sha256": hashlib.sha256(content).hexdigest()}


def test_finished_samples_are_left_alone(config: SampleConfig, drawn_once: Path):
    def written() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in drawn_once.iterdir()}

    before = written()
    drawn(config, drawn_once)
    assert written() == before


def test_settings_on_disk_give_the_sampling_they_were_drawn_with(
    config: SampleConfig, samples: Path
):
    settings = json.loads((samples / "settings.json").read_text())
    found = sampling_of(settings)
    assert (found.prior.sample_steps, found.precision) == (2, "fp32")
    assert found.decoder.cfg_scale == config.cfg_scale
    defaults = sampling_of({"unknown": 1})
    assert defaults.prior.sample_steps == default_sampling().prior.sample_steps
    spacings = [part.spacing for part in (defaults.prior, defaults.decoder, defaults.upsampler)]
    assert spacings == ["trailing", "karras", "karras"]  # of ddpm, and of dpmpp_2m twice
    assert sampling_of({"prior_sampler": "analytic_ddpm"}).prior.sampler is analytic_ddpm
    paper = sampling_of(
        {"sampler": "learned_ddpm", "upsampler_sampler": "ddim", "spacing": "strided"}
    )
    assert paper.decoder.sampler is learned_ddpm and paper.decoder.spacing == "strided"
    assert paper.prior.spacing == paper.upsampler.spacing == "strided"
    for wrong in ({"sampler": "learned_ddpm"}, {"upsampler_sampler": "analytic_ddpm"},
                  {"sampler": "analytic_ddpm"}, {"prior_sampler": "learned_ddpm"}):  # fmt: skip
        with pytest.raises(ValueError, match="sampler: found '.*_ddpm', expected one of ddim, "):
            sampling_of(wrong)
    assert sampling_of({"top_share": 0.25, "temperature": 2.0}).prior.top_share == 0.25
    with pytest.raises(ValueError, match="found 'euler', expected one of ddim, .*analytic_ddpm"):
        sampling_of({"prior_sampler": "euler"})


# -- what is refused ------------------------------------------------------------------------------


def test_wrong_options_leave_the_folder_to_the_right_ones(config: SampleConfig, tmp_path: Path):
    for name, value, message in (
        ("sampler", "ddin", "found 'ddin'"),
        ("decoder_steps", 0, "found 0, expected 1 or more"),
        ("seed", 10**20, "found 100000000000000000000, expected a number of 64 bits"),
        ("best_of", 0, "found 0, expected 1 or more"),
        ("top_share", 5.0, "found 5.0, expected more than 0"),
        ("temperature", -1.0, "found -1, expected 0 or more"),
        ("cfg_scale", float("nan"), "found nan, expected a finite number"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            drawn(config, tmp_path / "out", **{name: value})
    assert len(drawn(config, tmp_path / "out")) == len(CAPTIONS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "--batch-size: found 0, expected 1 or more"),
        ({"limit": -1}, "--limit: found -1, expected 0 or more"),
        ({"num_threads": 0}, "--num-threads: found 0, expected 1 or more"),
        ({"guide": "runs/weak", "cfg_scale": 1.0}, "--guide: found runs/weak with --cfg-scale 1"),
        ({"upsampler": (), "upsampler_tile": 7}, "--upsampler-tile: found it without"),
    ],
)
def test_wrong_numbers_and_options_of_no_use_are_refused(
    wrong: dict, message: str, config: SampleConfig
):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **wrong)


def test_captions_beyond_the_context_are_told(config: SampleConfig, capsys):
    length = load_clip("tiny:random").context_length
    captions = ["a " * (length - 2), "a " * (length - 1), "a cat", "very " * 300]
    model = Model(prior=config.prior, decoder=config.decoder)
    settings_of(model, captions, {}, "cpu")
    assert f"2 of 4 captions have more than the {length} tokens" in capsys.readouterr().out
    settings_of(model, captions[:1], {}, "cpu")
    assert "captions have" not in capsys.readouterr().out


def test_only_a_folder_of_samples_is_deleted(config: SampleConfig, tmp_path: Path):
    """Other tools write a settings.json, too."""
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(ValueError, match="expected samples or nothing"):
        drawn(config, tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").is_file()


def test_a_folder_that_was_left_before_its_first_image_is_taken_up(
    config: SampleConfig, tmp_path: Path
):
    (tmp_path / "settings.part").write_text('{"see')
    assert len(drawn(config, tmp_path)) == len(CAPTIONS)
    left = [path.name for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert not left


# -- the ablation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=6)


@pytest.fixture(scope="module")
def of_data(config: SampleConfig, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the captions of `data`."""
    out = tmp_path_factory.mktemp("of_data") / "samples"
    drawn(config, out, prompts=(), captions=str(data / "images"), seed=5)
    return out


@pytest.fixture
def fid_config(config: SampleConfig, data: Path, of_data: Path, tmp_path: Path) -> FidConfig:
    """The evaluation of samples of `data`'s captions."""
    fake = shutil.copytree(of_data, tmp_path / "of_data")
    return FidConfig(
        real=str(data / "images"), fake=str(fake), embeds=str(data / "embeds"),
        clip="tiny:random", prior=config.prior, decoder=config.decoder, upsampler=config.upsampler,
        out=str(tmp_path / "scores" / "scores.json"), num_threads=1,
    )  # fmt: skip


def evaluated(config: FidConfig) -> dict:
    assert fid.main(config) == 0
    return json.loads(Path(config.out).read_text())


def test_the_ablations_chain_is_the_samples(fid_config: FidConfig, tmp_path: Path):
    scores = evaluated(fid_config)
    assert set(scores["ablation"]) == {"true_image_embed", "prior", "text_embed"}
    for name, values in scores["ablation"]["prior"].items():
        found = scores["shapes"][name]
        assert values == {key: found[key] for key in found.keys() - {"real", "captions_sha256"}}
    picture = Image.open(Path(fid_config.fake) / "ablation.png")
    assert picture.height > 3 * 64
    found = {path.name for path in Path(fid_config.out).parent.iterdir()}
    assert found == {"scores.json", "scores_features"}, "pictures are kept beside the samples"


def test_the_ablation_decodes_as_the_samples_were(
    fid_config: FidConfig, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """Given the prior's own embeddings in the text's place, it draws the samples again."""
    from eval.sampling.chain import load_chain
    from eval.scores import scorecard

    fake = open_images(fid_config.fake)
    captions, image, _ = scorecard.read_embeds(fid_config.embeds)
    chain = load_chain("", fid_config.prior, fid_config.decoder, fid_config.upsampler)
    sampling, places = sampling_of(fake.settings), []
    for start in range(0, len(captions), 2):
        keys = scorecard.caption_keys(captions[start : start + 2], 5, start)
        places.append(chain.sample_prior(keys, captions[start : start + 2], sampling))
    embeds = (captions, image, torch.cat(places))
    shown = range(len(captions))
    _, images = scorecard.ablation(chain, embeds, fake, lambda found: {}, shown)
    again = images["text_embed"].astype(np.int16)
    assert abs(again - images["prior"].astype(np.int16)).max() <= 2


def test_other_samples_get_no_ablation_and_hear_why(
    fid_config: FidConfig, capsys: pytest.CaptureFixture
):
    other = dataclasses.replace(fid_config, upsampler=())
    assert "ablation" not in evaluated(other)
    assert "ablation: left out" in capsys.readouterr().out


# -- the evaluation --------------------------------------------------------------------------------


def test_a_prior_is_scored_without_a_decoder(fid_config: FidConfig):
    whole = evaluated(fid_config)
    alone = evaluated(dataclasses.replace(fid_config, decoder="", upsampler=()))
    assert "ablation" not in alone and alone["prior"] == whole["prior"]


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ({"embeds": ""}, "--prior: found it without --embeds"),
        ({"prior": ""}, "--decoder: found it without --prior"),
        ({"decoder": ""}, "--upsampler: found it without --decoder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    left_out: dict, message: str, fid_config: FidConfig
):
    with pytest.raises(ValueError, match=message):
        fid.main(dataclasses.replace(fid_config, **left_out))


def test_other_features_need_no_clip(
    fid_config: FidConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    class ColoursSpec(ExtractorSpec):
        """Stands for Inception, whose weights are another test's matter."""

        def build(self, device: object) -> Extractor:
            return lambda images: np.stack([np.asarray(x, np.float64).mean((0, 1)) for x in images])

    spec = ColoursSpec(
        space="inception", name="colours", resize="none", any_size=False, official=False
    )
    monkeypatch.setattr("eval.evaluation.network_spec", lambda request, space: spec)
    monkeypatch.chdir(Path(fid_config.fake))  # where there is no runs/clip
    bare = FidConfig(
        real=fid_config.real, fake=fid_config.fake, out=fid_config.out, features=("inception",),
        num_threads=1,
    )  # fmt: skip
    images = evaluated(bare)["images"]
    assert images["features"] == "colours" and images["fd"] > 0
    assert not {"judge", "clip_score", "fd_clip"} & images.keys()
    output = capsys.readouterr().out
    assert "clip_score: left out: no --clip" in output
    assert "warning: 12 images are too few to quote an FID; it takes 2049" in output
    judged = evaluated(dataclasses.replace(bare, clip="tiny:random"))["images"]
    assert judged["fd"] == images["fd"] and judged["judge"].startswith("clip tiny@")
    assert judged["judge_relation"] == "the CLIP that the model was trained on"
    assert "clip_score" in judged


def test_samples_of_an_earlier_training_get_no_ablation(
    fid_config: FidConfig, own_chain: SampleConfig, data: Path, capsys: pytest.CaptureFixture
):
    runs = {name: getattr(own_chain, name) for name in ("prior", "decoder", "upsampler")}
    mine = dataclasses.replace(fid_config, **runs)
    assert "ablation" in evaluated(mine), "a copy of the chain is the chain"
    trained_again(own_chain.decoder)
    assert "ablation" not in evaluated(mine)
    assert "ablation: left out" in capsys.readouterr().out
