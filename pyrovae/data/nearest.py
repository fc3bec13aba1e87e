r"""The nearest point of a rendered manifold: a dense grid, then Newton's method from the best points of it.

For an image x and coordinates t, minimise :math:`f(s) = \tfrac12 \lVert x - \mathrm{render}(\mathrm{move}(t, s))
\rVert^2` over tangent steps s. The grid finds the valley (its best points that are not neighbours are followed,
lest a nearly equal valley be missed); Newton's step, with eigenvalues of the exact Hessian taken in absolute value and
a trust radius, never goes up and converges quadratically. In float64; the number is the Euclidean norm of
the residual itself, so that it is exact to rounding at zero too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.errors import DataError

if TYPE_CHECKING:
    from pyrovae.data.geometry import Manifold

__all__ = ["Nearest", "nearest"]

_GRID = {1: 200, 2: 1600}  # points by dimension; 0.16 radians apart on a torus, where a bump is half a radian wide
_STARTS = 4
_NEIGHBOURS = 0.4  # radians within which two grid points lead into one valley
_TRUST = 0.3  # radians, first
_STEPS, _STILL = 60, 1e-9
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Nearest:
    """Where a manifold comes nearest to images.

    Attributes:
        coordinates: `[N, coordinate_dim]`.
        distance: `[N]`, Euclidean, in image space.
    """

    coordinates: Tensor
    distance: Tensor


def nearest(manifold: Manifold, images: Tensor, *, progress: str | None = None) -> Nearest:
    """Nearest points of a manifold.

    Args:
        manifold: the manifold.
        images: `[N, pixels]`.
        progress: label of a progress bar.

    Returns:
        in the dtype of the images.

    Raises:
        DataError: images of another shape, or with NaN or infinite values.
    """
    if images.dim() != 2 or images.shape[1] != manifold.pixels:
        raise DataError(f"images must be [N, {manifold.pixels}] for {manifold!r}, got {list(images.shape)}")
    if not images.isfinite().all():
        raise DataError("NaN or infinite values have no distance to a manifold: leave those images out")
    with torch.no_grad():
        grid = manifold.grid(_GRID[manifold.dim]).to(images.device)
        rendered = manifold.render(grid)
        near = torch.cat([manifold.geodesic(some.unsqueeze(1), grid) < _NEIGHBOURS for some in grid.split(100)])
        spacing = _spacing(rendered)
        rows: Any = images.detach().double().split(_ROWS)
        if progress is not None:
            from tqdm.auto import tqdm

            rows = tqdm(rows, desc=progress, disable=None, leave=False)
        found = [_of_rows(manifold, x, grid, rendered, near, spacing) for x in rows]
    if not found:
        return Nearest(images.new_zeros(0, manifold.coordinate_dim), images.new_zeros(0))
    return Nearest(*(torch.cat(part).to(images.dtype) for part in zip(*found, strict=True)))


def _spacing(rendered: Tensor) -> float:
    """Largest distance of a rendered grid point to the next one, `[G, pixels]`."""
    apart = torch.cdist(rendered, rendered).fill_diagonal_(torch.inf)
    return float(apart.amin(1).max())


def _of_rows(
    manifold: Manifold, x: Tensor, grid: Tensor, rendered: Tensor, near: Tensor, spacing: float
) -> tuple[Tensor, Tensor]:
    apart = torch.cdist(x, rendered)
    t, distance = grid[apart.argmin(1)], x.new_full((len(x),), torch.inf)
    for _ in range(_STARTS):
        value, best = apart.min(1)
        # No point of a valley is nearer than its best grid point less the way between two of them.
        rows = (value - spacing <= distance).nonzero().squeeze(1)
        if not len(rows):
            break
        refined, reached = _refine(manifold, x[rows], grid[best[rows]])
        nearer = reached < distance[rows]
        t[rows[nearer]], distance[rows[nearer]] = refined[nearer], reached[nearer]
        apart = apart.masked_fill(near[best], torch.inf)
    return t, distance


def _refine(manifold: Manifold, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method on each row: coordinates and distances."""

    def value(step: Tensor, at: Tensor, image: Tensor) -> Tensor:
        return 0.5 * (image - manifold.render(manifold.move(at, step))).square().sum(-1)

    slope = torch.func.vmap(torch.func.grad(value))
    bend = torch.func.vmap(torch.func.hessian(value))
    trust = x.new_full((len(x),), _TRUST)
    moving = torch.arange(len(x), device=x.device)
    for _ in range(_STEPS):
        at, image = t[moving], x[moving]
        zero = x.new_zeros(len(moving), manifold.dim)
        values, vectors = torch.linalg.eigh(bend(zero, at, image))
        downhill = -(vectors.mT @ slope(zero, at, image).unsqueeze(-1)).squeeze(-1)
        step = (vectors @ (downhill / values.abs().clamp_min(1e-6)).unsqueeze(-1)).squeeze(-1)
        length = torch.linalg.vector_norm(step, dim=-1)
        step = step * (trust[moving] / length.clamp_min(1e-300)).clamp_max(1).unsqueeze(-1)
        length = length.minimum(trust[moving])
        down = value(step, at, image) <= value(zero, at, image)
        t[moving] = torch.where(down.unsqueeze(-1), manifold.move(at, step), at)
        trust[moving] = torch.where(down, trust[moving], length / 4)
        moving = moving[length > _STILL]
        if not len(moving):
            break
    return t, (x - manifold.render(t)).norm(dim=-1)
