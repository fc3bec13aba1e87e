r"""Truncated normals in closed form, and the posterior over intervals that is made of them.

A standard normal u on [a, b], reflected so that b is the end nearer to zero. In the tail, b <= 0, with t = b - u,
beta = -b, w = b - a and M(beta) = sqrt(pi / 2) erfcx(beta / sqrt 2) = int_0^inf exp(-beta t - t^2 / 2) dt,

    I_0 = M(beta) - e M(beta + w),   I_1 = 1 - e - beta I_0,   I_2 = I_0 - beta I_1 - w e,   e = exp(-beta w - w^2 / 2)
    log P = log phi(b) + log I_0,    E[u] = b - I_1 / I_0,     Var[u] = I_2 / I_0 - (I_1 / I_0)^2

so that nothing is lost however far out [a, b] lies (no difference of two probabilities near 1, or of two that
underflow). The relative error of I_k grows as beta^{2k} eps, so beyond 100 deviations the moments come from those of
y = beta t, whose density is nearly exponential: with J_k = int_0^{beta w} y^k exp(-y) dy = k! P(k + 1, beta w),

    int y^k exp(-y - y^2 / (2 beta^2)) dy = J_k - J_{k+2} / (2 beta^2) + J_{k+4} / (8 beta^4) - ...

Around zero they follow from the error function. On a narrow interval all of these lose their digits to cancellation;
there exp(-beta t - t^2 / 2), beta = -b of either sign, is integrated by a Gauss-Legendre rule.

Burkardt (2014), "The Truncated Normal Distribution", has the moments; the reflection is standard.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyrovae.piecewise.cells import Intervals
from pyrovae.piecewise.gaussians import CellGaussians
from pyrovae.piecewise.posterior import CellPosterior

__all__ = ["TruncatedNormals", "quantile", "truncated"]

_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
_FAR = 100.0  # deviations beyond which the moments are taken from the asymptotic law
_NARROW, _NODES = 1.0, 12  # w max(1, |b|) below which a rule of so many nodes is exact to rounding
_WIDE = 1e4  # widths beyond which the far end is out of sight; keeps inf * 0 away
_TINY = 1e-300


def truncated(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P(low < u < high), E[u] and Var[u] of a standard normal u on `[low, high]`, elementwise, float64.

    An empty interval has log P = -inf and its upper end for a mean.
    """
    flip = low + high > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    tail = b <= 0
    beta, w = -b.clamp_max(0), (b - a).clamp(0, _WIDE)
    end = (-beta * w - 0.5 * w * w).exp()
    i0 = (_mills(beta) - end * _mills(beta + w)).clamp_min(0)
    i1 = 1 - end - beta * i0
    i2 = i0 - beta * i1 - w * end
    ratio = i1 / i0.clamp_min(_TINY)
    log_p = i0.log() - 0.5 * beta * beta - _LOG_ROOT_2PI
    mean, variance = b - ratio, i2 / i0.clamp_min(_TINY) - ratio * ratio
    far = beta > _FAR
    if far.any():
        away, spread = _far(beta.clamp_min(_FAR), w)
        mean, variance = torch.where(far, b - away, mean), torch.where(far, spread, variance)
    # Around zero: phi(60) = 0 in float64.
    left, right = a.clamp(-60, 60), b.clamp(-60, 60)
    p = 0.5 * (torch.erf(right / math.sqrt(2)) - torch.erf(left / math.sqrt(2)))
    low_phi, high_phi = (torch.exp(-0.5 * u * u - _LOG_ROOT_2PI) for u in (left, right))
    centre = (low_phi - high_phi) / p.clamp_min(_TINY)
    spread = 1 + (left * low_phi - right * high_phi) / p.clamp_min(_TINY) - centre * centre
    log_p = torch.where(tail, log_p, p.clamp_min(0).log())
    mean, variance = torch.where(tail, mean, centre), torch.where(tail, variance, spread)
    mean = torch.minimum(torch.maximum(mean, a), b)
    variance = variance.clamp_min(0)
    narrow = (w * b.abs().clamp_min(1) < _NARROW) & (w > 0)
    if narrow.any():
        log_p[narrow], mean[narrow], variance[narrow] = _by_rule(b[narrow], w[narrow])
    return log_p, torch.where(flip, -mean, mean), variance


