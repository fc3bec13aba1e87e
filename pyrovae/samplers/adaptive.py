"""Metropolis-corrected HMC with a step size of every datum, for chains that are short and begin anywhere.

During the first half of T trajectories a datum's step size e_b moves towards an acceptance rate of 0.8, a mean over its
C chains (Robbins & Monro 1951; Andrieu & Thoms 2008),

    log e_b <- log e_b + t^{-0.6} (a_b - 0.8),     t = 1, 2, ...

then it stays as it is. What comes back are the draws of the second half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrovae import noise
from pyrovae.samplers import hmc
from pyrovae.samplers.state import LogDensity, init

__all__ = ["run"]

_TARGET, _DECAY = 0.8, 0.6


def run(log_density: LogDensity, u: Tensor, num_steps: int, *, num_leapfrog: int = 5, step_size: float = 0.1) -> Tensor:
    """Draws `[T - T // 2, C, B, D]` of chains that start at `u: [C, B, D]`.

    Args:
        log_density: `[C, B, D] -> [C, B]`.
        num_steps: T >= 2.
        num_leapfrog: leapfrog steps of a trajectory.
        step_size: where every datum's begins.
    """
    if num_steps < 2:
        raise ValueError(f"chains need num_steps >= 2, half of which set their step sizes, got {num_steps}")
    chains, rows, dim = u.shape
    log_size = u.new_full((rows, 1), math.log(step_size))
    state, kept = init(log_density, u), []
    for t in range(num_steps):
        drawn = noise.normal(chains, rows, dim + 1, like=u)  # the last one decides on acceptance
        uniform = torch.special.ndtr(drawn[..., dim])
        state, info = hmc.step(
            state, log_density, log_size.exp(), num_leapfrog, drawn[..., :dim].contiguous(), uniform=uniform
        )
        if t < num_steps // 2:
            log_size = log_size + (t + 1) ** -_DECAY * (info.accept_prob.mean(0) - _TARGET).unsqueeze(-1)
        else:
            kept.append(state.u)
    return torch.stack(kept)
