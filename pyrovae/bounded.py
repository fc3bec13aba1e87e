"""Log-ratios log s - log Q that a new component s of a mixture may gain by lying where Q does not, kept in bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["logarithmic"]


def logarithmic(ratio: Tensor, bound: float) -> Tensor:
    """`bound * log(1 + ratio / bound)` where the ratio is positive, else the ratio; the ratio itself without a bound.

    A ratio between Gaussians grows like a square and outruns many a log-joint; this grows like a logarithm and outruns
    none, and yet exerts some force at every distance.
    """
    if math.isinf(bound):
        return ratio
    return torch.where(ratio > 0, bound * torch.log1p(ratio.clamp_min(0) / bound), ratio)
