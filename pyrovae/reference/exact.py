"""Exact posteriors: closed forms where a model gives one, grid quadrature for one or two latents per datum.

    log p(x) = log sum_g exp(log p(x, u_g)) + log(cell volume),   weights of the posterior on the grid likewise

The grid is found per datum: see `pyrovae.reference.grid`.
"""

from __future__ import annotations

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
from pyrovae.reference.grid import POINTS, enclose
from pyrovae.reference.posterior import Reference
from pyrovae.runtime import evaluating, seeded

__all__ = ["exact"]


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
        elif space.dim in POINTS:
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
    grid = enclose(
        log_joint, log_joint.rows.size, space.dim, drop=drop, dtype=space.dtype, device=space.device
    )  # fmt: skip
    u, weights = grid.u, (grid.values - torch.logsumexp(grid.values, 0)).exp()
    mean = (weights.unsqueeze(-1) * u).sum(0)
    sd = (weights.unsqueeze(-1) * (u - mean) ** 2).sum(0).sqrt()
    index = torch.multinomial(weights.T, num_samples, replacement=True).T  # [S, B]
    draws = u.gather(0, index.unsqueeze(-1).expand(-1, -1, space.dim))
    draws = draws + (torch.rand_like(draws) - 0.5) * grid.cell
    return draws.to(space.dtype).to(space.device), grid.log_integral(), mean, sd
