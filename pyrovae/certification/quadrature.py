r"""Rules of integration that know nothing of guides: grids for posteriors, Gauss-Hermite nodes for Gaussians.

Both are exact to rounding for what they are used on here, and say so where they are not.

    int f(u) du          trapezoid on a box outside which f vanishes: exponentially exact for smooth f
    E_N(m, C)[f(u)]      sum_g w_g f(m + chol(C) x_g), product Gauss-Hermite nodes x_g

Where a function of one variable has kinks at known places, both become Gauss-Legendre rules on the panels between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "LogDensity", "Moments", "gauss_hermite", "gaussian_moments", "gradient", "grid_moments", "hessian",
    "panel_moments", "panels",
]  # fmt: skip

LogDensity = Callable[[Tensor], Tensor]  # [..., B, D] -> [..., B]

_POINTS = {1: 8001, 2: 801}
_RIM = 30.0  # nats by which the log-density must have fallen at the rim of the box


class Moments(NamedTuple):
    """Mean `[B, D]`, covariance `[B, D, D]` and log of the normalising constant `[B]`."""

    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor

    @property
    def sd(self) -> Tensor:
        """`[B, D]`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()


def gauss_hermite(points: int, dim: int) -> tuple[Tensor, Tensor]:
    """Nodes `[G, D]` and weights `[G]` of the product rule for the standard normal, `G = points ** dim`.

    Exact for polynomials of degree `2 * points - 1` in each coordinate.
    """
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(points))
    weights = weights / weights.sum()
    index = torch.cartesian_prod(*[torch.arange(points)] * dim).reshape(-1, dim)
    return nodes[index], weights[index].prod(-1)


def panels(edges: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on the panels between ascending `edges: [K, ...]`, `[(K - 1) * points, ...]`."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(points))
    shape = (-1, *[1] * edges.dim())
    low, half = edges[:-1], 0.5 * edges.diff(dim=0)
    return (low + half * (1 + nodes.view(shape))).flatten(0, 1), (half * weights.view(shape)).flatten(0, 1)


def panel_moments(log_joint: LogDensity, edges: Tensor, rows: int, points: int = 400) -> Moments:
    """Moments of every datum's posterior over one latent, smooth between `edges: [K]` and without mass outside them."""
    u, weights = panels(edges, points)
    values = log_joint(u[:, None, None].expand(-1, rows, 1)) + weights.log()[:, None]
    total = torch.logsumexp(values, 0)
    share = (values - total).exp()
    mean = share.T @ u
    variance = (share * (u[:, None] - mean) ** 2).sum(0)
    return Moments(mean[:, None], variance[:, None, None], total)


def gradient(log_density: LogDensity, u: Tensor) -> Tensor:
    """`[..., B, D]`."""
    point = u.detach().requires_grad_()
    return torch.autograd.grad(log_density(point).sum(), point)[0]


def hessian(log_density: LogDensity, u: Tensor) -> Tensor:
    """`[..., B, D, D]`."""
    point = u.detach().requires_grad_()
    (slope,) = torch.autograd.grad(log_density(point).sum(), point, create_graph=True)
    columns = [torch.autograd.grad(slope[..., d].sum(), point, retain_graph=True)[0] for d in range(u.shape[-1])]
    return torch.stack(columns, dim=-1)


def gaussian_moments(log_joint: LogDensity, curvature: Callable[[Tensor], Tensor], at: Tensor) -> Moments:
    """Of a log-density that is quadratic with precision `curvature`: one Newton step from anywhere is exact."""
    precision = curvature(at)
    mean = at + torch.linalg.solve(precision, gradient(log_joint, at))
    evidence = log_joint(mean) + 0.5 * (at.shape[-1] * math.log(2 * math.pi) - torch.linalg.slogdet(precision)[1])
    return Moments(mean, torch.linalg.inv(precision), evidence)


def grid_moments(log_joint: LogDensity, bound: float, rows: int, dim: int) -> Moments:
    """Moments of every datum's posterior from one grid.

    Raises:
        ValueError: the log-density has not fallen far enough at the rim, or half of the points give another answer.
    """
    points = _POINTS[dim]
    fine = _on_grid(log_joint, bound, points, rows, dim)
    coarse = _on_grid(log_joint, bound, (points + 1) // 2, rows, dim)
    for name, a, b in zip(Moments._fields, fine, coarse, strict=True):
        if not torch.allclose(a, b, rtol=1e-7, atol=1e-7):
            raise ValueError(f"the grid of {points} points a dimension does not resolve the posterior's {name}")
    return fine


def _on_grid(log_joint: LogDensity, bound: float, points: int, rows: int, dim: int) -> Moments:
    ticks = torch.linspace(-bound, bound, points, dtype=torch.double)
    u, spacing = torch.cartesian_prod(*[ticks] * dim).reshape(-1, dim), 2 * bound / (points - 1)
    wide = u.unsqueeze(1).expand(-1, rows, -1)
    values = torch.cat([log_joint(part) for part in wide.split(100_000)])
    rim = (u.abs() == bound).any(-1)
    fall = values.amax(0) - values[rim].amax(0)
    if not (fall > _RIM).all():
        raise ValueError(f"the log-density falls by only {float(fall.min()):.1f} nats towards the box of ±{bound}")
    total = torch.logsumexp(values, 0)
    weights = (values - total).exp()  # [G, B]
    mean = weights.T @ u
    centred = u.unsqueeze(1) - mean
    covariance = torch.einsum("gb,gbd,gbe->bde", weights, centred, centred)
    return Moments(mean, covariance, total + dim * math.log(spacing))
