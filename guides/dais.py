"""Differentiable annealed importance sampling (Geffner & Domke 2021; Zhang et al. 2021), with a base guide q_0(u | x).

K leapfrog steps along bridges from the base to the posterior, momentum partially refreshed, nothing rejected:

    log g_k(u) = (1 - b_k) log q_0(u) + b_k log p(x, u),    0 < b_1 < ... < b_K = 1
    u_h = u + (e_k / 2) s v,    v' = v + e_k s grad log g_k(u_h),    u <- u_h + (e_k / 2) s v'
    v <- c v' + sqrt(1 - c^2) eps

    ELBO = E[ log p(x, u_K) - log q_0(u_0) + sum_k (log N(v'_k) - log N(v_{k-1})) ]

v is standard normal under the refreshment, and every step is a composition of shears, so the last line is a lower
bound for any step sizes e_k, scales s, bridges and c; all are learnt with the base, by the same bound. Its pathwise
gradient needs second derivatives of the log-joint. With ReLU decoders those of the nets' hidden layers are zero almost
everywhere, and a step jumps where a unit switches: the bound holds, but its gradient misses the jumps and is biased.
Smooth activations (`nn.SiLU`, `nn.ELU`) have no such fault.

Against NumPyro's AutoDAIS: scales are in units of the base's standard deviations (there a mass vector), which suits
amortization, as posteriors differ from datum to datum; step sizes are kept below their maximum by a sigmoid (there by
clipping, whose gradient vanishes).
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
from pyrovae.samplers import LogDensity, slope

__all__ = ["DAIS", "move"]


class DAIS(FromBase):
    """A Gaussian guide improved by K annealed steps, with a bound of its own.

    Args:
        base: a guide with a Gaussian family: the start, trained with the chain. For VAEs an `Amortized` guide; in joint
            mode one with `plate=None`.
        num_steps: K >= 1.
        step_size: where e begins, in standard deviations of the base.
        max_step_size: e stays below.
        keep: c, the share of the momentum that is kept, where it begins; in (0, 1).

    Note:
        Rows of the data plate may be subsampled. A mini-batch in the place of *one datum's likelihood* makes the bound
        useless (Zhang et al. 2021). The base alone is not the posterior: with many steps it becomes broader than it.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyrovae.guides import Amortized
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z**2, 0.25), obs=x.squeeze(-1))
        >>> guide = DAIS(Amortized(model, torch.nn.Linear(1, 2)), num_steps=4)
        >>> guide.log_weights(10, torch.ones(3, 1)).shape
        torch.Size([10, 3])
    """

    traits = GuideTraits(name="DAIS", marginal=False, stratified=True)

    def __init__(
        self,
        base: FamilyGuide,
        num_steps: int = 4,
        *,
        step_size: float = 0.1,
        max_step_size: float = 1.0,
        keep: float = 0.9,
    ) -> None:
        super().__init__(base, num_steps, step_size, max_step_size)
        if num_steps < 1:
            raise ValueError(f"DAIS needs num_steps >= 1, got {num_steps}")
        if not 0 < keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, got {keep:g}")
        begin = self._logit(step_size, max_step_size)
        self.step = nn.Parameter(torch.stack([begin, 0 * begin]))  # at the base, and its rise towards the posterior
        self.bridges = nn.Parameter(begin.new_zeros(num_steps))
        self.keep = nn.Parameter(self._logit(keep))

    def schedule(self) -> tuple[Tensor, Tensor]:
        """b_k and e_k, `[K]` each."""
        bridges = self.bridges.softmax(0).cumsum(0)
        start, rise = self.step.unbind()
        return bridges, self.max_step_size * (start + rise * bridges).sigmoid()

    def _chain(self, *args: Any, **kwargs: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
        log_joint, beta = self.space(*args, **kwargs).bind(*args, **kwargs), handlers.kl_weight()
        q, draw = self._start(*args, **kwargs)
        bridges, sizes = self.schedule()
        keep = self.keep.sigmoid()
        fresh = ((-self.keep).sigmoid() * (1 + keep)).sqrt()  # sqrt(1 - keep^2)
        scale = q.stddev

        def run(number: int) -> tuple[Tensor, Tensor]:
            u, log_q = draw(number)
            eps = noise.normal(len(u), u.shape[1], self.num_steps * u.shape[-1], like=u)
            momenta = eps.unflatten(-1, (self.num_steps, -1)).unbind(-2)
            density = recorded(log_joint, u.detach())
            v = momenta[0]
            for k, (bridge, size) in enumerate(zip(bridges, sizes, strict=True)):

                def between(point: Tensor, bridge: Tensor = bridge) -> Tensor:
                    return (1 - bridge) * q.log_prob(point) + bridge * density(point, beta)

                u, kicked = move(u, v, size * scale, between)
                log_q = log_q + 0.5 * (kicked.square() - v.square()).sum(-1)
                if k + 1 < self.num_steps:
                    v = keep * kicked + fresh * momenta[k + 1]
            return u, log_q

        return run


def move(u: Tensor, v: Tensor, size: Tensor, log_density: LogDensity) -> tuple[Tensor, Tensor]:
    """One leapfrog step that begins with the position; its Jacobian determinant is 1."""
    half = u + 0.5 * size * v
    kicked = v + size * slope(log_density, half)
    return half + 0.5 * size * kicked, kicked
