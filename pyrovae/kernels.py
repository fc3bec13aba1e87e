r"""Radial kernels, and the maximum mean discrepancy between two samples (Gretton et al. 2012).

.. math::
    \mathrm{MMD}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} k(a_i, a_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(b_i, b_j)
                     - \frac{2}{nm} \sum_{i,j} k(a_i, b_j)

The width of a kernel must grow with the dimension. Between a point at 0 and N(0, I_D), MMD^2 is

| D | exp(-r^2 / D^2) | exp(-r^2 / (2 D)) |
| --- | --- | --- |
| 2 | 0.167 | 0.167 |
| 10 | 0.0105 | 0.160 |
| 64 | 0.00025 | 0.156 |
| 512 | 0.000004 | 0.155 |

so a code that has collapsed to a point is invisible to the first in many dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Kernel", "kernel_of", "mmd2", "stein_direction"]

Kernel = Literal["rbf", "imq", "original"]


def kernel_of(name: Kernel, dim: int, bandwidth: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """k(a, b), `[n, D], [m, D] -> [n, m]`.

    Args:
        name: "rbf", exp(-r^2 / (2 s^2)); "imq", 2 s^2 / (2 s^2 + r^2), with heavier tails; "original", exp(-r^2 / D^2)
            of the InfoVAE authors' code, blind in many dimensions.
        dim: D.
        bandwidth: s^2; D by default, the mean squared distance of N(0, I_D) from its centre.
    """
    if name not in get_args(Kernel):
        raise ValueError(f"kernel must be 'rbf', 'imq' or 'original', got {name!r}")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"a kernel's bandwidth must be positive, got {bandwidth}")
    if name == "original":
        if bandwidth is not None:
            raise ValueError("the 'original' kernel has its bandwidth fixed, at D^2 / 2: take 'rbf' to choose one")
        return partial(_rbf, width=float(dim) ** 2)
    width = 2 * (float(dim) if bandwidth is None else bandwidth)
    return partial(_rbf if name == "rbf" else _imq, width=width)


def _rbf(a: Tensor, b: Tensor, width: float) -> Tensor:
    return (-_square_distances(a, b) / width).exp()


def _imq(a: Tensor, b: Tensor, width: float) -> Tensor:
    return width / (width + _square_distances(a, b))


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    # Not the square of cdist, whose gradient is not defined at equal points.
    return (a.square().sum(-1, keepdim=True) + b.square().sum(-1) - 2 * a @ b.T).clamp_min(0)


def mmd2(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Unbiased MMD^2 between `[n, D]` and `[m, D]`, n and m at least 2; scalar, negative at times."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"MMD takes at least two points on either side, got {len(a)} and {len(b)}")
    return _within(kernel(a, a)) + _within(kernel(b, b)) - 2 * kernel(a, b).mean()


def _within(pairs: Tensor) -> Tensor:
    n = len(pairs)
    return (pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))


def stein_direction(z: Tensor, score: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The direction in which Stein variational gradient descent moves a sample (Liu & Wang 2016), `[n, D]`.

        phi(z_i) = (1/n) sum_j [ k(z_j, z_i) grad log p(z_j) + grad_{z_j} k(z_j, z_i) ]

    the steepest descent of KL(q || p) in the kernel's space, for a radial kernel.

    Args:
        z: draws of q, `[n, D]`.
        score: grad log p at them, `[n, D]`.
    """
    fixed = z.detach()
    with torch.enable_grad():
        moving = fixed.clone().requires_grad_(True)
        pairs = kernel(fixed, moving)
        (repulsion,) = torch.autograd.grad(pairs.sum(), moving)
    # Of a radial kernel the gradient in the one argument is minus that in the other.
    return (pairs.detach().T @ score.detach() - repulsion) / len(z)
