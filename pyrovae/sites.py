"""One latent site of a model: where it lies in `u`, and how to get from there to its own space and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyrovae.errors import LatentError

__all__ = ["LatentSite", "bijection", "pack", "simplify", "to_constrained"]


@dataclass(frozen=True)
class LatentSite:
    """A continuous latent site.

    Attributes:
        name: the site's name.
        slice: its part of `u`.
        inner: sizes of its batch dims other than the data plate, left to right.
        frames: the inner plates, as (name, size, dim).
        unconstrained_shape: event shape in unconstrained coordinates.
        event_dim: event dims in the model's own space.
        support: the constraint, without batch dims; None where it depends on other latents or on the datum.
    """

    name: str
    slice: slice
    inner: torch.Size
    frames: tuple[tuple[str, int, int], ...]
    unconstrained_shape: torch.Size
    event_dim: int
    support: Any

    @property
    def size(self) -> int:
        return self.slice.stop - self.slice.start

    @property
    def is_real(self) -> bool:
        """Whether the site is unconstrained, so that its value is its part of `u`."""
        return self.support is not None and _is_real(self.support)

    def arrange(self, block: Tensor, *, joint: bool, padded: bool = False) -> Tensor:
        """A block of `u` in the site's layout: `[..., B, n] -> [..., *inner, B, *unconstrained]`.

        With `padded`, leading dims come from Pyro's particle plate, which leaves sizes of 1 for the inner plates:
        the last `len(inner)` of them make room. In joint mode B = 1 is dropped.
        """
        lead = block.shape[:-2]
        k = len(self.inner)
        if padded and k and len(lead) >= k and all(size == 1 for size in lead[-k:]):
            lead = lead[:-k]
        if joint:
            return block.reshape((*lead, *self.inner, *self.unconstrained_shape))
        value = block.reshape(*lead, block.shape[-2], *self.inner, *self.unconstrained_shape)
        return value.movedim(len(lead), len(lead) + k) if k else value

    def flatten(self, value: Tensor, *, joint: bool) -> Tensor:
        """The inverse of `arrange`."""
        k, e = len(self.inner), len(self.unconstrained_shape)
        if joint:
            return value.reshape(*value.shape[: value.dim() - k - e], 1, self.size)
        rows = value.dim() - e - 1
        value = value.movedim(rows, rows - k) if k else value
        return value.reshape(*value.shape[: rows - k + 1], self.size)


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


def bijection(site: LatentSite) -> Any:
    """The transform from the site's unconstrained block to its value.

    Raises:
        LatentError: the support is not the same for every run and row.
    """
    if site.support is None:
        raise LatentError(
            f"the support of site {site.name!r} depends on other latents or differs between data: reparameterise the "
            "model so that its support is fixed"
        )
    return biject_to(site.support)


def to_constrained(site: LatentSite, block: Tensor) -> Tensor:
    """The site's value for its (arranged) unconstrained block."""
    return block if site.is_real else bijection(site)(block)


def pack(sites: tuple[LatentSite, ...], values: dict[str, Tensor], *, joint: bool) -> Tensor:
    """Constrained site values to `u: [..., B, D]`."""
    blocks = []
    for site in sites:
        value = values[site.name]
        if not site.is_real:
            value = bijection(site).inv(value)
        blocks.append(site.flatten(value, joint=joint))
    return torch.cat(blocks, dim=-1)


def simplify(constraint: Any, other: Any, event_dim: int) -> Any:
    """A support without batch dims, from the supports of two runs; None when it is not the same for all rows and runs.

    `Uniform(0, 1)` expanded by a plate of 100 has bounds of shape [100]; a guide needs them for any batch size.
    """
    simple = copy.copy(constraint)
    for key, value in vars(constraint).items():
        twin = getattr(other, key)
        if isinstance(value, constraints.Constraint):
            reduced = simplify(value, twin, event_dim)
            if reduced is None:
                return None
            setattr(simple, key, reduced)
        elif isinstance(value, Tensor):
            if value.shape != twin.shape or not torch.equal(value, twin):
                return None
            event_shape = value.shape[max(0, value.dim() - event_dim) :] if event_dim else torch.Size()
            flat = value.reshape(-1, *event_shape)
            if not torch.equal(flat, flat[:1].expand_as(flat)):
                return None
            setattr(simple, key, flat[0].clone())
        elif isinstance(value, int | float) and value != twin:
            return None
    return simple
