r"""Pareto k-hat: can these importance weights be trusted, datum by datum?

With draws :math:`z_s \sim q(z \mid x)` and log weights :math:`\ell_s = \log p(x, z_s) - \log q(z_s \mid x)`, the
weights :math:`w_s = e^{\ell_s}` above a high threshold :math:`u` follow nearly a generalised Pareto law

.. math::
    P(w - u > t \mid w > u) = (1 + k t / \sigma)^{-1/k},

and its shape :math:`k` counts the moments they have: those of order below :math:`1/k`. The variance is infinite from
:math:`k = 1/2` on, the mean from 1 on. Below 0.5 the weights are fine, up to about 0.7 usable, beyond it an
importance-weighted estimate is not to be believed at any practical number of draws.

The tail is the :math:`M = \lceil \min(S/5, 3\sqrt S) \rceil` largest weights, above the (M+1)-th. With
:math:`b = -k/\sigma` the likelihood, maximised over :math:`k` at given :math:`b`, is

.. math::
    L(b) = n \left[\log(-b/k(b)) - k(b) - 1\right], \qquad k(b) = \frac1n \sum_i \log(1 - b t_i)

(:math:`t_i = w_i - u`; the sign of b is that of Zhang & Stephens, so :math:`1 - b t > 0`). Their estimate averages
:math:`b` over a grid with weights proportional to :math:`e^{L(b)}`, and :math:`k(\bar b)` is drawn towards 0.5 as by
ten further tail draws: :math:`\hat k = (n k + 10 \cdot 0.5)/(n + 10)`.

k-hat sees only where q puts draws: it cannot see a mode that q misses altogether.

Sources: Vehtari, Simpson, Gelman, Yao & Gabry, Pareto smoothed importance sampling (2015; JMLR 25:72, 2024);
Zhang & Stephens, Technometrics 51 (2009).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["pareto_khat", "psis_smooth"]

_MIN_DRAWS = 25  # the tail, a fifth of the draws, then has five
_MIN_TAIL = 5
_CONSTANT = 1e-3  # nats: float32 weights of an image differ by as much through rounding
_SMALLEST = math.log(torch.finfo(torch.float64).tiny)
_CHUNK = 4_000_000  # numbers in the [rows, grid, tail] table held at once


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Pareto shape of the upper tail of importance weights, one per datum.

    Args:
        log_weights: ``[S, *batch]``, log importance weights in nats, any constant offset. ``-inf`` is weight zero.

    Returns:
        ``[*batch]``, float64. ``-inf`` where the log weights are constant to 1e-3 nats (q is the exact posterior);
        ``inf`` where fewer than 5 draws lie above the threshold (a few draws hold all the weight: nothing can be said
        for the estimate, so it counts as the worst).

    Raises:
        ValueError: For fewer than 25 draws, for NaN or ``+inf``, and where all weights of a datum are zero.
    """
    return _fit(_columns(log_weights)).khat.reshape(log_weights.shape[1:])


