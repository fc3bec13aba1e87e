r"""log p(x) with its gradient, by Fisher's identity.

    d log p(x) / d theta = E_{p(z|x)}[d log p(x, z) / d theta]

The right side needs the posterior's moments on every cell and nothing else: the derivative of

    E[log p(x | z)] = -(X log(2 pi s^2) + sum_r E[1[z in r] |x - b_r - A_r z|^2] / s^2) / 2

with the moments held constant. Cells move with the weights, but p(x, z) is continuous across their boundaries, so what
one gains the other loses and the derivative is exact. Of the second derivative that is not true: asking for it raises.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrovae.piecewise.posterior import CellPosterior

__all__ = ["differentiable_evidence"]


class _WithGradient(torch.autograd.Function):
    """The first argument's value with the second's gradient, once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("log_evidence can be differentiated once: take its gradient without create_graph=True")
        return None, gradient


def differentiable_evidence(posterior: CellPosterior, maps: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """log p(x), `[B]`, nats, float64: the posterior's value, with the gradient in `maps`, `noise` and `x`.

    Args:
        posterior: p(z | x).
        maps: (b_r, A_r), `[R, X, 1 + D]`.
        noise: s, scalar.
        x: `[B, X]`.
    """
    weights = posterior.weights
    offset, slope = maps[..., 0], maps[..., 1:]
    # Around every cell's mean: the square of a mean residual, and what the spread of z adds.
    rest = x.unsqueeze(1) - offset - torch.einsum("rxd,brd->brx", slope, posterior.cell_mean)
    spread = torch.einsum("rxd,brde,rxe->br", slope, posterior.cell_covariance, slope)
    square = (weights * (rest.square().sum(-1) + spread)).sum(-1)
    expected = -0.5 * (square / noise**2 + x.shape[-1] * torch.log(2 * math.pi * noise**2))
    found: Tensor = _WithGradient.apply(posterior.log_evidence, expected)
    return found
