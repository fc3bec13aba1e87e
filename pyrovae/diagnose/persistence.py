r"""Persistent homology of a cloud of points: a density filter, max-min landmarks, Vietoris-Rips diagrams.

The Rips complex at scale r joins every set of points whose pairwise distances are at most r. As r grows, components
(H0), loops (H1) and cavities (H2) are born at b and die at d: bars of length :math:`d - b`, over the field of p
elements. Cost grows as :math:`m^{k+2}` in the number m of points for H0..Hk, so that it is taken of m landmarks.

* *Landmarks*: the next is the point farthest from all before (max-min); they cover the cloud evenly whatever its
  density, and are drawn to outliers.
* *Density filter*, against that: keep the points whose distance to their 15th neighbour is at most its 95th percentile.

Computed by ripser (Bauer, Ripser: efficient computation of Vietoris-Rips persistence barcodes, 2021; Tralie, Saul &
Bar-On, ripser.py, 2018), an extra: ``pip install pyrovae[topology]``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyrovae.errors import DataError
from pyrovae.farthest import farthest_points

__all__ = ["Persistence", "bottleneck", "dense", "landmarks", "persistence"]

_NEIGHBOUR, _KEPT = 15, 0.95
_ROWS = 512


@dataclass(frozen=True, eq=False, repr=False)
class Persistence:
    """Diagrams of one cloud from several choices of landmarks.

    Attributes:
        diagrams: choice, then degree: births and deaths `[n, 2]`, float64, longest bar first. The one component that
            never dies is left out of H0.
        scale: `[S]`, median pairwise distance of the landmarks, in the units of the points.
        radius: `[S]`, largest distance of a point to its landmark, in those units.
        num_points: from which landmarks were chosen.
    """

    diagrams: tuple[tuple[Tensor, ...], ...]
    scale: Tensor
    radius: Tensor
    num_points: int

    def bars(self, degree: int) -> Tensor:
        """Lengths of finite bars, longest first, `[S, n]`; choices with fewer of them end in zeros."""
        lengths = [choice[degree][:, 1] - choice[degree][:, 0] for choice in self.diagrams]
        return torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)

    def __repr__(self) -> str:
        return f"Persistence({len(self.diagrams)} choices of landmarks, H0..H{len(self.diagrams[0]) - 1})"


def persistence(
    x: Tensor, *, prime: int, max_degree: int, num_landmarks: int, seeds: range, normalise: bool, bar: Any = None
) -> Persistence:
    """Diagrams of points `[N, X]`, one for each seed of the landmarks.

    Args:
        bar: a progress bar, moved on by one for each seed.

    Raises:
        DataError: fewer than `num_landmarks` different points.
        ImportError: ripser is not installed.
    """
    ripser = _extra("ripser").ripser
    diagrams, scales, radii = [], [], []
    for seed in seeds:
        chosen, radius = landmarks(x, num_landmarks, seed=seed)
        points = x[chosen].double()
        apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").cpu()
        scale = apart[tuple(torch.triu_indices(num_landmarks, num_landmarks, 1))].median()
        unit = apart / scale if normalise else apart
        found = ripser(unit.numpy(), maxdim=max_degree, coeff=prime, distance_matrix=True)["dgms"]
        diagrams.append(tuple(_sorted(torch.as_tensor(diagram, dtype=torch.float64)) for diagram in found))
        scales.append(scale)
        radii.append(radius)
        if bar is not None:
            bar.update()
    return Persistence(tuple(diagrams), torch.stack(scales), torch.tensor(radii, dtype=torch.float64), len(x))


def landmarks(x: Tensor, num: int, *, seed: int = 0) -> tuple[Tensor, float]:
    """Max-min landmarks of points `[N, X]`; the first is drawn at random.

    Returns:
        their indices `[num]`, and the largest distance of a point to the nearest of them.

    Raises:
        DataError: fewer than `num` different points.
    """
    if len(x) < num:
        raise DataError(f"{num} landmarks need as many points, got {len(x)}: give more, or lower num_landmarks")
    first = int(torch.randint(len(x), (), generator=torch.Generator().manual_seed(seed)))
    return farthest_points(x, num, first)


def dense(x: Tensor) -> Tensor:
    """Bool `[N]`: whether the 15th neighbour of a point `[N, X]` is as near as that of 95 % of them.

    Raises:
        DataError: 15 points or fewer.
    """
    if len(x) <= _NEIGHBOUR:
        raise DataError(f"the density filter needs more than {_NEIGHBOUR} points, got {len(x)}: pass more")
    # A point is its own nearest.
    exact = "donot_use_mm_for_euclid_dist"  # far from the origin, products of matrices lose near neighbours
    nearest = [
        torch.cdist(some, x, compute_mode=exact).topk(_NEIGHBOUR + 1, largest=False).values for some in x.split(_ROWS)
    ]  # fmt: skip
    reach = torch.cat(nearest)[:, -1]
    return reach <= reach.sort().values[int(_KEPT * (len(x) - 1))]  # torch.quantile takes 2^24 values at most


def bottleneck(a: Tensor, b: Tensor) -> float:
    """Bottleneck distance of two diagrams `[n, 2]`: the least, over matchings of bars with each other or with the
    diagonal, of the largest move of a birth or death."""
    return float(_extra("persim").bottleneck(a.numpy(), b.numpy()))


def _sorted(diagram: Tensor) -> Tensor:
    finite = diagram[diagram[:, 1].isfinite()]
    return finite[(finite[:, 1] - finite[:, 0]).argsort(descending=True, stable=True)]


def _extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"persistent homology needs {name}: pip install pyrovae[topology]") from error
