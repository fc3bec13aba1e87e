r"""What every cell would be without its boundaries: a linear-Gaussian model.

    p(x, z) = kappa_r(x) N(z; mu_r(x), Sigma_r)     for z in cell r, where g(z) = A_r z + b_r
    Sigma_r = (I + A_r' A_r / s^2)^{-1},   mu_r = Sigma_r A_r' (x - b_r) / s^2
    log kappa_r = log N(x; b_r, s^2 I + A_r A_r')
                = -(|x - b_r - A_r mu_r|^2 / s^2 + |mu_r|^2 + log|Sigma_r^{-1}| + X log(2 pi s^2)) / 2

The last line has no difference of large numbers, however small s is. Nor is Sigma_r^{-1} = C_r' C_r formed: C_r is the
triangle in the QR decomposition of (A_r / s, I), and mu_r the solution of its least-squares problem.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CellGaussians", "gaussians"]


class CellGaussians(NamedTuple):
    """log kappa `[B, R]`, mu `[B, R, D]` and C, `[R, D, D]`, upper triangular with Sigma^{-1} = C' C."""

    log_weight: Tensor
    loc: Tensor
    factor: Tensor

    @property
    def log_det(self) -> Tensor:
        """log|C|, `[R]`."""
        return self.factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

    def log_prob(self, z: Tensor, rows: Tensor, cell: Tensor) -> Tensor:
        """log kappa + log N(z; mu, Sigma) of the named rows and cells, `[..., D] -> [...]`."""
        away = (z - self.loc[rows, cell]).unsqueeze(-1)
        square = (self.factor[cell] @ away).square().sum((-2, -1))
        constant = self.log_det - 0.5 * z.shape[-1] * math.log(2 * math.pi)
        return self.log_weight[rows, cell] + constant[cell] - 0.5 * square


def gaussians(maps: Tensor, noise: Tensor, x: Tensor) -> CellGaussians:
    """Of all cells and data.

    Args:
        maps: (b_r, A_r), `[R, X, 1 + D]`.
        noise: s, scalar.
        x: `[B, X]`.
    """
    offset, slope = maps[..., 0], maps[..., 1:]
    eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device).expand(len(slope), -1, -1)
    turn, factor = torch.linalg.qr(torch.cat([slope / noise, eye], -2))
    away = (x.unsqueeze(1) - offset) / noise  # [B, R, X]
    along = torch.einsum("rxd,brx->brd", turn[:, : x.shape[-1]], away).unsqueeze(-1)
    loc = torch.linalg.solve_triangular(factor, along, upper=True).squeeze(-1)
    rest = away - torch.einsum("rxd,brd->brx", slope / noise, loc)
    square = rest.square().sum(-1) + loc.square().sum(-1)
    found = CellGaussians(-0.5 * square - x.shape[-1] * torch.log(math.sqrt(2 * math.pi) * noise), loc, factor)
    return found._replace(log_weight=found.log_weight - found.log_det)
