r"""Gaussians and their mixtures as plain tensors: what the best members of the families are made of.

    ELBO(q) = E_q[log p(x, u)] + H(q),   mixtures: sum_m w_m E_{N_m}[log p(x, u) - log q(u)]

Expectations are Gauss-Hermite sums: no draw is made, and no guide, family or Pyro program is run. C candidates are kept
for each of B data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.certification.quadrature import LogDensity, gauss_hermite

__all__ = ["Members", "Mixtures", "Normals"]


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

    def nodes(self, points: int) -> tuple[Tensor, Tensor]:
        """Gauss-Hermite nodes `[G, C, B, D]` and weights `[G]`."""
        x, weights = gauss_hermite(points, self.loc.shape[-1])
        return self.loc + torch.einsum("cbij,gj->gcbi", self.tril, x), weights

    def elbo(self, log_joint: LogDensity, points: int) -> Tensor:
        """`[C, B]`, nats."""
        u, weights = self.nodes(points)
        entropy = self._log_det() + 0.5 * u.shape[-1] * math.log(2 * math.pi * math.e)
        return torch.einsum("g,gcb->cb", weights, log_joint(u)) + entropy

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

    def elbo(self, log_joint: LogDensity, points: int) -> Tensor:
        """`[C, B]`, nats."""
        x, weights = gauss_hermite(points, self.locs.shape[-1])
        u = (self.locs + self.scales * x[:, None, None, None]).movedim(3, 1)  # [G, M, C, B, D]
        values = log_joint(u) - self.log_prob(u)
        return torch.einsum("g,cbm,gmcb->cb", weights, self.log_weights_.exp(), values)

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


Members = Normals | Mixtures


def _pick(part: Tensor, index: Tensor) -> Tensor:
    return part[index, torch.arange(len(index))].unsqueeze(0)
