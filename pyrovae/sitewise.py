"""A run of a model at given latents that keeps every site's distribution, and how each site's curvature is found.

    moving   observed sites with Fisher information, and which of their parameters depend on u: J' F J
    closed   latent real normals whose parameters do not depend on u: a diagonal
    hessian  everything else: the negative Hessian of its log-density
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from pyrovae.fisher import fisher, innermost, unregistered
from pyrovae.joint import AtLatents, Structure, hidden_samples
from pyrovae.latents import LatentSpace, LogJoint

__all__ = ["Run", "Site", "Treatment", "run_at", "treatment"]


class Site:
    """One site of a run: its distribution, and the weight with which it counts per datum."""

    def __init__(self, msg: dict[str, Any], plate: str | None) -> None:
        self.name, self.fn, self.value = msg["name"], msg["fn"], msg["value"]
        self.mask, self.plate = msg["mask"], plate
        self.weight: Any = msg["scale"]
        for frame in msg["cond_indep_stack"]:
            if frame.name == plate:
                self.weight = self.weight * (frame.size / frame.full_size)

    def weigh(self, value: Tensor, lead: int = 0) -> Tensor:
        """`value: [*lead, *batch, *event]` times the site's scale and masks, also those below `to_event`."""
        batch = self.fn.batch_shape
        for weight, shape in [(self.weight, batch), (self.mask, batch), *self.inner_masks()]:
            if weight is not None:
                weight = torch.as_tensor(weight).to(value).expand(shape)
                value = value * weight.reshape(shape + (1,) * (value.dim() - lead - len(shape)))
        return value

    def inner_masks(self) -> list[tuple[Any, torch.Size]]:
        """Masks below `to_event`, each with the shape it is broadcast to."""
        fn, found = self.fn, []
        while isinstance(fn, td.Independent | MaskedDistribution):
            if isinstance(fn, MaskedDistribution):
                found.append((fn._mask, fn.batch_shape))
            fn = fn.base_dist
        return found


class Run(AtLatents):
    """The log-densities of a run and the distributions of its sites; with `only`, nothing but those sites'.

    Attributes:
        sites_seen: name -> `Site`.
        log_probs: name -> its log-density per datum, log-Jacobian included.
        latent, observed: the same, as lists.
    """

    def __init__(self, structure: Structure, u: Tensor, only: tuple[str, ...] = ()) -> None:
        super().__init__(structure, u, check=False)
        self.only = only
        self.sites_seen: dict[str, Site] = {}
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self.only:
            if msg["name"] in self.only:
                self.sites_seen[msg["name"]] = Site(msg, self.structure.plate)
            return
        before = len(self.latent), len(self.observed)
        super()._pyro_post_sample(msg)
        added = self.latent[before[0] :] + self.observed[before[1] :]
        if added:
            self.sites_seen[msg["name"]] = Site(msg, self.structure.plate)
            self.log_probs[msg["name"]] = added[0]


def run_at(bound: LogJoint, u: Tensor, only: tuple[str, ...] = ()) -> Run:
    """Run the model at `u: [B, D]`."""
    run = Run(bound.space.structure, u, only)
    with pyro.validation_enabled(False), hidden_samples(), run:
        bound.space.model(*bound.rows.args, **bound.rows.kwargs)
    return run


@dataclass(frozen=True)
class Treatment:
    """Which sites are treated how. Found once per latent space: it depends on the program, not on values."""

    moving: dict[str, tuple[str, ...]]
    closed: tuple[str, ...]
    hessian: tuple[str, ...]


def treatment(space: LatentSpace, run: Run, u: Tensor) -> Treatment:
    """Sort the sites of a model, from a run at `u` that recorded gradients."""
    cached = space.__dict__.get("_curvature")
    if cached is not None:
        return cached

    def moves(value: Tensor) -> bool:
        if not value.requires_grad:
            return False
        with torch.enable_grad():
            return torch.autograd.grad(value.sum(), u, allow_unused=True, retain_graph=True)[0] is not None

    latent = {site.name: site for site in space.sites}
    moving: dict[str, tuple[str, ...]] = {}
    closed, hessian = [], []
    for name, seen in run.sites_seen.items():
        blocks = fisher(seen.fn)
        if name in latent:
            base = innermost(seen.fn)
            fixed = isinstance(base, td.Normal) and latent[name].is_real and seen.mask is None
            if fixed and not moves(base.loc) and not moves(base.scale):
                closed.append(name)
            else:
                hessian.append(name)
        elif blocks is not None and not any(moves(value) for value in unregistered(seen.fn, blocks)):
            parameters = tuple(key for key, block in blocks.items() if moves(block.parameter))
            if parameters:
                moving[name] = parameters
        elif moves(run.log_probs[name]):
            hessian.append(name)
    found = Treatment(moving, tuple(closed), tuple(hessian))
    space.__dict__["_curvature"] = found
    return found
