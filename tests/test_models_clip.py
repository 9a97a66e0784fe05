"""FrozenClip against open_clip's own encoders, its preprocessing and its folded vocabulary."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import open_clip.constants
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from models.clip import (
    PIXEL_MEAN,
    PIXEL_STD,
    FrozenClip,
    build_clip,
    preprocess,
)
from models.configs import ClipConfig
from models.convert.runs import clip_config_named, load_clip
from models.diffusion.losses import contrastive
from models.tokenizers import VOCAB_SIZE, token_mask, tokenizer
from training.data.dataloader import Batch, as_batch
from training.tasks.clip import clip_objective

CAPTIONS = ["a red cube", "two blue spheres beside a green cone", ""]


@pytest.fixture(scope="module")
def tiny() -> FrozenClip:
    return load_clip("tiny:random")


def pixels(count: int, size: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8)


def picture(width: int, height: int) -> Image.Image:
    ramp = np.indices((height, width)).sum(0)[..., None] * [1, 2, 3] % 256
    return Image.fromarray(ramp.astype(np.uint8))


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 512])
def test_text_is_encoded_as_open_clip_encodes_it(vocab_size: int):
    """A folded vocabulary, too, pools at the end of text."""
    config = dataclasses.replace(clip_config_named("tiny"), vocab_size=vocab_size)
    clip = FrozenClip(build_clip(config), "tiny")
    tokens = torch.from_numpy(clip.tokenize(CAPTIONS))
    embed, states = clip.encode_text(tokens)
    expected = clip.clip.encode_text(tokens.long(), normalize=True)
    torch.testing.assert_close(embed, expected, atol=1e-5, rtol=0)
    assert states.shape == (3, clip.context_length, clip.text_width)
    end = tokens.argmax(1)  # the end of text has the largest id, and is where CLIP pools
    pooled = states[torch.arange(3), end] @ clip.clip.text_projection
    torch.testing.assert_close(F.normalize(pooled, dim=1), embed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_trimmed_where_the_tower_never_looks_at_it(causal: bool):
    text = open_clip.CLIPTextCfg(
        context_length=40, width=32, heads=2, layers=2, no_causal_mask=not causal
    )
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=32, layers=1, head_width=16)
    encoder = FrozenClip(open_clip.CLIP(16, vision, text), "small")
    tokens = torch.from_numpy(encoder.tokenize(CAPTIONS))
    found = encoder.trimmed(tokens)
    assert found.shape == (3, 16 if causal else 40)
    embed, states = encoder.encode_text(found)
    expected, whole = encoder.encode_text(tokens)
    torch.testing.assert_close(embed, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(states, whole[:, : states.shape[1]], atol=1e-5, rtol=0)


def test_images_are_encoded_as_open_clip_encodes_them(tiny: FrozenClip):
    image = pixels(3, tiny.image_size)
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    expected = tiny.clip.encode_image((image.float() / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(tiny.encode_image(image), expected, atol=1e-5, rtol=0)
    assert (PIXEL_MEAN, PIXEL_STD) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def test_weights_of_other_pixel_statistics_get_theirs_and_are_another_encoder(tiny: FrozenClip):
    other = copy.deepcopy(tiny.clip)
    mean, std = open_clip.constants.INCEPTION_MEAN, open_clip.constants.INCEPTION_STD
    other.visual.image_mean, other.visual.image_std = mean, std
    found, image = FrozenClip(other, "tiny"), pixels(2, tiny.image_size)
    expected = tiny.clip.encode_image((image.float() / 255 - 0.5) / 0.5, normalize=True)
    torch.testing.assert_close(found.encode_image(image), expected, atol=1e-5, rtol=0)
    assert found.encoder_id.startswith(f"{tiny.encoder_id}-0.5")


def test_an_embedding_does_not_depend_on_its_batch(tiny: FrozenClip):
    image, tokens = pixels(4, tiny.image_size), torch.from_numpy(tiny.tokenize(CAPTIONS))
    torch.testing.assert_close(tiny.encode_image(image)[:1], tiny.encode_image(image[:1]))
    torch.testing.assert_close(tiny.encode_text(tokens)[0][:1], tiny.encode_text(tokens[:1])[0])


def test_a_frozen_clip_trains_nothing(tiny: FrozenClip):
    assert not any(p.requires_grad for p in tiny.parameters()) and not tiny.clip.training
    assert not tiny.encode_image(pixels(1, tiny.image_size)).requires_grad


def test_without_its_vision_tower_it_reads_captions_as_before_and_refuses_pictures():
    whole, half = load_clip("tiny:random"), load_clip("tiny:random")
    half.drop_vision()
    tokens = torch.from_numpy(whole.tokenize(["a red cube", "a blue ball"]))
    for ours, theirs in zip(half.encode_text(tokens), whole.encode_text(tokens), strict=True):
        assert torch.equal(ours, theirs)
    assert half.encoder_id == whole.encoder_id and half.trimmed(tokens).equal(whole.trimmed(tokens))
    held = sum(p.numel() for p in half.parameters())
    vision = sum(p.numel() for p in whole.clip.visual.parameters())
    assert held == sum(p.numel() for p in whole.parameters()) - vision and vision > 0
    with pytest.raises(ValueError, match="found no vision tower any more"):
        half.encode_image(pixels(1, half.image_size))


def test_one_spec_is_one_encoder_and_leaves_the_generator_alone(tiny: FrozenClip):
    before = torch.get_rng_state()
    assert load_clip("tiny:random").encoder_id == tiny.encoder_id
    assert torch.equal(torch.get_rng_state(), before)



def test_weights_of_a_file_come_back(tiny: FrozenClip, tmp_path: Path):
    state = {name: tensor.clone() for name, tensor in tiny.clip.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    save_file({**state, "positional_embedding": state["positional_embedding"] + 1},
              str(tmp_path / "c.safetensors"))  # fmt: skip
    found = load_clip(f"tiny:{tmp_path / 'c.safetensors'}")
    assert torch.equal(
        found.clip.positional_embedding, tiny.clip.positional_embedding + 1
    ) and torch.equal(found.clip.token_embedding.weight, tiny.clip.token_embedding.weight)
    assert found.encoder_id != tiny.encoder_id


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("runs/none", "found no such folder, expected a finished run"),
        ("NoSuchNet:random", "found 'NoSuchNet', expected a name of open_clip.list_models"),
        ("ViT-B-32:no_such_tag", "found tag 'no_such_tag', expected one of .*laion2b"),
        ("NoSuchNet:tag", "found 'NoSuchNet', expected a name of open_clip"),
        ("tiny:/no/such/file.safetensors", "found no weights file"),
    ],
)
def test_a_spec_that_names_nothing_is_refused(spec: str, problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        load_clip(spec)
    assert "\n" not in str(caught.value)


# -- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height"),
    [(32, 32), (96, 64), (64, 200), (20, 30), (33, 32), (97, 400), (640, 480), (35, 34), (61, 32)],
)
def test_preprocessing_is_resize_then_centre_crop(width: int, height: int):
    """Bit for bit what torchvision's Resize and CenterCrop give."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    size, image = 32, picture(width, height)
    found = preprocess(image, size)
    assert found.shape == (3, size, size) and found.dtype == np.uint8
    oracle = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])(image)
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(oracle))
    grey = preprocess(image.convert("L"), size)
    assert np.array_equal(grey[0], grey[2])



