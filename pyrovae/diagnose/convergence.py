r"""Have the chains mixed, and how many draws are they worth? Rank-normalised R-hat and effective sample sizes.

Every chain of :math:`S` draws is split in two halves (the middle draw of an odd chain is dropped), giving
:math:`m = 2C` chains of :math:`n` draws. Draws are replaced by normal scores of their pooled ranks,
:math:`z = \Phi^{-1}((r - 3/8)/(mn + 1/4))`, ties sharing their mean rank, so that nothing depends on moments that may
not exist. With within-chain variance W and between-chain variance B (n times the variance of the chain means),

.. math::
    \hat R = \sqrt{\left(\tfrac{n-1}{n} W + \tfrac1n B\right) / W}.

*Bulk* R-hat is that of z; *folded* R-hat that of the normal scores of :math:`|x - \mathrm{median}|`, which sees chains
of equal location and unequal scale. ``split_rhat`` is the larger of the two.

The effective sample size is :math:`mn/\tau`, with autocorrelations that combine all chains,

.. math::
    \rho_t = 1 - \frac{W - \bar\gamma_t}{\frac{n-1}{n} W + \frac1n B}, \qquad
    \tau = -1 + 2 \sum_{j < J} \min_{i \le j}(\rho_{2i} + \rho_{2i+1}) + \rho_{2J},

:math:`\bar\gamma_t` the mean autocovariance and J the first pair whose sum is not positive (Geyer's initial positive
and monotone sequences), :math:`\tau \ge 1/\log_{10}(mn)`. ``ess_bulk`` is that of z; ``ess_tail`` the smaller of those
of the indicators :math:`x \le q_{5\%}` and :math:`x \le q_{95\%}`.

Sources: Vehtari, Gelman, Simpson, Carpenter & Buerkner, Bayesian Analysis 16 (2021); Geyer, Statistical Science 7
(1992). The definitions coincide with ArviZ's, except that constant draws give nan, and one chain has an R-hat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ess_bulk", "ess_tail", "split_rhat"]


def split_rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of bulk and folded.

    Args:
        draws: ``[C, S, *event]``: C >= 1 chains of S >= 4 draws.

    Returns:
        ``[*event]``, float64; about 1 where the chains agree. nan where all draws are equal or one is not finite.

    Raises:
        ValueError: If there are fewer than two dimensions, no chain, or fewer than 4 draws.
    """
    x, usable = _columns(draws)
    halves = _split(x)
    pooled = halves.flatten(1).sort(dim=1).values
    middle = pooled.shape[1] // 2  # the pooled number of draws is even
    median = (pooled[:, middle - 1] + pooled[:, middle]) / 2
    folded = (halves - median[:, None, None]).abs()
    # fmax: draws with two symmetric values have no folded R-hat, and the bulk one decides.
    rhat = torch.fmax(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))
    return _finish(rhat, usable, draws)


def ess_bulk(draws: Tensor) -> Tensor:
    """Effective number of draws for the centre of the distribution (of the rank-normalised draws).

    Args:
        draws: ``[C, S, *event]``: C >= 1 chains of S >= 4 draws.

    Returns:
        ``[*event]``, float64, out of ``C * S``. nan where all draws are equal or one is not finite.

    Raises:
        ValueError: If there are fewer than two dimensions, no chain, or fewer than 4 draws.
    """
    x, usable = _columns(draws)
    return _finish(_ess(_normal_scores(_split(x))), usable, draws)


def ess_tail(draws: Tensor) -> Tensor:
    """Effective number of draws for the 5 % and the 95 % quantile, the smaller of the two.

    An indicator that is constant although the draws are not (a tie at the largest value, say) counts all draws.

    Args:
        draws: ``[C, S, *event]``: C >= 1 chains of S >= 4 draws.

    Returns:
        ``[*event]``, float64, out of ``C * S``. nan where all draws are equal or one is not finite.

    Raises:
        ValueError: If there are fewer than two dimensions, no chain, or fewer than 4 draws.
    """
    x, usable = _columns(draws)
    pooled = x.flatten(1).sort(dim=1).values
    sizes = []
    for probability in (0.05, 0.95):
        below = (x <= _quantile(pooled, probability)[:, None, None]).to(x.dtype)
        halves = _split(below)
        flat = halves.flatten(1)
        constant = flat.amin(1) == flat.amax(1)
        sizes.append(torch.where(constant, float(flat.shape[1]), _ess(halves)))
    return _finish(torch.minimum(sizes[0], sizes[1]), usable, draws)


