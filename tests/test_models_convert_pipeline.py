"""diffusers' whole UnCLIPPipeline is the oracle: a chain converted from it draws its images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from test_models_convert_priors import random_prior
from test_models_convert_unets import SIZE, their_decoder, their_upsampler
from torch import Tensor

from models.clip import FrozenClip
from models.convert.runs import load_clip
from models.decoder import ImageSampling
from models.diffusion.samplers import SAMPLERS
from models.diffusion.schedule import NoiseSchedule
from models.priors.base import PriorSampling
from models.tokenizers import token_mask
from models.unclip import Sampling, UnClip
from training import convert

ENCODER = "tiny:random+raw"
CAPTIONS = ["a red cube", "a very small green circle left of a large blue square", ""]
STEPS = (6, 5, 4)  # of the prior, the decoder, the upsampler
SCALES = (3.0, 4.0)


class Scheduler(UnCLIPScheduler):
    """diffusers' own over our table: theirs is a product of a thousand float32 factors."""

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(*arguments, **options)
        self.alphas_cumprod = NoiseSchedule.build("cosine").alpha_bar


class Tokenizer:
    """Ours, as the pipeline calls that of transformers."""

    def __init__(self, encoder: FrozenClip) -> None:
        self.tokenize, self.model_max_length = encoder.tokenize, encoder.context_length

    def __call__(self, captions: list[str], **_: Any) -> Any:
        tokens = torch.from_numpy(self.tokenize(captions))
        return SimpleNamespace(input_ids=tokens, attention_mask=token_mask(tokens))


class TextTower:
    """Ours, as the pipeline calls that of transformers."""

    def __init__(self, encoder: FrozenClip) -> None:
        self.encoder = encoder

    def __call__(self, tokens: Tensor) -> Any:
        embed, states = self.encoder.encode_text(tokens)
        return SimpleNamespace(text_embeds=embed, last_hidden_state=states)


def noise_number(number: int, shape: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + number))


def theirs(monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], encoder: FrozenClip) -> Tensor:
    """Run the pipeline; what its schedulers draw is numbered from 3 on."""
    count = iter(range(3, 1000))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_unclip.randn_tensor",
        lambda shape, **_: noise_number(next(count), shape),
    )
    words: Any = {"tokenizer": Tokenizer(encoder), "text_encoder": TextTower(encoder)}
    pipeline = UnCLIPPipeline(**parts, **words)
    pipeline.set_progress_bar_config(disable=True)
    found: Any = pipeline(
        CAPTIONS,
        prior_latents=noise_number(0, (3, encoder.embed_dim)),
        decoder_latents=noise_number(1, (3, 3, SIZE, SIZE)),
        super_res_latents=noise_number(2, (3, 3, 2 * SIZE, 2 * SIZE)),
        prior_num_inference_steps=STEPS[0], decoder_num_inference_steps=STEPS[1],
        super_res_num_inference_steps=STEPS[2], prior_guidance_scale=SCALES[0],
        decoder_guidance_scale=SCALES[1], output_type="np",
    )  # fmt: skip
    assert next(count) == 3 + sum(STEPS) - 3  # all but the last steps draw
    return 2 * torch.from_numpy(found.images).permute(0, 3, 1, 2) - 1


def ours(monkeypatch: pytest.MonkeyPatch, folder: Path, encoder: FrozenClip) -> Tensor:
    """Draw with the runs that are converted from the pipeline's folders."""
    for part in ("prior", "decoder", "upsampler"):
        clip = "" if part == "upsampler" else ENCODER
        config = convert.ConvertConfig(
            part=part, diffusers=str(folder), run=str(folder / f"run_{part}"), clip=clip, factor=2
        )  # fmt: skip
        assert convert.main(config) == 0
    runs = [str(folder / f"run_{part}") for part in ("prior", "decoder", "upsampler")]
    chain = UnClip.load(encoder, runs[0], runs[1], (runs[2],))
    before = {"prior": 3, "decoder": 2 + STEPS[0], "upsampler": 1 + STEPS[0] + STEPS[1]}

    def normal(keys: Tensor, purpose: str, shape: Any) -> Tensor:
        part, *rest = purpose.split("_")
        start, step = list(before).index(part), rest[0 if part == "decoder" else 1 :]
        number = before[part] + int(step[0]) if step else start
        return noise_number(number, (len(keys), *shape))

    monkeypatch.setattr("models.diffusion.keyed_random.normal", normal)
    ddpm = SAMPLERS["ddpm"]
    prior, decoder, upsampler = STEPS
    sampling = Sampling(
        prior=PriorSampling(sampler=ddpm, sample_steps=prior, spacing="strided", best_of=1,
                            cfg_scale=SCALES[0]),
        decoder=ImageSampling(sampler=SAMPLERS["learned_ddpm"], sample_steps=decoder,
                              spacing="strided", cfg_scale=SCALES[1]),
        upsampler=ImageSampling(sampler=ddpm, sample_steps=upsampler, spacing="strided"),
    )  # fmt: skip
    keys = torch.arange(3)
    z = chain.sample_prior(keys, CAPTIONS, sampling)
    assert (z.norm(dim=1) - 1).abs().min() > 0.1
    return chain.render(keys, CAPTIONS, z, sampling)


@pytest.mark.slow
def test_a_converted_chain_draws_the_pipelines_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder = load_clip(ENCODER)
    assert encoder.embed_dim == encoder.text_width
    prior = random_prior((2, 16, 2, encoder.embed_dim, encoder.context_length))
    prior.save_pretrained(tmp_path / "prior")
    unet, project = their_decoder(embed=encoder.embed_dim)
    unet.save_pretrained(tmp_path / "decoder")
    project.save_pretrained(tmp_path / "text_proj")
    up = their_upsampler(1)
    for name in ("super_res_first", "super_res_last"):
        up.save_pretrained(tmp_path / name)
    fixed: dict[str, Any] = {"variance_type": "fixed_small_log"}
    of_prior = Scheduler(**fixed, prediction_type="sample", clip_sample_range=5.0)
    of_prior.save_pretrained(tmp_path / "prior_scheduler")
    parts = {
        "prior": prior, "decoder": unet, "text_proj": project, "super_res_first": up,
        "super_res_last": up, "prior_scheduler": of_prior,
        "decoder_scheduler": Scheduler(variance_type="learned_range"),
        "super_res_scheduler": Scheduler(**fixed),
    }  # fmt: skip
    expected = theirs(monkeypatch, parts, encoder)
    found = ours(monkeypatch, tmp_path, encoder)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.2
