"""Grids that enclose a density of one or two dimensions, datum by datum.

    int f(u) du = (cell volume) sum_g f(u_g)

The grid is widened until the log-density at its rim has fallen by `drop` nats, then shrunk to the region above that and
refined. Errors of the rule are far below Monte Carlo noise for smooth integrands (the trapezoid rule converges
exponentially when the integrand vanishes at both ends).

A mode narrower than a cell may stand between grid points, hundreds of nats above them. So local maxima that would be
left out are climbed first, and kept where their top, over a cell, could hold mass that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.errors import QuadratureError

__all__ = ["POINTS", "Grid", "enclose"]

POINTS = {1: 4001, 2: 301}  # a dimension
_FINER = {1: 64_001, 2: 301}  # at most, where those do not resolve the mass: narrow modes far from each other
_AGREE = 0.01  # nats
_CLIMBED, _ZOOMS, _TICKS = 8, 24, 9  # local maxima of a datum that are climbed, steps of that, and points a dimension
_MATTERS = math.log(1e-5)  # of the mass, in nats


class Grid(NamedTuple):
    """Points `[G, B, D]`, the log-density there `[G, B]` and the sides of a cell `[B, D]`; float64."""

    u: Tensor
    values: Tensor
    cell: Tensor

    def log_integral(self) -> Tensor:
        """Of the density, `[B]`."""
        return torch.logsumexp(self.values, 0) + self.cell.log().sum(-1)

    def coarse(self) -> Tensor:
        """Every second point in each dimension, `[G']` of all."""
        dim = self.u.shape[-1]
        points = round(len(self.u) ** (1 / dim))
        return torch.arange(len(self.u)).reshape(*[points] * dim)[(slice(None, None, 2),) * dim].flatten()


def enclose(
    log_density: Callable[[Tensor], Tensor], rows: int, dim: int, *, drop: float, dtype: torch.dtype, device: Any
) -> Grid:
    """A grid around the mass of every datum.

    Args:
        log_density: `[S, B, D] -> [S, B]`, nats; called in `dtype` on `device`.
        drop: nats below the mode beyond which mass is neglected (exp(-drop) of the peak).

    Raises:
        QuadratureError: the mass could not be enclosed, or is narrower than the grid.
    """
    points = POINTS[dim]
    low = torch.full((rows, dim), -10.0, dtype=torch.double)
    high = -low
    for _ in range(40):
        u, values = _on_grid(log_density, low, high, points, dtype, device)
        cell = (high - low) / (points - 1)
        grid = Grid(u, values, cell)
        inside = (values > values.amax(0) - drop) | _unseen(log_density, grid, drop, dtype, device)
        coords = torch.where(inside.unsqueeze(-1), u, torch.nan)
        least = coords.nan_to_num(nan=torch.inf).amin(0)
        most = coords.nan_to_num(nan=-torch.inf).amax(0)
        touch_low, touch_high = least <= low + 0.5 * cell, most >= high - 0.5 * cell
        width = high - low
        # Twice the width: far mass is reached in a few doublings, the shrinking that follows costs little.
        new_low = torch.where(touch_low, low - 2 * width, least - cell)
        new_high = torch.where(touch_high, high + 2 * width, most + cell)
        done = ~touch_low & ~touch_high & ((new_high - new_low) > 0.8 * width)
        if done.all():
            break
        low, high = torch.where(done, low, new_low), torch.where(done, high, new_high)
    else:
        raise QuadratureError(
            "the posterior's mass could not be enclosed by a grid: it may be improper; use reference.nuts"
        )

    def blind() -> bool:
        return bool(_unseen(log_density, grid, drop, dtype, device).any())

    while (not _change(grid) < _AGREE or blind()) and points < _FINER[dim]:
        points = 4 * (points - 1) + 1
        u, values = _on_grid(log_density, low, high, points, dtype, device)
        grid = Grid(u, values, (high - low) / (points - 1))
    _require_resolved(grid)
    if blind():
        raise QuadratureError(
            "the grid cannot resolve the posterior: it has modes far from each other, one of them narrower than the "
            "distance of grid points; use reference.hmc or reference.nuts, from starting points in all of them"
        )
    return grid


def _unseen(
    log_density: Callable[[Tensor], Tensor], grid: Grid, drop: float, dtype: torch.dtype, device: Any
) -> Tensor:  # fmt: skip
    """Bool `[G, B]`: points more than `drop` below the highest, next to a mode whose top, over a cell, has mass that
    matters.
    """
    u, values, cell = grid
    inside = values > values.amax(0) - drop
    dim = u.shape[-1]
    points = round(len(u) ** (1 / dim))
    field = values.T.reshape(-1, 1, *[points] * dim)
    pool = torch.nn.functional.max_pool1d if dim == 1 else torch.nn.functional.max_pool2d
    peaks = (field == pool(field, 3, 1, 1)).reshape(len(values.T), -1).T & ~inside & (values > -torch.inf)
    found = torch.zeros_like(inside)
    if not peaks.any():
        return found
    height, index = torch.where(peaks, values, -torch.inf).topk(min(_CLIMBED, len(u)), dim=0)  # [K, B]
    at = u.gather(0, index.unsqueeze(-1).expand(-1, -1, dim))
    reach = cell.expand_as(at).clone()
    ticks = torch.linspace(-1, 1, _TICKS, dtype=torch.double)
    moves = torch.cartesian_prod(*[ticks] * dim).reshape(-1, 1, 1, dim)
    for _ in range(_ZOOMS):
        near = at + moves * reach  # [P, K, B, D]
        heights = log_density(near.flatten(0, 1).to(dtype).to(device)).double().cpu().view(near.shape[:3])
        best, pick = heights.nan_to_num(nan=-torch.inf).max(0)
        step = moves[:, 0, 0][pick]  # [K, B, D]
        at = torch.where((best > height).unsqueeze(-1), at + step * reach, at)
        height = torch.maximum(best, height)
        rim = (step.abs() == 1).any(-1, keepdim=True)
        reach = torch.where(rim, reach, reach * 2 / (_TICKS - 1))
    mass = height + cell.log().sum(-1)
    total = torch.logsumexp(values, 0) + cell.log().sum(-1)
    matters = mass > total + max(_MATTERS, -drop)
    return found.scatter(0, index, matters & peaks.gather(0, index))


def _change(grid: Grid) -> float:
    """By how much, at most, every second grid point gives another log integral, nats."""
    coarse = torch.logsumexp(grid.values[grid.coarse()], 0) + grid.u.shape[-1] * math.log(2.0)
    return float((coarse - torch.logsumexp(grid.values, 0)).abs().max())


def _require_resolved(grid: Grid) -> None:
    """Raise when every second grid point gives another integral: the mass is narrower than the grid.

    The rule's error falls as exp(-c / cell^2), so half the points in agreement within 0.01 nats leave an error of about
    the fourth power of that.
    """
    change = _change(grid)
    if not change < _AGREE:
        raise QuadratureError(
            f"the grid cannot resolve the posterior (half of its points change log p(x) by {change:.2g} nats), "
            "as with two nearly collinear latents: use reference.nuts"
        )


def _on_grid(
    log_density: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, points: int, dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor]:
    """Grid points `[G, B, D]` and the log-density there `[G, B]`."""
    rows, dim = low.shape
    ticks = torch.linspace(0, 1, points, dtype=torch.double)
    unit = torch.cartesian_prod(*[ticks] * dim).reshape(-1, dim)
    u = low + unit.unsqueeze(1) * (high - low)
    block = max(1, math.ceil(200_000 / rows))
    parts = [log_density(part.to(dtype).to(device)).double().cpu() for part in u.split(block)]
    return u, torch.cat(parts).nan_to_num(nan=-torch.inf)
