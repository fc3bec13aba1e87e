"""What every sampler carries from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Info", "LogDensity", "State", "init"]

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
