"""Reference posteriors of many data at once, by batched HMC (`pyrovae.samplers.batched`).

All chains of all data of a chunk run in one tensor program. Where a datum's draws are worth too little, they are drawn
anew, from where its chains have come to and with twice as many transitions from one to the next; what came before was
warm-up then. Data that diverge are run again with smaller steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae import noise, store
from pyrovae.batching import Batched
from pyrovae.finished import Finished
from pyrovae.identity import program_identity
from pyrovae.latents import LatentSpace, LogJoint
from pyrovae.losses.base import require_pair
from pyrovae.memory import rows_within
from pyrovae.provenance import Provenance
from pyrovae.reference.posterior import DIVERGENT_SHARE, SLOW_ENERGY, ChainStatistics, Reference, status_of
from pyrovae.reference.starts import starts
from pyrovae.runtime import evaluating, seeded
from pyrovae.samplers import batched as sampler
from pyrovae.samplers.mass import MAX_DENSE
from pyrovae.samplers.state import State
from pyrovae.slopes import Slopes, slopes

__all__ = ["hmc"]

_STRICTER = (0.95, 0.99)  # target acceptance of data that diverged
_ENOUGH = 400.0  # ESS that makes a reference: what a budget leaves short of `target_ess` still judges a guide
_SPREAD = 4.0  # ratio of step sizes up to which data share their number of leapfrog steps


def hmc(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 8,
    num_samples: int | None = None,
    warmup: int = 300,
    target_ess: float = 2000.0,
    max_thin: int = 16,
    init: Tensor | Any | None = None,
    mass: str = "diagonal",
    target_accept: float = 0.8,
    chunk: int | None = None,
    memory: float = 0.5,
    plate: str | None = "data",
    batched: Batched = "auto",
    seed: int = 0,
    progress: bool = True,
    resume: str | Path | None = None,
    **kwargs: Any,
) -> Reference:
    """Draws of every datum's posterior, C chains each, `[C, S, B, D]`.

    Args:
        model: the Pyro program, and the arguments it is called with.
        num_chains: C >= 2 for every datum.
        num_samples: S, draws kept of every chain; by default twice `target_ess` in all.
        warmup: transitions that tune step sizes, masses and the trajectory's length; at least 50.
        target_ess: a datum's chains go on until bulk and tail ESS of the draws kept reach it and R-hat is below 1.02.
        max_thin: the budget: at the most, every `max_thin`-th transition is kept (a power of two).
        init: where chains start: None draws from the prior; a guide draws every other one from it, the rest from the
            prior; a tensor `[C, B, D]` is taken as it is (unconstrained).
        mass: "diagonal", or "dense" for at most 64 latents.
        target_accept: of the step sizes; data that diverge are run again at 0.95, then 0.99.
        chunk: data run together; by default what fits into `memory` GiB. Chains depend on it: the data of a chunk
            share their random numbers and their trajectories' lengths.
        plate, batched: as in `LatentSpace`.
        seed: makes the run repeatable; the caller's random state is left alone.
        progress: show a bar.
        resume: folder that keeps finished chunks; a run that was stopped goes on from there.

    Returns:
        a `Reference` whose `chains` hold the statistics per datum. Status "did not mix": R-hat above 1.1 or E-BFMI
        below 0.3; "divergent": more than 1 in 2,000 transitions even at 0.99; "not enough draws": R-hat above 1.05,
        or an ESS below 400 (below `target_ess`, if that is less); else "ok", though the budget may have ended before
        `target_ess` (`Reference.ess`).

    Raises:
        ValueError: a budget that is too small, or a chain that starts where the log-joint is not finite.
    """
    number = num_samples or max(4, math.ceil(2 * target_ess / max(1, num_chains)))
    plan = _Plan(num_chains, number, warmup, target_ess, max_thin, mass, target_accept)
    began = time.perf_counter()
    with evaluating(model), store.isolated(), seeded(seed):
        space = LatentSpace(model, *args, plate=plate, batched=batched, **kwargs)
        plan.check(space.dim)
        if init is not None and not isinstance(init, Tensor):
            require_pair(model, init, None)
        space.require_unit_scale(*args, **kwargs)
        whole = space.bind(*args, **kwargs)
        size = whole.rows.size
        start = starts(space, init, num_chains, args, kwargs, mixed=True)
        if start.shape[1] != size:
            raise ValueError(f"init is for {start.shape[1]} data, but {size} were given")
        if not start.isfinite().all():
            raise ValueError("init has starting points that are not finite: pass others")
        per_chunk = size
        if whole.foldable:
            per_chunk = min(size, chunk or rows_within(memory, whole, start[:1], num_chains))
        done = Finished(resume, (model,), (start, args, kwargs), {**asdict(plan), "seed": seed, "chunk": per_chunk})
        bar = _bar(progress, -(-size // per_chunk) * plan.transitions)
        parts: list[_Part] = []
        for first in range(0, size, per_chunk):
            index = torch.arange(first, min(first + per_chunk, size))
            name = f"rows-{first:06d}"
            known = done.get(name)
            if known is None:
                generator = torch.Generator(space.device).manual_seed(noise.mix(seed, first))
                found = _Run(whole, plan, generator, bar).sample(index, start[:, index])
                known = {"parts": [part.to_dict() for part in found]}
                done.put(name, known)
            parts += [_Part.of(content) for content in known["parts"]]
        bar.close()
    statuses = [status for part in parts for status in part.status]
    order = torch.cat([part.index for part in parts]).argsort()
    draws, lp = (torch.cat([getattr(p, name) for p in parts], dim=2)[:, :, order] for name in ("draws", "lp"))
    chains = ChainStatistics.joined([part.chains for part in parts], order)
    pooled = draws.double().flatten(0, 1)
    return Reference(
        kind="hmc", space=space, draws=draws, rhat=torch.cat([part.rhat for part in parts])[order],
        ess=torch.minimum(chains.ess_bulk, chains.ess_tail), divergences=int(chains.divergences.sum()),
        status=tuple(statuses[i] for i in order.tolist()),
        mean=pooled.mean(0), sd=pooled.std(0), log_evidence=None,
        provenance=Provenance.of_call(args, kwargs, num_data=size, seed=seed, num_samples=number),
        program=program_identity(model), seconds=time.perf_counter() - began, initial=start, lp=lp, chains=chains,
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    num_chains: int
    num_samples: int
    warmup: int
    target_ess: float
    max_thin: int
    mass: str
    target_accept: float

    @property
    def transitions(self) -> int:
        return self.warmup + self.num_samples

    def check(self, dim: int) -> None:
        if self.num_chains < 2 or self.num_samples < 4 or self.warmup < 50:
            raise ValueError("hmc needs num_chains >= 2, num_samples >= 4 and warmup >= 50")
        if not 0 < 2 * self.target_ess <= self.num_chains * self.num_samples:
            raise ValueError(
                f"{self.num_chains} x {self.num_samples} draws can hardly be worth target_ess={self.target_ess:g}: "
                "pass a num_samples of at least 2 * target_ess / num_chains, or leave it out"
            )
        if self.max_thin < 1 or self.max_thin & (self.max_thin - 1):
            raise ValueError(f"max_thin must be a power of two (1, 2, 4, ...), got {self.max_thin}")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must lie between 0 and 1, got {self.target_accept}")
        if self.mass not in ("diagonal", "dense"):
            raise ValueError(f"mass must be 'diagonal' or 'dense', got {self.mass!r}")
        if self.mass == "dense" and dim > MAX_DENSE:
            raise ValueError(
                f"a dense mass matrix needs at most {MAX_DENSE} latents, this model has {dim}: use mass='diagonal'"
            )


@dataclass(frozen=True)
class _Part:
    """Finished data: their indices, draws `[C, S, b, D]`, log-densities and statistics."""

    index: Tensor
    draws: Tensor
    lp: Tensor
    rhat: Tensor
    status: tuple[str, ...]
    chains: ChainStatistics

    def to_dict(self) -> dict[str, Any]:
        """For a file: tensors and strings."""
        return {**vars(self), "status": list(self.status), "chains": dict(vars(self.chains))}

    @classmethod
    def of(cls, content: dict[str, Any]) -> _Part:
        """The inverse of `to_dict`."""
        chains = ChainStatistics(**content["chains"])
        return cls(**{**content, "status": tuple(content["status"]), "chains": chains})

    def rows(self, keep: Tensor) -> _Part:
        """Some of them."""
        where = keep.nonzero().flatten().tolist()
        return _Part(
            self.index[keep], self.draws[:, :, keep], self.lp[:, :, keep], self.rhat[keep],
            tuple(self.status[i] for i in where), ChainStatistics.joined([self.chains], keep.nonzero().flatten()),
        )  # fmt: skip


@dataclass
class _Run:
    """One chunk."""

    whole: LogJoint
    plan: _Plan
    generator: torch.Generator
    bar: Any
    targets: dict[int, tuple[Tensor, Slopes]] = field(default_factory=dict)

    def sample(self, index: Tensor, start: Tensor) -> list[_Part]:
        """The data `index` from `start: [C, b, D]`."""
        done: list[_Part] = []
        for level, target_accept in enumerate((self.plan.target_accept, *_STRICTER)):
            plan = replace(self.plan, target_accept=max(target_accept, self.plan.target_accept))
            if level:
                self._more(plan.transitions)
            parts = self._attempt(plan, index, start)
            again = torch.cat([part.index[_worth_repeating(part, plan)] for part in parts]).sort().values
            if level == len(_STRICTER) or not len(again):
                return done + parts
            if self.whole.foldable:
                done += [kept for part in parts if len((kept := part.rows(~_worth_repeating(part, plan))).index)]
                start = start[:, torch.isin(index, again)]
                index = again
        raise AssertionError("unreachable")

    def _attempt(self, plan: _Plan, index: Tensor, start: Tensor) -> list[_Part]:
        target = self._target(index, start)
        state, tuned = sampler.warm_up(
            target.at(start), target, plan.warmup, self.generator,
            target_accept=plan.target_accept, dense=plan.mass == "dense", each=self.bar.update,
        )  # fmt: skip
        groups = self._groups(tuned.step_size)
        if len(groups) > 1:
            self._more((len(groups) - 1) * plan.num_samples)
        return [
            part
            for group in groups
            for part in self._draw(plan, index[group.cpu()], _rows(state, group), tuned.rows(group))
        ]

    def _draw(self, plan: _Plan, index: Tensor, state: State, tuned: sampler.Tuned) -> list[_Part]:
        """Draw and, for the data whose draws are worth too little, go on and keep half as many of the transitions."""
        done: list[_Part] = []
        thin = 1
        while True:
            state, found = sampler.draw(
                state, self._target(index, state.u), tuned, plan.num_samples, self.generator, thin=thin,
                each=self.bar.update,
            )  # fmt: skip
            part = _finish(index, found, tuned, thin, min(_ENOUGH, plan.target_ess))
            wanting = (part.chains.ess_bulk < plan.target_ess) | (part.chains.ess_tail < plan.target_ess)
            wanting |= ~(part.rhat < 1.02)
            wanting &= ~_diverged(part, plan)
            thin *= 2
            if thin > plan.max_thin or not wanting.any():
                return [*done, part]
            if self.whole.foldable and not wanting.all():
                done.append(part.rows(~wanting))
                index, state, tuned = index[wanting], _rows(state, wanting), tuned.rows(wanting)
            self._more(thin * plan.num_samples)

    def _target(self, index: Tensor, u: Tensor) -> Slopes:
        """The log-joint of some of the data; the last one is kept."""
        key = int(index[0])
        known = self.targets.get(key)
        if known is not None and torch.equal(known[0], index):
            return known[1]
        bound = self.whole
        if len(index) < bound.rows.size:
            bound = bound.at_rows(bound.rows.select(index))
        self.targets = {key: (index, slopes(bound, u))}
        return self.targets[key][1]

    def _groups(self, step_size: Tensor) -> list[Tensor]:
        """Data whose step sizes differ by at most `_SPREAD`."""
        order = step_size.argsort()
        if not self.whole.foldable:
            return [torch.arange(len(order), device=order.device)]
        groups: list[list[int]] = []
        for row in order.tolist():
            if not groups or float(step_size[row]) > _SPREAD * float(step_size[groups[-1][0]]):
                groups.append([])
            groups[-1].append(row)
        return [torch.tensor(sorted(group), device=order.device) for group in groups]

    def _more(self, transitions: int) -> None:
        if self.bar.total is not None:
            self.bar.total += transitions
            self.bar.refresh()


def _diverged(part: _Part, plan: _Plan) -> Tensor:
    transitions = plan.num_chains * plan.num_samples * part.chains.thin
    return part.chains.divergences > DIVERGENT_SHARE * transitions


def _worth_repeating(part: _Part, plan: _Plan) -> Tensor:
    """Smaller steps cure divergences, not energies that are explored too slowly (a funnel)."""
    return _diverged(part, plan) & (part.chains.ebfmi >= SLOW_ENERGY)


def _rows(state: State, index: Tensor) -> State:
    return State(state.u[:, index], state.log_density[:, index], state.gradient[:, index])


def _finish(index: Tensor, found: dict[str, Tensor], tuned: sampler.Tuned, thin: int, enough: float) -> _Part:
    draws, lp, energy, diverging = (
        found[name].transpose(0, 1).cpu() for name in ("u", "lp", "energy", "diverging")
    )  # fmt: skip
    accept_prob, divergences, ebfmi, num_leapfrog = (
        found[name].cpu() for name in ("accept_prob", "divergences", "ebfmi", "num_leapfrog")
    )  # fmt: skip
    transitions = draws.shape[0] * draws.shape[1] * thin
    rhat, bulk, tail, status = status_of(
        draws, divergent=divergences > DIVERGENT_SHARE * transitions, ebfmi=ebfmi, enough=enough
    )
    chains = ChainStatistics(
        bulk, tail, divergences, accept_prob, ebfmi, tuned.step_size.cpu(), num_leapfrog,
        torch.full_like(divergences, thin), energy, diverging,
    )  # fmt: skip
    return _Part(index, draws, lp, rhat, status, chains)


def _bar(progress: bool, total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="HMC", unit="transition", disable=None if progress else True, leave=False)
