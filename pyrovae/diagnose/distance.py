r"""How far are a guide's draws from reference draws? Five distances, per datum.

With draws :math:`a` of the guide and :math:`b` of the reference, moments taken over draws, per datum:

* standardised mean error :math:`\max_d |m_a - m_b|_d / s_{b,d}`;
* ratio of standard deviations :math:`s_{a,d} / s_{b,d}`, below 1 where the guide is too narrow;
* correlation error :math:`\lVert R_a - R_b \rVert_F`;
* 1-Wasserstein distance of every latent, :math:`\int_0^1 |F_a^{-1}(t) - F_b^{-1}(t)|\, dt / s_{b,d}`;
* sliced Wasserstein distance, draws divided by :math:`s_b` first: over unit vectors :math:`\theta_r`,

.. math::
    \Big(\tfrac1R \sum_r W_2^2(\theta_r \cdot a,\ \theta_r \cdot b)\Big)^{1/2}, \qquad
    W_2^2(p, q) = \int_0^1 \big(F_p^{-1}(t) - F_q^{-1}(t)\big)^2 dt.

The quantile functions of draws are step functions, so the integral is a finite sum, also where the numbers of draws
differ. For two normals it is :math:`(m_p - m_q)^2 + (s_p - s_q)^2`; a shift by :math:`\delta` (in units of
:math:`s_b`) in D dimensions gives about :math:`|\delta|/\sqrt D`.

None of these is zero between two finite sets of draws from one law: compare with the same number between two halves
of the reference (the noise floor). Draws are computed in float64. Standard deviations are the unbiased ones.

Sources: Bonneel, Rabin, Peyre & Pfister, Journal of Mathematical Imaging and Vision 51 (2015), for the sliced
distance; Yao, Vehtari, Simpson & Gelman, Yes, but did it work? (2018), for what to compare.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_draws", "correlation_error", "sd_ratio", "sliced_w2", "standardized_mean_error", "w1"]


def standardized_mean_error(a: Tensor, b: Tensor) -> Tensor:
    """Largest error of a mean over the dimensions, in standard deviations of the reference.

    Args:
        a: The guide's draws ``[S, B, D]``.
        b: Reference draws ``[T, B, D]``.

    Returns:
        ``[B]``, float64.

    Raises:
        ValueError: For shapes that do not match, fewer than 2 draws, draws that are not finite, or a constant
            reference.
    """
    a, b = check_draws(a, b)
    return ((a.mean(0) - b.mean(0)).abs() / b.std(0)).amax(-1)


def sd_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Standard deviation of the guide's draws over that of the reference.

    Args:
        a: The guide's draws ``[S, B, D]``.
        b: Reference draws ``[T, B, D]``.

    Returns:
        ``[B, D]``, float64.

    Raises:
        ValueError: As :func:`standardized_mean_error`.
    """
    a, b = check_draws(a, b)
    return a.std(0) / b.std(0)


