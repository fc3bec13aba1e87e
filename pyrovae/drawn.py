"""A guide's draws with what the model and the guide say of each: what ArviZ calls sample statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.chunks import per_chunk
from pyrovae.errors import NoDensityError
from pyrovae.psis import pareto_khat

__all__ = ["Drawn", "drawn"]


@dataclass(frozen=True)
class Drawn:
    """Draws `u [S, B, D]`, unconstrained; log-joint `lp` and `log_q` there `[S, B]`, nats; `khat [B]` of lp - log_q."""

    u: Tensor
    lp: Tensor
    log_q: Tensor
    khat: Tensor


def drawn(guide: Any, *args: Any, num_samples: int = 1000, seed: int = 0, chunk: int = 256, **kwargs: Any) -> Drawn:
    """Draw from a guide with a density.

    Args:
        guide: and the arguments it is called with.
        num_samples: S, at least 5 (k-hat is a fit to the largest weights).
        seed, chunk: as in `evidence.log_weights`.

    Raises:
        NoDensityError: the guide has draws but no density: export `guide.draws` alone.
    """
    if not hasattr(guide, "_sampler"):
        raise NoDensityError(f"{guide!r} has no density, so its draws have no log_q: export guide.draws(...) alone")

    def measure(*some: Any, **named: Any) -> Tensor:
        with guide._aside():
            log_joint = guide.space(*some, **named).bind(*some, **named)
            u, log_q = guide._sampler(*some, **named).draw(num_samples)
            return torch.cat([u, log_joint(u).unsqueeze(-1), log_q.unsqueeze(-1)], dim=-1)

    found = per_chunk(
        measure, (guide.model, guide), args, kwargs, plate=guide.plate, batched=guide.batched, seed=seed, chunk=chunk
    )
    lp, log_q = found[..., -2], found[..., -1]
    return Drawn(found[..., :-2].contiguous(), lp, log_q, pareto_khat((lp - log_q).double()))
