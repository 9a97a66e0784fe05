"""Encoders of open_clip's classes against open_clip itself: features, tokens, names and weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from _encoders import KINDS, write_architectures
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from models.architectures import CONFIG, find_architecture
from models.clip import FrozenClip, build_clip
from models.configs import ClipConfig
from models.convert.runs import absolute_spec, load_clip
from models.networks.packing import Packing
from models.tokenizers import token_mask

CLOSE: Any = {"atol": 1e-5, "rtol": 1e-4}
CAPTIONS = ["a red cube", "two blue spheres beside a green cone", "a"]


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    write_architectures(folder)
    return folder


@pytest.fixture(scope="module")
def folder(architectures: Path) -> Path:
    """A SigLIP in the layout of open_clip's repositories, with other pixels than OpenAI's."""
    folder = architectures / "repository"
    shutil.copytree(architectures / "tokenizers" / "sig", folder)
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    config = {
        "model_cfg": open_clip.get_model_config("small-sig"),
        "preprocess_cfg": {**pixels, "resize_mode": "squash"},
    }
    (folder / CONFIG).write_text(json.dumps(config))
    torch.manual_seed(1)
    model = find_architecture("small-sig").create()
    save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    return folder


def pictures(size: int) -> list[Image.Image]:
    ramp = np.indices((size + 9, size + 30)).sum(0)[..., None] * [1, 2, 3] % 256
    picture = Image.fromarray(ramp.astype(np.uint8))
    return [picture, picture.rotate(90, expand=True)]


@pytest.mark.parametrize("name", KINDS)
def test_features_and_tokens_are_those_of_open_clip(name: str, architectures: Path):
    """Its own preprocessing and tokenizer included, and the ids of the text tower."""
    encoder = load_clip(f"{name}:random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = open_clip.create_model_and_transforms(name, pretrained_text=False)
    assert_same_features(encoder, theirs, open_clip.get_tokenizer(name)(CAPTIONS))


def assert_same_features(encoder: FrozenClip, theirs: Any, ids: torch.Tensor) -> None:
    model, _, transform = theirs
    model.eval()
    images = pictures(encoder.image_size)
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(each) for each in images]))
        text = model.encode_text(ids)
    unit = nn.functional.normalize
    pixels = torch.from_numpy(np.stack([encoder.preprocess(each) for each in images]))
    torch.testing.assert_close(encoder.encode_image(pixels), unit(image, dim=-1), **CLOSE)
    tokens = torch.from_numpy(encoder.tokenize(CAPTIONS))
    assert tokens.dtype == torch.int32 and torch.equal(encoder.tokenize.ids(tokens).long(), ids)
    found, states = encoder.encode_text(tokens)
    torch.testing.assert_close(found, unit(text, dim=-1), **CLOSE)
    assert found.shape == (3, encoder.embed_dim)
    assert states.shape == (3, encoder.context_length, encoder.text_width)


# -- what a text tower says of each token ----------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_token_states_are_the_last_layer_s_as_open_clip_hands_them_out(
    name: str, architectures: Path
):
    """By `output_tokens`, which open_clip's CLIP has not, and not the class token of a CoCa."""
    encoder = load_clip(f"{name}:random")
    tokens = torch.from_numpy(encoder.tokenize(CAPTIONS))
    _, states = encoder.encode_text(tokens)
    tower = getattr(encoder.clip, "text", None)
    if tower is None:
        return  # tests/test_models_clip.py
    tower.output_tokens = True
    _, expected = tower(encoder.tokenize.ids(tokens).long())
    if name == "small-coca":
        expected = tower.ln_final(expected)
    if name == "small-nllb":  # which pools its first token, and hands out the others
        states = states[:, 1:]
    torch.testing.assert_close(states, expected, **CLOSE)


@pytest.mark.parametrize(("name", "words"), [
    ("small-vit", 1 + 3 + 1), ("small-coca", 1 + 3 + 1), ("small-sig", 3 + 1),
    ("small-sig-2", 3 + 1), ("small-roberta", 1 + 3 + 1), ("small-clipa", 1 + 3),
    ("small-worldwide", 1 + 3 + 1), ("small-mt5", 3 + 1),
])  # fmt: skip
def test_the_mask_keeps_words_start_and_end_whatever_a_tokenizer_pads_with(
    name: str, words: int, architectures: Path
):
    encoder = load_clip(f"{name}:random")
    tokens = torch.from_numpy(encoder.tokenize(["a red cube", ""]))
    assert token_mask(tokens).sum(1).tolist() == [words, words - 3]
    long = torch.from_numpy(encoder.tokenize(["red " * 100]))
    assert token_mask(long)[:, :-1].all()  # bert-base-uncased of CLIPA drops the end
    room = encoder.context_length - (words - 3)
    assert encoder.tokenize.num_cut(["red " * room, "red " * (room + 1)]) == 1


