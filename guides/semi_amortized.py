"""Semi-amortized variational inference (Kim, Wiseman, Miller, Sontag & Rush 2018).

The encoder's `lam_0` is improved by K gradient steps on each datum's own ELBO L, with momentum:

    v_{k+1}   = momentum * v_k + clip(grad_lam L(lam_k; x, eps_k))
    lam_{k+1} = lam_k + step_size * v_{k+1}

Training differentiates through the steps (exact double backprop), so model and encoder are trained for the refined
posterior. The noise of all steps is drawn before the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyrovae import handlers, noise
from pyrovae.compat import GuideTraits
from pyrovae.families import Family
from pyrovae.guides.base import FamilyGuide
from pyrovae.latents import LogJoint

__all__ = ["SemiAmortized"]


class SemiAmortized(FamilyGuide):
    """Refine another guide's variational parameters by inner gradient steps.

    Args:
        base: a guide with a family (`Amortized`, `Mixture`).
        num_steps: K >= 0; 0 is the base, bit for bit.
        step_size: per-datum step on `lam`, a number or one per block (`{"loc": 0.1, "log_var": 0.05}`).
        momentum: in [0, 1).
        num_samples: draws per inner gradient.
        antithetic: add the mirrored draw of each (families with symmetric noise): on a quadratic log-joint the
            gradient of the location is then exact.
        second_order: differentiate through the steps; False treats each step's gradient as a constant.
        max_norm: clip each datum's gradient to this norm, per block; a number, one per block, or None.
    """

    traits = GuideTraits(name="SemiAmortized", gaussian_sites=True, stratified=True)

    def __init__(
        self,
        base: FamilyGuide,
        num_steps: int = 10,
        step_size: float | Mapping[str, float] = 0.1,
        momentum: float = 0.5,
        *,
        num_samples: int = 1,
        antithetic: bool = False,
        second_order: bool = True,
        max_norm: float | Mapping[str, float] | None = 5.0,
    ) -> None:
        if not isinstance(base, FamilyGuide):
            raise TypeError(
                f"SemiAmortized refines a guide with a family, got {type(base).__name__}: pass the guide alone, "
                "SemiAmortized(Amortized(model, encoder), num_steps=10)"
            )
        if num_steps < 0 or num_samples < 1 or not 0 <= momentum < 1:
            raise ValueError("SemiAmortized needs num_steps >= 0, num_samples >= 1 and momentum in [0, 1)")
        for value in step_size.values() if isinstance(step_size, Mapping) else (step_size,):
            if not value > 0:
                raise ValueError(f"step sizes must be positive, got {value}")
        super().__init__(base.model, plate=base.plate, batched=base.batched)
        self.base = base
        self.num_steps, self.step_size, self.momentum = num_steps, step_size, momentum
        self.num_samples, self.antithetic, self.second_order = num_samples, antithetic, second_order
        self.max_norm = max_norm
        inner = base.traits
        self.traits = GuideTraits(
            name="SemiAmortized",
            reparameterised=inner.reparameterised,
            gaussian_sites=inner.gaussian_sites,
            stratified=True,
        )

    def _describe(self) -> str:
        return f"{self.base!r}, num_steps={self.num_steps}, step_size={self.step_size}, "

    def family(self, *args: Any, **kwargs: Any) -> Family:
        return self.base.family(*args, **kwargs)

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._path(*args, **kwargs)[-1]

    def path(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """`lam_0, ..., lam_K`, each `[B, P]`."""
        with self._aside():
            return self._path(*args, **kwargs)

    def _path(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        lam = self.base.lam(*args, **kwargs)
        path = [lam]
        if self.num_steps == 0:
            return path
        family = self.base.family(*args, **kwargs)
        if self.antithetic and not family.symmetric:
            raise ValueError(f"antithetic draws need a family with symmetric noise, not {family!r}")
        training = torch.is_grad_enabled() and lam.requires_grad
        through = training or (torch.is_grad_enabled() and self.second_order)
        log_joint = self.space(*args, **kwargs).bind(*args, **kwargs)
        draws = [
            noise.normal(self.num_samples, len(lam), family.strata_noise_dim, like=lam) for _ in range(self.num_steps)
        ]
        step_size = _by_block(family, self.step_size, lam)
        if not through:
            lam = lam.detach()
        velocity = torch.zeros_like(lam)
        for eps in draws:
            with torch.enable_grad():
                if not lam.requires_grad:
                    lam = lam.detach().requires_grad_()
                objective = self._objective(family, lam, eps, log_joint)
                (gradient,) = torch.autograd.grad(objective.sum(), lam, create_graph=through and self.second_order)
            velocity = self.momentum * velocity + self._clip(family, gradient)
            lam = lam + step_size * velocity
            path.append(lam if through else lam.detach())
        return path

    def _objective(self, family: Family, lam: Tensor, eps: Tensor, log_joint: LogJoint) -> Tensor:
        """Each datum's ELBO, `[B]` (KL part annealed as outside)."""
        if self.antithetic:
            eps = torch.cat([eps, -eps])
        beta = handlers.kl_weight()
        log_weights, u = family.stratified(lam, eps)
        value = log_joint(u, beta)
        entropy = family.entropy(lam)
        if entropy is None:
            value, entropy = value - beta * family(lam).log_prob(u), lam.new_zeros(len(lam))
        return (log_weights.exp() * value).sum(0) + beta * entropy

    def _clip(self, family: Family, gradient: Tensor) -> Tensor:
        if self.max_norm is None:
            return gradient
        limit = _by_block(family, self.max_norm, gradient)
        parts = []
        for block in family.blocks.values():
            part = gradient[:, block]
            if part.shape[1] == 0:
                continue
            norm = part.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()
            parts.append(part * (limit[block][:1] / norm).clamp(max=1.0))
        return torch.cat(parts, dim=-1)


def _by_block(family: Family, value: float | Mapping[str, float], like: Tensor) -> Tensor:
    """A number, or one per named block, as `[P]`."""
    full = torch.empty(family.num_params, dtype=like.dtype, device=like.device)
    if not isinstance(value, Mapping):
        return full.fill_(value)
    if set(value) != set(family.blocks):
        raise ValueError(f"give one value for each block of {family!r}: {', '.join(family.blocks)}; got {list(value)}")
    for name, block in family.blocks.items():
        full[block] = value[name]
    return full
