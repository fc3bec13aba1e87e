"""Gradient steps on variational parameters, each datum on its own ELBO: the engine of refinement.

    L(lam; eps) = sum_r w_r [log p(x, u_r) - log q(u_r; lam)],   u_r = T(lam, eps_r)          one value per datum

`climb` takes K differentiable steps with momentum, `descend` K steps of a torch optimiser; `pyrovae.ascent` as many as
each datum needs. Data never share a parameter, so the gradient of the sum over the batch is every datum's own gradient,
and Adam on `[B, P]` is B independent Adams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyro
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils.checkpoint import checkpoint

from pyrovae import noise
from pyrovae.families import Family
from pyrovae.latents import LogJoint
from pyrovae.recording import recorded

__all__ = ["RECORD", "Clip", "Objective", "Optimizer", "by_block", "climb", "descend", "toward"]

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
        self.log_joint = recorded(self.bound, u)

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
