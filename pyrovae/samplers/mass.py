"""Mass matrices of many data at once: positions u = A q, momenta p ~ N(0, I) in the whitened coordinates q.

A is diagonal, `[B, D]` (standard deviations), or the Cholesky factor of a covariance, `[B, D, D]`. The leapfrog step
of size e in q is, in u,

    p += (e/2) A' grad log f(u);     u += e A p;     p += (e/2) A' grad log f(u)

with kinetic energy |p|^2 / 2. From n draws, a covariance counts n / (n + 5), and 5 / (n + 5) of 0.001 times its own
diagonal is added: a short window cannot be singular, and the units of a latent do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MAX_DENSE", "Mass", "estimate", "unit"]

MAX_DENSE = 64  # latents up to which a dense mass matrix is offered
_PRIOR_DRAWS, _FLOOR = 5.0, 1e-3


@dataclass(frozen=True)
class Mass:
    """A of every datum.

    Attributes:
        factor: `[B, D]` or `[B, D, D]` lower triangular.
    """

    factor: Tensor

    @property
    def dense(self) -> bool:
        return self.factor.dim() == 3

    def scaled(self, step_size: Tensor) -> Mass:
        """e A, for step sizes `[B]`."""
        return Mass(self.factor * step_size.view(-1, *[1] * (self.factor.dim() - 1)))

    def push(self, q: Tensor) -> Tensor:
        """A q for `q: [C, B, D]`."""
        return torch.einsum("bij,cbj->cbi", self.factor, q) if self.dense else self.factor * q

    def pull(self, gradient: Tensor) -> Tensor:
        """A' g for `g: [C, B, D]`."""
        return torch.einsum("bji,cbj->cbi", self.factor, gradient) if self.dense else self.factor * gradient

    def whiten(self, u: Tensor) -> Tensor:
        """A^-1 u for `u: [C, B, D]`."""
        if not self.dense:
            return u / self.factor
        return torch.linalg.solve_triangular(self.factor, u.movedim(0, -1), upper=False).movedim(-1, 0)

    def log_size(self) -> Tensor:
        """log |det A| / D of every datum, `[B]`: by how much lengths grow."""
        diagonal = self.factor.diagonal(dim1=-2, dim2=-1) if self.dense else self.factor
        return diagonal.log().mean(-1)

    def rows(self, index: Tensor) -> Mass:
        """The matrices of some of the data."""
        return Mass(self.factor[index])


def unit(like: Tensor, *, dense: bool) -> Mass:
    """The identity for positions `like: [C, B, D]`."""
    _, rows, dim = like.shape
    if dense:
        return Mass(torch.eye(dim, dtype=like.dtype, device=like.device).repeat(rows, 1, 1))
    return Mass(torch.ones(rows, dim, dtype=like.dtype, device=like.device))


def estimate(draws: Tensor, *, dense: bool) -> Mass:
    """From the draws of a warm-up window, `[S, C, B, D]`, all chains of a datum pooled."""
    pooled = draws.flatten(0, 1).double()
    number = len(pooled)
    centred = pooled - pooled.mean(0)
    variance = centred.square().sum(0) / max(1, number - 1)  # [B, D]
    keep = number / (number + _PRIOR_DRAWS)
    tiny = torch.finfo(draws.dtype).tiny  # of draws that have not moved
    if not dense:
        return Mass((variance + tiny).sqrt().to(draws.dtype))
    floor = (1 - keep) * _FLOOR * variance + tiny
    covariance = torch.einsum("nbi,nbj->bij", centred, centred) / max(1, number - 1)
    return Mass(torch.linalg.cholesky(keep * covariance + torch.diag_embed(floor)).to(draws.dtype))
