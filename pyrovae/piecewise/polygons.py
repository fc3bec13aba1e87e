r"""Gaussians on convex polygons: masses, moments and draws for two latents.

A polygon is cut into strips by horizontal lines through its corners; in a strip z_1 runs from one straight edge to
another, l(z_2) to h(z_2). With z_2 ~ N(m_2, s_2^2) and z_1 | z_2 ~ N(m_1(z_2), s^2),

    P = int N(z_2; m_2, s_2^2) [Phi((h - m_1) / s) - Phi((l - m_1) / s)] dz_2

The bracket and the conditional moments of z_1 are those of a truncated normal, in closed form and in logarithms. The
integrand over z_2 is log-concave (Prekopa 1971), so it is found without derivatives however narrow or far out it lies:
from heights around the cell's mode, a grid is shrunk to where it stands within 50 nats of its maximum. Gauss-Legendre
rules there are halved until halves and whole agree to 1e-13 of p(x), or to rounding.

The mode z* is the point of the polygon nearest to the mean in the metric of the precision, and a convex polygon has
density(z) <= density(z*) exp(-|z - z*|^2 / 2) in that metric.

For draws a panel is chosen by its mass, z_2 by inverting the integral of the Legendre polynomial through the panel's
nodes (an error of the distribution function below 1e-6), z_1 by that of a truncated normal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.piecewise.cells import Polygons
from pyrovae.piecewise.gaussians import CellGaussians
from pyrovae.piecewise.posterior import CellPosterior
from pyrovae.piecewise.truncated import quantile, truncated

__all__ = ["PolygonNormals"]

_NODES = 16  # Gauss-Legendre nodes of a panel
_GRID, _SHRINK, _ROUNDS = 9, 0.6, 200  # points of the search grid, what share it must lose to go on, and how often
_DROP = 50.0  # nats below the maximum where a slice ends
_REACH = 11.0  # standard deviations around the mode: density exp(-60) of the cell's highest
_LOW = 100.0  # nats below the highest density of all cells at which a cell has no mass to speak of
_SEEN = 60.0  # nats below the datum's largest strip where a strip is dropped
_AGREE, _ROUNDINGS, _HALVINGS = 1e-13, 16, 60
_ROWS = 100_000  # panels evaluated at once
_DRAWS, _BISECTIONS = 10_000, 36  # draws made at once, and steps of their inversion: 1e-11 of a panel
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class _Strips(NamedTuple):
    """S strips of all cells: from z_2 = `low` to `high`, z_1 between edges given at both heights, `[S, 2]`."""

    cell: Tensor
    low: Tensor
    high: Tensor
    left: Tensor
    right: Tensor


class _Panels(NamedTuple):
    """P pieces of strips, each of one datum: `[P]`."""

    row: Tensor
    strip: Tensor
    low: Tensor
    high: Tensor

    def at(self, index: Tensor) -> _Panels:
        return _Panels(*(part[index] for part in self))


def _strips(vertices: Sequence[Tensor]) -> _Strips:
    cells, heights, lefts, rights = [], [], [], []
    for cell, corners in enumerate(vertices):
        points = corners.tolist()
        edges = [(p, q) for p, q in zip(points, points[1:] + points[:1], strict=True) if p[1] != q[1]]
        levels = sorted({p[1] for p in points})
        for low, high in itertools.pairwise(levels):
            middle = 0.5 * (low + high)
            across = [
                [p[0] + (q[0] - p[0]) * (level - p[1]) / (q[1] - p[1]) for level in (low, high)]
                for p, q in edges
                if min(p[1], q[1]) < middle < max(p[1], q[1])
            ]
            if len(across) != 2:  # corners a rounding error apart
                continue
            left, right = sorted(across, key=sum)
            cells.append(cell)
            heights.append((low, high))
            lefts.append(left)
            rights.append(right)
    like = vertices[0]
    low, high = (torch.tensor(part, dtype=like.dtype, device=like.device) for part in zip(*heights, strict=True))
    ends = (torch.tensor(part, dtype=like.dtype, device=like.device) for part in (lefts, rights))
    return _Strips(torch.tensor(cells, device=like.device), low, high, *ends)


class _Slices:
    """The integrand over z_2, of every strip and datum."""

    def __init__(self, strips: _Strips, gaussians: CellGaussians) -> None:
        self.strips, self.gaussians = strips, gaussians
        factor = gaussians.factor
        self.scale = 1 / factor[:, 1, 1].abs()
        self.pull = -factor[:, 0, 1] / factor[:, 0, 0]
        self.rest = 1 / factor[:, 0, 0].abs()

    def bounds(self, panels: _Panels, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Conditional mean `[P, G]` and scale `[P, 1]` of z_1 at `z: [P, G]`, and its ends, standardised."""
        strips, cell = self.strips, self.strips.cell[panels.strip]
        low = strips.low[panels.strip].unsqueeze(-1)
        share = (z - low) / (strips.high[panels.strip].unsqueeze(-1) - low)
        left, right = (
            ends[panels.strip][:, :1] * (1 - share) + ends[panels.strip][:, 1:] * share
            for ends in (strips.left, strips.right)
        )
        loc = self.gaussians.loc[panels.row, cell]
        mean = loc[:, :1] + self.pull[cell].unsqueeze(-1) * (z - loc[:, 1:])
        scale = self.rest[cell].unsqueeze(-1)
        return mean, scale, (left - mean) / scale, (right - mean) / scale

    def __call__(self, panels: _Panels, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log of the integrand, E[z_1 | z_2] and Var[z_1 | z_2] on the cell, `[P, G]` each."""
        cell = self.strips.cell[panels.strip]
        mean, scale, left, right = self.bounds(panels, z)
        log_p, away, variance = truncated(left, right)
        own = self.scale[cell].unsqueeze(-1)
        u = (z - self.gaussians.loc[panels.row, cell, 1].unsqueeze(-1)) / own
        weight = self.gaussians.log_weight[panels.row, cell].unsqueeze(-1)
        return weight + log_p - 0.5 * u * u - own.log() - _LOG_ROOT_2PI, mean + scale * away, scale**2 * variance


class _Integrated(NamedTuple):
    """Panels with their nodes: heights, log of weight times integrand, conditional moments of z_1; `[P, G]` each."""

    panels: _Panels
    heights: Tensor
    log_parts: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def log_mass(self) -> Tensor:
        return torch.logsumexp(self.log_parts, -1)


class PolygonNormals(CellPosterior):
    """The posterior of two latents: on every polygon a normal, cut off at its edges; batch `[B]`, event `[2]`.

    Mass outside the cells' square is not seen: `models.PiecewiseAffineVAE` takes one that is large enough.
    """

    def __init__(self, cells: Polygons, gaussians: CellGaussians, dtype: torch.dtype) -> None:
        self.slices = _Slices(_strips(cells.vertices), gaussians)
        found = _integrate(self.slices, _panels(self.slices, cells))
        shape = gaussians.log_weight.shape
        place = found.panels.row * shape[1] + self.slices.strips.cell[found.panels.strip]  # in [B * R]
        total = _log_sum(found.log_mass, found.panels.row, shape[0])
        part = (found.log_parts - total[found.panels.row].unsqueeze(-1)).exp()  # [P, G], of the posterior's mass

        def add(values: Tensor) -> Tensor:
            zero = values.new_zeros(shape.numel(), *values.shape[2:])
            return zero.index_add(0, place, torch.einsum("pg,pg...->p...", part, values))

        mass = add(torch.ones_like(part))
        safe = mass.clamp_min(1e-300)
        mean = add(torch.stack([found.mean, found.heights], -1)) / safe.unsqueeze(-1)
        away = torch.stack([found.mean, found.heights], -1) - mean[place].unsqueeze(1)
        outer = away.unsqueeze(-1) * away.unsqueeze(-2)
        outer[..., 0, 0] += found.variance
        covariance = add(outer) / safe[..., None, None]
        log_mass = mass.log().view(shape) + total.unsqueeze(-1)
        super().__init__(cells, gaussians, dtype, log_mass, mean.view(*shape, 2), covariance.view(*shape, 2, 2))
        self._prepare_draws(found, found.log_mass - total[found.panels.row])

    def _prepare_draws(self, found: _Integrated, log_share: Tensor) -> None:
        """Panels of any mass to speak of, datum by datum, with the distribution function of z_2 in each."""
        order = found.panels.row.argsort(stable=True)
        order = order[log_share[order] > -35]
        self.panels = found.panels.at(order)
        self.panel_rows = self.panels.row.contiguous()
        share = log_share[order].exp()
        total = share.new_zeros(len(self.rows)).index_add(0, self.panels.row, share)
        self.reached = (share / total[self.panels.row]).cumsum(0)  # datum b's panels rise from b to b + 1
        density = (found.log_parts[order] - found.log_mass[order].unsqueeze(-1)).exp() / _rule(share)[1]
        self.series = density @ _series(share).mT

    def _draw(self, rows: Tensor) -> Tensor:
        parts = [self._draw_some(part) for part in rows.reshape(-1).contiguous().split(_DRAWS)]
        return torch.cat(parts).reshape(*rows.shape, 2)

    def _draw_some(self, rows: Tensor) -> Tensor:
        uniform = torch.rand(3, len(rows), dtype=self.reached.dtype, device=rows.device)
        index = torch.searchsorted(self.reached, rows + uniform[0])
        first, last = (torch.searchsorted(self.panel_rows, rows, right=right) for right in (False, True))
        index = torch.minimum(torch.maximum(index, first), last - 1)  # rounding at the ends
        panels = self.panels.at(index)
        t = _invert(self.series[index], uniform[1])
        height = (panels.low + (panels.high - panels.low) * t).unsqueeze(-1)
        mean, scale, left, right = self.slices.bounds(panels, height)
        across = mean + scale * quantile(uniform[2].unsqueeze(-1), left, right)
        return torch.cat([across, height], -1)


def _panels(slices: _Slices, cells: Polygons) -> _Panels:
    """Of every datum and strip, the heights around the mode of its cell; cells far below the highest are left out."""
    mode, peak = _modes(cells, slices.gaussians)
    reach = _REACH * slices.scale
    strips, cell = slices.strips, slices.strips.cell
    low = torch.maximum(strips.low, mode[:, cell, 1] - reach[cell])  # [B, S]
    high = torch.minimum(strips.high, mode[:, cell, 1] + reach[cell])
    row, strip = ((high > low) & (peak > peak.amax(-1, keepdim=True) - _LOW)[:, cell]).nonzero().unbind(-1)
    return _Panels(row, strip, low[row, strip], high[row, strip])


def _modes(cells: Polygons, gaussians: CellGaussians) -> tuple[Tensor, Tensor]:
    """Where each cell's density is highest, `[B, R, 2]`, and its logarithm there, `[B, R]`."""
    start = cells.corners  # [R, V, 2]
    factor = gaussians.factor.mT  # z -> factor' z has a round metric
    start, centre = start @ factor, torch.einsum("brd,rde->bre", gaussians.loc, factor)
    along = start.roll(-1, 1) - start
    away = centre.unsqueeze(2) - start  # [B, R, V, 2]
    length = along.square().sum(-1)
    share = ((away * along).sum(-1) / length.clamp_min(1e-300)).clamp(0, 1)
    nearest = start + share.unsqueeze(-1) * along
    distance = (centre.unsqueeze(2) - nearest).square().sum(-1)
    turn = along[..., 0] * away[..., 1] - along[..., 1] * away[..., 0]  # positive left of an edge
    turn = turn * factor[:, 0, 0, None].sign() * factor[:, 1, 1, None].sign()  # which a reflection turns round
    inside = ((turn >= 0) | (length == 0)).all(-1)
    pick = distance.argmin(-1, keepdim=True)
    point = nearest.gather(2, pick.unsqueeze(-1).expand(-1, -1, 1, 2)).squeeze(2)
    square = torch.where(inside, 0.0, distance.gather(2, pick).squeeze(2))
    mode = torch.where(inside.unsqueeze(-1), centre, point)
    mode = torch.linalg.solve_triangular(factor.mT, mode.unsqueeze(-1), upper=True).squeeze(-1)
    return mode, gaussians.log_weight + gaussians.log_det - 2 * _LOG_ROOT_2PI - 0.5 * square


def _integrate(slices: _Slices, panels: _Panels) -> _Integrated:
    """Panels on which the rule has converged, of all data; panels of no mass are left out."""
    rows = len(slices.gaussians.log_weight)
    parts = [_locate(slices, panels.at(some)) for some in torch.arange(len(panels.row)).split(_ROWS)]
    panels = _Panels(*(torch.cat(part) for part in zip(*(panels for panels, _ in parts), strict=True)))
    peak = torch.cat([peak for _, peak in parts]) + (panels.high - panels.low).log()
    highest = peak.new_full((rows,), -torch.inf).scatter_reduce(0, panels.row, peak, "amax")
    todo = panels.at((peak > highest[panels.row] - _SEEN).nonzero().squeeze(-1))
    whole = _evaluate(slices, todo)
    kept: list[_Integrated] = []
    for _ in range(_HALVINGS):
        value, panels = whole.log_mass, whole.panels
        total = _log_sum(torch.cat([value, *(part.log_mass for part in kept)]),
                         torch.cat([panels.row, *(part.panels.row for part in kept)]), rows)  # fmt: skip
        middle = 0.5 * (panels.low + panels.high)
        halves = [_evaluate(slices, panels._replace(high=middle)), _evaluate(slices, panels._replace(low=middle))]
        finer = [(half.log_mass - total[panels.row]).exp() for half in halves]
        share = (value - total[panels.row]).exp()
        error = (share - finer[0] - finer[1]).abs()
        rounding = torch.finfo(value.dtype).eps * value.abs()  # of a logarithm: all that can be asked for far out
        good = error < _AGREE + _ROUNDINGS * rounding * share
        kept += [_Integrated(half.panels.at(good), *(part[good] for part in half[1:])) for half in halves]
        if good.all():
            return _joined(kept)
        whole = _joined([_Integrated(half.panels.at(~good), *(part[~good] for part in half[1:])) for half in halves])
    raise ValueError(f"the posterior over polygons is not resolved after {_HALVINGS} halvings of its strips")


def _joined(parts: Sequence[_Integrated]) -> _Integrated:
    panels = _Panels(*(torch.cat(part) for part in zip(*(part.panels for part in parts), strict=True)))
    return _Integrated(panels, *(torch.cat(part) for part in zip(*(part[1:] for part in parts), strict=True)))


def _locate(slices: _Slices, panels: _Panels) -> tuple[_Panels, Tensor]:
    """Every strip shrunk to where its integrand stands, and the log of its maximum."""
    ticks = torch.linspace(0, 1, _GRID, dtype=panels.low.dtype, device=panels.low.device)
    low, high = panels.low.clone(), panels.high.clone()
    peak = torch.full_like(low, -torch.inf)
    active = torch.arange(len(low), device=low.device)
    for _ in range(_ROUNDS):
        some = panels.at(active)
        z = low[active, None] + (high - low)[active, None] * ticks
        values = slices(some, z)[0]
        peak[active] = torch.maximum(peak[active], values.amax(-1))
        inside = values > values.amax(-1, keepdim=True) - _DROP
        first = (inside.int().argmax(-1) - 1).clamp_min(0)
        last = (_GRID - inside.flip(-1).int().argmax(-1)).clamp_max(_GRID - 1)
        pick = torch.arange(len(active), device=low.device)
        width = high[active] - low[active]
        low[active], high[active] = z[pick, first], z[pick, last]
        active = active[(high[active] - low[active] < _SHRINK * width) & inside.any(-1)]
        if not len(active):
            return panels._replace(low=low, high=high), peak
    raise ValueError("the integrand of a strip could not be found: the noise scale is too small for float64")


@lru_cache
def _legendre() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], and the matrix from values at the nodes to the series of their integral."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    vander = np.polynomial.legendre.legvander(nodes, _NODES - 1)
    degrees = np.arange(_NODES)
    series = ((2 * degrees + 1) / 2)[:, None] * vander.T * weights  # exact projection: degree 2 n - 1 at most
    integral = np.stack([np.polynomial.legendre.legint(column, lbnd=-1) for column in series.T], -1) / 2
    return 0.5 * (nodes + 1), 0.5 * weights, integral


