"""Derivatives of functions whose rows are independent, as matrices and as products with vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["hessian", "jacobian", "negative_hessian", "sandwich"]


def jacobian(
    function: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor, tangents: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Derivatives along `tangents: [T, B, D]`, each `[T, *output]`; by default d outputs / d u_d for every d at once.

    Forward mode, rows being independent: one tangent per latent dimension, the primal computed once.
    """
    if tangents is None:
        tangents = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device).unsqueeze(1).expand(-1, *u.shape)
    columns = torch.func.vmap(lambda tangent: torch.func.jvp(function, (u,), (tangent,))[1])(tangents)
    # Under vmap a Python number's tangent is a batched double and promotes what it meets.
    return tuple(column.to(u.dtype) for column in columns)


def hessian(total: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Hessian of a sum over independent rows, `[B, D, D]`."""
    (columns,) = jacobian(lambda point: (torch.func.grad(total)(point),), u)  # [D, B, D]
    return columns.movedim(0, 1)


def negative_hessian(total: Tensor, leaf: Tensor) -> Callable[[Tensor], Tensor]:
    (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
    if not slope.requires_grad:  # linear in u
        return torch.zeros_like
    return lambda p: -torch.autograd.grad(slope, leaf, p, retain_graph=True)[0]


def sandwich(output: Tensor, leaf: Tensor, weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """p -> J' F J p. J p is the derivative of J' c with respect to c, which is linear in it: no forward mode needed."""
    cotangent = torch.zeros_like(output).requires_grad_()
    (pulled,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)

    def product(p: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pulled, cotangent, p, retain_graph=True)
        return torch.autograd.grad(output, leaf, weigh(pushed), retain_graph=True)[0]

    return product
