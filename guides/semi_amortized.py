"""Semi-amortized variational inference (Kim, Wiseman, Miller, Sontag & Rush 2018).

The encoder's `lam_0` is improved by K gradient steps on each datum's own ELBO L, with momentum:

    v_{k+1}   = momentum * v_k + clip(grad_lam L(lam_k; x, eps_k))
    lam_{k+1} = lam_k + step_size * v_{k+1}

Training differentiates through the steps (exact double backprop), so model and encoder are trained for the refined
posterior. The noise of all steps is drawn before the loop; a random mask in the model (dropout) is drawn once a step.

The ablations of the paper train the model at a constant lam_K, and the encoder

    detached      by the ELBO's gradient at lam_0                                   (VAE+SVI)
    detached-kl   by KL(q(lam_0) || q(lam_K)), lam_K constant                       (VAE+SVI+KL)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyrovae import handlers
from pyrovae.compat import GuideTraits
from pyrovae.families import Family
from pyrovae.guides.base import FamilyGuide
from pyrovae.guides.refined import Refined, RefinedGuide, start_of
from pyrovae.guides.side_term import pull
from pyrovae.refine import RECORD, Clip, Objective, Optimizer, by_block, climb, descend, toward

__all__ = ["SemiAmortized"]

Gradient = Literal["total", "first-order", "detached", "detached-kl"]


class SemiAmortized(RefinedGuide):
    """Refine another guide's variational parameters by inner gradient steps.

    Args:
        base: a guide with a family (`Amortized`, `Mixture`).
        num_steps: K >= 0; 0 is the base, bit for bit.
        step_size: per-datum step on `lam`, a number or one per block (`{"loc": 0.1, "log_var": 0.05}`); 0.1.
        momentum: in [0, 1); 0.5.
        num_samples: draws per inner gradient.
        antithetic: add the mirrored draw of each (families with symmetric noise): on a quadratic log-joint the
            gradient of the location is then exact.
        gradient: what trains the encoder. "total" (default) differentiates through the steps; "first-order" treats
            each step's gradient as a constant; "detached" and "detached-kl" are the ablations above.
        max_norm: clip each datum's gradient to this norm, per block; a number, one per block, or None.
        memory: "light" keeps `lam` and `v` of every step alone and computes the rest again in the backward pass: the
            same gradient to the last digit, memory that hardly grows with K, more time. "fast" keeps everything.
        inner: "gradient" takes the steps above; "svi" takes K steps of a torch optimizer without a graph, and has
            the detached gradients only.
        optimizer: with `inner="svi"`, from a list of parameters to a torch optimizer whose coordinates are independent
            (not LBFGS); by default `torch.optim.Adam(params, lr=0.05)`.

    Note:
        The model must be twice differentiable in its latents for "total": cuDNN's recurrent nets and fused attention
        are not. Batch normalisation in training mode makes rows depend on each other.
    """

    traits = GuideTraits(name="SemiAmortized", gaussian_sites=True, gaussian_base=True, stratified=True)

    def __init__(
        self,
        base: FamilyGuide,
        num_steps: int = 10,
        step_size: float | Mapping[str, float] | None = None,
        momentum: float | None = None,
        *,
        num_samples: int = 1,
        antithetic: bool = False,
        gradient: Gradient | None = None,
        max_norm: float | Mapping[str, float] | None = 5.0,
        memory: Literal["fast", "light"] = "fast",
        inner: Literal["gradient", "svi"] = "gradient",
        optimizer: Optimizer | None = None,
    ) -> None:
        if not isinstance(base, FamilyGuide):
            raise TypeError(
                f"SemiAmortized refines a guide with a family, got {type(base).__name__}: pass the guide alone, "
                "SemiAmortized(Amortized(model, encoder), num_steps=10)"
            )
        if inner not in ("gradient", "svi") or memory not in ("fast", "light"):
            raise ValueError(
                f"inner must be 'gradient' or 'svi' and memory 'fast' or 'light', got {inner!r}, {memory!r}"
            )
        if gradient is None:
            gradient = "total" if inner == "gradient" else "detached"
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient must be one of {', '.join(get_args(Gradient))}, got {gradient!r}")
        if inner == "svi" and gradient in ("total", "first-order"):
            raise ValueError(
                f"a torch optimizer's steps carry no graph, so inner='svi' has no {gradient!r} gradient: use "
                "gradient='detached' or 'detached-kl', or inner='gradient'"
            )
        if inner == "svi" and (step_size is not None or momentum is not None):
            raise ValueError("with inner='svi' steps and momentum are the optimizer's: optimizer=lambda params: ...")
        if inner == "gradient" and optimizer is not None:
            raise ValueError("an optimizer steps only with inner='svi': pass that, or step_size and momentum")
        step_size, momentum = 0.1 if step_size is None else step_size, 0.5 if momentum is None else momentum
        if num_steps < 0 or num_samples < 1 or not 0 <= momentum < 1:
            raise ValueError("SemiAmortized needs num_steps >= 0, num_samples >= 1 and momentum in [0, 1)")
        for name, option in (("step sizes", step_size), ("max_norm", 1.0 if max_norm is None else max_norm)):
            for value in option.values() if isinstance(option, Mapping) else (option,):
                if not value > 0:
                    raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(base.model, plate=base.plate, batched=base.batched)
        self.base = base
        self.num_steps, self.step_size, self.momentum = num_steps, step_size, momentum
        self.num_samples, self.antithetic, self.max_norm = num_samples, antithetic, max_norm
        self.gradient, self.memory, self.inner = gradient, memory, inner
        self.optimizer = optimizer or _adam
        self.traits = GuideTraits(
            name="SemiAmortized",
            reparameterised=base.traits.reparameterised,
            gaussian_sites=base.traits.gaussian_sites,
            gaussian_base=base.traits.gaussian_base,
            stratified=True,
        )

    def _describe(self) -> str:
        steps = f"step_size={self.step_size}" if self.inner == "gradient" else "inner='svi'"
        return f"{self.base!r}, num_steps={self.num_steps}, {steps}, gradient={self.gradient!r}, "

    def family(self, *args: Any, **kwargs: Any) -> Family:
        return self.base.family(*args, **kwargs)

    def path(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """`lam_0, ..., lam_K`, each `[B, P]`."""
        with self._aside():
            return self._path(*args, **kwargs)[0]

    def _refine(self, *args: Any, **kwargs: Any) -> Refined:
        path, term = self._path(*args, **kwargs)
        return Refined(path[-1], term)

    def _path(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Tensor | None]:
        lam, term = start_of(self.base, *args, **kwargs)
        if self.num_steps == 0:
            return [lam], term
        family = self.family(*args, **kwargs)
        log_joint = self.space(*args, **kwargs).bind(*args, **kwargs)
        objective = Objective(family, log_joint, beta=handlers.kl_weight(), antithetic=self.antithetic)
        draws = [objective.noise(self.num_samples, lam) for _ in range(self.num_steps)]
        spare = objective.noise(self.num_samples, lam) if self.gradient == "detached-kl" else None
        clip = Clip(family, self.max_norm, lam)
        if self.num_steps >= RECORD:
            objective.record(lam, draws[0])
        graph = torch.is_grad_enabled() and self.gradient in ("total", "first-order")
        start = lam if graph else lam.detach()
        if self.inner == "svi":
            path, first = descend(objective, start, draws, optimizer=self.optimizer, clip=clip)
        else:
            path, first = climb(
                objective, start, draws, step_size=by_block(family, self.step_size, lam), momentum=self.momentum,
                clip=clip, second_order=graph and self.gradient == "total", light=self.memory == "light",
            )  # fmt: skip
        if torch.is_grad_enabled() and not graph and lam.requires_grad:
            if spare is not None:
                first = toward(family, lam, path[-1], spare)
            own = pull(lam, first)
            term = own if term is None else term + own
        return path, term


def _adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.05)
