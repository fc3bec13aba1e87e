"""Gradient ascent on variational parameters, each datum on its own ELBO: the engine of refinement and of q*.

    L(lam; eps) = sum_r w_r [log p(x, u_r) - log q(u_r; lam)],   u_r = T(lam, eps_r)          one value per datum

`climb` takes K differentiable steps with momentum, `descend` K steps of a torch optimiser, `Ascent` as many as each
datum needs. Data never share a parameter, so the gradient of the sum over the batch is every datum's own gradient, and
Adam on `[B, P]` is B independent Adams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils.checkpoint import checkpoint

from pyrovae import noise
from pyrovae.families import Family
from pyrovae.latents import LogJoint

__all__ = ["RECORD", "Ascent", "Clip", "LocalFit", "Objective", "by_block", "climb", "descend", "toward"]

RECORD = 5  # steps from which a recorded log-joint repays being compared with the program
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def _has_strata(family: Family) -> bool:
    return type(family).stratified is not Family.stratified


def _has_entropy(family: Family) -> bool:
    """Whether plain draws and a closed-form entropy give the ELBO."""
    with torch.no_grad():
        return not _has_strata(family) and family.entropy(family.init(1)) is not None


class Objective:
    """Each datum's ELBO as a function of `lam: [B, P]` and standard normal `eps: [S, B, N]`.

    Args:
        log_joint: of the batch, `(u [R, B, D], beta) -> [R, B]`, nats.
        beta: weight of the KL part.
        antithetic: add the mirrored draw of each.
        path_only: hold q's parameters constant inside log q, which makes value and gradient free of noise where q is
            the posterior (Roeder, Wu & Duvenaud 2017), instead of taking a closed-form entropy.

    Raises:
        ValueError: antithetic draws of a family whose noise is not symmetric.
    """

    def __init__(
        self, family: Family, log_joint: LogJoint, *, beta: float = 1.0, antithetic: bool = False,
        path_only: bool = False,
    ) -> None:  # fmt: skip
        if antithetic and not family.symmetric:
            raise ValueError(f"antithetic draws need a family with symmetric noise, not {family!r}")
        self.family, self.beta = family, beta
        self.bound = log_joint
        self.log_joint: Callable[..., Tensor] = log_joint
        self.antithetic, self.path_only = antithetic, path_only
        self.closed = _has_entropy(family)

    def noise(self, num_samples: int, lam: Tensor) -> Tensor:
        """Fresh noise for one evaluation, `[S, B, N]`."""
        return noise.normal(num_samples, len(lam), self.family.strata_noise_dim, like=lam)

    def record(self, lam: Tensor, eps: Tensor) -> None:
        """From now on run the log-joint as a graph without handlers, for noise of the shape of `eps`."""
        with torch.no_grad():
            u = self.family.stratified(lam, self._all(eps))[1]
        self.log_joint = self.bound.recorded(u)

    def _all(self, eps: Tensor) -> Tensor:
        return torch.cat([eps, -eps]) if self.antithetic else eps

    def __call__(self, lam: Tensor, eps: Tensor) -> Tensor:
        """The ELBO, `[B]`, nats."""
        family, beta, eps = self.family, self.beta, self._all(eps)
        if self.closed:
            u = family.sample(lam, eps)
            if self.path_only:
                return (self.log_joint(u, beta) - beta * family.frozen_log_prob(lam, u)).mean(0)
            entropy = family.entropy(lam)
            assert entropy is not None
            return self.log_joint(u, beta).mean(0) + beta * entropy
        if self.path_only and _has_strata(family):
            log_weights, u = family.stratified(lam, eps)
            log_q = family.frozen_log_prob(lam, u)
        else:
            log_weights, u, log_q = family.stratified_and_log_prob(lam, eps)
        return (log_weights.exp() * (self.log_joint(u, beta) - beta * log_q)).sum(0)

    def gradient(self, lam: Tensor, eps: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """The ELBO `[B]`, without graph, and its gradient `[B, P]`; works under `no_grad`, too."""
        with torch.enable_grad(), pyro.validation_enabled(False):
            leaf = lam if lam.requires_grad else lam.detach().requires_grad_()
            value = self(leaf, eps)
            (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=create_graph)
        return value.detach(), gradient


def by_block(family: Family, value: float | Mapping[str, float], like: Tensor) -> Tensor:
    """A number, or one per named block, as `[P]`."""
    full = torch.empty(family.num_params, dtype=like.dtype, device=like.device)
    if not isinstance(value, Mapping):
        return full.fill_(value)
    if set(value) != set(family.blocks):
        raise ValueError(f"give one value for each block of {family!r}: {', '.join(family.blocks)}; got {list(value)}")
    for name, block in family.blocks.items():
        full[block] = value[name]
    return full


class Clip:
    """Scale a gradient `[B, P]` so that no block of a datum's gradient has a norm above its limit."""

    def __init__(self, family: Family, max_norm: float | Mapping[str, float] | None, like: Tensor) -> None:
        self.limits: Tensor | None = None
        if max_norm is None:
            return
        blocks = [block for block in family.blocks.values() if block.stop > block.start]
        self.limits = by_block(family, max_norm, like)[[block.start for block in blocks]]
        self.member = like.new_zeros(family.num_params, len(blocks))
        for number, block in enumerate(blocks):
            self.member[block, number] = 1.0

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.limits is None:
            return gradient
        norms = (gradient.square() @ self.member).clamp_min(1e-24).sqrt()
        return gradient * ((self.limits / norms).clamp(max=1.0) @ self.member.T)


