"""Hamiltonian variational inference (Caterini, Doucet & Sejdinovic 2018): tempered leapfrog steps from a base guide.

    u_0 ~ q_0(u | x),   gamma ~ N(0, I),   v_0 = gamma / sqrt(beta_0);      K times:
    v~ = v + (e/2) grad log p(x, u),   u <- u + e v~,   v' = v~ + (e/2) grad log p(x, u)
    v <- sqrt(beta_{k-1} / beta_k) v'

    ELBO = E[ log p(x, u_K) + log N(v_K) - log q_0(u_0) - log N(gamma) ]

with beta_0 in (0, 1] and beta_K = 1. Leapfrog steps keep volumes; the tempering multiplies them by beta_0^{D/2} in all,
which cancels the density of v_0. After a start with much energy the momentum is cooled down, by the schedule

    1 / sqrt(beta_k) = (1 - 1 / sqrt(beta_0)) (k / K)^2 + 1 / sqrt(beta_0)

The flow is deterministic given gamma, and what it may learn from the datum is in its gradients. Step sizes (one for
each dimension, in standard deviations of the base) and beta_0 are learnt. A step jumps where a ReLU unit of the decoder
switches, which pathwise gradients miss: the bound holds, but its gradient is biased. Smooth activations have no such
fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import handlers, noise
from pyrovae.compat import GuideTraits
from pyrovae.guides.base import FamilyGuide
from pyrovae.guides.chain import FromBase
from pyrovae.recording import recorded
from pyrovae.samplers import slope

__all__ = ["HVAE"]


class HVAE(FromBase):
    """A Gaussian guide followed by K leapfrog steps on the log-joint.

    Args:
        base: a guide with a Gaussian family: the start, trained with the flow.
        num_steps: K >= 0; 0 is the base itself.
        step_size: where e begins, in standard deviations of the base.
        max_step_size: e stays below.
        temperature: beta_0 at the beginning, in (0, 1]; 1 switches tempering off and is then not learnt.
        dim: D, for a step size of each dimension; None shares one.
    """

    traits = GuideTraits(name="HVAE", marginal=False, stratified=True)

    def __init__(
        self,
        base: FamilyGuide,
        num_steps: int = 4,
        *,
        step_size: float = 0.1,
        max_step_size: float = 1.0,
        temperature: float = 0.9,
        dim: int | None = None,
    ) -> None:
        super().__init__(base, num_steps, step_size, max_step_size)
        if dim is not None and dim < 1:
            raise ValueError(f"dim is the number of latents, or None for a step size they share, got {dim}")
        if num_steps < 0:
            raise ValueError(f"HVAE needs num_steps >= 0, got {num_steps}")
        if not 0 < temperature <= 1:
            raise ValueError(f"temperature must lie in (0, 1], got {temperature:g}")
        if num_steps:
            self.step = nn.Parameter(self._logit(step_size, max_step_size).repeat(dim or 1))
            if temperature < 1:
                self.heat = nn.Parameter(self._logit(temperature))
        self.tempered = bool(num_steps) and temperature < 1

    def schedule(self) -> Tensor:
        """1 / sqrt(beta_k), `[K + 1]`."""
        times = torch.linspace(0, 1, self.num_steps + 1).to(next(self.parameters()))
        if not self.tempered:
            return torch.ones_like(times)
        hottest = self.heat.sigmoid().rsqrt()
        return (1 - hottest) * times.square() + hottest

    def _chain(self, *args: Any, **kwargs: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
        log_joint, beta = self.space(*args, **kwargs).bind(*args, **kwargs), handlers.kl_weight()
        q, draw = self._start(*args, **kwargs)
        if self.num_steps and self.step.numel() not in (1, self.space(*args, **kwargs).dim):
            raise ValueError(
                f"HVAE has dim={self.step.numel()} step sizes, but the model has {self.space(*args, **kwargs).dim} "
                "latents per datum: give it that number, or None for a step size they share"
            )

        def run(number: int) -> tuple[Tensor, Tensor]:
            u, log_q = draw(number)
            if not self.num_steps:
                return u, log_q
            density = recorded(log_joint, u.detach())
            gamma = noise.normal(*u.shape, like=u)
            size = self.max_step_size * self.step.sigmoid() * q.stddev
            heat = self.schedule()
            v = gamma * heat[0]
            force = slope(lambda point: density(point, beta), u)
            for k in range(self.num_steps):
                v = v + 0.5 * size * force
                u = u + size * v
                force = slope(lambda point: density(point, beta), u)
                v = (v + 0.5 * size * force) * (heat[k + 1] / heat[k])
            return u, log_q + 0.5 * (v.square() - gamma.square()).sum(-1)

        return run
