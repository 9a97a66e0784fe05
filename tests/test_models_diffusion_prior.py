"""Laws of the diffusion prior: who sees what and how the condition is dropped."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _priors import EMBED, LENGTH, captions, prior_of, rows
from torch import Tensor

from models.diffusion.samplers import SAMPLERS
from models.networks.transformer import Block, causal_mask
from models.priors.base import EMBED_RMS, EmbedScale, PriorSampling, PriorText
from models.priors.diffusion import DiffusionPrior


def tiny(**changes) -> DiffusionPrior:
    return prior_of("diffusion", **changes)


def predict(
    prior: DiffusionPrior, text: PriorText, *, shift: float = 0.0, drop: Any = False
) -> Tensor:
    """What a prior makes of the same noise, shifted, under some captions."""
    count, rng = len(text.text), torch.Generator().manual_seed(2)
    t = torch.randint(0, 1000, (count,), generator=rng)
    x_t = torch.randn(count, EMBED, generator=rng) + shift
    return prior(x_t, t, text, torch.as_tensor(drop).expand(count))


def test_attention_is_causal():
    """What follows a token does not change it: hidden states before a changed input stay."""
    prior, text = tiny(), captions()
    text.token_mask[:] = True
    seen: list[Any] = []
    prior.blocks[-2].register_forward_hook(lambda module, args, output: seen.append(output))
    predict(prior, text)
    text.text[:, 2] += 1.0
    predict(prior, text)
    predict(prior, text, shift=1.0)
    first, words, noised = seen
    torch.testing.assert_close(words[:, :2], first[:, :2])
    assert all((words[:, i] != first[:, i]).any() for i in range(2, prior.length))
    torch.testing.assert_close(noised[:, : LENGTH + 2], words[:, : LENGTH + 2])
    assert (noised[:, LENGTH + 2 :] != words[:, LENGTH + 2 :]).any()


def test_the_last_tokens_alone_are_what_they_are_among_all():
    block = Block(width=16, num_heads=2, qk_norm=True)
    x = torch.randn(3, LENGTH, 16)
    mask = causal_mask(LENGTH, torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5]))
    torch.testing.assert_close(block(x, mask, num_queries=2), block(x, mask)[:, -2:])


@pytest.mark.parametrize("changed", ["text", "text_embed", "token_mask"])
def test_a_dropped_condition_is_not_read_and_a_kept_one_is(changed: str):
    prior, text, drop = tiny(), captions(), [True, True, False, False]
    before = predict(prior, text, drop=drop)
    value = getattr(text, changed)
    other = dataclasses.replace(
        text, **{changed: ~value if changed == "token_mask" else value + 1}
    )
    after = predict(prior, other, drop=drop)
    torch.testing.assert_close(after[:2], before[:2])
    assert ((after[2:] - before[2:]).abs().amax(1) > 1e-3).all()


def test_the_default_scale_is_the_papers():
    """17.2 for 1024 dimensions: a unit vector divided by the buffer has the paper's norm."""
    z = F.normalize(torch.randn(3, 1024), dim=1)
    norms = EmbedScale(1024)(z).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), 17.2), atol=0.05, rtol=0)
    assert abs(EMBED_RMS * 1024**0.5 - 17.2) < 0.05


def test_scaling_whitens_and_restoring_undoes_it():
    scale = EmbedScale(EMBED)
    data = F.normalize(torch.randn(500, EMBED) * torch.linspace(0.2, 2, EMBED) + 0.3, dim=1)
    scale.set(data.mean(0), data.std(0))
    x = scale(data)
    torch.testing.assert_close(x.mean(0), torch.zeros(EMBED), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(EMBED), atol=1e-5, rtol=0)
    torch.testing.assert_close(scale.restore(x), data, atol=1e-5, rtol=0)
    scale.set(data.mean(0), torch.zeros(EMBED))  # a constant dimension stays finite
    assert scale(data).isfinite().all()


def sampling(**changes) -> PriorSampling:
    return PriorSampling(**{"sampler": SAMPLERS["dpmpp_2m"], "sample_steps": 4, **changes})


def drawn(prior: DiffusionPrior, keys: torch.Tensor, options: PriorSampling) -> torch.Tensor:
    return prior.sample(keys, rows(captions(8), keys), options)


def test_best_of_takes_the_larger_dot_product():
    prior, keys = tiny().eval(), torch.arange(8)
    text_embed = captions(8).text_embed
    one, three = (drawn(prior, keys, sampling(best_of=n)) for n in (1, 3))
    better = (three * text_embed).sum(1) - (one * text_embed).sum(1)
    assert (better >= 0).all() and (better > 0).any()
    torch.testing.assert_close(three.norm(dim=1), torch.ones(8))
    kept = better == 0  # the first draw is one of the three, unchanged
    torch.testing.assert_close(three[kept], one[kept])


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "scale_text": False}, {"depth": 1}])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "ddpm"])
def test_a_caption_that_is_read_once_is_one_that_is_read_at_every_step(
    changes: dict, sampler: str, monkeypatch: pytest.MonkeyPatch
):
    """Guided, the best of three draws, captions of one to five tokens with rubbish behind them."""
    prior, keys = tiny(**changes).eval(), torch.arange(8)
    mask = torch.arange(LENGTH) <= (keys % LENGTH)[:, None]
    text = dataclasses.replace(captions(8), token_mask=mask)
    options = sampling(sampler=SAMPLERS[sampler], cfg_scale=3.0, best_of=3)
    found = prior.sample(keys, text, options)
    words: list[int] = []
    prior.text_in.register_forward_hook(lambda module, args, output: words.append(1))
    assert torch.equal(prior.sample(keys, text, options), found) and len(words) == 2
    monkeypatch.setattr(prior, "prefill", lambda text, drop: text)
    expected = prior.sample(keys, text, options)
    assert len(words) > 2 + 3 * 2 * 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_analytic_variances_come_from_the_data(monkeypatch: pytest.MonkeyPatch):
    """Of Gaussian data by a perfect denoiser, few steps keep the spread that DDPM's own lose."""
    rng = torch.Generator().manual_seed(0)
    data = torch.randn(4000, EMBED, generator=rng) * 0.2 + 0.1
    prior = tiny().eval()
    prior.scale.set(data.mean(0), data.std(0))
    prior.scale.set_spectrum(torch.cov(data.T))
    assert prior.scale.spectrum.mean().item() == pytest.approx(1.0, abs=0.01)

    def perfect(x_t, t, text, drop):
        signal, _ = prior.schedule.coefficients(t, x_t)
        return x_t * signal  # E[x0 | x_t] where x0 has variance 1

    prior.forward = perfect
    monkeypatch.setattr(prior.scale, "restore", lambda x, unit_norm: x)
    keys, text = torch.arange(3000), captions(3000)
    spread = {
        name: prior.sample(
            keys, text, sampling(sampler=SAMPLERS[name], sample_steps=5, best_of=1)
        ).std()
        for name in ("analytic_ddpm", "ddpm")
    }
    assert spread["analytic_ddpm"] > 1.02 * spread["ddpm"]



def test_guidance_of_one_is_the_conditional_model():
    """Without guidance the unconditional half is not even evaluated."""
    prior, keys = tiny().eval(), torch.arange(8)
    before = drawn(prior, keys, sampling(cfg_scale=1.0))
    guided = drawn(prior, keys, sampling(cfg_scale=3.0))
    with torch.no_grad():
        prior.null_text.add_(1.0)
    torch.testing.assert_close(drawn(prior, keys, sampling(cfg_scale=1.0)), before)
    assert not torch.allclose(guided, before, atol=1e-3)
