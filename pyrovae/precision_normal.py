"""A normal whose precision is differentiated through products alone.

    q(u) = N(mu, Lambda^{-1}),   Lambda given as numbers and, for its derivative, as p -> Lambda p

A matrix of which every entry depends on the parameters of a net is dear to differentiate: D directions through the net
and back. A draw and its log-density need few:

    u = mu + s,   s = A eps with A A' = Lambda^{-1};             du = dmu - Lambda^{-1} dLambda s / 2
    log q(u) = log|Lambda| / 2 - s' Lambda s / 2 + const;        d log|Lambda| = E_t[t' dLambda t],  t = A r

The field -Lambda^{-1} dLambda s / 2 moves the covariance as it must: it adds its product with Lambda^{-1} and the
transpose, -Lambda^{-1} dLambda Lambda^{-1}. The trace is estimated with P vectors r of random signs (Hutchinson 1990)
that have nothing to do with eps, so the gradient of any function of draws and densities stays unbiased: it is linear in
d log|Lambda|, with weights that do not depend on r. With r = eps the estimate would cancel the derivative of
s' Lambda s: that is sticking the landing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["PrecisionNormal", "covariance_factor"]


class PrecisionNormal(TorchDistribution):
    """N(loc, Lambda^{-1}) over R^D.

    Args:
        loc: mu, `[B, D]`.
        precision: Lambda, `[B, D, D]`, without gradient.
        products: p -> Lambda p for every p of `[T, B, D]`. Only their derivative is used, so they need not know of a
            floor under the eigenvalues of `precision`.
        num_probes: P >= 1.
    """

    arg_constraints = {"loc": constraints.real_vector, "precision_matrix": constraints.positive_definite}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, precision: Tensor, products: Callable[[Tensor], Tensor], num_probes: int) -> None:
        self.loc, self.precision_matrix = loc, precision.detach()
        self.products, self.num_probes = products, num_probes
        self.scale_tril = covariance_factor(self.precision_matrix)
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None  # the last draws, and `_changes` there
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def covariance_matrix(self) -> Tensor:
        """Without gradient."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def variance(self) -> Tensor:
        """Without gradient."""
        return self.scale_tril.square().sum(-1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> TorchDistribution:
        same = torch.Size(batch_shape) == self.batch_shape
        return self if same else super().expand(batch_shape, _instance)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.at(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def at(self, eps: Tensor) -> Tensor:
        """The draws that belong to standard normal `eps: [*shape, B, D]`."""
        away = _times(self.scale_tril, eps)
        if not torch.is_grad_enabled():
            return self.loc + away
        change, trace = self._changes(away)
        u = self.loc + away - 0.5 * _times(self.scale_tril, _times(self.scale_tril.mT, change))
        self._drawn = u, change, trace
        return u

    def log_prob(self, value: Tensor) -> Tensor:
        away = value - self.loc
        still = away.detach()
        ahead = _times(self.precision_matrix, still)
        square = (still * ahead).sum(-1)
        log_det = -2 * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if torch.is_grad_enabled():
            drawn = self._drawn
            change, trace = drawn[1:] if drawn is not None and drawn[0] is value else self._changes(still)
            square = square + (still * change).sum(-1) + 2 * (ahead * (away - still)).sum(-1)
            log_det = log_det + trace
        return 0.5 * (log_det - square - away.shape[-1] * math.log(2 * math.pi))

    def _changes(self, away: Tensor) -> tuple[Tensor, Tensor]:
        """dLambda s for every s of `[*shape, B, D]`, and an estimate of d log|Lambda| `[B]`: both zero in value."""
        signs = torch.randint(0, 2, (self.num_probes, *self.loc.shape), device=away.device).to(away.dtype) * 2 - 1
        probes = _times(self.scale_tril, signs)
        vectors = torch.cat([away.reshape(-1, *self.loc.shape), probes])
        found = self.products(vectors)
        change = found - found.detach()
        number = len(vectors) - self.num_probes
        return change[:number].view_as(away), (probes * change[number:]).sum(-1).mean(0)


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)


def covariance_factor(precision: Tensor) -> Tensor:
    """Cholesky factor of the covariance from the precision, without forming an inverse.

    With J the exchange matrix, J P J = L L' gives P^{-1} = A A' for the lower-triangular A = (J L' J)^{-1}.
    """
    flipped = torch.linalg.cholesky(precision.flip(-2, -1))
    lower = flipped.flip(-2, -1).mT
    return torch.linalg.solve_triangular(lower, torch.eye(lower.shape[-1]).to(lower).expand_as(lower), upper=False)
