"""Log-likelihoods of single observations at draws of a posterior: what leave-one-out cross-validation needs.

That makes sense where observations share latents (joint mode). With latents of every datum's own, leaving a datum out
leaves its latents to their prior: importance sampling from their posterior cannot bridge that.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyrovae.errors import IncompatibleError
from pyrovae.joint import counts
from pyrovae.latents import LatentSpace
from pyrovae.runtime import evaluating, preserve_rng
from pyrovae.store import isolated

__all__ = ["log_likelihood"]


def log_likelihood(space: LatentSpace, draws: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """log p(x_i | z) of every observed site: name -> `[C, S, *batch]`, nats; an event counts as one observation.

    Args:
        space: of the model, in joint mode.
        draws: `[C, S, 1, D]`, unconstrained (`reference.draws`).
        args, kwargs: as the model is called.

    Raises:
        IncompatibleError: a model with a data plate.
    """
    if space.plate is not None:
        raise IncompatibleError(
            f"leave-one-out needs observations that share latents (plate=None); here every datum in the plate "
            f"{space.plate!r} has its own, so compare models by evidence.iwae on held-out data"
        )
    chains, number = draws.shape[:2]
    flat = draws.flatten(0, 1)
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad(), preserve_rng(), isolated(), evaluating(space.model), poutine.block():
        for u in flat:
            values = space.constrain(u)
            trace = poutine.trace(poutine.condition(space.model, values)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
            for name, site in trace.nodes.items():
                observed = counts(site) and site["is_observed"] and name not in values
                if observed and not isinstance(site["fn"], Unit):
                    found.setdefault(name, []).append(site["log_prob"])
    return {name: torch.stack(parts).unflatten(0, (chains, number)) for name, parts in found.items()}
