r"""The exact law of a short run: what `ShortRun` is held against, because it has no density.

Langevin, u' = u + (s^2 / 2) g(u) + s eps, or leapfrog HMC with fresh momentum, K steps from a known start.

On a Gaussian posterior one step of either is affine, u' = F u + G eps + c, so the law stays Gaussian:

    mean' = F mean + c,   cov' = F cov F' + G G'

Elsewhere the density of Langevin's u is carried from step to step on a grid of cells of volume v:

    p'(u') = v sum_u p(u) prod_d N(u'_d; u_d + (s^2 / 2) g_d(u), s^2)

(HMC of several leapfrog steps has no density in closed form there.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.certification.problems import Problem
from pyrovae.certification.quadrature import LogDensity, gradient, grid_moments

__all__ = ["Start", "affine_law", "langevin_law", "normal_start", "prior_start"]

_REACH = 6.0  # standard deviations of start and posterior that the grid covers


class Start(NamedTuple):
    """Where chains begin: mean `[B, D]`, covariance `[B, D, D]` and log-density `[..., B, D] -> [..., B]`."""

    mean: Tensor
    covariance: Tensor
    log_density: LogDensity


def normal_start(loc: Tensor, scale: Tensor) -> Start:
    """N(loc, diag(scale^2)), both `[B, D]`."""

    def log_density(u: Tensor) -> Tensor:
        return (-0.5 * ((u - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    return Start(loc, (scale**2).diag_embed(), log_density)


def prior_start(problem: Problem) -> Start:
    """The model's prior; on problems with a Gaussian posterior it is N(0, I)."""
    if problem.gaussian:
        return normal_start(torch.zeros_like(problem.start), torch.ones_like(problem.start))
    prior = grid_moments(problem.log_prior, problem.bound, len(problem.x), problem.dim)
    return Start(prior.mean, prior.covariance, problem.log_prior)


def affine_law(
    problem: Problem, start: Start, num_steps: int, step_size: float, num_leapfrog: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean `[B, D]` and covariance `[B, D, D]` after K steps on a Gaussian posterior; 0 leapfrog steps is Langevin."""
    eye = torch.eye(problem.dim, dtype=torch.double)
    precision, s = problem.curvature(problem.start), step_size
    if num_leapfrog == 0:
        forward, noise = eye - 0.5 * s**2 * precision, s * eye.expand_as(precision)
    else:  # u and v as linear maps of (u - mode, fresh momentum)
        u, v = (torch.cat(pair, -1).expand(*precision.shape[:-1], -1) for pair in ((eye, 0 * eye), (0 * eye, eye)))
        for _ in range(num_leapfrog):
            v = v - 0.5 * s * precision @ u
            u = u + s * v
            v = v - 0.5 * s * precision @ u
        forward, noise = u.split(problem.dim, -1)
    mean, covariance = start.mean - problem.truth.mean, start.covariance
    for _ in range(num_steps):
        mean = (forward @ mean.unsqueeze(-1)).squeeze(-1)
        covariance = forward @ covariance @ forward.mT + noise @ noise.mT
    return mean + problem.truth.mean, covariance


def langevin_law(problem: Problem, start: Start, num_steps: int, step_size: float) -> tuple[Tensor, Tensor]:
    """Mean `[B, D]` and covariance `[B, D, D]` after K steps, for one or two latents.

    Raises:
        ValueError: a millionth of the mass left the grid (steps too long for the tails), or half as many points give
            another answer.
    """
    fine = _carry(problem, start, num_steps, step_size, 1.4)
    coarse = _carry(problem, start, num_steps, step_size, 1.0)
    variance = fine[1].diagonal(dim1=-2, dim2=-1).amin(-1)[:, None]  # the smallest one, `[B, 1]`
    shift = ((fine[0] - coarse[0]).abs() / variance.sqrt()).max()
    stretch = ((fine[1] - coarse[1]).flatten(1).abs() / variance).max()
    if not max(shift, stretch) < 1e-3:
        raise ValueError("the law of the short run is not resolved by its grid")
    return fine


def _carry(problem: Problem, start: Start, num_steps: int, step_size: float, cells: float) -> tuple[Tensor, Tensor]:
    """The law on a grid of `cells` points per `step_size`, datum by datum."""
    truth, sd = problem.truth, start.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    low = torch.minimum(start.mean - _REACH * sd, truth.mean - _REACH * truth.sd) - 2 * step_size
    high = torch.maximum(start.mean + _REACH * sd, truth.mean + _REACH * truth.sd) + 2 * step_size
    means, covariances = [], []
    for row in range(len(problem.x)):
        ticks = [
            torch.linspace(a, b, 2 + int((b - a) * cells / step_size), dtype=torch.double)
            for a, b in zip(low[row].tolist(), high[row].tolist(), strict=True)
        ]
        volume = math.prod(float(tick[1] - tick[0]) for tick in ticks)
        u = torch.cartesian_prod(*ticks).reshape(-1, problem.dim)
        wide = u.unsqueeze(1).expand(-1, len(problem.x), -1)
        drift = u + 0.5 * step_size**2 * gradient(problem.log_joint, wide)[:, row]
        mass = volume * start.log_density(wide)[:, row].exp()
        # [G, n_d] each: where the d-th coordinate goes from every grid point.
        kernels = [
            (-0.5 * ((tick - drift[:, d : d + 1]) / step_size) ** 2).exp() / (step_size * math.sqrt(2 * math.pi))
            for d, tick in enumerate(ticks)
        ]
        for _ in range(num_steps):
            moved = mass.unsqueeze(-1) * kernels[-1]
            mass = volume * (moved.sum(0) if problem.dim == 1 else kernels[0].T @ moved).flatten()
        lost = abs(1 - float(mass.sum()))
        if not lost < 1e-6:
            raise ValueError(
                f"Langevin steps of {step_size:.2g} are too long for the tails of the start: they carry {lost:.1g} of "
                f"the mass of datum {row} out of every grid"
            )
        means.append(mass @ u)
        centred = u - means[-1]
        covariances.append(torch.einsum("g,gd,ge->de", mass, centred, centred))
    return torch.stack(means), torch.stack(covariances)
