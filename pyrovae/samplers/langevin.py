"""Unadjusted Langevin dynamics.

    u' = u + (s^2 / 2) grad log p(u) + T s eps,    eps ~ N(0, I)

s is the noise scale (texts on stochastic-gradient Langevin use eta = s^2 / 2), T the temperature. For a Gaussian
target of precision lam the chain is AR(1) with coefficient a = 1 - s^2 lam / 2, and its stationary variance
(1 / lam) / (1 - s^2 lam / 4) exceeds the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.samplers.state import Info, LogDensity, State, init

__all__ = ["init", "step"]


def step(
    state: State, log_density: LogDensity, step_size: float | Tensor, eps: Tensor, *, temperature: float = 1.0
) -> tuple[State, Info]:
    """One uncorrected step.

    Args:
        step_size: s, a number or `[B, 1]`.
        eps: standard normals, shaped like `state.u`.
    """
    u = state.u + 0.5 * step_size**2 * state.gradient + temperature * step_size * eps
    new = init(log_density, u)
    ones = torch.ones_like(new.log_density)
    return new, Info(ones, torch.zeros_like(ones), ~torch.isfinite(new.log_density))
