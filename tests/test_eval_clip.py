"""The scores of a CLIP, on sets whose answer is known, and the weights it hands on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from eval.clip import ClipScoreConfig, main
from models.convert.runs import load_clip
from models.scores import linear_probe, retrieval_both_ways, zero_shot
from models.weights import save_weights


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the scores ------------------------------------------------------------------------------------


def test_any_and_all_right_answers_differ_where_captions_repeat():
    """Two images of one caption: the nearest is one of them, the second nearest is another's."""
    image = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0.9, 0.4, 0]])
    text = torch.tensor([[1.0, 0.1, 0], [1.0, 0.1, 0], [0, 1.0, 0]])
    found = retrieval_both_ways(image, text, ["a", "a", "b"], ks=(2,))
    assert found["text_to_image_r@2_any"] == 1
    assert found["text_to_image_r@2_all"] == pytest.approx((0.5 + 0.5 + 1) / 3)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_retrieval_is_what_plain_loops_count(k: int):
    image, text = random(40, 8).numpy(), random(40, 8, seed=1).numpy()
    captions = [f"caption {i * i % 23}" for i in range(40)]
    found = retrieval_both_ways(torch.from_numpy(image), torch.from_numpy(text), captions, ks=(k,))
    for way, queries, gallery in (("text_to_image", text, image), ("image_to_text", image, text)):
        hits, shares = 0, 0.0
        for query, caption in zip(queries, captions, strict=True):
            cosines = [np.dot(query, one) / np.linalg.norm(one) for one in gallery]
            nearest = sorted(range(40), key=lambda j: -cosines[j])[:k]
            right = sum(captions[j] == caption for j in nearest)
            hits, shares = hits + (right > 0), shares + right / min(k, captions.count(caption))
        assert found[f"{way}_r@{k}_any"] == pytest.approx(hits / 40)
        assert found[f"{way}_r@{k}_all"] == pytest.approx(shares / 40)


def test_zero_shot_averages_the_sentences_of_a_class():
    image, labels = torch.eye(3), torch.tensor([0, 1, 2])
    sentences = torch.eye(3)[:, None].repeat(1, 2, 1) + 0.3 * random(3, 2, 3)
    assert zero_shot(image, sentences, labels) == 1
    weights = F.normalize(F.normalize(sentences.double(), dim=-1).mean(1), dim=-1)
    wrong = zero_shot(image, sentences, labels.roll(1))
    assert wrong == ((image.double() @ weights.T).argmax(1) == labels.roll(1)).double().mean()


def test_a_linear_probe_is_logistic_regression():
    """scipy fits the same objective; the two agree on every test sample's class."""
    x, y = F.normalize(random(60, 4), dim=1), torch.arange(60) % 3
    test_x = F.normalize(random(200, 4, seed=1), dim=1)

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        logits = torch.from_numpy(x.double().numpy() @ weight.T + bias)
        return float(F.cross_entropy(logits, y)) + 0.005 * float((weight**2).sum())

    best = minimize(loss, np.zeros(15), method="BFGS", options={"gtol": 1e-8}).x
    expected = (test_x.double().numpy() @ best[:12].reshape(3, 4).T + best[12:]).argmax(1)
    accuracy = linear_probe((x, y), (test_x, torch.from_numpy(expected)), weight_decay=0.01)
    assert accuracy >= 0.99


# -- the script ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_shards=2, samples_per_shard=12)


def test_the_script_scores_retrieval_classes_and_a_probe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    embeds, images = str(data / "embeds"), str(data / "images")
    out = tmp_path / "scores.json"
    config = ClipScoreConfig(
        embeds=embeds, images=images, label_column="caption", templates=("{}",),
        train_embeds=embeds, train_images=images, probe_weight_decay=1e-6, out=str(out),
    )  # fmt: skip
    assert main(config) == 0
    scores = json.loads(out.read_text())
    # a class is a caption here, and its only sentence the caption: both are retrieval
    assert scores["zero_shot_accuracy"] == pytest.approx(
        scores["image_to_text_r@1_any"], abs=1 / 24
    )
    assert scores["linear_probe_accuracy"] > 0.9  # fitted to the very samples
    assert scores["n"] == scores["n_probe_train"] == 24
    assert "text_to_image_r@10_all: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeds": ""}, "embeds: found nothing"),
        ({"label_column": "kind"}, "label_column: found key, url, caption"),
        ({"label_column": "caption", "images": ""}, "images: found nothing"),
    ],
)
def test_a_wrong_request_is_refused(data: Path, changes: dict, message: str):
    given = {"embeds": str(data / "embeds"), "images": str(data / "images"), **changes}
    with pytest.raises(ValueError, match=message):
        main(ClipScoreConfig(**given))


def test_exported_weights_are_open_clips(tmp_path: Path):
    """open_clip itself loads them, and so do we."""
    path = tmp_path / "clip.safetensors"
    assert main(ClipScoreConfig(clip="ViT-S-32-alt:random", export=str(path))) == 0
    ours = load_clip(f"ViT-S-32-alt:{path}")
    theirs: Any = open_clip.create_model("ViT-S-32-alt", pretrained=str(path)).eval()
    words = torch.from_numpy(ours.tokenize(["a red cube"])).long()
    with torch.no_grad():
        expected = theirs.encode_text(words, normalize=True)
    torch.testing.assert_close(ours.encode_text(words)[0], expected, atol=1e-6, rtol=1e-5)
    assert ours.encoder_id == load_clip("ViT-S-32-alt:random").encoder_id


def test_weights_of_another_shape_are_refused(tmp_path: Path):
    save_weights(tmp_path / "x.safetensors", {"logit_scale": torch.zeros(())})
    with pytest.raises(ValueError, match="these weights belong to another configuration"):
        load_clip(f"ViT-S-32-alt:{tmp_path / 'x.safetensors'}")
