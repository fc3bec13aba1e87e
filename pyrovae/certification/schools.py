r"""Eight schools written out by hand: the exact posterior of tau, and the best Gaussians.

    mu ~ N(0, 5^2),   tau ~ HalfCauchy(5),   eta_j ~ N(0, 1),   y_j ~ N(mu + tau eta_j, sigma_j^2),   j = 1..8

Given tau everything is Gaussian, so p(tau | y) is known up to a sum over a grid of s = log tau:

    log p(y, s) = log N(y; 0, diag(sigma^2 + tau^2) + 5^2 1 1') + log HalfCauchy(tau; 5) + s

The ELBO of q = N(m, L L') over (s, mu, eta) is an integral over s alone: given s the log-joint is quadratic in
(mu, eta), and q's conditional mean and covariance of those are known (Rubin 1981 for the data).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyrovae.certification.best import maximise
from pyrovae.certification.problems import LOG_2PI, SCHOOLS
from pyrovae.certification.quadrature import gauss_hermite, gradient

__all__ = ["Gaussian", "Posterior", "best_gaussian", "posterior"]

_SCALE = 5.0  # of mu's prior and tau's
_FLAT = 1e-4  # slope of an optimum in any parameter, nats


class Posterior(NamedTuple):
    """log p(y) in nats; mean and standard deviation of tau."""

    log_evidence: float
    mean: float
    sd: float


class Gaussian(NamedTuple):
    """The best member of a Gaussian family: its ELBO in nats; mean and standard deviation of tau = exp(s)."""

    elbo: float
    mean: float
    sd: float


@cache
def posterior() -> Posterior:
    """By a grid in log tau."""
    y, sigma = (values.double() for values in SCHOOLS)
    ticks = torch.linspace(-40, 25, 20_001, dtype=torch.double)
    tau = ticks.exp()
    precision = 1 / (sigma**2 + tau.unsqueeze(-1) ** 2)
    total, pull = precision.sum(-1) + _SCALE**-2, (precision * y).sum(-1)
    log_det = math.log(_SCALE**2) + total.log() - precision.log().sum(-1)
    square = (precision * y**2).sum(-1) - pull**2 / total
    log_joint = -0.5 * (len(y) * LOG_2PI + log_det + square) + _log_prior(ticks)
    log_mass = torch.logsumexp(log_joint, 0)
    weights = (log_joint - log_mass).exp()
    mean = (weights * tau).sum()
    sd = (weights * (tau - mean) ** 2).sum().sqrt()
    return Posterior(float(log_mass + (ticks[1] - ticks[0]).log()), float(mean), float(sd))


def _log_prior(s: Tensor) -> Tensor:
    """log HalfCauchy(exp(s); 5) + s."""
    return math.log(2 / (math.pi * _SCALE)) - functional.softplus(2 * (s - math.log(_SCALE))) + s


@cache
def best_gaussian(full_rank: bool) -> Gaussian:
    """The best diagonal or full-rank Gaussian over (s, mu, eta), by L-BFGS from eight starts.

    Raises:
        ValueError: the search stopped short of an optimum.
    """
    dim, starts = 2 + len(SCHOOLS[0]), 8
    rows, columns = torch.tril_indices(dim, dim, offset=-1)
    below = len(rows) if full_rank else 0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(starts, 2 * dim + below, generator=generator, dtype=torch.double)
    start = torch.cat([noise[:, :dim], -noise[:, dim : 2 * dim].abs(), 0.1 * noise[:, 2 * dim :]], -1).unsqueeze(1)

    def build(p: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_sd, rest = p.split([dim, dim, below], dim=-1)
        tril = log_sd.exp().diag_embed()
        if full_rank:
            strict = torch.zeros_like(tril)
            strict[..., rows, columns] = rest
            tril = tril + strict
        return loc, tril

    def elbo(p: Tensor) -> Tensor:
        return _elbo(*build(p))

    theta = maximise(elbo, start, 2000)
    found = elbo(theta)[:, 0]
    best = int(found.argmax())
    if not gradient(elbo, theta)[best].abs().max() < _FLAT:
        raise ValueError("eight schools: the search for the best Gaussian stopped short of an optimum")
    loc, tril = build(theta[best, 0])
    variance = float(tril[0].square().sum())
    mean = math.exp(float(loc[0]) + variance / 2)
    return Gaussian(float(found[best]), mean, mean * math.sqrt(math.expm1(variance)))


def _elbo(loc: Tensor, tril: Tensor) -> Tensor:
    """ELBO of N(loc, tril tril') over (s, mu, eta), `[..., D]`, `[..., D, D]` -> `[...]`, with nodes for s alone."""
    y, sigma = (values.double() for values in SCHOOLS)
    nodes, weights = gauss_hermite(60, 1)
    z = nodes[:, 0]
    s = loc[..., :1] + tril[..., :1, 0] * z  # [..., G]
    mean = loc[..., None, 1:] + z.unsqueeze(-1) * tril[..., None, 1:, 0]  # [..., G, D - 1]
    covariance = (tril[..., 1:, 1:] @ tril[..., 1:, 1:].mT).unsqueeze(-3)
    variance, tau = covariance.diagonal(dim1=-2, dim2=-1), s.exp().unsqueeze(-1)
    square = mean**2 + variance
    prior = square[..., 0] / _SCALE**2 + square[..., 1:].sum(-1) + 2 * math.log(_SCALE) + mean.shape[-1] * LOG_2PI
    residual = mean[..., :1] + tau * mean[..., 1:] - y
    spread = variance[..., :1] + 2 * tau * covariance[..., 0, 1:] + tau**2 * variance[..., 1:]
    likelihood = ((residual**2 + spread) / sigma**2 + 2 * sigma.log() + LOG_2PI).sum(-1)
    log_joint = _log_prior(s) - 0.5 * (prior + likelihood)
    entropy = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * loc.shape[-1] * (LOG_2PI + 1)
    return (log_joint * weights).sum(-1) + entropy