@pytest.mark.parametrize("name", ["small-worldwide", "small-eva"])
def test_causal_towers_of_every_class_and_tokenizer_encode_packed_captions(
    name: str, architectures: Path
):
    encoder = load_clip(f"{name}:random")
    assert encoder.packs_text
    tokens = torch.from_numpy(encoder.tokenize(CAPTIONS))
    keep = token_mask(tokens)
    embed, states = encoder.encode_text(encoder.trimmed(tokens))
    packing, rows = Packing.of(keep.sum(1)), tokens[keep].long()
    found = encoder.encode_packed(rows, packing)
    torch.testing.assert_close(found, states[keep[:, : states.shape[1]]], **CLOSE)
    torch.testing.assert_close(encoder.pool_packed(found, rows, packing), embed, **CLOSE)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"small-worldwide", "small-eva"}))
def test_towers_that_read_padding_are_given_all_of_it(name: str, architectures: Path):
    encoder = load_clip(f"{name}:random")
    tokens = torch.from_numpy(encoder.tokenize(CAPTIONS))
    text = KINDS[name][2]
    if encoder.is_causal:
        assert encoder.packs_text and text
        return
    assert not encoder.packs_text and encoder.trimmed(tokens) is tokens


def test_without_what_only_pictures_or_captioning_need_a_coca_reads_captions_as_before(
    architectures: Path,
):
    encoder = load_clip("small-coca:random")
    tokens = torch.from_numpy(encoder.tokenize(CAPTIONS))
    before = encoder.encode_text(tokens)
    encoder.drop_vision()
    for ours, theirs in zip(encoder.encode_text(tokens), before, strict=True):
        assert torch.equal(ours, theirs)
    kept = {name.split(".")[0] for name, _ in encoder.clip.named_parameters()}
    assert kept == {"text", "logit_scale"}


# -- names -----------------------------------------------------------------------------------------


def test_a_folder_of_open_clip_s_layout_is_that_encoder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With its tokenizer and its preprocessing; a repository in Hugging Face's cache as well."""
    name = f"local-dir:{folder}"
    encoder = load_clip(name)
    theirs = open_clip.create_model_and_transforms(name)
    assert_same_features(encoder, theirs, open_clip.get_tokenizer(name)(CAPTIONS))
    assert encoder.encoder_id.startswith("local-dir:repository@")
    assert encoder.encoder_id.endswith("/bilinear-squash-160-0.5-0.5-0.5-0.25-0.25-0.25")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--sig"
    shutil.copytree(folder, cached / "snapshots" / "1234")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    found = load_clip("hf-hub:someone/sig")
    assert found.encoder_id.removeprefix("hf-hub:someone/sig") == encoder.encoder_id.removeprefix(
        "local-dir:repository"
    )


def test_a_relative_folder_is_made_absolute_for_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("local-dir:sig+raw") == f"local-dir:{tmp_path}/sig+raw"
    assert absolute_spec("hf-hub:someone/sig") == "hf-hub:someone/sig"


def test_openai_s_spelling_is_open_clip_s_architecture():
    assert find_architecture("ViT-B/32").name == "ViT-B-32"
    assert find_architecture("ViT-B/32").model == open_clip.get_model_config("ViT-B-32")


@pytest.mark.parametrize(("name", "expected"), [
    ("ViT-B-16-SigLIP", ("bicubic", "squash", 0.5)), ("MobileCLIP-B", ("bilinear", "shortest", 0)),
    ("ViT-L-14", (None, None, None)),
])  # fmt: skip
def test_a_file_of_weights_is_read_by_what_all_published_ones_of_its_architecture_agree_in(
    name: str, expected: tuple
):
    found = find_architecture(name).preprocessing
    assert (found.get("interpolation"), found.get("resize_mode")) == expected[:2]
    assert expected[2] is None or set(found["mean"]) == {expected[2]}


