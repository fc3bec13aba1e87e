"""Clusters against classes, by the measures that are in use, which are not to be confused.

*Hungarian accuracy* gives every cluster one class and every class one cluster, as well as that can be done; clusters
beyond the number of classes count as errors. *Many-to-one accuracy* names each cluster by its majority: it rises with
the number of clusters, to 1 with one for each datum. Both find the names on the data they are computed on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Clustering", "clustering"]


@dataclass(frozen=True)
class Clustering:
    """How clusters and classes go together.

    Attributes:
        hungarian: one-to-one accuracy.
        many_to_one: accuracy of majorities.
        nmi: mutual information over the mean entropy, 0 to 1.
        ari: adjusted Rand index, 0 in expectation for clusters at random.
        used: clusters that have members.
        table: `[K, C]`, data in each cluster and class.
        names: `[K]`, majority class of each cluster; of an empty one the largest class.
    """

    hungarian: float
    many_to_one: float
    nmi: float
    ari: float
    used: int
    table: Tensor
    names: Tensor

    def __repr__(self) -> str:
        return (
            f"{self.used} of {len(self.table)} clusters used, {self.table.shape[1]} classes: Hungarian accuracy "
            f"{self.hungarian:.1%}, many-to-one {self.many_to_one:.1%}, NMI {self.nmi:.3f}, ARI {self.ari:.3f}"
        )


def clustering(clusters: Tensor, y: Tensor, *, num_clusters: int | None = None) -> Clustering:
    """Measures of an assignment `[N]` to clusters against labels `[N]`, both integers.

    Args:
        num_clusters: K, where more may be empty than the largest number seen shows.

    Raises:
        ValueError: shapes that differ, no data, or a cluster beyond `num_clusters`.
    """
    if clusters.shape != y.shape or clusters.dim() != 1 or not len(y):
        raise ValueError(f"clusters and labels must both be [N], got {list(clusters.shape)} and {list(y.shape)}")
    number = int(clusters.max()) + 1 if num_clusters is None else num_clusters
    if int(clusters.min()) < 0 or int(clusters.max()) >= number:
        raise ValueError(f"clusters must lie between 0 and {number - 1}")
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    clusters, y = clusters.detach().cpu(), y.detach().cpu()
    classes, index = y.unique(return_inverse=True)
    table = torch.zeros(number, len(classes), dtype=torch.long)
    table.index_put_((clusters.long(), index), torch.ones(len(y), dtype=torch.long), accumulate=True)
    rows, columns = linear_sum_assignment(-table.numpy())
    majority = torch.where(table.sum(1) > 0, table.argmax(1), table.sum(0).argmax())
    return Clustering(
        hungarian=float(table[torch.as_tensor(rows), torch.as_tensor(columns)].sum()) / len(y),
        many_to_one=float(table.amax(1).sum()) / len(y),
        nmi=float(normalized_mutual_info_score(y.numpy(), clusters.numpy())),
        ari=float(adjusted_rand_score(y.numpy(), clusters.numpy())),
        used=int((table.sum(1) > 0).sum()), table=table, names=classes[majority],
    )  # fmt: skip
