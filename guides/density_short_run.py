"""Short runs with a density (Nijkamp et al. 2020; Pang et al. 2021): Langevin steps whose noise is held fixed.

    u_{k+1} = u_k + (s_k^2 / 2) grad log p(x, u_k) + T s_k eps_k

Given eps_1..eps_K the chain is a map of u_0. Where every step is injective (s_k^2 / 2 times any curvature below 1) the
map has a density, and

    log q = log q_0(u_0) - sum_k log |det(I + (s_k^2 / 2) grad^2 log p(x, u_k))|

makes log p(x, u_K) - log q an importance weight: its mean is a lower bound of log p(x). Conditioning on the noise
counts too little entropy, so the bound is loose, and the step size that is best for it is a bit more than half of the
one that brings the chain closest to the posterior (`tune_step_size` has both criteria). A step that is not injective
voids it: `non_injective` counts those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrovae import handlers, noise
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.errors import LatentError
from pyrovae.guides.base import FamilyGuide
from pyrovae.guides.chain import ChainGuide
from pyrovae.guides.short_run import step_sizes
from pyrovae.products import hessian
from pyrovae.recording import recorded

__all__ = ["DensityShortRun"]


class DensityShortRun(ChainGuide):
    """K Langevin steps per datum with the density they have at fixed noise.

    Args:
        model: the Pyro program.
        num_steps: K >= 1.
        step_size: the noise scale s, a number or K of them.
        init: None starts from the prior; a guide with a family starts from its posterior.
        temperature: T, of the noise.
        plate, batched: as in `LatentSpace`.

    Note:
        Like `ShortRun` it has no parameters and gives the model the gradient of E_q[log p(x, z)] alone: chains and
        their density are constants in training. Every step costs a Hessian, D gradients: for D up to about 64.

    Warns:
        where steps were not injective, so that the weights are no bound.
    """

    traits = GuideTraits(name="DensityShortRun", marginal=False, stratified=True, from_prior=True)

    def __init__(
        self,
        model: Callable[..., Any],
        num_steps: int = 20,
        step_size: float | Sequence[float] = 0.1,
        init: FamilyGuide | None = None,
        *,
        temperature: float = 1.0,
        plate: str | None = "data",
        batched: Batched = "auto",
    ) -> None:
        if init is not None:
            if not isinstance(init, FamilyGuide) or init.model is not model:
                raise TypeError(
                    "DensityShortRun starts from the prior, or from a guide with a family for the same model, got "
                    f"{init!r}"
                )
            plate, batched = init.plate, init.batched
        if temperature < 0:
            raise ValueError(f"the temperature must not be negative, got {temperature:g}")
        super().__init__(model, plate=plate, batched=batched)
        self.steps = step_sizes(num_steps, step_size)
        self.num_steps, self.temperature, self.init = num_steps, float(temperature), init
        self.traits = replace(type(self).traits, from_prior=init is None)

    def _describe(self) -> str:
        return f"num_steps={self.num_steps}, "

    def non_injective(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """The share of steps at which the map folds, `[B]`; 0 says that no fold was met on these chains."""
        with self._aside(), torch.no_grad():
            return self._walk(num_samples, *args, **kwargs)[2].mean(0)

    def audited_log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Log-weights of chains, and the share of each one's steps at which the map folds, `[S, B]` both.

        Without a warning: the numbers of a chain that folds are no importance weight, and the caller is to say so.
        """
        with self._aside(), torch.no_grad():
            u, log_q, folded = self._walk(num_samples, *args, **kwargs)
            return self.space(*args, **kwargs).log_joint(u, *args, **kwargs) - log_q, folded

    def _draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return self._walk(num_samples, *args, **kwargs)[0]  # draws alone claim no bound

    def _chain(self, *args: Any, **kwargs: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
        def run(number: int) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                u, log_q, folded = self._walk(number, *args, **kwargs)
            if folded.any():
                warnings.warn(
                    f"{float(folded.mean()):.2%} of the Langevin steps are not injective, so these weights are "
                    "no bound of log p(x): take smaller steps",
                    stacklevel=2,
                )
            return u, log_q

        return run

    def _walk(self, number: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """End points `[S, B, D]`, log q `[S, B]`, and the share of each chain's steps that were not injective."""
        log_joint, beta = self.space(*args, **kwargs).bind(*args, **kwargs), handlers.kl_weight()
        if self.init is None:
            if log_joint.space.enumerated:
                raise LatentError(
                    f"DensityShortRun cannot start from the prior where discrete latents {log_joint.space.enumerated} "
                    "are summed out, as the density of that prior is not known: start from a guide, init=..."
                )
            u = self.space(*args, **kwargs).prior(number, *args, **kwargs)
            log_q = log_joint.terms(u)[0]
        else:
            family, lam = self.init.family(*args, **kwargs), self.init.lam(*args, **kwargs)
            u, log_q = family.rsample_and_log_prob(lam, noise.normal(number, len(lam), family.noise_dim, like=lam))
        density, folded = recorded(log_joint, u), torch.zeros_like(log_q)
        for size in self.steps:
            eps = noise.normal(*u.shape, like=u)
            with torch.enable_grad():
                rows = u.flatten(0, 1).requires_grad_()
                total = density(rows.view(u.shape), beta).sum()
                (slope,) = torch.autograd.grad(total, rows, retain_graph=True)
                curvature = hessian(total, rows).view(*u.shape, u.shape[-1])
            stretch = torch.linalg.eigvalsh(torch.eye(u.shape[-1]).to(u) + 0.5 * size**2 * _symmetric(curvature))
            log_q = log_q - stretch.abs().log().sum(-1)
            folded = folded + (~(stretch > 0)).any(-1) / self.num_steps
            u = u + 0.5 * size**2 * slope.view(u.shape) + self.temperature * size * eps
        return u, log_q, folded


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT).detach()
