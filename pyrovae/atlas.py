"""Ways over an atlas: straight lines inside charts, and changes of chart where two of them overlap.

A chart holds a datum that it can redraw. Two data that one chart holds are joined by the straight line between their
coordinates there; the shortest way over data in overlaps (Dijkstra, lengths in cubes' sides) joins two that no chart
holds together. Each point of it is decoded by one chart.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

__all__ = ["Ways", "ways"]

_NODES = 500  # data in overlaps, at most
_SHORTEST = 1e-6  # in cubes' sides: SciPy takes lengths near 0 for no edge at all
_HELD = 2.0  # default of `within`, in median distances of the data from what the likeliest chart makes of them


class Ways(NamedTuple):
    """Interpolations over charts.

    Attributes:
        x: E[x | z, c] along each way, evenly spaced by length in coordinates, `[steps, B, *event]`.
        joined: bool `[B]`; False where no chain of charts joins the two ends. Such a pair is cross-faded, which leaves
            the manifold.
    """

    x: Tensor
    joined: Tensor


def ways(guide: Any, x: Tensor, other: Tensor, known: Tensor, *, steps: int, within: float | None = None) -> Ways:
    """`guides.Charts.interpolate`."""
    if steps < 2:
        raise ValueError(f"an interpolation needs at least its two ends, got steps={steps}")
    if x.shape != other.shape:
        raise ValueError(f"both ends must have one shape, got {list(x.shape)} and {list(other.shape)}")
    if within is None:
        within = _HELD * float((known - guide.reconstruct(known)).flatten(1).norm(dim=-1).median())
    overlap = known[_held(guide, known, within).sum(1) > 1]
    overlap = overlap[:: -(-len(overlap) // _NODES) or 1]  # from all over, in whatever order the data come
    nodes = torch.cat([x, other, overlap])
    z, held = guide.coordinates(nodes), _held(guide, nodes, within)
    places = z.movedim(1, 0)
    apart = torch.cdist(places, places).masked_fill(~(held.T.unsqueeze(2) & held.T.unsqueeze(1)), torch.inf)
    size = len(x)
    # Ways lead from their own start to their own end over known data alone, whatever else is in the batch.
    apart[:, :, :size], apart[:, size : 2 * size] = torch.inf, torch.inf
    others = ~torch.eye(size, dtype=torch.bool, device=x.device)
    apart[:, :size, size : 2 * size].masked_fill_(others, torch.inf)
    length, chart = apart.clamp_min(_SHORTEST).min(0)
    _, before = dijkstra(length.double().cpu().numpy(), indices=range(len(x)), return_predecessors=True)
    ends = guide.reconstruct(x), guide.reconstruct(other)
    fade = torch.linspace(0, 1, steps, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
    found, joined = [], torch.ones(len(x), dtype=torch.bool, device=x.device)
    for pair in range(len(x)):
        way = [len(x) + pair]
        while way[-1] != pair and before[pair, way[-1]] >= 0:
            way.append(int(before[pair, way[-1]]))
        if way[-1] != pair:
            joined[pair] = False
            found.append(torch.lerp(ends[0][pair], ends[1][pair], fade))
            continue
        hops = torch.tensor(list(itertools.pairwise(way[::-1])), device=x.device)
        found.append(_decode(guide.model, z, hops, chart[hops[:, 0], hops[:, 1]], steps))
    return Ways(torch.stack(found, 1), joined)


def _held(guide: Any, x: Tensor, within: float) -> Tensor:
    """Bool `[B, N]`: charts that redraw a datum, and in any case the likeliest one."""
    shares, z = guide.predict(x), guide.coordinates(x).movedim(1, 0)
    with torch.no_grad():
        redrawn = guide.model.mean(z, torch.arange(len(z), device=x.device).unsqueeze(1))
    distance = torch.linalg.vector_norm((x - redrawn).flatten(2), dim=-1).T
    return (distance < within) | (shares == shares.amax(1, keepdim=True))


def _decode(model: Any, z: Tensor, hops: Tensor, charts: Tensor, steps: int) -> Tensor:
    """One way: hops `[H, 2]` between nodes with coordinates `[V, N, d]`, each in its chart `[H]`."""
    a, b = (z[hops[:, end], charts] for end in (0, 1))
    lengths = torch.linalg.vector_norm(b - a, dim=-1).clamp_min(_SHORTEST)
    cuts = lengths.cumsum(0)
    at = torch.linspace(0, 1, steps, dtype=z.dtype, device=z.device) * cuts[-1]
    hop = torch.bucketize(at, cuts[:-1])
    share = ((at - (cuts - lengths)[hop]) / lengths[hop]).unsqueeze(-1)
    with torch.no_grad():
        found: Tensor = model.mean(torch.lerp(a[hop], b[hop], share), charts[hop])
    return found
