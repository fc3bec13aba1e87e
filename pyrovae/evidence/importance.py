"""Lower bounds of log p(x) from importance weights, one value per datum with its standard error.

From S importance weights w_s = p(x, z_s) / q(z_s | x):

    ELBO   = mean_s log w_s               (lower bound in expectation)
    IWAE_S = log (1/S) sum_s w_s          (tighter lower bound; bias about -Var(w) / (2 S p(x)^2))

Noise is seeded per datum from (seed, datum index): the order and size of chunks change nothing beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae.chunks import per_chunk
from pyrovae.evidence.estimate import LOWER, Estimate, kind_of
from pyrovae.losses.base import require_pair
from pyrovae.provenance import Provenance

__all__ = ["elbo", "iwae", "log_weights", "summarize"]

_OPTIONS = ("seed", "chunk", "indices", "progress", "resume")


def log_weights(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 1000,
    seed: int = 0,
    chunk: int | None = None,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    **kwargs: Any,
) -> Tensor:
    """log p(x, z_s) - log q(z_s | x), `[S, B]`, float64, nats.

    Args:
        num_samples: S.
        seed: with the datum's index, seeds its noise.
        chunk: data evaluated at once; bounds memory, changes nothing else.
        indices: index of each datum in its data set, when the rows given are not rows 0..B-1.
        progress: label of a progress bar.
        resume: folder that keeps finished chunks; a run that was stopped goes on from there.

    Raises:
        NoDensityError: the guide has no density.
        IncompatibleError: the guide was built for another model.
        ScaleError: a KL weight or scale is in force.
    """
    require_pair(model, guide, None)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    rows = chunk if chunk is not None else max(1, 64_000 // num_samples)
    weights = per_chunk(
        lambda *a, **k: guide.log_weights(num_samples, *a, **k), (model, guide), args, kwargs,
        plate=guide.plate, batched=guide.batched, seed=seed, chunk=rows, indices=indices, progress=progress,
        resume=resume, settings={"num_samples": num_samples},
    )  # fmt: skip
    return weights.double()


def summarize(
    weights: Tensor, provenance: Provenance | None = None, *, model: Any = None
) -> tuple[Estimate, Estimate]:
    """(ELBO, IWAE) from log-weights `[S, B]`; of a model with a tilted prior, say which: it decides on their kind.

    Standard errors per datum: sd(log w) / sqrt(S) and, by the delta method, sqrt(sum w^2 / (sum w)^2 - 1/S); nan for
    S = 1, which says nothing about its own spread.
    """
    number, kind = len(weights), kind_of(model, LOWER)
    spread = weights.std(0) if number > 1 else torch.full_like(weights[0], torch.nan)
    bound = torch.logsumexp(weights, 0) - math.log(number)
    inverse_ess = torch.exp(torch.logsumexp(2 * weights, 0) - 2 * torch.logsumexp(weights, 0))
    se = (inverse_ess - 1 / number).clamp_min(0).sqrt() if number > 1 else spread
    return (
        Estimate("ELBO", kind, weights.mean(0), spread / math.sqrt(number), number, provenance),
        Estimate(f"IWAE-{number}", kind, bound, se, number, provenance),
    )


def iwae(model: Callable[..., Any], guide: Any, *args: Any, num_samples: int = 1000, **kwargs: Any) -> Estimate:
    """Importance-weighted bound per datum (Burda, Grosse & Salakhutdinov 2016); options as in `log_weights`."""
    return _estimates(model, guide, args, kwargs, num_samples)[1]


def elbo(model: Callable[..., Any], guide: Any, *args: Any, num_samples: int = 100, **kwargs: Any) -> Estimate:
    """ELBO per datum from sampled weights; options as in `log_weights`."""
    return _estimates(model, guide, args, kwargs, num_samples)[0]


def _estimates(
    model: Callable[..., Any], guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int
) -> tuple[Estimate, Estimate]:
    weights = log_weights(model, guide, *args, num_samples=num_samples, **kwargs)
    data = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    provenance = Provenance.of_call(
        args, data, num_data=weights.shape[1], seed=kwargs.get("seed", 0), num_samples=num_samples
    )
    return summarize(weights, provenance, model=model)
