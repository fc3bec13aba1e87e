"""Entropy from draws alone, by nearest neighbours (Kozachenko & Leonenko 1987).

    H = psi(S) - psi(k) + log V_D + (D / S) sum_s log r_s,     r_s the distance from draw s to its k-th neighbour

V_D is the volume of the unit ball. Its bias vanishes with S, slowly in many dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["entropy"]


def entropy(draws: Tensor, neighbour: int = 3) -> Tensor:
    """Differential entropy of `draws: [S, B, D]`, datum by datum, `[B]`, nats.

    Raises:
        ValueError: no more draws than neighbours.
    """
    number, _, dim = draws.shape
    if not 1 <= neighbour < number:
        raise ValueError(f"the entropy takes more than {neighbour} draws and neighbour >= 1, got {number} draws")
    radii = torch.stack([_distances(one).kthvalue(neighbour + 1).values for one in draws.double().movedim(1, 0)])
    psi = torch.special.digamma(torch.tensor([float(number), float(neighbour)]))
    ball = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)
    return (float(psi[0] - psi[1]) + ball + dim * radii.log().mean(-1)).to(draws.dtype)


def _distances(points: Tensor) -> Tensor:
    """Differences first: by products of matrices, near neighbours far from the origin would round to one point."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
