"""How a guide trains an encoder that its posterior has no gradient path to.

Where a posterior is found by a search without a graph, the encoder behind the search learns from a term that is zero
in value and has the gradient it is meant to have,

    t(y) = <y, g> - sg(<y, g>),    dt/dphi = (dy/dphi)' g,       y: [B, P] the encoder's output, g: [B, P] constant

It is added to the objective: in the Pyro program as a factor inside the data plate, elsewhere in log q.
"""

from __future__ import annotations

from typing import Any

import pyro
from pyro.distributions import Unit
from torch import Tensor

from pyrovae import handlers
from pyrovae.errors import ScaleError
from pyrovae.latents import LatentSpace

__all__ = ["emit_term", "pull", "share"]


def pull(output: Tensor, direction: Tensor) -> Tensor:
    """A term `[B]` of value zero whose gradient with respect to `output` is `direction`."""
    inner = (output * direction.detach()).sum(-1)
    return inner - inner.detach()


class _GradientOnly(Unit):
    """A factor of a guide that `handlers.anneal` leaves alone: what it adds is no part of the KL."""

    has_rsample = True


def emit_term(space: LatentSpace, term: Tensor | None) -> None:
    """Write the term `[B]` into the guide's program, inside the data plate."""
    if term is None:
        return
    # A guide's factor is subtracted from the ELBO.
    fn: Any = _GradientOnly(-term if space.plate is not None else -term.sum())
    pyro.sample("_encoder", fn, obs=fn.sample(), infer={"is_auxiliary": True})


def share(term: Tensor | None) -> Tensor | float:
    """The term as it is subtracted from log q, which losses multiply by the KL weight."""
    if term is None:
        return 0.0
    beta = handlers.kl_weight()
    if beta == 0:
        raise ScaleError(
            "at a KL weight of 0 this loss has no place for the gradient of a detached encoder: start the schedule "
            "above 0, or use losses.ELBO() or one of Pyro's losses"
        )
    return term / beta
