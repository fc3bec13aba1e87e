r"""The cells of a leaky-ReLU net: where every unit keeps its sign, and the affine map there.

    y_1 = W_1 z + v_1,   h_l = q_l * y_l,   y_{l+1} = W_{l+1} h_l + v_{l+1},   g(z) = y_L,   q_l in {1, leak}^{H_l}

With the factors q held fixed everything is affine in z, so each y_l is a matrix on (1, z): `augmented`. Cells are found
layer by layer: on every cell so far the pre-activations of the next layer are affine, and their zeros cut it.

    one latent     intervals, cut at points; H units of one layer make at most H + 1
    two latents    convex polygons inside a square, cut by lines; H units of one layer make at most 1 + H + H(H-1)/2

Balestriero, Paris & Baraniuk (2020), "Analytical Probability Distributions and Exact Expectation-Maximization for Deep
Generative Networks".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cells", "Intervals", "Layer", "Polygons", "augmented", "factors_at", "intervals", "polygons"]

Layer = tuple[Tensor, Tensor]  # W [n_out, n_in], v [n_out]

_FLAT = 1e-12  # of the box: corners this close to a line lie on it
_POINTS = 2000  # points located at once: more are out of the processor's cache


@dataclass(frozen=True)
class Cells:
    """R cells with the factors q_l of their hidden layers, `[R, H_l]` each."""

    factors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.factors[0])

    @property
    def patterns(self) -> Tensor:
        """Which units are positive, `[R, H]` bool, hidden layers side by side."""
        return torch.cat([factors == 1 for factors in self.factors], dim=-1)


@dataclass(frozen=True)
class Intervals(Cells):
    """Cells of one latent, from left to right.

    Attributes:
        edges: the boundaries between them, `[R - 1]`, ascending.
    """

    edges: Tensor

    def __repr__(self) -> str:
        return f"Intervals(R = {len(self)})"

    @property
    def low(self) -> Tensor:
        """Left ends, `[R]`; the first is -inf."""
        return torch.cat([self.edges.new_tensor([-torch.inf]), self.edges])

    @property
    def high(self) -> Tensor:
        """Right ends, `[R]`; the last is inf."""
        return torch.cat([self.edges, self.edges.new_tensor([torch.inf])])

    def locate(self, z: Tensor) -> Tensor:
        """Index of the cell of every point, `[..., 1] -> [...]`."""
        return torch.searchsorted(self.edges, z[..., 0].contiguous())


@dataclass(frozen=True)
class Polygons(Cells):
    """Cells of two latents within the square `[-box, box]^2`.

    Attributes:
        vertices: corners of each, `[V_r, 2]`, counter-clockwise.
        box: half the width of the square.
    """

    vertices: tuple[Tensor, ...]
    box: float

    def __repr__(self) -> str:
        return f"Polygons(R = {len(self)}, box = {self.box:g})"

    @property
    def corners(self) -> Tensor:
        """`vertices` as one tensor, `[R, V, 2]`, the last corner repeated."""
        longest = max(len(corners) for corners in self.vertices)
        return torch.stack([torch.cat([c, c[-1:].expand(longest - len(c), 2)]) for c in self.vertices])

    def locate(self, z: Tensor) -> Tensor:
        """Index of the cell that every point lies in, or is nearest to lying in, `[..., 2] -> [...]`."""
        start = self.corners
        along = start.roll(-1, 1) - start
        length = along.norm(dim=-1)
        outward = torch.stack([along[..., 1], -along[..., 0]], -1) / length.clamp_min(1e-300).unsqueeze(-1)
        level = torch.where(length > 0, (outward * start).sum(-1), torch.inf)  # repeated corners bound nothing
        planes = torch.cat([outward, -level.unsqueeze(-1)], -1).reshape(-1, 3)
        points = torch.cat([z, torch.ones_like(z[..., :1])], -1).reshape(-1, 3)
        found = [(part @ planes.T).view(len(part), *level.shape).amax(-1).argmin(-1) for part in points.split(_POINTS)]
        return torch.cat(found).reshape(z.shape[:-1])


def augmented(layers: Sequence[Layer], factors: Sequence[Tensor]) -> list[Tensor]:
    """Every layer's pre-activation as a matrix on (1, z): `[R, n_l, 1 + D]` each; differentiable in the weights.

    Args:
        layers: W_l, v_l of as many layers as are asked for.
        factors: q_l `[R, H_l]` of all but the last of them.
    """
    weight, bias = layers[0]
    rows = len(factors[0]) if factors else 1
    found = [torch.cat([bias.unsqueeze(-1), weight], -1).expand(rows, -1, -1)]
    for (weight, bias), q in zip(layers[1:], factors, strict=True):
        y = weight @ (q.unsqueeze(-1) * found[-1])
        found.append(torch.cat([y[..., :1] + bias.unsqueeze(-1), y[..., 1:]], -1))
    return found


def factors_at(layers: Sequence[Layer], leak: float, z: Tensor) -> tuple[Tensor, ...]:
    """q_l at every point, `[N, D] -> [N, H_l]` for each of the given (hidden) layers."""
    found, h = [], z
    for weight, bias in layers:
        y = h @ weight.T + bias
        q = torch.where(y > 0, y.new_tensor(1.0), y.new_tensor(leak))  # of y's dtype: a plain 0.1 is float32's
        found.append(q)
        h = q * y
    return tuple(found)


@torch.no_grad()
def intervals(layers: Sequence[Layer], leak: float) -> Intervals:
    """All cells of a net of one latent; exact for any number of layers."""
    hidden = layers[:-1]
    edges = layers[0][0].new_zeros(0)
    for depth in range(len(hidden)):
        inside = factors_at(hidden[:depth], leak, _middles(edges))
        y = augmented(layers[: depth + 1], inside)[-1]  # [R, H, 2], or [1, H, 2] in the first layer
        zeros = -y[..., 0] / y[..., 1]  # a unit that is constant on the cell has none: nan or infinite
        cells = Intervals((), edges)
        kept = zeros[(zeros > cells.low.unsqueeze(-1)) & (zeros < cells.high.unsqueeze(-1))]
        edges = torch.unique(torch.cat([edges, kept]))
    return Intervals(factors_at(hidden, leak, _middles(edges)), edges)


def _middles(edges: Tensor) -> Tensor:
    """A point inside each interval, `[R, 1]`."""
    if not len(edges):
        return edges.new_zeros(1, 1)
    return torch.cat([edges[:1] - 1, 0.5 * (edges[1:] + edges[:-1]), edges[-1:] + 1]).unsqueeze(-1)


@torch.no_grad()
def polygons(layers: Sequence[Layer], leak: float, box: float) -> Polygons:
    """All cells of a net of two latents that meet the square `[-box, box]^2`."""
    hidden = layers[:-1]
    square = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]).to(layers[0][0]) * box
    pieces = [square]
    for depth in range(len(hidden)):
        inside = factors_at(hidden[:depth], leak, _centres(pieces))
        y = augmented(layers[: depth + 1], inside)[-1].expand(len(pieces), -1, -1)
        pieces = [part for piece, lines in zip(pieces, y, strict=True) for part in _cut(piece, lines, _FLAT * box)]
    return Polygons(factors_at(hidden, leak, _centres(pieces)), tuple(pieces), box)


def _centres(pieces: Sequence[Tensor]) -> Tensor:
    return torch.stack([piece.mean(0) for piece in pieces])


def _cut(piece: Tensor, lines: Tensor, flat: float) -> list[Tensor]:
    """The parts of a convex polygon between lines c + a . z = 0, rows (c, a) of `lines`."""
    parts = [piece]
    for line in lines:
        parts = list(itertools.chain.from_iterable(_halves(part, line, flat) for part in parts))
    return parts


def _halves(piece: Tensor, line: Tensor, flat: float) -> list[Tensor]:
    steepness = line[1:].norm()
    if steepness == 0:
        return [piece]
    side = (line[0] + piece @ line[1:]) / steepness  # signed distances of the corners
    if side.min() >= -flat or side.max() <= flat:
        return [piece]
    halves = []
    for sign in (1.0, -1.0):
        corners = []
        values = (sign * side).tolist()
        for i, here in enumerate(values):
            j = (i + 1) % len(values)
            if here >= 0:
                corners.append(piece[i])
            if here * values[j] < 0:
                corners.append(piece[i] + (piece[j] - piece[i]) * (here / (here - values[j])))
        halves.append(torch.stack(corners))
    return halves
