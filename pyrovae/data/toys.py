r"""Points of the plane around a curve, or around ten centres: data on which everything can be computed and seen.

    circle     (cos t, sin t) + e,      t uniform
    wave       (t, cos 1.4 t) + e,      t ~ N(0, 2^2)
    mixture    c_k + s_k * n,           k uniform over ten centres, n ~ N(0, I)

with e ~ N(0, noise^2 I). Centres c_k are uniform in [-2, 2]^2 and scales s_k (one per coordinate) in [noise, 3 noise];
both are the same whatever the seed of the points.

The sets of Balestriero, Paris & Baraniuk (2020), as far as they are described.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["TOYS", "Toy", "toy"]

Toy = Literal["circle", "wave", "mixture"]
TOYS: tuple[Toy, ...] = get_args(Toy)

_CENTRES, _SPREAD, _LENGTH = 10, 2.0, 2.0


def toy(name: Toy | str, num: int, *, noise: float = 0.1, seed: int = 0) -> Tensor:
    """Independent points of one set, `[num, 2]`, float64.

    >>> points = toy("circle", 1000, noise=0.1)
    >>> points.shape, bool((points.norm(dim=1) - 1).abs().max() < 0.5)
    (torch.Size([1000, 2]), True)

    Args:
        name: "circle", "wave" or "mixture".
        num: number of points.
        noise: as above.
        seed: of the points; the caller's random state is left alone.

    Raises:
        ValueError: an unknown name, less than one point, or a noise that is not positive.
    """
    if name not in TOYS:
        raise ValueError(f"unknown toy data {name!r}: choose one of {', '.join(TOYS)}")
    if num < 1 or not noise > 0:
        raise ValueError(f"toy data need num >= 1 and a positive noise, got num={num} and noise={noise}")
    generator = torch.Generator().manual_seed(seed)
    away = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    if name == "circle":
        t = 2 * math.pi * torch.rand(num, generator=generator, dtype=torch.float64)
        return torch.stack([t.cos(), t.sin()], -1) + noise * away
    if name == "wave":
        t = _LENGTH * torch.randn(num, generator=generator, dtype=torch.float64)
        return torch.stack([t, (1.4 * t).cos()], -1) + noise * away
    fixed = torch.Generator().manual_seed(0)
    centres, scales = torch.rand(2, _CENTRES, 2, generator=fixed, dtype=torch.float64)
    k = torch.randint(_CENTRES, (num,), generator=generator)
    return _SPREAD * (2 * centres[k] - 1) + noise * (1 + 2 * scales[k]) * away
