"""Mixtures of amortized Gaussians, for posteriors with several modes.

    q(u | x) = sum_m w_m(x) N(u; mu_m(x), diag(s_m(x)^2))

The weights have no path gradient; the default estimator in `fit` therefore takes one draw per component and weighs
it exactly:

    ELBO = sum_m w_m E_{u ~ q_m}[ log p(x, u) - log q(u | x) ]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyrovae.compat import GuideTraits
from pyrovae.families import DiagonalNormal, Family, MixtureOfNormals
from pyrovae.guides.amortized import Amortized
from pyrovae.guides.base import FamilyGuide

__all__ = ["Mixture"]


class Mixture(FamilyGuide):
    """A mixture of `Amortized` guides with diagonal normals.

    Args:
        components: guides of the same model, each with `family="diagonal"`. Start them differently: equal
            components stay equal.
        weights: module from the data to logits `[B, M]`; None learns M constant logits.

    Note:
        k-hat cannot see a missed mode (on z ~ N(0, 1), x | z ~ N(z^2, 1/16) a Gaussian on one of the two modes at
        x = 2.25 stays below 0.7). Compare with `reference.exact` or with chains started from the prior.
    """

    traits = GuideTraits(name="Mixture", reparameterised=False, stratified=True)

    def __init__(self, components: Sequence[Amortized], weights: nn.Module | None = None) -> None:
        if not components:
            raise ValueError("a mixture needs at least one component")
        first = components[0]
        for guide in components:
            if guide.model is not first.model or guide.plate != first.plate:
                raise ValueError("the components of a mixture must be guides of one model with one plate")
        super().__init__(first.model, plate=first.plate, batched=first.batched)
        self.components = nn.ModuleList(components)
        self.weights = weights
        if weights is None:
            self.logits = nn.Parameter(torch.zeros(len(components), dtype=_dtype(first)))
        self.__dict__["_family"] = None

    @property
    def parts(self) -> list[Amortized]:
        """The component guides."""
        return [cast(Amortized, guide) for guide in self.components]

    def _describe(self) -> str:
        return f"components={len(self.components)}, "

    def family(self, *args: Any, **kwargs: Any) -> Family:
        if self._family is None:
            for guide in self.parts:
                if not isinstance(guide.family(*args, **kwargs), DiagonalNormal):
                    raise ValueError(f"a mixture takes components with family='diagonal', got {guide!r}")
            self.__dict__["_family"] = MixtureOfNormals(self.space(*args, **kwargs).dim, len(self.components))
        return self._family

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        parts = [guide.lam(*args, **kwargs) for guide in self.parts]
        dim = self.family(*args, **kwargs).dim
        locs = torch.cat([part[:, :dim] for part in parts], dim=-1)
        log_vars = torch.cat([part[:, dim:] for part in parts], dim=-1)
        if self.weights is None:
            logits = self.logits.expand(len(locs), -1)
        else:
            logits = self.weights(self.parts[0].encoder_input(*args, **kwargs))
        return torch.cat([logits, locs, log_vars], dim=-1)


def _dtype(guide: Amortized) -> torch.dtype:
    return next((p.dtype for p in guide.parameters()), torch.get_default_dtype())
