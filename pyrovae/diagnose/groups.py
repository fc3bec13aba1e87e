r"""What each group of latents holds: codes exchanged between data, and labels read off one group alone.

*Interventions.* For data :math:`x, x'` with codes :math:`z, z'` and an attribute a of images, a group's effect is

.. math::
    E \, | a(\hat x(z_{-l}, z'_l)) - a(\hat x(z)) |,   \qquad \hat x(z) = E[x | z],

and its share that effect over the sum of all groups'. A ladder that does what it is for has stroke width and slant in
its shallow groups and identity in its deep ones (Zhao, Song & Ermon 2017).

*Probes.* How well simple predictors tell labels from the posterior mean of :math:`u_l` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.diagnose.probe import Probe, probe
from pyrovae.generate import centre, decode

__all__ = [
    "GroupProbes", "Interventions", "image_slant", "image_width", "interventions", "probe_groups", "stroke_width",
]  # fmt: skip

Attribute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Interventions:
    """How much each group of latents moves each attribute.

    Attributes:
        groups: latent sites, in the order the model draws them.
        attributes: names.
        effect: `[L, A]`, mean absolute change.
        se: its standard error over data.
        share: `[L, A]`, effect over the column's sum; nan where nothing moved.
    """

    groups: tuple[str, ...]
    attributes: tuple[str, ...]
    effect: Tensor
    se: Tensor
    share: Tensor

    def __repr__(self) -> str:
        width = max(len(name) for name in (*self.groups, "group"))
        lines = ["  ".join(["group".ljust(width), *(f"{name:>12}" for name in self.attributes)])]
        for name, row in zip(self.groups, self.share.tolist(), strict=True):
            lines.append("  ".join([name.ljust(width), *(f"{value:>12.0%}" for value in row)]))
        return "\n".join(lines)


def interventions(
    model: Callable[..., Any], guide: Any, x: Tensor, attributes: Mapping[str, Attribute] | None = None, *,
    site: str = "x", seed: int = 0,
) -> Interventions:  # fmt: skip
    """Exchange one latent site at a time between random pairs of data.

    Args:
        model, guide: with a data plate.
        x: data `[B, *event]`, B >= 2.
        attributes: name -> function of images `[B, *event]` with one number, or a row of them, each; stroke width,
            width and slant by default. Integers (a classifier's labels, `lambda x: net(x).argmax(-1)`) count as
            changed, 1, or not, 0.
        site: the observed site.
        seed: of the pairs.

    Raises:
        ValueError: fewer than two data, or an attribute of another shape.
    """
    if len(x) < 2:
        raise ValueError("an exchange of codes needs at least two data")
    attributes = attributes or {"stroke width": stroke_width, "width": image_width, "slant": image_slant}
    code, space = centre(model, guide, x), guide.space(x)
    # A shift of a random order pairs every datum with another one.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    other = code[partner.to(code.device)]
    changed = code.repeat(1 + len(space.sites), 1, 1)
    for row, latent in enumerate(space.sites, start=1):
        changed[row, :, latent.slice] = other[:, latent.slice]
    images, _ = decode(space, changed, x, site=site)
    effects, errors = [], []
    for name, attribute in attributes.items():
        values = torch.stack([attribute(image) for image in images])
        if values.shape[:2] != images.shape[:2]:
            raise ValueError(f"attribute {name!r} gives {list(values.shape[1:])} for {len(x)} images, not one row each")
        move = _moves(values[1:], values[0])
        effects.append(move.mean(1))
        errors.append(_standard_error(move[:, order.to(move.device)]))
    effect = torch.stack(effects, 1)
    return Interventions(
        tuple(latent.name for latent in space.sites), tuple(attributes), effect, torch.stack(errors, 1),
        effect / effect.sum(0),
    )  # fmt: skip


@dataclass(frozen=True)
class GroupProbes:
    """What each group of latents alone knows of labels.

    Attributes:
        groups: latent sites, in the order the model draws them.
        kinds: of predictors.
        accuracy: `[L, P]`, share of held-out data.
        se: its binomial standard error.
        probes: the results themselves, one row a group.
    """

    groups: tuple[str, ...]
    kinds: tuple[str, ...]
    accuracy: Tensor
    se: Tensor
    probes: tuple[tuple[Probe, ...], ...]

    def __repr__(self) -> str:
        one = self.probes[0][0]
        width = max(len(name) for name in (*self.groups, "group"))
        lines = ["  ".join(["group".ljust(width), *(f"{kind:>14}" for kind in self.kinds)])]
        for name, row in zip(self.groups, self.probes, strict=True):
            cells = (f"{found.accuracy:.1%} +- {found.se:.1%}" for found in row)
            lines.append("  ".join([name.ljust(width), *(f"{cell:>14}" for cell in cells)]))
        return "\n".join([*lines, f"of {one.num_held_out} held-out data ({one.num_labels} labels)"])


def probe_groups(
    model: Callable[..., Any], guide: Any, x: Tensor, y: Tensor, *,
    kinds: Sequence[Literal["linear", "knn", "kmeans"]] = ("linear", "knn"), num_labels: int | None = None,
    seed: int = 0,
) -> GroupProbes:  # fmt: skip
    """Predict labels from each latent site's posterior mean alone (unconstrained coordinates).

    Args:
        model, guide: with a data plate; a guide without density will do.
        x, y: data `[B, *event]` and their labels `[B]`.
        kinds, num_labels, seed: as in `probe`; every group is judged on the same data.

    Raises:
        ValueError: labels that do not match the data, or too few of them.
    """
    if not kinds:
        raise ValueError("kinds must name at least one of 'linear', 'knn' and 'kmeans'")
    code, sites = centre(model, guide, x), guide.space(x).sites
    found = tuple(
        tuple(probe(code[:, site.slice], y, kind=kind, num_labels=num_labels, seed=seed) for kind in kinds)
        for site in sites
    )
    return GroupProbes(
        tuple(site.name for site in sites), tuple(kinds),
        torch.tensor([[one.accuracy for one in row] for row in found], dtype=torch.double),
        torch.tensor([[one.se for one in row] for row in found], dtype=torch.double), found,
    )  # fmt: skip


def _moves(values: Tensor, before: Tensor) -> Tensor:
    """How far attributes `[L, B, ...]` are from `[B, ...]`, `[L, B]`."""
    if not values.is_floating_point():
        changed = values != before
        return (changed.flatten(2).any(-1) if changed.dim() > 2 else changed).double()
    distance = (values.double() - before.double()).abs()
    return distance.flatten(2).sum(-1) if distance.dim() > 2 else distance


def _standard_error(move: Tensor) -> Tensor:
    """Of the mean over pairs in a ring, `[L, B] -> [L]`: every datum is in two of them, next to one another."""
    off = move - move.mean(1, keepdim=True)
    shared = (off * off.roll(1, 1)).mean(1).clamp_min(0)
    return ((move.var(1) + 2 * shared) / move.shape[1]).sqrt()


def stroke_width(x: Tensor) -> Tensor:
    """Twice the ink over the length of its outline (total variation), in pixels; images `[B, (1,) H, W]`."""
    image = _plain(x)
    outline = image.diff(dim=-1).abs().sum((-1, -2)) + image.diff(dim=-2).abs().sum((-1, -2))
    return 2 * image.sum((-1, -2)) / outline.clamp_min(1e-12)


def image_width(x: Tensor) -> Tensor:
    """Standard deviation of the ink's column, in pixels."""
    return _moments(x)[0].sqrt()


def image_slant(x: Tensor) -> Tensor:
    """Covariance of the ink's column and row over the row's variance: columns per row."""
    _, across, down = _moments(x)
    return across / down.clamp_min(1e-12)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variance of the column, covariance with the row, variance of the row, weighed by ink; `[B]` each."""
    image = _plain(x)
    ink = image / image.sum((-1, -2), keepdim=True).clamp_min(1e-12)
    row = torch.arange(image.shape[-2], dtype=image.dtype, device=image.device).view(-1, 1)
    column = torch.arange(image.shape[-1], dtype=image.dtype, device=image.device)
    off_row = row - (ink * row).sum((-1, -2)).view(-1, 1, 1)
    off_column = column - (ink * column).sum((-1, -2)).view(-1, 1, 1)
    pairs = ((off_column, off_column), (off_column, off_row), (off_row, off_row))
    across, both, down = ((ink * a * b).sum((-1, -2)) for a, b in pairs)
    return across, both, down


def _plain(x: Tensor) -> Tensor:
    if x.dim() == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.dim() != 3:
        raise ValueError(f"this attribute takes grey images [B, H, W] or [B, 1, H, W], got {list(x.shape)}")
    return x.double()
