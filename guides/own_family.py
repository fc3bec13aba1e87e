"""Guides that are told their family: by name, class, instance, or as a callable of D."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyrovae.compat import GuideTraits
from pyrovae.families import FAMILIES, Family, get_family, refuse_unbuilt_flow
from pyrovae.guides.base import FamilyGuide

__all__ = ["OwnFamily", "family_traits"]


class OwnFamily(FamilyGuide):
    """Holds the family that was asked for, and makes it when D is known."""

    def _choose(self, family: Any) -> None:
        """To be called in `__init__`, after that of `nn.Module`."""
        refuse_unbuilt_flow(family)
        self.flow = family if isinstance(family, nn.Module) else None
        self.__dict__["family_spec"], self.__dict__["_family"] = family, None  # not as submodules

    @property
    def _family_name(self) -> str:
        spec = self.family_spec
        return repr(spec if isinstance(spec, str | Family) else getattr(spec, "__name__", "?"))

    def family(self, *args: Any, **kwargs: Any) -> Family:
        flow = self.flow  # named in every run: Pyro registers its weights then
        if flow is not None:
            return get_family(flow, self.space(*args, **kwargs).dim)
        if self._family is None:
            self.__dict__["_family"] = get_family(self.family_spec, self.space(*args, **kwargs).dim)
        return self._family


def family_traits(name: str, family: Any) -> GuideTraits:
    """What a guide of this name with this family offers."""
    kind = FAMILIES.get(family) if isinstance(family, str) else family
    if callable(kind) and not isinstance(kind, type | Family):
        kind = kind(2)  # any D will do to ask
    return GuideTraits(
        name,
        reparameterised=getattr(kind, "reparameterised", True),
        gaussian_sites=getattr(kind, "gaussian", True),
        gaussian_base=getattr(kind, "gaussian_base", True),
        stratified=True,
    )
