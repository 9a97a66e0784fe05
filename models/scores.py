"""Scores of embeddings: tensors to numbers, without files and models."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_ONCE = 2048


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine between row i of `a` and row i of `b`, both [N, E]."""
    return F.cosine_similarity(a.double(), b.double(), dim=1).mean().item()


def shuffled_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine over all pairs of different rows of `a` and `b` [N, E]: the exact
    baseline of what random re-pairing would give, without the noise of one shuffle."""
    a, b = F.normalize(a.double(), dim=1), F.normalize(b.double(), dim=1)
    n = len(a)
    if n < 2:
        raise ValueError(f"shuffled_cosine: found {n} rows, expected at least 2")
    total = a.sum(0) @ b.sum(0) - (a * b).sum()
    return (total / (n * (n - 1))).item()


def _nearest(query: Tensor, gallery: Tensor, k: int) -> Tensor:
    """Return the k rows of `gallery` nearest to each of `query` by cosine, int64 [N, k], nearest
    first; in batches of queries, so that memory grows with N and not with its square."""
    rows = F.normalize(gallery.double(), dim=1)
    nearest = [
        (F.normalize(batch.double(), dim=1) @ rows.T).topk(min(k, len(rows)), dim=1).indices
        for batch in query.split(QUERIES_AT_ONCE)
    ]
    return torch.cat(nearest)


def retrieval_at_k(query: Tensor, gallery: Tensor, captions: list[str], k: int = 1) -> float:
    """Return the share of `query` rows with a right answer among the k nearest `gallery` rows.

    query, gallery: [N, E], row i of both belongs to captions[i]. Rows that share a caption are
    all right answers ("any of the same caption"): the drawn set repeats captions.
    """
    nearest = _nearest(query, gallery, k).tolist()
    hits = [any(captions[i] == captions[j] for j in row) for i, row in enumerate(nearest)]
    return torch.tensor(hits, dtype=torch.float64).mean().item()


def prior_scorecard(
    drawn: Tensor, image_embed: Tensor, text_embed: Tensor, captions: list[str]
) -> dict[str, float]:
    """Compare a prior's draws with the true image embeddings of their captions.

    All [N, E], unit norm. mse: mean over samples and dimensions; cos: to z_i; cos_text: to z_t;
    cos_shuffled: to the images of other captions; retrieval_at_1, _at_5: of z_i by the draw.
    """
    return {
        "mse": (drawn.double() - image_embed.double()).square().mean().item(),
        "cos": mean_cosine(drawn, image_embed),
        "cos_text": mean_cosine(drawn, text_embed),
        "cos_shuffled": shuffled_cosine(drawn, image_embed),
        "retrieval_at_1": retrieval_at_k(drawn, image_embed, captions),
        "retrieval_at_5": retrieval_at_k(drawn, image_embed, captions, 5),
        "n": len(drawn),
    }


def retrieval_both_ways(
    image: Tensor, text: Tensor, captions: list[str], ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Return R@k of images by captions and of captions by images, [N, E] each.

    Row i of both is one pair; pairs of one caption answer each other. "any": a right answer is
    among the k nearest (of several captions of an image, any one); "all": the share of the right
    answers that are, of as many as k can hold.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    own = torch.tensor([numbers[caption] for caption in captions])
    repeats = own.bincount()[own]
    scores: dict[str, float] = {}
    ways = {"text_to_image": (text, image), "image_to_text": (image, text)}
    for way, (query, gallery) in ways.items():
        nearest = _nearest(query, gallery, max(ks)).cpu()
        for k in ks:
            hits = (own[nearest[:, :k]] == own[:, None]).sum(1).double()
            possible = repeats.clamp(max=k).double()
            scores[f"{way}_r@{k}_any"] = (hits > 0).double().mean().item()
            scores[f"{way}_r@{k}_all"] = (hits / possible).mean().item()
    return scores


def zero_shot(image: Tensor, classes: Tensor, labels: Tensor) -> float:
    """Return the share of images [N, E] whose nearest class is theirs; labels: int64 [N].

    classes: [C, T, E], embeddings of T sentences for each class, whose normalised mean represents
    it (Radford et al. 2021, section 3.1.4).
    """
    weights = F.normalize(F.normalize(classes.double(), dim=-1).mean(1), dim=-1)
    predicted = (F.normalize(image.double(), dim=1) @ weights.T).argmax(1)
    return (predicted == labels).double().mean().item()


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, weight_decay: float
) -> float:
    """Return the accuracy on `test` of multinomial logistic regression fitted to `train`.

    Each: embeddings [N, E] and labels int64 [N]. Fitted by L-BFGS to convergence, in float64;
    weight_decay: half of it times the squared weights is added to the mean loss.
    """
    (x, y), (test_x, test_y) = train, test
    x, test_x = (F.normalize(rows.double(), dim=1) for rows in (x, test_x))
    num_classes = int(torch.cat([y, test_y]).max()) + 1
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> float:
        fit.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value.item()

    fit.step(loss)
    predicted = (test_x @ weight.T + bias).argmax(1)
    return (predicted == test_y).double().mean().item()