def psis_smooth(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto smoothed importance weights: the tail is replaced by the quantiles of the law fitted to it.

    The i-th smallest of the n tail weights becomes the ``(i - 1/2)/n`` quantile, cut at the largest raw weight. Where
    k-hat is not finite nothing is smoothed.

    Args:
        log_weights: ``[S, *batch]``, log importance weights in nats, any constant offset.

    Returns:
        Smoothed log weights ``[S, *batch]``, float64, each datum's summing to one, and k-hat ``[*batch]``.

    Raises:
        ValueError: As :func:`pareto_khat`.
    """
    x = _columns(log_weights)
    tail = _fit(x)
    size = tail.places.shape[1]
    for n in tail.length[tail.khat.isfinite()].unique().tolist():
        rows = torch.where(tail.khat.isfinite() & (tail.length == n))[0]
        k, sigma, cut = (value[rows, None] for value in (tail.khat, tail.sigma, tail.threshold))
        # minus log of the survival probability: the quantile is sigma (e^{k h} - 1) / k
        hazard = -torch.log1p(-(torch.arange(n, dtype=x.dtype, device=x.device) + 0.5) / n)
        quantile = sigma * torch.where(k.abs() < 1e-15, hazard, torch.expm1(k * hazard) / k)
        x[rows[:, None], tail.places[rows, size - n :]] = (quantile + cut.exp()).log().clamp(max=0.0)
    x = x - x.logsumexp(dim=1, keepdim=True)
    return x.T.reshape(log_weights.shape), tail.khat.reshape(log_weights.shape[1:])


class _Tail(NamedTuple):
    """Fitted upper tails of N columns; the tail of a column is the last ``length`` of its ``places``."""

    khat: Tensor  # [N]
    sigma: Tensor  # [N], in units of the largest weight
    threshold: Tensor  # [N], log of the threshold over the largest weight
    length: Tensor  # [N]
    places: Tensor  # [N, M], positions of the M largest, ascending in weight


def _columns(log_weights: Tensor) -> Tensor:
    """``[S, *batch]`` to float64 ``[N, S]``, shifted to maximum zero."""
    if log_weights.dim() < 1 or log_weights.shape[0] < _MIN_DRAWS:
        raise ValueError(
            f"k-hat needs at least {_MIN_DRAWS} draws along the first dimension, got shape "
            f"{tuple(log_weights.shape)}: draw more"
        )
    x = log_weights.detach().to(torch.float64)
    bad = (x.isnan() | (x == math.inf)).any(0)
    if bad.any():
        raise ValueError(f"NaN or +inf log weights at {_first(bad)}: check the model's and the guide's densities there")
    zero = (x == -math.inf).all(0)
    if zero.any():
        raise ValueError(f"all log weights at {_first(zero)} are -inf: no draw lies in the model's support there")
    x = x.reshape(x.shape[0], -1).T
    return (x - x.amax(dim=1, keepdim=True)).contiguous()


def _fit(x: Tensor) -> _Tail:
    """Fits each row of ``x [N, S]`` on its own."""
    draws = x.shape[1]
    size = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    values, places = x.topk(size + 1, dim=1)
    values, places = values.flip(1), places.flip(1)[:, 1:]
    threshold = values[:, 0].clamp(min=_SMALLEST)
    above = values[:, 1:] > threshold[:, None]
    length = above.sum(1)  # below `size` where weights are tied or vanish
    excess = values[:, 1:].exp() - threshold.exp()[:, None]

    khat = torch.full_like(threshold, math.inf)
    sigma = torch.full_like(threshold, math.nan)
    for n in length[length >= _MIN_TAIL].unique().tolist():
        for rows in torch.where(length == n)[0].split(max(1, _CHUNK // (n * _grid_size(n)))):
            khat[rows], sigma[rows] = _fit_pareto(excess[rows, size - n :])
    khat[x.amin(dim=1) >= -_CONSTANT] = -math.inf
    return _Tail(khat, sigma, threshold, length, places)


def _fit_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Zhang & Stephens' estimate with the prior of Vehtari et al.

    Args:
        excess: ``[N, n]``, positive, ascending along the last dimension.

    Returns:
        Regularised shape ``[N]`` and scale ``[N]``.
    """
    n = excess.shape[1]
    grid = _grid_size(n)
    steps = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device)
    quartile = excess[:, int(n / 4 + 0.5) - 1, None]
    b = 1 / excess[:, -1:] + (1 - (grid / (steps - 0.5)).sqrt()) / (3 * quartile)  # [N, grid]
    k = torch.log1p(-b[:, :, None] * excess[:, None, :]).mean(-1)
    weight = (n * ((-b / k).log() - k - 1)).softmax(-1)
    weight = torch.where(weight >= 10 * torch.finfo(weight.dtype).eps, weight, 0.0)
    b_mean = (b * weight).sum(-1) / weight.sum(-1)
    k_mean = torch.log1p(-b_mean[:, None] * excess).mean(-1)
    return (n * k_mean + 10 * 0.5) / (n + 10), -k_mean / b_mean


def _grid_size(n: int) -> int:
    return 30 + int(math.sqrt(n))


def _first(mask: Tensor) -> str:
    """Names the first datum that is marked."""
    if mask.dim() == 0:
        return "the only datum"
    place = tuple(mask.nonzero()[0].tolist())
    return f"datum {place[0] if len(place) == 1 else place}"
