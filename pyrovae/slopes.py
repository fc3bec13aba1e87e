"""A log-density with its gradient as graphs of tensor operations, for samplers that evaluate both many thousand times.

    at(u) = (log f(u), d/du log f(u)),     gradient(u) = d/du log f(u)

Automatic differentiation costs bookkeeping at every evaluation. Here it runs once, while `pyrovae.recording` records
the backward pass along with the forward one; replaying needs no autograd at all. A second graph leaves out what only
the value needs, which a trajectory asks for at its end alone.

Annealing needs the two terms of the log-joint and their gradients apart, log f_beta(u) = log p(u) + beta log p(x | u).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.latents import LogJoint
from pyrovae.recording import record, recorded
from pyrovae.samplers.state import State, init

__all__ = ["Parts", "Slopes", "Tempered", "slopes", "tempered"]


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
        value, slope = both(point)
        _require_same((value, slope, slope), (*whole(point), *slim(point)))

    def at(point: Tensor) -> State:
        with torch.no_grad():
            return State(point, *whole(point))

    def gradient(point: Tensor) -> Tensor:
        with torch.no_grad():
            return slim(point)[0]

    return Slopes(at, gradient)


class Parts(NamedTuple):
    """log p(u) with its Jacobian and log p(x | u), `[..., B]`, and their gradients, `[..., B, D]`."""

    latent: Tensor
    observed: Tensor
    latent_gradient: Tensor
    observed_gradient: Tensor

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.latent_gradient, self.observed_gradient


@dataclass(frozen=True)
class Tempered:
    """The parts of a log-joint, and the gradients alone, at points of one shape."""

    parts: Callable[[Tensor], Parts]
    gradients: Callable[[Tensor], tuple[Tensor, Tensor]]

    def at(self, beta: float) -> Slopes:
        """log p(u) + beta log p(x | u)."""

        def state(u: Tensor) -> State:
            found = self.parts(u)
            return State(u, found.latent + beta * found.observed, mixed(*found.gradients))

        def mixed(latent: Tensor, observed: Tensor) -> Tensor:
            return torch.add(latent, observed, alpha=beta)

        return Slopes(state, lambda u: mixed(*self.gradients(u)))


def tempered(bound: LogJoint, u: Tensor) -> Tempered:
    """The parts of a log-joint at points of `u`'s shape; as `slopes`."""
    density = recorded(bound, u)
    ones = torch.ones(u.shape[:-1], dtype=u.dtype, device=u.device)

    def everything(point: Tensor) -> Parts:
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            latent, observed = density.terms(leaf)
            pulls = [
                # A term may not depend on the latents at all.
                torch.autograd.grad(term, leaf, ones, retain_graph=True, materialize_grads=True)[0]
                if term.requires_grad
                else torch.zeros_like(point)
                for term in (latent, observed)
            ]
        return Parts(latent.detach(), observed.detach(), pulls[0], pulls[1])

    if density is bound:
        return Tempered(everything, lambda point: everything(point).gradients)
    whole = record(everything, u, ()).at()
    slim = record(lambda point: everything(point).gradients, u, ()).at()
    for point in (u, 0.1 * torch.ones_like(u)):
        expected = everything(point)
        _require_same((*expected, *expected.gradients), (*whole(point), *slim(point)))

    def parts(point: Tensor) -> Parts:
        with torch.no_grad():
            return Parts(*whole(point))

    def gradients(point: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            latent, observed = slim(point)
        return latent, observed

    return Tempered(parts, gradients)


def _require_same(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    near = 1e-8 if expected[0].dtype == torch.float64 else 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        if not torch.allclose(ours, theirs, rtol=near, atol=near * (1 + float(theirs.abs().max())), equal_nan=True):
            raise AssertionError("a recorded gradient differs from autograd's: please report this model")
