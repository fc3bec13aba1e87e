"""Metropolis-corrected HMC of many data at once: every chain of every datum in one tensor program.

Each datum has a step size and a mass matrix of its own; the number of leapfrog steps is one for all of them, random
around tau / e (e the median step size), with jitter U(0.5, 1.5) so that no chain can be caught in a period:

    L = floor(J tau / e + V),     J ~ U(0.5, 1.5), V ~ U(0, 1), at least 1

Warm-up estimates masses at the ends of growing windows, from draws of all of a datum's chains, and tunes step sizes
and tau throughout (`tuning`). Afterwards nothing changes any more: the chains are stationary Markov chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyrovae.samplers.hmc import DIVERGENT
from pyrovae.samplers.mass import Mass, estimate, unit
from pyrovae.samplers.state import State
from pyrovae.samplers.tuning import StepSizes, TrajectoryLength

__all__ = ["Target", "Tuned", "Visit", "draw", "reasonable", "transition", "warm_up"]

_WINDOWS = (0.13, 0.27, 0.47, 0.87)  # ends of the mass windows, as shares of the warm-up
_MAX_STEPS = 256  # of one trajectory


class Target(Protocol):
    """A log-density of `[C, B, D]`: with its gradient (`at`), and the gradient alone."""

    @property
    def at(self) -> Callable[[Tensor], State]: ...

    @property
    def gradient(self) -> Callable[[Tensor], Tensor]: ...


@dataclass(frozen=True)
class Tuned:
    """What warm-up found, frozen: `step_size: [B]`, the mass matrices, tau."""

    step_size: Tensor
    mass: Mass
    tau: float

    def rows(self, index: Tensor) -> Tuned:
        """For some of the data."""
        return replace(self, step_size=self.step_size[index], mass=self.mass.rows(index))


class Visit(NamedTuple):
    """One transition: acceptance, energy at its start, divergence, `[C, B]`; the trajectory's end and last momentum,
    `[C, B, D]`; its number of steps."""

    accept_prob: Tensor
    energy: Tensor
    diverging: Tensor
    end: Tensor
    momentum: Tensor
    num_leapfrog: int


def transition(
    state: State, target: Target, tuned: Tuned, steps: int, generator: torch.Generator
) -> tuple[State, Visit]:
    """One trajectory of `steps` leapfrog steps of every chain, accepted or not."""
    u = state.u
    chains, rows, dim = u.shape
    noise = torch.randn(chains, rows, dim, generator=generator, dtype=u.dtype, device=u.device)
    uniform = torch.rand(chains, rows, generator=generator, dtype=u.dtype, device=u.device)
    whole = tuned.mass.scaled(tuned.step_size)
    half = tuned.mass.scaled(0.5 * tuned.step_size)
    momentum = noise + half.pull(state.gradient)
    for _ in range(steps - 1):
        u = u + whole.push(momentum)
        momentum = momentum + whole.pull(target.gradient(u))
    new = target.at(u + whole.push(momentum))
    momentum = momentum + half.pull(new.gradient)

    energy = 0.5 * noise.square().sum(-1) - state.log_density
    error = 0.5 * momentum.square().sum(-1) - new.log_density - energy
    error = error.nan_to_num(nan=math.inf)
    accept_prob = (-error).exp().clamp(max=1.0)
    accept = uniform < accept_prob
    wide = accept.unsqueeze(-1)
    kept = State(
        torch.where(wide, new.u, state.u),
        torch.where(accept, new.log_density, state.log_density),
        torch.where(wide, new.gradient, state.gradient),
    )
    return kept, Visit(accept_prob, energy, error > DIVERGENT, new.u, momentum, steps)


def _jittered(state: State, target: Target, tuned: Tuned, generator: torch.Generator) -> tuple[State, Visit]:
    return transition(state, target, tuned, _number_of_steps(tuned, generator), generator)


def _number_of_steps(tuned: Tuned, generator: torch.Generator) -> int:
    jitter, rounding = torch.rand(2, generator=generator, dtype=torch.double, device=generator.device).tolist()
    wanted = (0.5 + jitter) * tuned.tau / float(tuned.step_size.median())
    return max(1, min(_MAX_STEPS, math.floor(wanted + rounding)))


def warm_up(
    state: State,
    target: Target,
    num_steps: int,
    generator: torch.Generator,
    *,
    target_accept: float = 0.8,
    dense: bool = False,
    each: Callable[[], None] = lambda: None,
) -> tuple[State, Tuned]:
    """Tune on `num_steps` transitions from `state`; `each` is called after every one.

    Raises:
        ValueError: a chain starts where the log-density is not finite.
    """
    bad = ~(state.log_density.isfinite() & state.gradient.isfinite().all(-1))
    if bad.any():
        chain, row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"chain {chain} of datum {row} starts where the log-joint or its gradient is not finite: pass other "
            "starting points with init=..., or check the model there"
        )
    mass = unit(state.u, dense=dense)
    sizes = StepSizes(reasonable(state, target, mass, generator), target_accept)
    length, window = TrajectoryLength(), _Window(state.u)
    ends = {max(1, round(share * num_steps)) for share in _WINDOWS}
    for step in range(1, num_steps + 1):
        before, size = state.u, sizes.size
        state, visit = _jittered(state, target, Tuned(size, mass, length.tau), generator)
        sizes.update(visit.accept_prob.mean(0))
        centre = window.add(state.u)
        if step > num_steps * _WINDOWS[0] / 2:  # chains that still travel to the mass would ask for long ones
            length.update(
                visit.num_leapfrog * size, visit.accept_prob, mass.whiten(before - centre),
                mass.whiten(visit.end - centre), visit.momentum,
            )  # fmt: skip
        if step in ends and len(window.draws) * len(state.u) > 2 * state.u.shape[-1]:
            new = estimate(torch.stack(window.draws), dense=dense)
            # Whitened lengths change by the ratio of the masses: step sizes start from where they are in u.
            start = size * (mass.log_size() - new.log_size()).exp()
            mass, window = new, _Window(state.u)
            sizes = StepSizes(start, target_accept)
        each()
    length.settle(max(1, num_steps // 5))
    return state, Tuned(sizes.average, mass, length.tau)


class _Window:
    """Draws of a warm-up window with their mean."""

    def __init__(self, u: Tensor) -> None:
        self.draws: list[Tensor] = []
        self.sum = torch.zeros_like(u[0])

    def add(self, u: Tensor) -> Tensor:
        """Keep `u: [C, B, D]`; the mean so far, `[B, D]`."""
        self.draws.append(u)
        self.sum = self.sum + u.mean(0)
        return self.sum / len(self.draws)


def reasonable(state: State, target: Target, mass: Mass, generator: torch.Generator) -> Tensor:
    """Step sizes at which one leapfrog step is accepted about half of the time (Hoffman & Gelman 2014), `[B]`."""
    rows = state.u.shape[1]
    size = torch.ones(rows, dtype=state.u.dtype, device=state.u.device)
    direction = torch.zeros_like(size)
    settled = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(40):
        _, visit = transition(state, target, Tuned(size, mass, 0.0), 1, generator)
        now = torch.where(visit.accept_prob.mean(0) > 0.5, 1.0, -1.0)
        direction = torch.where(direction == 0, now, direction)
        settled = settled | (now != direction)
        if settled.all():
            break
        size = torch.where(settled, size, size * 2.0**direction)
    return size


def draw(
    state: State,
    target: Target,
    tuned: Tuned,
    num_samples: int,
    generator: torch.Generator,
    *,
    thin: int = 1,
    each: Callable[[], None] = lambda: None,
) -> tuple[State, dict[str, Tensor]]:
    """Every `thin`-th of `thin * num_samples` transitions.

    Returns:
        the last state, and of the draws kept `u [S, C, B, D]`, `lp`, `energy` and `diverging` `[S, C, B]`; of all
        transitions the mean `accept_prob [B]` and `num_leapfrog`, the sum `divergences [B]`, and `ebfmi [B]`.
    """
    kept: dict[str, list[Tensor]] = {"u": [], "lp": [], "energy": [], "diverging": []}
    accepted = state.log_density.new_zeros(state.log_density.shape[1])
    divergences, leapfrogs = torch.zeros_like(accepted), 0
    energies = _Energies()
    number = thin * num_samples
    for step in range(1, number + 1):
        state, visit = _jittered(state, target, tuned, generator)
        accepted += visit.accept_prob.mean(0)
        divergences += visit.diverging.sum(0)
        leapfrogs += visit.num_leapfrog
        energies.add(visit.energy)
        if step % thin == 0:
            for name, value in zip(kept, (state.u, state.log_density, visit.energy, visit.diverging), strict=True):
                kept[name].append(value)
        each()
    found = {name: torch.stack(values) for name, values in kept.items()}
    mean_leapfrog = torch.full_like(accepted, leapfrogs / number)
    return state, {**found, "accept_prob": accepted / number, "divergences": divergences,
                   "num_leapfrog": mean_leapfrog, "ebfmi": energies.ebfmi()}  # fmt: skip


class _Energies:
    """Energy Bayesian fraction of missing information, sum_n (E_n - E_{n-1})^2 / sum_n (E_n - mean)^2, as they come."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, energy: Tensor) -> None:
        value = energy.double()
        if self.count == 0:
            self.first, self.last = value, value
            self.sum, self.squares, self.changes = (torch.zeros_like(value) for _ in range(3))
        moved = value - self.first  # from a point among them: no cancellation
        self.sum += moved
        self.squares += moved.square()
        self.changes += (value - self.last).square()
        self.last, self.count = value, self.count + 1

    def ebfmi(self) -> Tensor:
        """The smallest over chains, `[B]`."""
        return (self.changes / (self.squares - self.sum.square() / self.count)).amin(0)
