r"""Could a guide's draws be the reference's? Two tests per datum: a kernel's and a classifier's.

*Maximum mean discrepancy* (Gretton et al. 2012), with draws :math:`a_1..a_n` and :math:`b_1..b_n` and a kernel k that
is a sum of Gaussians whose widths are 1/2, 1 and 2 times the median distance of the pooled draws,

.. math::
    \mathrm{MMD}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} \big(k(a_i, a_j) + k(b_i, b_j)\big)
                     - \frac{2}{n^2} \sum_{i,j} k(a_i, b_j),

unbiased: it may be negative where the laws are one. Its p-value is the rank of the statistic among those of random
reassignments of the 2n draws, (1 + number as large) / (1 + number of them).

*Classifier two-sample test* (Lopez-Paz & Oquab 2017): the accuracy of a classifier that tells a from b on draws it has
not seen, 5-fold; 1/2 where nobody can, 1 where they lie apart.

Draws are whitened by the reference first. Both want independent draws: thin chains before.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyrovae.diagnose.distance import check_draws

__all__ = ["c2st", "mmd2"]

_WIDTHS = (0.5, 1.0, 2.0)
_FOLDS = 5


def mmd2(
    a: Tensor, b: Tensor, *, max_draws: int = 500, num_permutations: int = 200, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unbiased squared maximum mean discrepancy and its permutation p-value.

    Args:
        a: The guide's draws ``[S, B, D]``.
        b: Reference draws ``[T, B, D]``.
        max_draws: n at most, taken evenly from both; time and memory grow with its square.
        num_permutations: Reassignments; no p-value is below 1 / (1 + this number).
        seed: Of the reassignments, the same for every datum.

    Returns:
        ``[B]`` and ``[B]``, float64.

    Raises:
        ValueError: As `standardized_mean_error`, and for fewer than one permutation.
    """
    if num_permutations < 1:
        raise ValueError(f"num_permutations must be at least 1, got {num_permutations}")
    a, b = _whitened(a, b, max_draws)
    n = len(a)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([torch.randperm(2 * n, generator=generator) for _ in range(num_permutations)])
    first = torch.zeros(1 + num_permutations, 2 * n, dtype=torch.double)  # 1 where a draw counts as the guide's
    first[0, :n] = 1
    first[1:].scatter_(1, shuffled[:, :n], 1.0)
    found = torch.stack([_statistics(torch.cat([a[:, row], b[:, row]]), first) for row in range(a.shape[1])], dim=1)
    p = (1 + (found[1:] >= found[0]).sum(0)) / (1 + num_permutations)
    return found[0], p.double()


def _statistics(pooled: Tensor, first: Tensor) -> Tensor:
    """MMD^2 of every assignment ``[P, 2n]`` of the pooled draws ``[2n, D]``."""
    square = torch.cdist(pooled, pooled).square()
    middle = square[*torch.triu_indices(len(pooled), len(pooled), 1)].median().clamp_min(1e-300)
    kernel = sum(((-square / (2 * width**2 * middle)).exp() for width in _WIDTHS), torch.zeros_like(square))
    kernel = kernel.fill_diagonal_(0.0)
    first = first.to(pooled.device)
    second = 1 - first
    n = len(pooled) // 2
    to_first, to_second = first @ kernel, second @ kernel
    within = (to_first * first).sum(1) + (to_second * second).sum(1)
    return within / (n * (n - 1)) - 2 * (to_first * second).sum(1) / n**2


def c2st(
    a: Tensor, b: Tensor, *, classifier: Literal["quadratic", "mlp"] = "quadratic", max_draws: int = 1000, seed: int = 0
) -> Tensor:
    """Accuracy of a classifier that tells the guide's draws from the reference's.

    Args:
        a: The guide's draws ``[S, B, D]``.
        b: Reference draws ``[T, B, D]``.
        classifier: ``"quadratic"``, logistic regression on the latents, their squares and products, which sees wrong
            means and covariances; ``"mlp"``, a net with two hidden layers of 10 D units, which sees shapes too and
            takes seconds a datum.
        max_draws: Taken evenly from both, at most.
        seed: Of folds and nets.

    Returns:
        ``[B]``, float64; its standard error is about 0.5 / sqrt(2 n) for n draws of each.

    Raises:
        ValueError: As `standardized_mean_error`, for another classifier, and for fewer than 5 draws.
    """
    if classifier not in ("quadratic", "mlp"):
        raise ValueError(f"classifier must be 'quadratic' or 'mlp', got {classifier!r}")
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    a, b = _whitened(a, b, max_draws)
    if len(a) < _FOLDS:
        raise ValueError(f"the classifier test needs at least {_FOLDS} draws of each, got {len(a)}")
    label = [1] * len(a) + [0] * len(b)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    return torch.tensor(
        [
            float(cross_val_score(
                _classifier(classifier, a.shape[2], seed), torch.cat([a[:, row], b[:, row]]).cpu().numpy(), label,
                cv=folds,
            ).mean())
            for row in range(a.shape[1])
        ],
        dtype=torch.double,
    )  # fmt: skip


def _classifier(name: str, dim: int, seed: int) -> object:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    if name == "mlp":
        return MLPClassifier((10 * dim, 10 * dim), learning_rate_init=0.01, max_iter=500, random_state=seed)
    return make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler(), LogisticRegression(max_iter=1000))


def _whitened(a: Tensor, b: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Equally many draws of both, ``[n, B, D]``, centred and decorrelated by the reference's moments."""
    a, b = check_draws(a, b)
    n = min(len(a), len(b), limit)
    centred = b - b.mean(0)
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / (len(b) - 1)
    # Units first: a jitter in sds keeps collinear latents invertible.
    sd = b.std(0)
    correlation = covariance / (sd.unsqueeze(-1) * sd.unsqueeze(-2))
    factor = torch.linalg.cholesky(correlation + 1e-9 * torch.eye(b.shape[2], dtype=b.dtype, device=b.device))

    def whiten(x: Tensor) -> Tensor:
        some = x[torch.linspace(0, len(x) - 1, n).long()]
        standard = ((some - b.mean(0)) / sd).movedim(0, -1)
        return torch.linalg.solve_triangular(factor, standard, upper=False).movedim(-1, 0)

    return whiten(a), whiten(b)
