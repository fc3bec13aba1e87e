r"""Gaussians and their mixtures as plain tensors: what the best members of the families are made of.

    ELBO(q) = E_q[log p(x, u)] + H(q),   mixtures: sum_m w_m E_{N_m}[log p(x, u) - log q(u)]

Expectations are Gauss-Hermite sums (Gauss-Legendre between the kinks of a log-joint that has them): no draw is made,
and no guide, family or Pyro program is run. C candidates are kept for each of B data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.certification.quadrature import LogDensity, gauss_hermite, panels

__all__ = ["Members", "Mixtures", "Normals", "Posterior"]

_REACH = 9.0  # standard deviations that panels cover


class Normals(NamedTuple):
    """N(loc, tril tril'): `loc [C, B, D]`, `tril [C, B, D, D]` lower-triangular."""

    loc: Tensor
    tril: Tensor

    def pick(self, index: Tensor) -> Normals:
        """Candidate `index: [B]` of every datum, alone."""
        return Normals(*(_pick(part, index) for part in self))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[C, B, D]` and covariance `[C, B, D, D]`."""
        return self.loc, self.tril @ self.tril.mT

    def nodes(self, points: int, kinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Nodes `[G, C, B, D]` and weights `[G, C, B]`, exact for functions that are smooth but for `kinks: [K]`."""
        x, weights = _standard(points, self.loc, self.tril[..., 0], kinks)
        return self.loc + (self.tril @ x.unsqueeze(-1)).squeeze(-1), weights

    def elbo(self, log_joint: LogDensity, points: int, kinks: Tensor | None = None) -> Tensor:
        """`[C, B]`, nats."""
        u, weights = self.nodes(points, kinks)
        entropy = self._log_det() + 0.5 * u.shape[-1] * math.log(2 * math.pi * math.e)
        return (weights * log_joint(u)).sum(0) + entropy

    def log_weights(self, log_joint: LogDensity, number: int, seed: int) -> Tensor:
        """log p(x, u_s) - log q(u_s) at plain draws, `[S, C, B]`."""
        generator = torch.Generator().manual_seed(seed)
        eps = torch.randn(number, *self.loc.shape, generator=generator, dtype=torch.double)
        u = self.loc + torch.einsum("cbij,scbj->scbi", self.tril, eps)
        log_q = -0.5 * eps.square().sum(-1) - self._log_det() - 0.5 * eps.shape[-1] * math.log(2 * math.pi)
        return log_joint(u) - log_q

    def _log_det(self) -> Tensor:
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Mixtures(NamedTuple):
    """sum_m w_m N(locs_m, diag(scales_m^2)): `log_weights [C, B, M]` normalised, `locs`, `scales` `[C, B, M, D]`."""

    log_weights_: Tensor
    locs: Tensor
    scales: Tensor

    def pick(self, index: Tensor) -> Mixtures:
        """Candidate `index: [B]` of every datum, alone."""
        return Mixtures(*(_pick(part, index) for part in self))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[C, B, D]` and covariance `[C, B, D, D]`."""
        weights = self.log_weights_.exp()
        mean = torch.einsum("cbm,cbmd->cbd", weights, self.locs)
        spread = self.locs - mean.unsqueeze(-2)
        inner = torch.einsum("cbm,cbmd->cbd", weights, self.scales**2).diag_embed()
        return mean, inner + torch.einsum("cbm,cbmd,cbme->cbde", weights, spread, spread)

    def log_prob(self, u: Tensor) -> Tensor:
        """`[..., C, B, D] -> [..., C, B]`."""
        constant = self.log_weights_ - self.scales.log().sum(-1) - 0.5 * u.shape[-1] * math.log(2 * math.pi)
        z = (u.unsqueeze(-2) - self.locs) / self.scales
        return torch.logsumexp(constant - 0.5 * z.square().sum(-1), -1)

    def elbo(self, log_joint: LogDensity, points: int, kinks: Tensor | None = None) -> Tensor:
        """`[C, B]`, nats."""
        locs, scales = self.locs.movedim(2, 0), self.scales.movedim(2, 0)  # [M, C, B, D]
        x, weights = _standard(points, locs, scales, kinks)
        u = locs + scales * x  # [G, M, C, B, D]
        values = log_joint(u) - self.log_prob(u)
        return (self.log_weights_.exp().movedim(2, 0) * weights * values).sum((0, 1))

    def log_weights(self, log_joint: LogDensity, number: int, seed: int) -> Tensor:
        """log p(x, u_s) - log q(u_s) at plain draws, `[S, C, B]`."""
        generator = torch.Generator().manual_seed(seed)
        shape = (number, *self.log_weights_.shape[:-1])
        uniform = torch.rand(*shape, 1, generator=generator, dtype=torch.double)
        index = (uniform > self.log_weights_.exp().cumsum(-1)[..., :-1]).sum(-1)[..., None, None]  # [S, C, B, 1, 1]
        index = index.expand(*shape, 1, self.locs.shape[-1])
        eps = torch.randn(*shape, self.locs.shape[-1], generator=generator, dtype=torch.double)
        loc, scale = (
            part.expand(number, *part.shape).gather(-2, index).squeeze(-2) for part in (self.locs, self.scales)
        )
        u = loc + scale * eps
        return log_joint(u) - self.log_prob(u)


class Posterior(NamedTuple):
    """The posterior itself: `mean [C, B, D]`, `covariance [C, B, D, D]`, `log_evidence [C, B]`."""

    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor

    def pick(self, index: Tensor) -> Posterior:
        """Candidate `index: [B]` of every datum, alone."""
        return Posterior(*(_pick(part, index) for part in self))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[C, B, D]` and covariance `[C, B, D, D]`."""
        return self.mean, self.covariance

    def log_weights(self, log_joint: LogDensity, number: int, seed: int) -> Tensor:
        """log p(x) at every draw, `[S, C, B]`."""
        return self.log_evidence.expand(number, -1, -1)


Members = Normals | Mixtures | Posterior


def _standard(points: int, loc: Tensor, scale: Tensor, kinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Nodes `[G, ..., D]` and weights `[G, ...]` for standard normals; `scale` and `loc`, `[..., D]`, make them u."""
    dim = loc.shape[-1]
    if kinks is None:
        x, weights = gauss_hermite(points, dim)
        shape = (-1, *[1] * (loc.dim() - 1))
        return x.view(*shape, dim), weights.view(shape)
    with torch.no_grad():  # nodes are where they are: the gradient of the sum is the sum of the gradients
        at = ((kinks.view(-1, *[1] * (loc.dim() - 1)) - loc[..., 0]) / scale[..., 0]).clamp(-_REACH, _REACH)
        ends = torch.full_like(at[:1], _REACH)
        x, weights = panels(torch.cat([-ends, at, ends]), points)
        return x.unsqueeze(-1), weights * (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)


def _pick(part: Tensor, index: Tensor) -> Tensor:
    return part[index, torch.arange(len(index))].unsqueeze(0)
