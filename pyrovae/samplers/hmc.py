"""Hamiltonian Monte Carlo with the leapfrog integrator (Duane et al. 1987; Neal 2011).

    v ~ N(0, I);   L times:  v += (e/2) grad log p(u);  u += e v;  v += (e/2) grad log p(u)

Without correction (`uniform=None`) every end point is taken, as short-run inference does; with it the end point is
accepted with probability min(1, exp(H - H')), H = -log p(u) + |v|^2 / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.samplers.state import Info, LogDensity, State, init

__all__ = ["init", "leapfrog", "step"]

DIVERGENT = 1000.0  # energy error in nats beyond which a trajectory counts as divergent (Stan's convention)


def leapfrog(
    state: State, log_density: LogDensity, velocity: Tensor, step_size: float | Tensor, num_leapfrog: int
) -> tuple[State, Tensor]:
    """`num_leapfrog` steps from (state, velocity); returns the end point and its velocity."""
    for _ in range(num_leapfrog):
        velocity = velocity + 0.5 * step_size * state.gradient
        state = init(log_density, state.u + step_size * velocity)
        velocity = velocity + 0.5 * step_size * state.gradient
    return state, velocity


def step(
    state: State,
    log_density: LogDensity,
    step_size: float | Tensor,
    num_leapfrog: int,
    velocity: Tensor,
    *,
    uniform: Tensor | None = None,
) -> tuple[State, Info]:
    """One trajectory with fresh standard normal `velocity`, shaped like `state.u`.

    Args:
        step_size: e, a number or `[B, 1]`.
        uniform: `[..., B]` uniforms for Metropolis correction, or None for none.
    """
    new, end = leapfrog(state, log_density, velocity, step_size, num_leapfrog)
    energy = 0.5 * velocity.square().sum(-1) - state.log_density
    error = (0.5 * end.square().sum(-1) - new.log_density - energy).nan_to_num(nan=torch.inf)
    diverging = error > DIVERGENT
    if uniform is None:
        return new, Info(torch.ones_like(error), error, diverging)
    accept_prob = (-error).exp().clamp(max=1.0)
    accept = uniform < accept_prob
    kept = State(
        torch.where(accept.unsqueeze(-1), new.u, state.u),
        torch.where(accept, new.log_density, state.log_density),
        torch.where(accept.unsqueeze(-1), new.gradient, state.gradient),
    )
    return kept, Info(accept_prob, error, diverging)