def correlation_error(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of the difference of the two correlation matrices.

    Args:
        a: The guide's draws ``[S, B, D]``.
        b: Reference draws ``[T, B, D]``.

    Returns:
        ``[B]``, float64; zero for D = 1, nan where the guide's draws are constant in a dimension (no correlation).

    Raises:
        ValueError: As :func:`standardized_mean_error`.
    """
    a, b = check_draws(a, b)
    return torch.linalg.matrix_norm(_correlation(a) - _correlation(b))


def w1(a: Tensor, b: Tensor) -> Tensor:
    """1-Wasserstein distance of every latent's marginal, in standard deviations of the reference.

    Args:
        a: The guide's draws ``[S, B, D]``.
        b: Reference draws ``[T, B, D]``; S and T may differ.

    Returns:
        ``[B, D]``, float64. For two normals of equal scale, the shift.

    Raises:
        ValueError: As :func:`standardized_mean_error`.
    """
    a, b = check_draws(a, b)
    weight, index_a, index_b = (value.to(a.device) for value in _coupling(a.shape[0], b.shape[0]))
    apart = (a.sort(dim=0).values[index_a] - b.sort(dim=0).values[index_b]).abs()
    return torch.einsum("n,nbd->bd", weight, apart) / b.std(0)


def sliced_w2(
    a: Tensor, b: Tensor, num_directions: int = 200, seed: int = 0, *, standardize: bool = True
) -> Tensor:  # fmt: skip
    """Sliced 2-Wasserstein distance, in standard deviations of the reference.

    Every datum sees the same directions, drawn from a generator of its own: the global one is left alone, and a datum's
    number does not depend on the others in the batch.

    Args:
        a: The guide's draws ``[S, B, D]``.
        b: Reference draws ``[T, B, D]``; S and T may differ.
        num_directions: Number of random unit vectors.
        seed: Seed of the directions.
        standardize: False leaves the draws in their own unit. For images, whose pixels have one unit: in standard
            deviations, a corner that is hardly ever touched would count as much as the middle, and a constant one
            raises.

    Returns:
        ``[B]``, float64.

    Raises:
        ValueError: As :func:`standardized_mean_error`, and for fewer than one direction.
    """
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions}")
    a, b = check_draws(a, b, may_be_constant=not standardize)
    scale = b.std(0) if standardize else torch.ones_like(b[0])
    directions = _directions(num_directions, a.shape[-1], seed).to(a.device)
    weight, index_a, index_b = (value.to(a.device) for value in _coupling(a.shape[0], b.shape[0]))
    distances = []
    # One datum at a time: memory stays at R (S + T), and rounding cannot depend on the batch.
    for datum in range(a.shape[1]):
        line_a = (directions @ (a[:, datum] / scale[datum]).T).sort(dim=1).values
        line_b = (directions @ (b[:, datum] / scale[datum]).T).sort(dim=1).values
        squared = ((line_a[:, index_a] - line_b[:, index_b]).square() * weight).sum(1)
        distances.append(squared.mean().sqrt())
    return torch.stack(distances)


def check_draws(a: Tensor, b: Tensor, *, may_be_constant: bool = False) -> tuple[Tensor, Tensor]:
    """Both sets of draws in float64, or a clear error."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[1:] != b.shape[1:] or 0 in a.shape[1:]:
        raise ValueError(
            f"draws must be [S, B, D] and [T, B, D] with equal B and D, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    for name, draws in (("a", a), ("b", b)):
        if draws.shape[0] < 2:
            raise ValueError(f"{name} has {draws.shape[0]} draws: give at least 2")
        bad = ~draws.isfinite().all(2).all(0)
        if bad.any():
            raise ValueError(f"{name} has NaN or infinite draws at datum {int(bad.nonzero()[0])}: remove that datum")
    a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
    flat = b.amin(0) == b.amax(0)
    if flat.any() and not may_be_constant:
        datum, dim = flat.nonzero()[0].tolist()
        raise ValueError(
            f"the reference b is constant at datum {datum}, dimension {dim}: it has no standard deviation to measure in"
        )
    return a, b


def _correlation(x: Tensor) -> Tensor:
    """``[S, B, D]`` to ``[B, D, D]``."""
    constant = x.amin(0) == x.amax(0)
    centred = x - x.mean(0)
    # Scaling before the product keeps the diagonal at one to rounding, and tiny or huge units harmless.
    unit = centred / torch.where(constant, math.nan, torch.linalg.vector_norm(centred, dim=0))
    return torch.einsum("sbd,sbe->bde", unit, unit)


def _directions(count: int, dim: int, seed: int) -> Tensor:
    """Unit vectors ``[count, dim]``, uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)


def _coupling(s: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of s and t equally weighted points.

    Returns:
        Lengths of the steps of the common grid (summing to 1), and on each step the ranks of the two points.
    """
    common = math.lcm(s, t)
    # Step ends i/s and j/t in units of 1/common: integers, so that equal ends are equal.
    ends = torch.cat([torch.arange(1, s + 1) * (common // s), torch.arange(1, t + 1) * (common // t)]).unique()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    weight = (ends - starts).to(torch.float64) / common
    return weight, starts // (common // s), starts // (common // t)