def climb(
    objective: Objective,
    lam: Tensor,
    draws: Sequence[Tensor],
    *,
    step_size: Tensor,
    momentum: float,
    clip: Clip,
    second_order: bool = False,
    light: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """One step for each of `draws`: v <- momentum * v + clip(grad L), lam <- lam + step_size * v.

    Args:
        second_order: differentiate through the gradients, not only through the sum of the steps.
        light: keep only `lam` and `v` of every step and compute the rest again in the backward pass.

    Returns:
        `lam_0, ..., lam_K` and the unclipped gradient at `lam_0` (`[B, P]`, without graph).
    """

    def step(lam: Tensor, velocity: Tensor | None, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = objective.gradient(lam, eps, create_graph=second_order)[1]
        clipped = clip(gradient)
        velocity = clipped if velocity is None else torch.add(clipped, velocity, alpha=momentum)
        return torch.addcmul(lam, step_size, velocity), velocity, gradient.detach()

    path, velocity, first = [lam], None, lam
    for number, eps in enumerate(draws):
        if light and second_order:
            # Non-reentrant checkpoints keep random state and allow gradients to be taken inside.
            lam, velocity, gradient = checkpoint(step, lam, velocity, eps, use_reentrant=False)
        else:
            lam, velocity, gradient = step(lam, velocity, eps)
        first = gradient if number == 0 else first
        path.append(lam)
    return path, first


def descend(
    objective: Objective, lam: Tensor, draws: Sequence[Tensor], *, optimizer: Optimizer, clip: Clip
) -> tuple[list[Tensor], Tensor]:
    """One step of a fresh torch optimiser on minus the ELBO for each of `draws`; returns what `climb` does."""
    leaf = lam.detach().clone().requires_grad_()
    stepper = optimizer([leaf])
    path, first = [leaf.detach().clone()], leaf
    for number, eps in enumerate(draws):
        gradient = objective.gradient(leaf, eps)[1]
        first = gradient if number == 0 else first
        leaf.grad = -clip(gradient)
        stepper.step()
        path.append(leaf.detach().clone())
    return path, first


def toward(family: Family, lam: Tensor, target: Tensor, eps: Tensor) -> Tensor:
    """-grad_lam KL(q_lam || q_target), `[B, P]`: in closed form where torch knows one, else at draws from `eps`."""
    target = target.detach()
    with torch.enable_grad():
        leaf = lam.detach().requires_grad_()
        try:
            kl = kl_divergence(family(leaf), family(target))
        except NotImplementedError:
            log_weights, u, log_q = family.stratified_and_log_prob(leaf, eps)
            kl = (log_weights.exp() * (log_q - family.frozen_log_prob(target, u))).sum(0)
        (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    return -gradient


@dataclass(frozen=True)
class LocalFit:
    """Variational parameters optimised datum by datum.

    Attributes:
        lam: `[B, P]`, the best window's mean of the iterates.
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
