"""Stochastic variational inference datum by datum, without an encoder (Hoffman, Blei, Wang & Paisley 2013, local part).

    lam*_b = argmax_lam ELBO(lam; x_b),     found anew for every datum by a torch optimiser, to convergence

This q* is the best member of its family: what an encoder loses against it is the amortization gap, what it loses
against the posterior the approximation gap (Cremer, Li & Duvenaud 2018). In training it is the SVI baseline: the model
is trained at a constant lam*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrovae import handlers
from pyrovae.ascent import Ascent, LocalFit
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.families import Family
from pyrovae.guides.base import FamilyGuide
from pyrovae.guides.own_family import OwnFamily, family_traits
from pyrovae.guides.refined import Refined, RefinedGuide, start_of
from pyrovae.guides.side_term import pull
from pyrovae.refine import Objective, Optimizer
from pyrovae.runtime import evaluating, preserve_rng

__all__ = ["LocalSVI"]


class LocalSVI(OwnFamily, RefinedGuide):
    """Every datum's variational parameters, optimised to convergence on each call.

    Args:
        model: the Pyro program.
        family: "diagonal", "full-rank", "low-rank", "mixture", a `Family`, or a callable of D; by default the base's
            family, or "diagonal". A flow has weights of its own, which no datum has to itself: they stay as they are
            here, and are trained with the model.
        base: a guide with a family whose `lam` is the start; None starts from `family.init`. In training the base
            learns by the ELBO's gradient at the start alone.
        num_samples: draws per gradient, each with its mirror image where the family is symmetric.
        max_steps, check, patience, reductions, shrink, tolerance, optimizer: the stopping rule, as in
            `pyrovae.ascent.Ascent`.
        progress: show a progress bar.
        plate, batched: as in `LatentSpace`; of the base, where there is one.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> fit = LocalSVI(model).fit(torch.tensor([2.0, -4.0]))
        >>> [round(float(loc), 1) for loc in fit.lam[:, 0]], bool(fit.converged.all())
        ([1.0, -2.0], True)
    """

    traits = GuideTraits(name="LocalSVI", gaussian_sites=True, gaussian_base=True, stratified=True)

    def __init__(
        self,
        model: Callable[..., Any],
        family: str | type[Family] | Family | Callable[[int], Family] | None = None,
        *,
        base: FamilyGuide | None = None,
        num_samples: int = 8,
        max_steps: int = 5000,
        check: int = 50,
        patience: int = 2,
        reductions: int = 3,
        shrink: float = 0.2,
        tolerance: float = 1e-3,
        optimizer: Optimizer | None = None,
        progress: bool = False,
        plate: str | None = "data",
        batched: Batched = "auto",
    ) -> None:
        if base is not None:
            if not isinstance(base, FamilyGuide) or base.model is not model:
                raise TypeError(
                    "the base of LocalSVI must be a guide with a family (Amortized, Mixture, ...) built for the same "
                    f"model, got {base!r}"
                )
            if family is not None:
                raise ValueError("LocalSVI takes its family from the base: leave family out, or start without a base")
            plate, batched = base.plate, base.batched
        super().__init__(model, plate=plate, batched=batched)
        self._choose("diagonal" if family is None else family)
        self.ascent = Ascent(num_samples, max_steps, check, patience, reductions, shrink, tolerance, optimizer)
        self.base, self.progress = base, progress
        self.traits = _traits(base, self.family_spec)

    def _describe(self) -> str:
        what = f"family={self._family_name}" if self.base is None else f"base={self.base!r}"
        return f"{what}, max_steps={self.ascent.max_steps}, "

    def family(self, *args: Any, **kwargs: Any) -> Family:
        return super().family(*args, **kwargs) if self.base is None else self.base.family(*args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> LocalFit:
        """Optimise and report; the model in evaluation mode, its weights and the random state as they were."""
        with self._aside(), evaluating(self.model, self), preserve_rng(), torch.no_grad():
            return self.ascent.run(**self._problem(self._start(*args, **kwargs).lam, args, kwargs))

    def _start(self, *args: Any, **kwargs: Any) -> Refined:
        if self.base is not None:
            return start_of(self.base, *args, **kwargs)
        space, plate = self.space(*args, **kwargs), self.space(*args, **kwargs).read_plate(*args, **kwargs)
        rows = 1 if plate is None else plate.size
        return Refined(self.family(*args, **kwargs).init(rows, dtype=space.dtype, device=space.device))

    def _problem(self, start: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {
            "family": self.family(*args, **kwargs), "log_joint": self.space(*args, **kwargs).bind(*args, **kwargs),
            "start": start, "beta": handlers.kl_weight(), "progress": "local inference" if self.progress else None,
        }  # fmt: skip

    def _refine(self, *args: Any, **kwargs: Any) -> Refined:
        start, term = self._start(*args, **kwargs)
        problem = self._problem(start.detach(), args, kwargs)
        if torch.is_grad_enabled() and start.requires_grad:
            objective = Objective(problem["family"], problem["log_joint"], beta=problem["beta"])
            own = pull(start, objective.gradient(start, objective.noise(self.ascent.num_samples, start))[1])
            term = own if term is None else term + own
        return Refined(self.ascent.improve(**problem), term)


def _traits(base: FamilyGuide | None, family: Any) -> GuideTraits:
    """The family's, under this guide's name."""
    return family_traits("LocalSVI", family) if base is None else replace(base.traits, name="LocalSVI", stages=False)
