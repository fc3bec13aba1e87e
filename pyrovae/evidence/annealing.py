r"""Annealed importance sampling, forwards and backwards (Neal 2001; Grosse, Ancha & Roy 2016).

Between prior and posterior lie f_t(u) = p(u) p(x | u)^{beta_t}, 0 = beta_0 < ... < beta_T = 1. With u_0 from the prior,

    log w = sum_t (beta_t - beta_{t-1}) log p(x | u_{t-1}),     u_t from an HMC step that leaves f_t as it is,

E[w] = p(x), so that log (1/C) sum_c w_c over C chains is a lower bound of log p(x) in expectation. The same chain
backwards, from a draw of the posterior, has E[w] = 1 / p(x): minus its logarithm is an upper bound.

HMC steps and masses are set by a pilot run, one for each of some temperatures, and then frozen: steps that adapt to
the chain they move would break both statements. By Markov's inequality a lower bound exceeds log p(x) + b, and an
upper bound falls short of log p(x) - b, with probability at most exp(-b).

Schedules: linear, or sigmoid (beta_t ~ sigmoid(delta (2 t / T - 1)) shifted and scaled to [0, 1], delta = 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae import noise, store
from pyrovae.batching import Batched
from pyrovae.chunks import per_chunk
from pyrovae.errors import LatentError
from pyrovae.evidence.estimate import LOWER, UPPER, Estimate, kind_of
from pyrovae.latents import LatentSpace
from pyrovae.memory import rows_within
from pyrovae.provenance import Provenance
from pyrovae.runtime import evaluating
from pyrovae.samplers.batched import Tuned, reasonable, transition
from pyrovae.samplers.mass import Mass
from pyrovae.samplers.state import State
from pyrovae.slopes import Parts, Tempered, tempered

__all__ = ["Schedule", "ais", "annealed", "reverse_ais", "temperatures"]

Schedule = Literal["linear", "sigmoid"]

_DELTA = 4.0
_KNOTS, _TRIES = 50, 6  # temperatures of the pilot run, and its transitions at each
_TARGET, _GAIN = 0.65, 0.5  # acceptance rate sought, and how fast log step sizes follow it
_MEMORY = 0.5  # GiB of one chunk


def temperatures(number: int, schedule: Schedule = "sigmoid") -> Tensor:
    """beta_0 .. beta_T, `[T + 1]`, float64.

    Raises:
        ValueError: fewer than one step, or an unknown schedule.
    """
    if number < 1:
        raise ValueError(f"num_temperatures must be at least 1, got {number}")
    ticks = torch.linspace(0, 1, number + 1, dtype=torch.double)
    if schedule == "linear":
        return ticks
    if schedule != "sigmoid":
        raise ValueError(f"schedule must be 'linear' or 'sigmoid', got {schedule!r}")
    curve = torch.sigmoid(_DELTA * (2 * ticks - 1))
    return (curve - curve[0]) / (curve[-1] - curve[0])


def ais(model: Callable[..., Any], *args: Any, **options: Any) -> Estimate:
    """Lower bound of every datum's log p(x), by chains from the prior.

    Args:
        model: the Pyro program, and the arguments it is called with.
        num_chains: C, 16 by default.
        num_temperatures: T, 1000 by default. Too few are worse than importance sampling with a good guide.
        num_leapfrog: mean number of steps of an HMC transition, 3 by default.
        schedule: "sigmoid" or "linear".
        plate, batched: as in `LatentSpace`.
        seed: makes the run repeatable, together with `chunk`.
        chunk: data run together; by default what fits into half a GiB.
        progress: label of a progress bar.
        resume: folder that keeps finished chunks; a run that was stopped goes on from there.

    Returns:
        an `Estimate`; `se` by the delta method over chains.

    Raises:
        LatentError: discrete latents are summed out, which leaves no likelihood to temper.
        ScaleError: a KL weight or scale is in force.
    """
    return annealed(model, None, args, **options)[0]


def reverse_ais(model: Callable[..., Any], posterior: Tensor, *args: Any, **options: Any) -> Estimate:
    """Upper bound of every datum's log p(x), by chains from draws of its posterior.

    Args:
        posterior: `[C, B, D]`, unconstrained. A bound only where these are exact draws (simulated data, closed forms);
            one draw may be repeated C times.
        Others as in `ais`.
    """
    return annealed(model, posterior, args, **options)[0]


def annealed(
    model: Callable[..., Any],
    posterior: Tensor | None,
    args: tuple[Any, ...],
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 3,
    schedule: Schedule = "sigmoid",
    plate: str | None = "data",
    batched: Batched = "auto",
    seed: int = 0,
    chunk: int | None = None,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    **kwargs: Any,
) -> tuple[Estimate, Tensor]:
    """The bound, and its log-weights `[C, B]`; from below without `posterior`, else from above."""
    if num_chains < 2 or num_leapfrog < 1:
        raise ValueError("annealing needs num_chains >= 2 and num_leapfrog >= 1")
    betas = temperatures(num_temperatures, schedule)
    with evaluating(model), store.isolated():
        space = LatentSpace(model, *args, plate=plate, batched=batched, **kwargs)
        space.require_unit_scale(*args, **kwargs)
        whole = space.bind(*args, **kwargs)
        if chunk is None:
            point = torch.zeros(1, whole.rows.size, space.dim, dtype=space.dtype, device=space.device)
            chunk = rows_within(_MEMORY, whole, point, num_chains)
    if space.enumerated:
        raise LatentError(
            f"annealing tempers the likelihood, which a model with enumerated latents {list(space.enumerated)} does "
            "not have by itself: use evidence.iwae"
        )
    if posterior is not None and posterior.shape != (num_chains, whole.rows.size, space.dim):
        raise ValueError(
            f"posterior draws must have shape {[num_chains, whole.rows.size, space.dim]}, got {list(posterior.shape)}"
        )

    def measure(*some: Any, **named: Any) -> Tensor:
        """Log-weights `[C, b]` of some rows."""
        ends, some = (None, some) if posterior is None else (some[0].transpose(0, 1), some[1:])
        bound = space.bind(*some, **named)
        generator = torch.Generator(space.device).manual_seed(noise.row_seeds()[0])
        start = space.prior(num_chains, *some, **named)
        target = tempered(bound, start)
        # Draws of its own: what a chain's steps and masses are must not depend on where it starts.
        path = _pilot(target, space.prior(num_chains, *some, **named), betas, num_leapfrog, generator)
        if ends is None:
            return _anneal(target, start, betas, path, num_leapfrog, generator)
        return _anneal(target, ends.contiguous(), betas.flip(0), path, num_leapfrog, generator)

    weights = per_chunk(
        measure, (model,), args, kwargs, plate=plate, batched=batched, seed=seed, chunk=chunk, indices=indices,
        progress=progress, resume=resume, beside=() if posterior is None else (posterior.transpose(0, 1),),
        settings={"num_chains": num_chains, "num_temperatures": num_temperatures, "num_leapfrog": num_leapfrog,
                  "schedule": schedule, "reverse": posterior is not None},
    )  # fmt: skip
    provenance = Provenance.of_call(args, kwargs, num_data=weights.shape[1], seed=seed, num_samples=num_chains)
    mean = torch.logsumexp(weights, 0) - math.log(num_chains)
    inverse_ess = torch.exp(torch.logsumexp(2 * weights, 0) - 2 * torch.logsumexp(weights, 0))
    se = (inverse_ess - 1 / num_chains).clamp_min(0).sqrt()
    if posterior is None:
        kind = kind_of(model, LOWER)
        return Estimate(f"AIS-{num_temperatures}", kind, mean, se, num_chains, provenance), weights
    kind = kind_of(model, UPPER)
    return Estimate(f"reverse AIS-{num_temperatures}", kind, -mean, se, num_chains, provenance), weights


@dataclass(frozen=True)
class _Path:
    """Step sizes and masses at some temperatures, `[K]`, and in between by interpolation of logarithms."""

    betas: Tensor
    log_size: Tensor  # [K, B]
    log_scale: Tensor  # [K, B, D]

    def at(self, beta: float) -> Tuned:
        right = min(max(1, int(torch.searchsorted(self.betas, beta))), len(self.betas) - 1)
        low, high = float(self.betas[right - 1]), float(self.betas[right])
        share = min(1.0, max(0.0, (beta - low) / (high - low)))
        size, scale = (
            torch.lerp(value[right - 1], value[right], share).exp() for value in (self.log_size, self.log_scale)
        )
        return Tuned(size, Mass(scale), 0.0)


def _pilot(target: Tempered, u: Tensor, betas: Tensor, steps: int, generator: torch.Generator) -> _Path:
    """Set step sizes and masses along the path, on chains that are then forgotten."""
    chosen = betas[torch.linspace(0, len(betas) - 1, min(_KNOTS, len(betas))).round().long()].unique()
    variance = u.var(0)
    log_size: Tensor | None = None
    sizes, scales = [], []
    for beta in chosen.tolist():
        density = target.at(beta)
        state = density.at(u)
        mass = Mass(variance.sqrt())
        if log_size is None:
            log_size = reasonable(state, density, mass, generator).log()
        visited = []
        for number in range(_TRIES):
            tuned = Tuned(log_size.exp(), mass, 0.0)
            state, visit = transition(state, density, tuned, _jitter(steps, generator), generator)
            log_size = log_size + _GAIN / (1 + number) ** 0.5 * (visit.accept_prob.mean(0) - _TARGET)
            visited.append(state.u)
        u = state.u
        # Chains of one temperature are few: what the temperatures before it said still counts half.
        variance = 0.5 * variance + 0.5 * torch.stack(visited).flatten(0, 1).var(0)
        sizes.append(log_size)
        scales.append(0.5 * variance.log())
    return _Path(chosen, torch.stack(sizes), torch.stack(scales))


def _jitter(steps: int, generator: torch.Generator) -> int:
    """Uniform around `steps`, from half of it to one and a half: a fixed length can be a period of the chain."""
    low = max(1, -(-steps // 2))
    high = 2 * steps - low
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))


def _anneal(
    target: Tempered, u: Tensor, betas: Tensor, path: _Path, steps: int, generator: torch.Generator
) -> Tensor:
    """Log-weights `[C, B]` of chains along `betas`, up or down."""
    parts = target.parts(u)
    total = torch.zeros_like(parts.observed, dtype=torch.double)
    ladder = betas.tolist()
    for before, beta in pairwise(ladder):
        total += (beta - before) * parts.observed.double()
        if beta == ladder[-1]:
            break  # the last transition would move nothing that counts
        u, parts = _move(target, u, parts, beta, path.at(beta), _jitter(steps, generator), generator)
    return total


def _move(
    target: Tempered, u: Tensor, parts: Parts, beta: float, tuned: Tuned, steps: int, generator: torch.Generator
) -> tuple[Tensor, Parts]:
    gradient = torch.add(parts.latent_gradient, parts.observed_gradient, alpha=beta)
    state = State(u, parts.latent + beta * parts.observed, gradient)
    new, _ = transition(state, target.at(beta), tuned, steps, generator)
    return new.u, target.parts(new.u)