@pytest.mark.parametrize(("spec", "problem"), [
    ("hf-hub:someone/nothing", "clip hf-hub:someone/nothing: found no open_clip_config.json .*"
     r"o.create_model\('hf-hub:someone/nothing'\)"),
    ("local-dir:nowhere", "clip local-dir:nowhere: found no open_clip_config.json, expected one"),
    ("ViT-B/32:laion2b-s34b-b79k", "clip ViT-B-32:laion2b-s34b-b79k: found no weights of it on this"
     r" machine.*o.create_model\('ViT-B-32', 'laion2b-s34b-b79k'\)"),
    ("small-vit:openai", "found tag 'openai', expected random or a file of weights"),
    ("ViT-B-16-SigLIP:random", "tokenizer timm/ViT-B-16-SigLIP: found none on this machine"),
    ("roberta-ViT-B-32:random", "tokenizer roberta-base: found none on this machine"),
])  # fmt: skip
def test_what_would_have_to_be_downloaded_is_one_line_that_says_how(
    spec: str, problem: str, architectures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=problem) as caught:
        load_clip(spec)
    assert "\n" not in str(caught.value)


def test_only_clips_of_clip_s_own_tokenizer_are_trained(architectures: Path):
    for name in ("small-eva", "small-clipa"):
        with pytest.raises(ValueError, match=f"clip architecture: found {name}, a C.*expected a"):
            build_clip(ClipConfig(architecture=name))
    assert isinstance(build_clip(ClipConfig(architecture="small-vit")), open_clip.CLIP)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["a.safetensors", "a.pt", "a.bin"])
@pytest.mark.parametrize("name", ["small-vit", "small-sig", "small-coca"])
def test_weights_of_each_kind_of_file_are_loaded_and_not_called_random(
    name: str, file: str, architectures: Path, tmp_path: Path, capfd, caplog
):
    torch.manual_seed(2)
    state, path = find_architecture(name).create().state_dict(), tmp_path / file
    if file == "a.pt":  # as open_clip's training saves it
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": wrapped, "optimizer": {}}, path)
    else:
        save_file(state, str(path)) if file == "a.safetensors" else torch.save(state, path)
    encoder = load_clip(f"{name}:{path}")
    for key, value in encoder.clip.state_dict().items():
        assert torch.equal(value.nan_to_num(), state[key].nan_to_num()), key  # CoCa's are empty()
    output = capfd.readouterr()
    assert output.out + output.err + caplog.text == ""


def test_what_no_embedding_depends_on_may_be_there_or_not_with_a_line_that_says_so(
    architectures: Path, tmp_path: Path, capfd
):
    state = find_architecture("small-vit").create().state_dict()
    whole = {**state, "logit_bias": torch.zeros(()), "attn_mask": torch.zeros(77, 77)}
    torch.save(whole, tmp_path / "more.pt")
    del state["logit_scale"]
    torch.save(state, tmp_path / "less.pt")
    more, less = (load_clip(f"small-vit:{tmp_path}/{file}.pt") for file in ("more", "less"))
    assert more.encoder_id == less.encoder_id
    assert capfd.readouterr().err.splitlines() == [
        f"{tmp_path}/more.pt: ignores logit_bias, attn_mask, which no embedding depends on",
        f"{tmp_path}/less.pt: lacks logit_scale, which no embedding depends on",
    ]
    for name in ("ln_final.weight", "visual.proj"):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"tensor {name}: found nothing, expected"):
            load_clip(f"small-vit:{tmp_path}/other.pt")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 605\n" % (b"0" * 64)


@pytest.mark.parametrize(("content", "problem"), [
    (POINTER, "found a pointer of Git LFS, expected the weights themselves; .*git lfs pull"),
    (b"x", r"found no (complete safetensors|plain tensors) \(.*expected"),
    ("half", r"found no (complete safetensors|plain tensors) \(.*expected"),
])  # fmt: skip
@pytest.mark.parametrize("file", ["a.safetensors", "a.pt", "a.bin"])
def test_what_is_no_weights_is_refused_in_one_line(
    file: str, content: bytes | str, problem: str, architectures: Path, tmp_path: Path
):
    path = tmp_path / file
    if content == "half":
        state = find_architecture("small-vit").create().state_dict()
        save_file(state, str(path)) if file == "a.safetensors" else torch.save(state, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    assert isinstance(content, bytes)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: {problem}") as caught:
        load_clip(f"small-vit:{path}")
    assert "\n" not in str(caught.value)