def _columns(draws: Tensor) -> tuple[Tensor, Tensor]:
    """``[C, S, *event]`` to float64 ``[K, C, S]``, and ``[K]``: finite and not constant."""
    if draws.dim() < 2 or draws.shape[0] < 1 or draws.shape[1] < 4:
        raise ValueError(f"draws must be [chains, draws >= 4, ...], got shape {tuple(draws.shape)}: draw longer chains")
    x = draws.detach().to(torch.float64).reshape(*draws.shape[:2], math.prod(draws.shape[2:]))
    x = x.permute(2, 0, 1).contiguous()
    flat = x.flatten(1)
    usable = flat.isfinite().all(1) & (flat.amin(1) < flat.amax(1))
    return x, usable


def _finish(value: Tensor, usable: Tensor, draws: Tensor) -> Tensor:
    return torch.where(usable, value, math.nan).reshape(draws.shape[2:])


def _split(x: Tensor) -> Tensor:
    """``[K, C, S]`` to ``[K, 2C, S // 2]``."""
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half], x[..., -half:]], dim=1)


def _normal_scores(x: Tensor) -> Tensor:
    """Normal scores of the ranks pooled over chains, ``[K, m, n]`` to the same."""
    flat = x.flatten(1)
    ordered = flat.sort(dim=1).values
    # A tied group at sorted positions i+1 .. j has mean rank (i + 1 + j) / 2.
    first = torch.searchsorted(ordered, flat, right=False)
    last = torch.searchsorted(ordered, flat, right=True)
    rank = (first + last + 1).to(x.dtype) / 2
    return torch.special.ndtri((rank - 0.375) / (flat.shape[1] + 0.25)).reshape(x.shape)


def _rhat(x: Tensor) -> Tensor:
    """R-hat of chains that are split and scored already, ``[K, m, n]`` to ``[K]``."""
    n = x.shape[-1]
    within = x.var(dim=2).mean(dim=1)
    between = n * x.mean(dim=2).var(dim=1)
    return ((between / within + n - 1) / n).sqrt()


def _ess(x: Tensor) -> Tensor:
    """Effective sample size of the mean of split chains, ``[K, m, n]`` to ``[K]``."""
    chains, n = x.shape[1:]
    gamma = _autocovariance(x).mean(dim=1)  # [K, n], divided by n at every lag
    within = gamma[:, :1] * n / (n - 1)
    total = gamma[:, :1] + x.mean(dim=2).var(dim=1)[:, None]
    rho = 1 - (within - gamma) / total
    rho[:, 0] = 1

    # Pairs 0 .. last; the estimate stops three lags short of the end, where few products are left.
    last = max(0, (n - 3) // 2)
    even = rho[:, 0 : 2 * last + 1 : 2]
    pair = even + rho[:, 1 : 2 * last + 2 : 2]
    stops = pair <= 0
    stop = torch.where(stops.any(1), stops.to(torch.uint8).argmax(1), last)[:, None]  # J
    counted = torch.arange(last + 1, device=x.device) < stop
    total_pairs = torch.where(counted, pair.cummin(dim=1).values, 0.0).sum(1)
    even_stop, pair_stop = even.gather(1, stop)[:, 0], pair.gather(1, stop)[:, 0]
    remainder = torch.where((even_stop > 0) | (pair_stop >= 0), even_stop, 0.0)

    size = chains * n
    tau = -1 + 2 * total_pairs + remainder
    return size / tau.clamp(min=1 / math.log10(size))


def _autocovariance(x: Tensor) -> Tensor:
    """Autocovariance along the last dimension at lags 0 .. n-1, each a sum divided by n."""
    n = x.shape[-1]
    length = 1 << (2 * n - 1).bit_length()  # zero padding keeps the ends apart
    spectrum = torch.fft.rfft(x - x.mean(dim=-1, keepdim=True), n=length)
    return torch.fft.irfft(spectrum.abs().square(), n=length)[..., :n] / n


def _quantile(ordered: Tensor, probability: float) -> Tensor:
    """Linear interpolation between order statistics (Hyndman & Fan's type 7), ``[K, N]`` to ``[K]``."""
    count = ordered.shape[1]
    position = count * probability + (1 - probability)
    lower = min(max(math.floor(position), 1), count - 1)
    fraction = min(max(position - lower, 0.0), 1.0)
    # In this form a tie gives its own value exactly, which the comparison with the draws relies on.
    return ordered[:, lower - 1] + fraction * (ordered[:, lower] - ordered[:, lower - 1])
