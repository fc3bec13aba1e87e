r"""The exact posterior over cells: a mixture of Gaussians, each cut off at the boundary of its cell.

    p(z | x) = sum_r 1[z in r] kappa_r N(z; mu_r, Sigma_r) / p(x),     p(x) = sum_r kappa_r P_r
    pi_r = kappa_r P_r / p(x),   P_r = Pr[N(mu_r, Sigma_r) in cell r]

Subclasses have the integrals: over intervals for one latent, over polygons for two.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import constraints

from pyrovae.piecewise.cells import Intervals, Polygons
from pyrovae.piecewise.gaussians import CellGaussians

__all__ = ["CellPosterior"]


class CellPosterior(TorchDistribution):
    """What intervals and polygons share: weights, moments, density; batch `[B]`, event `[D]`.

    Its parameters are constants: no gradient flows through draws or densities to the model. It computes in float64 and
    gives draws and densities in the dtype asked for.

    Args:
        cells: the cells.
        gaussians: the Gaussian of each.
        dtype: of draws, moments and densities.
        log_mass: log(kappa_r P_r), `[B, R]`.
        mean: E[z | cell], `[B, R, D]`.
        covariance: Cov[z | cell], `[B, R, D, D]`.

    Attributes:
        log_evidence: log p(x), `[B]`, nats, float64.
        log_weights: log pi_r, `[B, R]`, float64.
        weights: pi_r, `[B, R]`, float64.
        cell_mean, cell_covariance: as given.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        cells: Intervals | Polygons,
        gaussians: CellGaussians,
        dtype: torch.dtype,
        log_mass: Tensor,
        mean: Tensor,
        covariance: Tensor,
    ) -> None:
        self.cells, self.gaussians, self.dtype = cells, gaussians, dtype
        self.log_evidence = torch.logsumexp(log_mass, -1)
        self.log_weights = log_mass - self.log_evidence.unsqueeze(-1)
        self.weights = self.log_weights.exp()
        self.cell_mean, self.cell_covariance = mean, covariance
        self.rows = torch.arange(len(log_mass), device=log_mass.device)  # of the data, in the shape of the batch
        super().__init__(self.rows.shape, mean.shape[-1:], validate_args=False)

    @abstractmethod
    def _draw(self, rows: Tensor) -> Tensor:
        """One draw for each of the data named, `[...] -> [..., D]`, float64."""

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> CellPosterior:
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new.rows = self.rows.expand(batch_shape)
        new._batch_shape = torch.Size(batch_shape)
        return new

    @property
    def first(self) -> Tensor:
        """pi_r E[z | r], `[B, R, D]`, float64."""
        return self.weights.unsqueeze(-1) * self.cell_mean

    @property
    def second(self) -> Tensor:
        """pi_r E[z z' | r], `[B, R, D, D]`, float64."""
        outer = self.cell_mean.unsqueeze(-1) * self.cell_mean.unsqueeze(-2)
        return self.weights[..., None, None] * (self.cell_covariance + outer)

    @property
    def mean(self) -> Tensor:
        return self.first.sum(-2)[self.rows].to(self.dtype)

    @property
    def covariance_matrix(self) -> Tensor:
        """`[B, D, D]`."""
        away = self.cell_mean - self.first.sum(-2, keepdim=True)
        spread = self.cell_covariance + away.unsqueeze(-1) * away.unsqueeze(-2)
        return (self.weights[..., None, None] * spread).sum(-3)[self.rows].to(self.dtype)

    @property
    def variance(self) -> Tensor:
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self._draw(self.rows.expand(torch.Size(sample_shape) + self.batch_shape)).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        z = value.to(self.log_evidence.dtype)
        shape = broadcast_shape(z.shape[:-1], self.batch_shape)
        rows, z = self.rows.expand(shape), z.expand(*shape, z.shape[-1])
        cell = self.cells.locate(z.detach())
        return (self.gaussians.log_prob(z, rows, cell) - self.log_evidence[rows]).to(self.dtype)