def _rule(like: Tensor) -> tuple[Tensor, Tensor]:
    nodes, weights, _ = _legendre()
    return torch.from_numpy(nodes).to(like), torch.from_numpy(weights).to(like)


def _series(like: Tensor) -> Tensor:
    return torch.from_numpy(_legendre()[2]).to(like)


def _invert(series: Tensor, uniform: Tensor) -> Tensor:
    """t in [0, 1] at which the integral with Legendre coefficients `series: [N, K]` reaches `uniform: [N]`."""
    low, high = torch.zeros_like(uniform), torch.ones_like(uniform)
    columns = series.T.contiguous()
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        x = 2 * middle - 1
        here, above = columns[-1], torch.zeros_like(x)  # Clenshaw's recurrence
        for k in range(len(columns) - 2, -1, -1):
            here, above = columns[k] + ((2 * k + 1) / (k + 1)) * x * here - ((k + 1) / (k + 2)) * above, here
        below = here < uniform
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


def _evaluate(slices: _Slices, panels: _Panels) -> _Integrated:
    nodes, weights = _rule(panels.low)
    width = panels.high - panels.low
    parts = []
    for index in torch.arange(len(width), device=width.device).split(_ROWS // 4):
        some = panels.at(index)
        z = some.low.unsqueeze(-1) + width[index].unsqueeze(-1) * nodes
        value, mean, variance = slices(some, z)
        parts.append((z, value + (weights * width[index].unsqueeze(-1)).log(), mean, variance))
    return _Integrated(panels, *(torch.cat(part) for part in zip(*parts, strict=True)))


def _log_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """log sum exp of `values: [P]` by datum, `[rows]`."""
    peak = values.new_full((rows,), -torch.inf).scatter_reduce(0, row, values, "amax")
    return peak + values.new_zeros(rows).index_add(0, row, (values - peak[row]).exp()).log()
