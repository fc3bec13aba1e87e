r"""Images on closed manifolds whose topology, geodesics and distances are known.

A manifold M is the image of coordinates t under a closed-form renderer, one picture of g x g pixels for each t. With
pixel angles :math:`u_p = v_p = 2\pi p / g`, directions :math:`f_p` of :math:`g^2` Fibonacci points on the globe and
a concentration :math:`\kappa` (4 by default):

.. math::
    \begin{aligned}
    \text{circle:}\quad & I_{pq} = \exp\big(-\lVert (x_p, y_q) - 0.6\,(\cos t, \sin t) \rVert^2 / 2 s^2\big),\ s = 0.2,
        \ \text{pixels in } [-1, 1]^2 \\
    \text{torus:}\quad & T_{pq}(t) = \exp\big(\kappa (\cos(u_p - t_1) + \cos(v_q - t_2) - 2)\big) \\
    \text{Klein bottle:}\quad & I(t) \propto T(t_1, t_2) + T(t_1 + \pi, -t_2) \\
    \text{sphere:}\quad & I_p = \exp\big(\kappa (n \cdot f_p - 1)\big), \qquad
    \text{projective plane:}\quad I_p = \exp\big(\kappa ((n \cdot f_p)^2 - 1)\big) \\
    \text{two circles:}\quad & \text{the circle with } s = 0.2 \text{ or with } s = 0.1
    \end{aligned}

Each is a compact quotient of a flat torus or of the round sphere by a group without fixed points; a geodesic of the
quotient is the shortest one of the cover over all *lifts* of its end. Distances along M are radians of that flat or
round metric. Image space measures them alike up to one factor: to within 0.5 % everywhere with 16 x 16 pixels, and
4 % on the circle of the narrow blob, which is smaller than a pixel.

Betti numbers over a prime field: torus and Klein bottle share (1, 2, 1) over Z2, and only Z3 tells that the Klein
bottle and the projective plane are not orientable: (1, 1, 0) and (1, 0, 0).

The question is that of Jin, McDaniel, Tatro, Catanzaro, Smith, Bendich, Dwyer & Fletcher, Implications of data
topology for deep generative models (2024); the renderers are our own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pyrovae.data.geometry import Manifold

__all__ = [
    "REGISTRY", "Circle", "KleinBottle", "Manifold", "ProjectivePlane", "Sphere", "Torus", "TwoCircles", "manifold",
]  # fmt: skip

_TURN = 2 * math.pi
_GOLDEN = math.pi * (3 - math.sqrt(5))
_RADIUS, _BLOB = 0.6, 0.2  # of the circle, in half picture widths


class _Flat(Manifold):
    """Quotient of a flat torus; coordinates are angles."""

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        return _TURN * torch.rand(num, self.coordinate_dim, generator=generator, dtype=torch.float64)

    def grid(self, num: int) -> Tensor:
        side = max(2, round(num ** (1 / self.dim)))
        line = torch.arange(side, dtype=torch.float64) * _TURN / side
        return torch.cartesian_prod(*[line] * self.dim).reshape(-1, self.dim)

    def move(self, t: Tensor, step: Tensor) -> Tensor:
        return t + step

    def lifts(self, t: Tensor) -> Tensor:
        return t.unsqueeze(0)

    def cover_distance(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(_wrap(b - a), dim=-1)

    def cover_path(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        return a + share.unsqueeze(-1) * _wrap(b - a)


class Circle(_Flat):
    """A blob that goes round in the picture; `t` `[..., 1]` is its angle."""

    name, dim, embedding_dim, coordinate_dim = "circle", 1, 2, 1
    _betti = {"even": (1, 1, 0), "odd": (1, 1, 0)}

    def render(self, t: Tensor) -> Tensor:
        return _blob(t[..., 0], torch.full_like(t[..., 0], _BLOB), self.size)


class TwoCircles(_Flat):
    """A wide blob or a narrow one that goes round; `t` `[..., 2]` is 0 (wide) or 1 (narrow), then the angle."""

    name, dim, embedding_dim, coordinate_dim = "two-circles", 1, 2, 2
    _betti = {"even": (2, 2, 0), "odd": (2, 2, 0)}

    def render(self, t: Tensor) -> Tensor:
        return _blob(t[..., 1], _BLOB * (1 - 0.5 * t[..., 0]), self.size)

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        angle = super().draw(num, generator)[:, 1]
        narrow = torch.randint(2, (num,), generator=generator)
        return torch.stack([narrow.double(), angle], 1)

    def grid(self, num: int) -> Tensor:
        line = torch.arange(max(1, num // 2), dtype=torch.float64) * _TURN / max(1, num // 2)
        return torch.cartesian_prod(torch.arange(2, dtype=torch.float64), line)

    def move(self, t: Tensor, step: Tensor) -> Tensor:
        return torch.stack([t[..., 0], t[..., 1] + step[..., 0]], -1)

    def cover_distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Infinite between the two."""
        apart = _wrap(b[..., 1] - a[..., 1]).abs()
        return torch.where(a[..., 0] == b[..., 0], apart, math.inf)

    def cover_path(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        if (a[..., 0] != b[..., 0]).any():
            raise ValueError("no path leads from one component to the other: leave such pairs out")
        return torch.stack([a[..., 0], a[..., 1] + share * _wrap(b[..., 1] - a[..., 1])], -1)


class Torus(_Flat):
    """A blob that leaves the picture on one side and comes back on the other; `t` `[..., 2]` are two angles."""

    name, dim, embedding_dim, coordinate_dim = "torus", 2, 3, 2
    _betti = {"even": (1, 2, 1), "odd": (1, 2, 1)}

    def render(self, t: Tensor) -> Tensor:
        angle = torch.arange(self.size, dtype=t.dtype, device=t.device) * (_TURN / self.size)
        bump = torch.exp(self.kappa * (torch.cos(angle - t.unsqueeze(-1)) - 1))
        return (bump[..., 0, :, None] * bump[..., 1, None, :]).flatten(-2)


class KleinBottle(Torus):
    """Two of the torus's blobs, half a turn apart and mirrored: (t1, t2) and (t1 + pi, -t2) are one picture."""

    name, dim, embedding_dim, coordinate_dim = "klein-bottle", 2, 4, 2
    _betti = {"even": (1, 2, 1), "odd": (1, 1, 0)}

    def render(self, t: Tensor) -> Tensor:
        first, second = self.lifts(t)
        # Their sum is largest, 1 + exp(-2 kappa), on a blob at t2 = 0: divided by it, pixels stay in [0, 1].
        return (super().render(first) + super().render(second)) / (1 + math.exp(-2 * self.kappa))

    def grid(self, num: int) -> Tensor:
        whole = super().grid(2 * num)
        return whole[whole[:, 0] < math.pi]

    def lifts(self, t: Tensor) -> Tensor:
        return torch.stack([t, torch.stack([t[..., 0] + math.pi, -t[..., 1]], -1)])


class Sphere(Manifold):
    """A bump on a globe whose Fibonacci points are the pixels; `t` `[..., 3]` is the unit vector n to its top."""

    name, dim, embedding_dim, coordinate_dim = "sphere", 2, 3, 3
    _betti = {"even": (1, 0, 1), "odd": (1, 0, 1)}

    def render(self, t: Tensor) -> Tensor:
        return torch.exp(self.kappa * (t @ _fibonacci(self.pixels).to(t).T - 1))

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(num, 3, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(normal, dim=-1)

    def grid(self, num: int) -> Tensor:
        return _fibonacci(num)

    def move(self, t: Tensor, step: Tensor) -> Tensor:
        first = _perpendicular(t)
        tangent = step[..., :1] * first + step[..., 1:] * torch.linalg.cross(t, first)
        # The same unit vector as cos|s| t + sin|s| s/|s| to second order, and smooth at s = 0.
        return torch.nn.functional.normalize(t + tangent, dim=-1)

    def lifts(self, t: Tensor) -> Tensor:
        return t.unsqueeze(0)

    def cover_distance(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(a, b)  # a point against its lifts
        across = torch.linalg.vector_norm(torch.linalg.cross(a, b), dim=-1)
        return torch.atan2(across, (a * b).sum(-1))  # arccos of the product, accurate at both ends

    def cover_path(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Great circle; between antipodes, any one of them."""
        # Exactly 0 at -a; b - (a . b) a would be rounding, of any direction.
        tangent = torch.linalg.cross(torch.linalg.cross(a, b, dim=-1), a, dim=-1)
        length = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
        antipodal = length < 1e-12
        tangent = torch.where(antipodal, _perpendicular(a), tangent / length.clamp_min(1e-12))
        angle = (share * self.cover_distance(a, b)).unsqueeze(-1)
        return torch.cos(angle) * a + torch.sin(angle) * tangent


class ProjectivePlane(Sphere):
    """Two bumps on the globe, at n and at -n: the two unit vectors are one picture."""

    name, dim, embedding_dim, coordinate_dim = "projective-plane", 2, 4, 3
    _betti = {"even": (1, 1, 1), "odd": (1, 0, 0)}

    def render(self, t: Tensor) -> Tensor:
        return torch.exp(self.kappa * ((t @ _fibonacci(self.pixels).to(t).T).square() - 1))

    def grid(self, num: int) -> Tensor:
        return _fibonacci(2 * num)[:num]  # the upper half

    def lifts(self, t: Tensor) -> Tensor:
        return torch.stack([t, -t])


REGISTRY: dict[str, type[Manifold]] = {
    kind.name: kind for kind in (Circle, Sphere, Torus, KleinBottle, ProjectivePlane, TwoCircles)
}

Name = Literal["circle", "sphere", "torus", "klein-bottle", "projective-plane", "two-circles"]


def manifold(name: Name | str, *, size: int = 16, kappa: float = 4.0) -> Manifold:
    """A manifold by name.

    >>> torus = manifold("torus")
    >>> images, angles = torus.sample(100, noise=0.02)
    >>> images.shape, torus.betti(), torus.betti(3)
    (torch.Size([100, 256]), (1, 2, 1), (1, 2, 1))

    Raises:
        ValueError: an unknown name.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown manifold {name!r}: choose one of {', '.join(REGISTRY)}")
    return REGISTRY[name](size, kappa)


def _blob(angle: Tensor, sd: Tensor, size: int) -> Tensor:
    """A Gaussian blob on the circle of radius 0.6 in [-1, 1]^2, `[..., size * size]`."""
    line = torch.linspace(-1, 1, size, dtype=angle.dtype, device=angle.device)
    width = (2 * sd.square()).unsqueeze(-1)
    down = torch.exp(-(line - _RADIUS * torch.cos(angle).unsqueeze(-1)).square() / width)
    across = torch.exp(-(line - _RADIUS * torch.sin(angle).unsqueeze(-1)).square() / width)
    return (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)


def _fibonacci(num: int) -> Tensor:
    """Evenly spread unit vectors `[num, 3]`, float64."""
    index = torch.arange(num, dtype=torch.float64)
    height = 1 - (2 * index + 1) / num
    around, radius = index * _GOLDEN, (1 - height.square()).sqrt()
    return torch.stack([radius * torch.cos(around), radius * torch.sin(around), height], 1)


def _perpendicular(n: Tensor) -> Tensor:
    """A unit vector at right angles to each of `[..., 3]`."""
    axis = (torch.arange(3, device=n.device) == n.abs().argmin(-1, keepdim=True)).to(n.dtype)
    return torch.nn.functional.normalize(axis - (axis * n).sum(-1, keepdim=True) * n, dim=-1)


def _wrap(angle: Tensor) -> Tensor:
    """Into [-pi, pi)."""
    return torch.remainder(angle + math.pi, _TURN) - math.pi
