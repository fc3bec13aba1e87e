"""Derivatives of functions whose rows are independent, as matrices and as products with vectors.

They are taken from the graph that an evaluation at `u: [B, D]` left behind. J p is the derivative of J' c with respect
to c, which is linear in it: no forward mode is needed. Matrices take all D directions in one vectorised pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Form", "hessian", "jacobian", "negative_hessian", "negative_hessians", "sandwich", "sandwiches"]

Form = Callable[..., Callable[[Tensor], Tensor]]


def jacobian(output: Tensor, u: Tensor, *, create_graph: bool = False) -> Tensor:
    """d output / d u_d for every d at once, `[D, *output]`."""
    cotangent, pulled = _pulled(output, u)
    return _along_axes(pulled, cotangent, u, create_graph)


def hessian(total: Tensor, u: Tensor, *, create_graph: bool = False) -> Tensor:
    """Hessian of a sum over independent rows, `[B, D, D]`."""
    (slope,) = torch.autograd.grad(total, u, create_graph=True)
    if not _depends(slope, u):
        return u.new_zeros(*u.shape, u.shape[-1])
    return _along_axes(slope, u, u, create_graph).movedim(0, 1)


def _pulled(output: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """c and J' c, as a function of c that can be differentiated."""
    cotangent = torch.zeros_like(output).requires_grad_()
    (pulled,) = torch.autograd.grad(output, u, cotangent, create_graph=True)
    return cotangent, pulled


def _along_axes(value: Tensor, source: Tensor, u: Tensor, create_graph: bool) -> Tensor:
    """The vector-Jacobian products of `value: [B, D]` with every axis, `[D, *source]`."""
    axes = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device).unsqueeze(1).expand(-1, *u.shape)
    return _batched(value, source, axes, create_graph=create_graph)


def negative_hessian(total: Tensor, leaf: Tensor) -> Callable[[Tensor], Tensor]:
    """p -> -H p for `p: [B, D]`, without gradient."""
    (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
    if not _depends(slope, leaf):
        return torch.zeros_like
    return lambda p: -torch.autograd.grad(slope, leaf, p, retain_graph=True)[0]


def negative_hessians(total: Tensor, u: Tensor) -> Callable[[Tensor], Tensor]:
    """p -> -H p for every p of `[T, B, D]`; can be differentiated."""
    (slope,) = torch.autograd.grad(total, u, create_graph=True)
    if not _depends(slope, u):
        return torch.zeros_like
    return lambda p: -_batched(slope, u, p)


def sandwich(output: Tensor, leaf: Tensor, weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """p -> J' F J p for `p: [B, D]`, without gradient."""
    cotangent, pulled = _pulled(output, leaf)

    def product(p: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pulled, cotangent, p, retain_graph=True)
        return torch.autograd.grad(output, leaf, weigh(pushed).detach(), retain_graph=True)[0]

    return product


def sandwiches(output: Tensor, u: Tensor, weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """p -> J' F J p for every p of `[T, B, D]`; can be differentiated."""
    cotangent, pulled = _pulled(output, u)
    return lambda p: _batched(output, u, weigh(_batched(pulled, cotangent, p)))


def _depends(slope: Tensor, u: Tensor) -> bool:
    """False where a function is linear in u, perhaps with parameters for coefficients."""
    if not slope.requires_grad:
        return False
    return torch.autograd.grad(slope.sum(), u, allow_unused=True, retain_graph=True)[0] is not None


def _batched(value: Tensor, source: Tensor, vectors: Tensor, *, create_graph: bool = True) -> Tensor:
    """Vector-Jacobian products of `value` with `vectors: [T, *value]`, `[T, *source]`."""

    def product(vector: Tensor, batched: bool) -> Tensor:
        return torch.autograd.grad(
            value, source, vector, is_grads_batched=batched, create_graph=create_graph, retain_graph=True
        )[0]

    try:
        return product(vectors, True)
    except RuntimeError as error:  # an operation whose derivative cannot be vectorised (group norm)
        why = str(error).partition("\n")[0]
        warnings.warn(
            f"torch cannot vectorise the curvature's derivatives ({why}): "
            "they are taken one direction at a time, which is right but slow",
            stacklevel=2,
        )
        return torch.stack([product(vector, False) for vector in vectors])
