"""The plain objective of a guide: what it is trained by when nobody says otherwise."""

from __future__ import annotations

from typing import Any

from pyro.infer import Trace_ELBO

from pyrovae.losses.diffusion import DiffusionELBO
from pyrovae.losses.elbo import ELBO
from pyrovae.losses.joint import ExpectedLogJoint
from pyrovae.losses.recursive import RecursiveELBO

__all__ = ["chosen"]


def chosen(guide: Any) -> Any:
    """ELBO, stratified or recursive for mixtures, E_q log p without a density, Pyro's own for Pyro's guides; that of a
    diffusion by single steps."""
    traits = getattr(guide, "traits", None)
    if traits is None:
        return Trace_ELBO()
    if "diffusion" in traits.latents:
        return DiffusionELBO()
    if not traits.has_density:
        return ExpectedLogJoint()
    if traits.stages:
        return RecursiveELBO()
    return ELBO() if traits.reparameterised else ELBO("stratified")
