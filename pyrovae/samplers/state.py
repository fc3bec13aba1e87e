"""What every sampler carries from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Info", "LogDensity", "State", "init", "slope"]

LogDensity = Callable[[Tensor], Tensor]


class State(NamedTuple):
    """Position `u [..., B, D]`, its log-density `[..., B]` and gradient `[..., B, D]`."""

    u: Tensor
    log_density: Tensor
    gradient: Tensor


class Info(NamedTuple):
    """accept_prob `[..., B]` (1 for uncorrected steps); energy_error `[..., B]`, nats; diverging `[..., B]`."""

    accept_prob: Tensor
    energy_error: Tensor
    diverging: Tensor


def init(log_density: LogDensity, u: Tensor) -> State:
    """Evaluate the log-density and its gradient at `u`; nothing is kept for differentiation."""
    with torch.enable_grad():
        point = u.detach().requires_grad_()
        value = log_density(point)
        # Rows are independent: the gradient of the sum is every row's own.
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return State(point.detach(), value.detach(), gradient)


def slope(log_density: LogDensity, u: Tensor) -> Tensor:
    """The gradient at `u`, `[..., B, D]`; where gradients are on it can be differentiated, with respect to whatever
    the log-density depends on."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        point = u if create and u.requires_grad else u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_density(point).sum(), point, create_graph=create)
    return gradient
