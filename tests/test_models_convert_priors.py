"""diffusers' own prior is the oracle: converted weights give its outputs, there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from safetensors.torch import load_file, save_file

from models.configs import DiffusionPriorConfig
from models.convert.files import WEIGHTS_NAME
from models.convert.priors import prior_from_diffusers, prior_to_diffusers
from models.priors.base import PriorText
from models.priors.diffusion import DiffusionPrior, TextCache

SHAPES = [  # heads, channels a head, layers, E, L
    (2, 8, 1, 12, 5),
    (4, 16, 3, 32, 20),
    (1, 64, 2, 24, 77),
]


def random_prior(shape: tuple[int, ...], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    heads, head, layers, dim, words = shape
    model = PriorTransformer(
        num_attention_heads=heads, attention_head_dim=head, num_layers=layers, embedding_dim=dim,
        num_embeddings=words, additional_embeddings=4,
    )  # fmt: skip
    for parameter in model.parameters():  # some are built as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    model.clip_mean.data.normal_()
    model.clip_std.data.uniform_(0.5, 2)
    return model.eval()


def asked(shape: tuple[int, ...], count: int = 6) -> tuple[torch.Tensor, torch.Tensor, PriorText]:
    """x_t, t and captions of 1 to L words."""
    *_, dim, words = shape
    rng = torch.Generator().manual_seed(1)
    lengths = torch.linspace(1, words, count).long()
    text = PriorText(
        text_embed=torch.randn(count, dim, generator=rng),
        text=torch.randn(count, words, dim, generator=rng),
        token_mask=torch.arange(words) < lengths[:, None],
    )
    t = torch.randint(0, 1000, (count,), generator=rng)
    return torch.randn(count, dim, generator=rng), t, text


@torch.no_grad()
def theirs(model: Any, x: torch.Tensor, t: torch.Tensor, text: PriorText) -> torch.Tensor:
    inputs = {"proj_embedding": text.text_embed, "encoder_hidden_states": text.text}
    mask = text.token_mask
    return model(x, timestep=t, attention_mask=mask, **inputs).predicted_image_embedding


@torch.no_grad()
def ours(
    prior: DiffusionPrior, x: torch.Tensor, t: torch.Tensor, text: PriorText | TextCache
) -> torch.Tensor:
    return prior(x, t, text, torch.zeros(len(x), dtype=torch.bool))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_converted_prior_says_what_diffusers_does(shape: tuple[int, ...], tmp_path: Path):
    model = random_prior(shape)
    model.save_pretrained(tmp_path)
    prior = prior_from_diffusers(tmp_path)
    x, t, text = asked(shape)
    expected = theirs(model, x, t, text)
    torch.testing.assert_close(ours(prior, x, t, text), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        cache = prior.prefill(text, torch.zeros(len(x), dtype=torch.bool))
    for _ in "ab":  # what is read once serves every step
        torch.testing.assert_close(ours(prior, x, t, cache), expected, atol=1e-5, rtol=1e-5)
    z = prior.scale.restore(x)
    whole = model.post_process_latents(x)
    torch.testing.assert_close(z, torch.nn.functional.normalize(whole, dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prior_goes_back_to_diffusers(shape: tuple[int, ...], tmp_path: Path):
    heads, head, layers, dim, words = shape
    torch.manual_seed(0)
    sizes = DiffusionPriorConfig(
        width=heads * head, depth=layers, num_heads=heads, qk_norm=False, scale_text=False,
        time_channels=heads * head,
    )  # fmt: skip
    prior = DiffusionPrior(sizes, embed_dim=dim, text_width=dim, context_length=words).eval()
    prior.scale.set(torch.randn(dim), torch.rand(dim) + 0.5)
    prior_to_diffusers(prior, tmp_path)
    loaded: Any = PriorTransformer.from_pretrained(tmp_path)
    x, t, text = asked(shape)
    expected = theirs(loaded.eval(), x, t, text)
    torch.testing.assert_close(ours(prior, x, t, text), expected, atol=1e-5, rtol=1e-5)
    again = prior_from_diffusers(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in prior.state_dict().items()
               if "null" not in k and k != "scale.spectrum")  # fmt: skip



def test_the_null_caption_is_the_empty_one_of_the_pipelines(tmp_path: Path):
    """A dropped caption is read as diffusers' pipeline reads ""."""
    shape = SHAPES[1]
    model = random_prior(shape)
    model.save_pretrained(tmp_path)
    x, t, text = asked(shape)
    empty = PriorText(**{name: value[1:2] for name, value in vars(text).items()})
    prior = prior_from_diffusers(tmp_path, null=empty)
    with torch.no_grad():
        found = prior(x, t, text, torch.ones(len(x), dtype=torch.bool))
    many = PriorText(**{n: v.expand(len(x), *v.shape[1:]) for n, v in vars(empty).items()})
    torch.testing.assert_close(found, theirs(model, x, t, many), atol=1e-5, rtol=1e-5)


def test_schedule_and_noise_are_those_of_unclips_scheduler():
    prior = DiffusionPrior(
        DiffusionPriorConfig(width=16, depth=1, num_heads=2),
        embed_dim=8, text_width=8, context_length=4,
    )  # fmt: skip
    theirs = UnCLIPScheduler(num_train_timesteps=1000).alphas_cumprod
    torch.testing.assert_close(prior.schedule.alpha_bar.float(), theirs, atol=1e-6, rtol=1e-3)


def test_what_is_no_such_prior_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="found no configuration of PriorTransformer"):
        prior_from_diffusers(tmp_path)
    random_prior(SHAPES[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DModel"}, "found a UNet2DModel, expected"),
        ({"norm_in_type": "layer"}, "norm_in_type: found 'layer', expected None"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            prior_from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(str(tmp_path / WEIGHTS_NAME))
    save_file({**tensors, "extra": torch.zeros(1)}, str(tmp_path / WEIGHTS_NAME))
    with pytest.raises(ValueError, match="found tensors without a place: extra"):
        prior_from_diffusers(tmp_path)
    save_file(dict(list(tensors.items())[1:]), str(tmp_path / WEIGHTS_NAME))
    with pytest.raises(ValueError, match=f"tensor {next(iter(tensors))}: found none, expected it"):
        prior_from_diffusers(tmp_path)
    del config["num_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_layers: found none in config.json"):
        prior_from_diffusers(tmp_path)


def test_what_diffusers_cannot_be_is_not_written(tmp_path: Path):
    prior = DiffusionPrior(
        DiffusionPriorConfig(width=16, depth=1, num_heads=2),
        embed_dim=8, text_width=8, context_length=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="qk_norm: found True, expected False"):
        prior_to_diffusers(prior, tmp_path / "out")
    assert not (tmp_path / "out").exists()