# -- tokens ----------------------------------------------------------------------------------------


def test_the_full_vocabulary_is_open_clips():
    found = tokenizer(24)(CAPTIONS)
    assert np.array_equal(found, open_clip.tokenize(CAPTIONS, 24).numpy())
    assert found.dtype == np.int32


@pytest.mark.parametrize("vocab_size", [512, 4096])
def test_a_folded_vocabulary_keeps_padding_start_and_end(vocab_size: int):
    full, folded = tokenizer(24)(CAPTIONS), tokenizer(24, vocab_size)(CAPTIONS)
    assert np.array_equal(folded == 0, full == 0)
    assert np.array_equal(folded == vocab_size - 2, full == VOCAB_SIZE - 2)
    assert np.array_equal(folded == vocab_size - 1, full == VOCAB_SIZE - 1)
    assert folded.min() >= 0 and folded.max() < vocab_size
    assert np.array_equal(folded.argmax(1), full.argmax(1))  # where CLIP pools


def test_no_word_folds_onto_padding_start_or_end():
    """At the edges: sizes that fold the very words of the caption first or last."""
    full = tokenizer(24)(["red cube"])
    words = full[(full > 0) & (full < VOCAB_SIZE - 2)]
    assert len(words) == 2
    for word in words.tolist():
        for vocab_size, expected in ((word + 2, 1), (word + 3, word)):
            folded = tokenizer(24, vocab_size)(["red cube"])
            assert (folded[full == word] == expected).all()
            assert np.array_equal(folded == 0, full == 0)
            assert (folded >= vocab_size - 2).sum() == 2



def test_a_long_caption_is_cut_and_still_ends():
    tokens = tokenizer(8)(["one two three four five six seven eight nine ten"])
    assert tokens.shape == (1, 8) and tokens[0, -1] == VOCAB_SIZE - 1
    assert (tokens != 0).all()


def test_the_mask_keeps_what_is_not_padding():
    tokens = torch.from_numpy(tokenizer(8)(["a cube", ""]))
    assert token_mask(tokens).sum(1).tolist() == [4, 2]


