"""A log-density with its gradient as graphs of tensor operations, for samplers that evaluate both many thousand times.

    at(u) = (log f(u), d/du log f(u)),     gradient(u) = d/du log f(u)

Automatic differentiation costs bookkeeping at every evaluation. Here it runs once, while `pyrovae.recording` records
the backward pass along with the forward one; replaying needs no autograd at all. A second graph leaves out what only
the value needs, which a trajectory asks for at its end alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.latents import LogJoint
from pyrovae.recording import record, recorded
from pyrovae.samplers.state import State, init

__all__ = ["Slopes", "slopes"]


@dataclass(frozen=True)
class Slopes:
    """Value and gradient at points of one shape `[..., B, D]`; nothing is kept for differentiation."""

    at: Callable[[Tensor], State]
    gradient: Callable[[Tensor], Tensor]


def slopes(bound: LogJoint, u: Tensor) -> Slopes:
    """Value and gradient of a log-joint at points of `u`'s shape, with the parameters as they are now.

    Where the program cannot be recorded (`recorded` warns) autograd runs at every evaluation, with the same numbers.
    """
    density = recorded(bound, u)
    if density is bound:
        return Slopes(lambda point: init(bound, point), lambda point: init(bound, point).gradient)

    # A constant, not ones_like(value): the graph of the gradient would have to compute the value for its shape.
    ones = torch.ones(u.shape[:-1], dtype=u.dtype, device=u.device)

    def both(point: Tensor) -> tuple[Tensor, Tensor]:
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            value = density(leaf)
            # Rows are independent: the gradient of the sum is every row's own.
            (gradient,) = torch.autograd.grad(value, leaf, ones)
        return value.detach(), gradient

    def alone(point: Tensor) -> tuple[Tensor]:
        return (both(point)[1],)

    whole, slim = record(both, u, ()).at(), record(alone, u, ()).at()
    for point in (u, 0.1 * torch.ones_like(u)):
        _require_same(both(point), (*whole(point), *slim(point)))

    def at(point: Tensor) -> State:
        with torch.no_grad():
            return State(point, *whole(point))

    def gradient(point: Tensor) -> Tensor:
        with torch.no_grad():
            return slim(point)[0]

    return Slopes(at, gradient)


def _require_same(expected: tuple[Tensor, Tensor], found: tuple[Tensor, ...]) -> None:
    value, slope = expected
    near = 1e-8 if value.dtype == torch.float64 else 1e-3
    for ours, theirs in zip(found, (value, slope, slope), strict=True):
        if not torch.allclose(ours, theirs, rtol=near, atol=near * (1 + float(theirs.abs().max())), equal_nan=True):
            raise AssertionError("a recorded gradient differs from autograd's: please report this model")
