"""Exact posteriors: closed forms where a model gives one, grid quadrature for one or two latents per datum.

    log p(x) = log sum_g exp(log p(x, u_g)) + log(cell volume),   weights of the posterior on the grid likewise

The grid is found per datum: widened until the log-joint at its rim has fallen by `drop` nats, then shrunk to the
region above that and refined. Errors of the rule are far below Monte Carlo noise for smooth integrands (the
trapezoid rule converges exponentially when the integrand vanishes at both ends).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae import store
from pyrovae.batching import Batched
from pyrovae.identity import program_identity
from pyrovae.latents import LatentSpace
from pyrovae.provenance import Provenance
from pyrovae.reference.posterior import Reference
from pyrovae.runtime import evaluating, seeded

__all__ = ["exact"]

_POINTS = {1: 4001, 2: 301}


def exact(
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    drop: float = 40.0,
    plate: str | None = "data",
    batched: Batched = "auto",
    seed: int = 0,
    **kwargs: Any,
) -> Reference:
    """The exact posterior of every datum.

    Uses `model.posterior(*args)` and `model.log_evidence(*args)` where the model defines them, else quadrature.

    Args:
        num_samples: independent draws to make, as one chain.
        drop: nats below the mode beyond which mass is neglected (exp(-40) of the peak).

    Raises:
        ValueError: neither a closed form nor at most two latents per datum.
    """
    began = time.perf_counter()
    with evaluating(model), store.isolated(), seeded(seed), torch.no_grad():
        space = LatentSpace(model, *args, plate=plate, batched=batched, **kwargs)
        space.require_unit_scale(*args, **kwargs)
        if hasattr(model, "posterior") and hasattr(model, "log_evidence"):
            q = model.posterior(*args, **kwargs)
            draws, evidence = q.sample((num_samples,)), model.log_evidence(*args, **kwargs)
            mean, sd = q.mean, q.variance.sqrt()
        elif space.dim in _POINTS:
            draws, evidence, mean, sd = _quadrature(space, num_samples, drop, args, kwargs)
        else:
            raise ValueError(
                f"no exact posterior: quadrature needs at most 2 latents per datum, this model has {space.dim}, and it "
                "defines no posterior(x) and log_evidence(x); use reference.nuts"
            )
    rows = draws.shape[1]
    return Reference(
        kind="exact", space=space, draws=draws.unsqueeze(0), rhat=torch.ones(rows),
        ess=torch.full((rows,), float(num_samples)), divergences=0, status=("ok",) * rows,
        mean=mean, sd=sd, log_evidence=evidence,
        provenance=Provenance.of_call(args, kwargs, num_data=rows, seed=seed, num_samples=num_samples),
        program=program_identity(model), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _quadrature(
    space: LatentSpace, num_samples: int, drop: float, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_joint = space.bind(*args, **kwargs)
    rows, dim, points = log_joint.rows.size, space.dim, _POINTS[space.dim]
    low = torch.full((rows, dim), -10.0, dtype=torch.double)
    high = -low
    for _ in range(40):
        u, values = _on_grid(log_joint, low, high, points, space)
        inside = values > values.amax(0) - drop
        coords = torch.where(inside.unsqueeze(-1), u, torch.nan)
        least = coords.nan_to_num(nan=torch.inf).amin(0)
        most = coords.nan_to_num(nan=-torch.inf).amax(0)
        cell = (high - low) / (points - 1)
        touch_low, touch_high = least <= low + 0.5 * cell, most >= high - 0.5 * cell
        width = high - low
        # Twice the width: far mass is reached in a few doublings, the shrinking that follows costs little.
        new_low = torch.where(touch_low, low - 2 * width, least - cell)
        new_high = torch.where(touch_high, high + 2 * width, most + cell)
        done = ~touch_low & ~touch_high & ((new_high - new_low) > 0.8 * width)
        if done.all():
            break
        low, high = torch.where(done, low, new_low), torch.where(done, high, new_high)
    else:
        raise ValueError("the posterior's mass could not be enclosed by a grid: it may be improper; use reference.nuts")
    cell = (high - low) / (points - 1)
    total = torch.logsumexp(values, 0)
    _require_resolved(values, total, points, dim)
    evidence = total + cell.log().sum(-1)
    weights = (values - total).exp()
    mean = (weights.unsqueeze(-1) * u).sum(0)
    sd = (weights.unsqueeze(-1) * (u - mean) ** 2).sum(0).sqrt()
    index = torch.multinomial(weights.T, num_samples, replacement=True).T  # [S, B]
    draws = u.gather(0, index.unsqueeze(-1).expand(-1, -1, dim))
    draws = draws + (torch.rand_like(draws) - 0.5) * cell
    return draws.to(space.dtype).to(space.device), evidence, mean, sd


def _require_resolved(values: Tensor, total: Tensor, points: int, dim: int) -> None:
    """Raise when every second grid point gives another evidence: the mass is narrower than the grid.

    The rule's error falls as exp(-c / cell^2), so half the points in agreement within 0.01 nats leave an error of about
    the fourth power of that.
    """
    coarse = values.reshape(*[points] * dim, -1)[(slice(None, None, 2),) * dim].reshape(-1, values.shape[1])
    change = (torch.logsumexp(coarse, 0) + dim * math.log(2.0) - total).abs().max()
    if not change < 0.01:
        raise ValueError(
            f"the grid cannot resolve the posterior (half of its points change log p(x) by {float(change):.2g} nats), "
            "as with two nearly collinear latents: use reference.nuts"
        )


def _on_grid(
    log_joint: Any, low: Tensor, high: Tensor, points: int, space: LatentSpace
) -> tuple[Tensor, Tensor]:
    """Grid points `[G, B, D]` and the log-joint there `[G, B]`."""
    rows, dim = low.shape
    ticks = torch.linspace(0, 1, points, dtype=torch.double)
    unit = torch.cartesian_prod(*[ticks] * dim).reshape(-1, dim)
    u = low + unit.unsqueeze(1) * (high - low)
    block = max(1, math.ceil(200_000 / rows))
    parts = [log_joint(part.to(space.dtype).to(space.device)).double().cpu() for part in u.split(block)]
    return u, torch.cat(parts).nan_to_num(nan=-torch.inf)