def test_a_token_0_within_a_caption_is_one_of_its_words():
    """CLIP's token 0 is "!" before more punctuation."""
    tokens = torch.from_numpy(load_clip("tiny:random").tokenize(["wow!( cat", "a cat"]))
    (end,) = (tokens[0] == tokens[0].max()).nonzero()
    assert (tokens[0, : int(end)] == 0).any()
    assert token_mask(tokens)[0].tolist() == [i <= int(end) for i in range(tokens.shape[1])]
    assert torch.equal(token_mask(tokens)[1], tokens[1] != 0)


# -- the contrastive loss --------------------------------------------------------------------------


def unit_rows(seed: int) -> torch.Tensor:
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)



def test_what_is_no_negative_leaves_the_loss_of_the_others():
    """Rows 4 and 5 are nobody's negatives: the first four have the loss of a batch of four."""
    image, text, scale = unit_rows(0), unit_rows(1), torch.tensor(20.0)
    negative = torch.ones(6, 6, dtype=torch.bool)
    negative[4:], negative[:, 4:] = False, False
    four, _ = contrastive(image[:4], text[:4], scale, torch.ones(4, 4, dtype=torch.bool))
    six, accuracy = contrastive(image, text, scale, negative)
    assert torch.allclose(six[:4], four) and not six[4:].any() and accuracy[4:].all()


def test_one_caption_of_two_images_is_a_negative_of_neither():
    """Each of the two pairs has the loss that it has without the other."""
    torch.manual_seed(0)
    clip = build_clip(ClipConfig(embed_dim=16, vision_width=32, text_width=32, vision_depth=1,
                                 text_depth=1, vocab_size=512))  # fmt: skip
    captions = ["a red circle", "a blue cross", "a red circle", "a green star"]
    tokens = torch.from_numpy(tokenizer(clip.context_length, 512)(captions))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)

    def losses(rows: list[int]) -> torch.Tensor:
        columns = {"image": images[rows].numpy(), "tokens": tokens[rows].numpy()}
        return clip_objective(clip, as_batch(columns, torch.arange(len(rows))))["loss"]

    twice, first, second = losses([0, 1, 2, 3]), losses([0, 1, 3]), losses([1, 2, 3])
    assert torch.allclose(twice[0], first[0], atol=1e-5)
    assert torch.allclose(twice[2], second[1], atol=1e-5)
    assert (twice[[1, 3]] > torch.stack([first[[1, 2]], second[[0, 2]]]).amax(0) - 1e-5).all()


def whole_matrix(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, negative: torch.Tensor
) -> torch.Tensor:
    """The formula over all pairs at once: [G]."""
    own = torch.eye(len(image), dtype=torch.bool)
    logits = (scale * image @ text.T).masked_fill(~(negative | own), float("-inf"))
    return -(logits.log_softmax(1) + logits.log_softmax(0)).diagonal() / 2


@pytest.mark.parametrize("twice", [False, True])
def test_workers_that_each_compute_their_rows_are_the_whole_matrix(twice: bool):
    """Losses and gradients, those of the rows that others own and of the temperature included."""
    image, text = unit_rows(0).requires_grad_(), unit_rows(1).requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    words = torch.tensor([0, 1, 2, 1, 4, 0]) if twice else torch.arange(6)
    negative = words[:, None] != words
    parts = [
        contrastive(image, text, scale, negative[local], local)
        for local in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    found, accuracy = (torch.cat(each) for each in zip(*parts, strict=True))
    expected = whole_matrix(image, text, scale, negative)
    torch.testing.assert_close(found, expected)
    if not twice:
        torch.testing.assert_close(found.mean(), open_clip.ClipLoss()(image, text, scale))
        assert torch.equal(accuracy, ((image @ text.T).argmax(1) == torch.arange(6)).float())
    given = (image, text, scale)
    ours, theirs = (torch.autograd.grad(loss.mean(), given) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_a_worker_never_holds_the_whole_batchs_matrix():
    """Of 2,000 samples, 2 its own: nothing is larger than all embeddings, of 8 dimensions."""
    total, own, dim = 2000, 2, 8
    image, text = (F.normalize(torch.randn(own, dim), dim=1) for _ in range(2))
    clip = SimpleNamespace(
        encode_image=lambda pixels, normalize: image,
        encode_text=lambda tokens, normalize: text,
        logit_scale=torch.zeros(1),
    )
    columns = {
        "image": torch.zeros(own, 3, 2, 2, dtype=torch.uint8),
        "tokens": torch.tensor([[1, 2], [1, 3]]),
    }
    batch = Batch(keys=torch.arange(own), weight=torch.ones(own), num_real=total, columns=columns)
    with Largest() as largest:
        found = clip_objective(
            clip, batch, lambda rows: (torch.cat([rows] * (total // own)), slice(4, 4 + own))
        )
    assert found["loss"].shape == (own,) and largest.numel == total * dim
