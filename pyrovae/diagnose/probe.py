"""What codes know of labels that training never saw: accuracy of simple predictors on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyrovae.diagnose.clustering import clustering

__all__ = ["Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """Accuracy of a predictor on codes it was not fitted to.

    Attributes:
        kind: of predictor.
        accuracy: share of the held-out data.
        se: its binomial standard error.
        num_labels, num_held_out: data it was fitted to, and judged by.
    """

    kind: str
    accuracy: float
    se: float
    num_labels: int
    num_held_out: int

    def __repr__(self) -> str:
        return (
            f"{self.kind} probe: {self.accuracy:.1%} +- {self.se:.1%} of {self.num_held_out} held-out data "
            f"({self.num_labels} labels)"
        )


def probe(
    z: Tensor,
    y: Tensor,
    *,
    kind: Literal["linear", "knn", "kmeans"] = "linear",
    num_labels: int | None = None,
    neighbours: int = 5,
    seed: int = 0,
) -> Probe:
    """Predict labels from codes.

    Args:
        z: codes `[N, D]` (posterior means; several sites side by side).
        y: labels `[N]`, integers.
        kind: "linear", multinomial logistic regression; "knn", the vote of the nearest codes; "kmeans", clusters found
            in all codes without labels, each named by the majority of its labelled members.
        num_labels: labelled data; half of all by default. Few make it semi-supervised. Each class has one at least.
        neighbours: of "knn".
        seed: of the split.

    Returns:
        a `Probe`, judged by the data without labels.

    Raises:
        ValueError: shapes that do not match, codes that are not finite, or too few labels to see every class.
    """
    if kind not in ("linear", "knn", "kmeans"):
        raise ValueError(f"kind must be 'linear', 'knn' or 'kmeans', got {kind!r}")
    if z.dim() != 2 or y.shape != z.shape[:1]:
        raise ValueError(f"a probe takes codes [N, D] and labels [N], got {list(z.shape)} and {list(y.shape)}")
    if not z.isfinite().all():
        raise ValueError("the codes have NaN or infinite values")
    known = len(z) // 2 if num_labels is None else num_labels
    classes = y.unique()
    if not len(classes) <= known < len(z):
        raise ValueError(f"num_labels must lie between the {len(classes)} classes and the {len(z)} data, got {known}")
    codes = ((z - z.mean(0)) / z.std(0).clamp_min(1e-12)).detach().cpu().double()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    labels = y.detach().cpu()
    first = torch.stack([order[(labels[order] == c).nonzero()[0, 0]] for c in classes.cpu()])  # one of each class
    rest = order[~torch.isin(order, first)]
    taken, held_out = torch.cat([first, rest[: known - len(first)]]), rest[known - len(first) :]
    found = _predict(kind, codes, labels, taken, held_out, neighbours, seed)
    right = float((found == labels[held_out]).double().mean())
    return Probe(kind, right, math.sqrt(right * (1 - right) / len(held_out)), known, len(held_out))


def _predict(
    kind: str, codes: Tensor, labels: Tensor, taken: Tensor, held_out: Tensor, neighbours: int, seed: int
) -> Tensor:
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    if kind == "kmeans":
        number = len(labels.unique())
        clusters = torch.as_tensor(KMeans(number, n_init=10, random_state=seed).fit_predict(codes.numpy())).long()
        return clustering(clusters[taken], labels[taken], num_clusters=number).names[clusters[held_out]]
    near = min(neighbours, len(taken))
    model = LogisticRegression(max_iter=2000) if kind == "linear" else KNeighborsClassifier(near)
    model.fit(codes[taken].numpy(), labels[taken].numpy())
    return torch.as_tensor(model.predict(codes[held_out].numpy()))
