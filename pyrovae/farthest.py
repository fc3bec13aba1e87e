"""Farthest-point (max-min) choice of data: each is as far as can be from all before it.

The points chosen so far are no nearer to one another than the farthest datum is to them, so they cover a cloud evenly
whatever its density, and are drawn to outliers (Gonzalez 1985).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.errors import DataError

__all__ = ["farthest_points"]


def farthest_points(x: Tensor, number: int, first: int = 0) -> tuple[Tensor, float]:
    """Points of `[N, *event]`, by Euclidean distance.

    Args:
        number: how many.
        first: index of the first.

    Returns:
        their indices `[number]`, and the largest distance of a datum to the nearest of them.

    Raises:
        DataError: fewer than `number` different points.
    """
    if not 1 <= number <= len(x):
        raise DataError(f"{number} farthest points need as many points, got {len(x)}: give more, or ask for fewer")
    flat = x.flatten(1)
    chosen, squared = [first], (flat - flat[first]).square().sum(1)
    while len(chosen) < number:
        farthest = int(squared.argmax())
        if not squared[farthest] > 0:
            raise DataError(
                f"{number} farthest points need as many different points, got {len(chosen)}: give more, or ask for "
                "fewer"
            )
        chosen.append(farthest)
        squared = torch.minimum(squared, (flat - flat[farthest]).square().sum(1))
    return torch.tensor(chosen, device=x.device), float(squared.max().sqrt())