def _by_rule(b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P, mean and variance on `[b - w, b]`."""
    nodes, weights = (torch.from_numpy(part).to(b) for part in np.polynomial.legendre.leggauss(_NODES))
    t = 0.5 * w.unsqueeze(-1) * (nodes + 1)
    parts = weights * (b.unsqueeze(-1) * t - 0.5 * t * t).exp()
    total = parts.sum(-1)
    mean = (parts * t).sum(-1) / total
    variance = (parts * (t - mean.unsqueeze(-1)).square()).sum(-1) / total
    return (0.5 * w * total).log() - 0.5 * b * b - _LOG_ROOT_2PI, b - mean, variance


def _far(beta: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of t, far out."""
    end = beta * w
    j = [math.factorial(k) * torch.special.gammainc(torch.full_like(end, k + 1.0), end) for k in range(7)]
    small = beta**-2
    total, first, second = (j[k] - 0.5 * small * j[k + 2] + 0.125 * small**2 * j[k + 4] for k in range(3))
    total = total.clamp_min(_TINY)
    mean = first / total
    return mean / beta, (second / total - mean * mean) * small


def _mills(beta: Tensor) -> Tensor:
    return math.sqrt(math.pi / 2) * torch.special.erfcx(beta / math.sqrt(2))


def quantile(uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The inverse distribution function of a standard normal on `[low, high]`, elementwise.

    On the reflected interval log Phi(u) = log Phi(b) + log(v + (1 - v) Phi(a) / Phi(b)); where exp of it underflows,
    Newton's method on log Phi takes over from the asymptote -sqrt(-2 log Phi).
    """
    flip = low + high > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    uniform = torch.where(flip, 1 - uniform, uniform)
    top = torch.special.log_ndtr(b)
    level = top + torch.log(uniform + (1 - uniform) * (torch.special.log_ndtr(a) - top).exp())
    far = level < -100
    u = torch.where(far, -(-2 * level).clamp_min(0).sqrt(), torch.special.ndtri(level.exp()))
    for _ in range(6 if far.any() else 0):
        value = torch.special.log_ndtr(u)
        slope = (-0.5 * u * u - _LOG_ROOT_2PI - value).exp()
        u = torch.where(far, u - (value - level) / slope, u)
    u = torch.minimum(torch.maximum(u, a), b)
    return torch.where(flip, -u, u)


class TruncatedNormals(CellPosterior):
    """The posterior of one latent: on every interval a normal, cut off at its ends; batch `[B]`, event `[1]`."""

    def __init__(self, cells: Intervals, gaussians: CellGaussians, dtype: torch.dtype) -> None:
        self.scale = 1 / gaussians.factor[:, 0, 0].abs()  # [R]
        loc = gaussians.loc[..., 0]
        self.low, self.high = (cells.low - loc) / self.scale, (cells.high - loc) / self.scale  # [B, R], standardised
        log_mass, mean, variance = truncated(self.low, self.high)
        super().__init__(
            cells, gaussians, dtype, gaussians.log_weight + log_mass, (loc + self.scale * mean).unsqueeze(-1),
            (self.scale**2 * variance)[..., None, None],
        )  # fmt: skip

    def _draw(self, rows: Tensor) -> Tensor:
        cell = torch.distributions.Categorical(logits=self.log_weights[rows], validate_args=False).sample()
        uniform = torch.rand(rows.shape, dtype=self.low.dtype, device=self.low.device)
        u = quantile(uniform, self.low[rows, cell], self.high[rows, cell])
        return (self.gaussians.loc[rows, cell, 0] + self.scale[cell] * u).unsqueeze(-1)
