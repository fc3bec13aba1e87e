r"""What every cell would be without its boundaries: a linear-Gaussian model.

    p(x, z) = kappa_r(x) N(z; mu_r(x), Sigma_r)     for z in cell r, where g(z) = A_r z + b_r
    Sigma_r = (I + A_r' A_r / s^2)^{-1},   mu_r = Sigma_r A_r' (x - b_r) / s^2
    log kappa_r = log N(x; b_r, s^2 I + A_r A_r')
                = -(|x - b_r - A_r mu_r|^2 / s^2 + |mu_r|^2 + log|Sigma_r^{-1}| + X log(2 pi s^2)) / 2

The last line has no difference of large numbers, however small s is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CellGaussians", "gaussians"]


class CellGaussians(NamedTuple):
    """log kappa `[B, R]`, mu `[B, R, D]` and Sigma `[R, D, D]`."""

    log_weight: Tensor
    loc: Tensor
    covariance: Tensor

    def log_prob(self, z: Tensor, rows: Tensor, cell: Tensor) -> Tensor:
        """log kappa + log N(z; mu, Sigma) of the named rows and cells, `[..., D] -> [...]`."""
        away = (z - self.loc[rows, cell]).unsqueeze(-1)
        precision = torch.linalg.inv(self.covariance)
        square = (away * (precision[cell] @ away)).sum((-2, -1))
        constant = torch.linalg.slogdet(precision)[1] - z.shape[-1] * math.log(2 * math.pi)
        return self.log_weight[rows, cell] + 0.5 * (constant[cell] - square)


def gaussians(maps: Tensor, noise: Tensor, x: Tensor) -> CellGaussians:
    """Of all cells and data.

    Args:
        maps: (b_r, A_r), `[R, X, 1 + D]`.
        noise: s, scalar.
        x: `[B, X]`.
    """
    offset, slope = maps[..., 0], maps[..., 1:]
    variance = noise**2
    eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    precision = eye + slope.mT @ slope / variance
    away = x.unsqueeze(1) - offset  # [B, R, X]
    loc = torch.linalg.solve(precision, torch.einsum("rxd,brx->brd", slope, away).unsqueeze(-1) / variance).squeeze(-1)
    rest = away - torch.einsum("rxd,brd->brx", slope, loc)
    log_det = torch.linalg.slogdet(precision)[1] + x.shape[-1] * torch.log(2 * math.pi * variance)
    log_weight = -0.5 * (rest.square().sum(-1) / variance + loc.square().sum(-1) + log_det)
    return CellGaussians(log_weight, loc, torch.linalg.inv(precision))
