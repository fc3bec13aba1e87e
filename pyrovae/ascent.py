"""Local inference: every datum's ELBO maximised over its own variational parameters until it stops improving.

    lam*_b = argmax_lam ELBO(lam; x_b)

by a torch optimiser on `[B, P]`, with the path derivative of the ELBO (`pyrovae.refine.Objective`).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae import noise
from pyrovae.families import Family
from pyrovae.latents import LogJoint
from pyrovae.refine import RECORD, Objective, Optimizer

__all__ = ["Ascent", "LocalFit"]


@dataclass(frozen=True)
class LocalFit:
    """Variational parameters optimised datum by datum.

    Attributes:
        lam: `[B, P]`: the best window's mean of the iterates; the last iterate where no window was completed.
        converged: `[B]`: the ELBO had stopped improving by more than its noise at the smallest step.
        steps: `[B]`, gradient steps taken.
        elbo: `[B]`, at `lam` from fresh draws, nats.
        se: `[B]`, its standard error.
    """

    lam: Tensor
    converged: Tensor
    steps: Tensor
    elbo: Tensor
    se: Tensor

    def __repr__(self) -> str:
        return (
            f"LocalFit({int(self.converged.sum())} of {len(self.converged)} data converged, after at most "
            f"{int(self.steps.max())} steps; ELBO {float(self.elbo.mean()):.3f} nats per datum)"
        )


@dataclass(frozen=True)
class Ascent:
    """Maximise every datum's ELBO by a torch optimiser, each until its own stopping rule holds.

    The mean of the iterates over a window of `check` steps is compared with the best one before it, on common draws. A
    datum that has not improved by more than the standard error of the difference (and `tolerance`) for `patience`
    windows goes back to its best and multiplies its steps by `shrink`; when it would do so for the `reductions` + 1st
    time it has converged. With `max_steps` below `check` nothing is compared and the last iterate is taken: SVI with a
    fixed number of steps.

    Args:
        num_samples: draws per gradient; families with symmetric noise add the mirrored draw of each.
        max_steps: after which the data left over are reported as not converged.
        check, patience, reductions, shrink, tolerance: as above; tolerance in nats.
        optimizer: from a list of parameters to a torch optimiser whose coordinates are independent; by default Adam
            with step 0.05 and a short memory.
    """

    num_samples: int = 8
    max_steps: int = 5000
    check: int = 50
    patience: int = 2
    reductions: int = 3
    shrink: float = 0.2
    tolerance: float = 1e-3
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        if min(self.num_samples, self.max_steps, self.check, self.patience) < 1 or self.reductions < 0:
            raise ValueError(
                "local inference needs num_samples, max_steps, check and patience of at least 1, and reductions >= 0"
            )
        if not 0 < self.shrink < 1 or not self.tolerance >= 0:
            raise ValueError("shrink must lie between 0 and 1, and tolerance must not be negative")

    def run(
        self, family: Family, log_joint: LogJoint, start: Tensor, *, beta: float = 1.0, progress: str | None = None
    ) -> LocalFit:
        """Climb from `start: [B, P]`; `progress` labels a progress bar.

        Raises:
            FloatingPointError: an ELBO that is not finite.
        """
        climber = self._climb(family, log_joint, start, beta, progress)
        with climber.stream(1), torch.no_grad():
            values = climber.trials(climber.best)[0]
        se = values.std(0) / math.sqrt(len(values))
        return LocalFit(climber.best, climber.done, climber.steps, values.mean(0), se)

    def improve(
        self, family: Family, log_joint: LogJoint, start: Tensor, *, beta: float = 1.0, progress: str | None = None
    ) -> Tensor:
        """The `lam: [B, P]` of `run` alone."""
        return self._climb(family, log_joint, start, beta, progress).best

    def _climb(self, family: Family, log_joint: LogJoint, start: Tensor, beta: float, progress: str | None) -> _Climber:
        objective = Objective(family, log_joint, beta=beta, antithetic=family.symmetric, path_only=True)
        climber = _Climber(self, objective, start)
        with climber.stream(0):
            climber.run(progress)
        return climber


_TRIALS = 16  # evaluations that a comparison is made of


class _Climber:
    """An ascent under way: where every datum stands."""

    def __init__(self, rule: Ascent, objective: Objective, start: Tensor) -> None:
        self.rule, self.objective = rule, objective
        self.best, rows = start.detach().clone(), len(start)
        self.leaf = self.best.clone().requires_grad_()
        self.stepper = (rule.optimizer or _adam)([self.leaf])
        self.scale = start.new_ones(rows, 1)
        self.done = torch.zeros(rows, dtype=torch.bool, device=start.device)
        self.waited, self.reduced, self.steps = (torch.zeros_like(self.done, dtype=torch.long) for _ in range(3))
        self.seeds = noise.row_seeds() if noise.active() else None

    def stream(self, number: int) -> AbstractContextManager[None]:
        """Noise of a datum's own: it takes one number from its outer stream, however many steps its neighbours need."""
        return nullcontext() if self.seeds is None else noise.per_datum(number, self.seeds)

    def run(self, progress: str | None) -> None:
        rule, leaf = self.rule, self.leaf
        steps: Any = range(1, rule.max_steps + 1)
        if progress is not None:
            from tqdm.auto import tqdm

            steps = tqdm(steps, desc=progress, unit="step", disable=None, leave=False)
        total, number = torch.zeros_like(self.best), 0
        for step in steps:
            eps = self.objective.noise(rule.num_samples, leaf)
            if step == 1 and rule.max_steps >= RECORD:
                self.objective.record(leaf, eps)
            gradient = self.objective.gradient(leaf, eps)[1]
            before = leaf.detach().clone()
            leaf.grad = -gradient
            self.stepper.step()
            with torch.no_grad():
                leaf.copy_(torch.lerp(before, leaf, self.scale))
            total, number = total + leaf.detach(), number + 1
            if number == rule.check or (step == rule.max_steps and step > rule.check):
                with torch.no_grad():
                    self._judge(total / number, step)
                if self.done.all():
                    return
                total, number = torch.zeros_like(total), 0
        if number:  # the mean of a first window cut short would lag behind
            self.best, self.steps = leaf.detach().clone(), self.steps + number
            _require_finite(self.objective.gradient(leaf, eps)[0], rule.max_steps)

    def trials(self, *points: Tensor) -> list[Tensor]:
        """The ELBO at every point, `[_TRIALS, B]`, on common draws."""
        draws = [self.objective.noise(self.rule.num_samples, self.best) for _ in range(_TRIALS)]
        with pyro.validation_enabled(False):
            return [torch.stack([self.objective(lam, eps) for eps in draws]) for lam in points]

    def _judge(self, lam: Tensor, step: int) -> None:
        """Compare a window's mean with the best before it."""
        rule = self.rule
        ours, theirs = self.trials(lam, self.best)
        _require_finite(ours.sum(0), step)
        gain = ours - theirs
        se = (gain.std(0) / math.sqrt(len(gain))).nan_to_num(nan=0.0)  # nan: the best so far had no finite ELBO
        better = ~self.done & (gain.mean(0) > se.clamp_min(rule.tolerance))
        self.best = torch.where(better.unsqueeze(-1), lam, self.best)
        self.steps = torch.where(self.done, self.steps, step)
        self.waited = torch.where(better, 0, self.waited + 1)
        stuck = ~self.done & (self.waited >= rule.patience)
        self.done = self.done | (stuck & (self.reduced >= rule.reductions))
        self.reduced = self.reduced + stuck.long()
        self.waited = torch.where(stuck, 0, self.waited)
        self.leaf.copy_(torch.where(stuck.unsqueeze(-1), self.best, self.leaf))
        self.scale = torch.where(stuck.unsqueeze(-1), self.scale * rule.shrink, self.scale)
        self.scale = torch.where(self.done.unsqueeze(-1), 0.0, self.scale)


def _require_finite(values: Tensor, step: int) -> None:
    bad = ~torch.isfinite(values)
    if bad.any():
        raise FloatingPointError(
            f"the ELBO of {int(bad.sum())} data (first: row {int(bad.nonzero()[0])}) is not finite after {step} steps "
            "of local inference: give the optimiser a smaller step, or check the model at such latents"
        )


def _adam(params: list[Tensor]) -> torch.optim.Optimizer:
    # With the usual memory of a thousand steps the steep gradients of the start hold the later steps back: on pPCA with
    # 10 latents the ELBO ended 0.02 (diagonal) to 0.1 nats (full-rank) short, with this one 0.002.
    return torch.optim.Adam(params, lr=0.05, betas=(0.9, 0.95))
