"""Bounds of log p(x), one value per datum with its standard error.

From S importance weights w_s = p(x, z_s) / q(z_s | x):

    ELBO   = mean_s log w_s               (lower bound in expectation)
    IWAE_S = log (1/S) sum_s w_s          (tighter lower bound; bias about -Var(w) / (2 S p(x)^2))

Noise is seeded per datum from (seed, datum index): the order and size of chunks change nothing beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae import noise, store
from pyrovae.batching import Batched, RowArguments
from pyrovae.losses.base import require_pair
from pyrovae.plates import read_plate
from pyrovae.provenance import Provenance, require_comparable
from pyrovae.runtime import evaluating, preserve_rng

__all__ = ["Estimate", "difference", "elbo", "iwae", "log_weights", "per_chunk", "summarize"]


@dataclass(frozen=True)
class Estimate:
    """An estimate per datum.

    Attributes:
        name: "ELBO", "IWAE-1000", ...
        kind: "lower bound", "upper bound" or "exact".
        values: `[B]`, nats.
        se: `[B]`, Monte Carlo standard error of each value.
        num_samples: draws per datum.
        provenance: of the numbers, where it is known.
    """

    name: str
    kind: str
    values: Tensor
    se: Tensor
    num_samples: int
    provenance: Provenance | None = None

    @property
    def mean(self) -> float:
        """Mean over data, nats per datum."""
        return float(self.values.mean())

    @property
    def mean_se(self) -> float:
        """Standard error of the mean, for data drawn from a population (sampling noise included)."""
        if len(self.values) == 1:
            return float(self.se[0])
        return float(self.values.std() / math.sqrt(len(self.values)))

    def __repr__(self) -> str:
        mean = f"{self.mean:.3f} +- {self.mean_se:.3f} nats per datum"
        return f"{self.name} ({self.kind}): {mean} over {len(self.values)} data"

    def _repr_html_(self) -> str:
        return f"<b>{self.name}</b> ({self.kind}): {self.mean:.3f} &plusmn; {self.mean_se:.3f} nats per datum"


def per_chunk(
    function: Callable[..., Tensor],
    programs: tuple[Callable[..., Any], ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    plate: str | None,
    batched: Batched = "auto",
    seed: int = 0,
    chunk: int = 64,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
) -> Tensor:
    """Evaluate `function(*rows, **rows) -> [S, b, ...]` on chunks of rows and join the results along dim 1.

    Runs without gradient, in evaluation mode, in an isolated parameter store, with per-datum noise; weights,
    buffers and the caller's random state stay as they were.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with torch.no_grad(), preserve_rng(), evaluating(*programs), store.isolated():
        if plate is None:
            with noise.per_datum(seed, [0]):
                return function(*args, **kwargs)
        size = read_plate(programs[0], plate, args, kwargs).size
        rows = RowArguments(args, kwargs, size, batched)
        indices = range(size) if indices is None else indices
        if len(indices) != size:
            raise ValueError(f"indices must name each of the {size} data, got {len(indices)}")
        if not _splits(programs[0], plate, rows, size, chunk):
            chunk = size
        starts: Any = range(0, size, chunk)
        if progress is not None:
            from tqdm.auto import tqdm

            starts = tqdm(starts, desc=progress, disable=None, leave=False)
        parts = []
        for start in starts:
            stop = min(start + chunk, size)
            some_args, some_kwargs = rows.rows(slice(start, stop)) if chunk < size else (args, kwargs)
            with noise.per_datum(seed, indices[start:stop]):
                parts.append(function(*some_args, **some_kwargs))
        return torch.cat(parts, dim=1)


def _splits(program: Callable[..., Any], plate: str, rows: RowArguments, size: int, chunk: int) -> bool:
    """Whether the program runs on some of the rows (a plate of fixed size does not)."""
    if chunk >= size or not rows.names():
        return False
    some_args, some_kwargs = rows.rows(slice(0, chunk))
    return read_plate(program, plate, some_args, some_kwargs).size == chunk


def log_weights(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 1000,
    seed: int = 0,
    chunk: int | None = None,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """log p(x, z_s) - log q(z_s | x), `[S, B]`, float64, nats.

    Args:
        num_samples: S.
        seed: with the datum's index, seeds its noise.
        chunk: data evaluated at once; bounds memory, changes nothing else.
        indices: index of each datum in its data set, when the rows given are not rows 0..B-1.
        progress: label of a progress bar.

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
    )  # fmt: skip
    return weights.double()


def summarize(weights: Tensor, provenance: Provenance | None = None) -> tuple[Estimate, Estimate]:
    """(ELBO, IWAE) from log-weights `[S, B]`.

    Standard errors per datum: sd(log w) / sqrt(S) and, by the delta method, sqrt(sum w^2 / (sum w)^2 - 1/S); nan for
    S = 1, which says nothing about its own spread.
    """
    number = len(weights)
    spread = weights.std(0) if number > 1 else torch.full_like(weights[0], torch.nan)
    bound = torch.logsumexp(weights, 0) - math.log(number)
    inverse_ess = torch.exp(torch.logsumexp(2 * weights, 0) - 2 * torch.logsumexp(weights, 0))
    se = (inverse_ess - 1 / number).clamp_min(0).sqrt() if number > 1 else spread
    return (
        Estimate("ELBO", "lower bound", weights.mean(0), spread / math.sqrt(number), number, provenance),
        Estimate(f"IWAE-{number}", "lower bound", bound, se, number, provenance),
    )


def difference(first: Estimate, second: Estimate) -> tuple[float, float]:
    """(mean, standard error) of the paired difference `first - second` over the same data, nats per datum.

    Pairing takes the spread between data out: the error is far smaller than that of either mean.
    """
    if first.values.shape != second.values.shape:
        raise ValueError(f"paired differences need the same data: {len(first.values)} against {len(second.values)}")
    if first.provenance is not None and second.provenance is not None:
        require_comparable(first.provenance, second.provenance)
    gain = first.values - second.values
    if len(gain) == 1:
        return float(gain[0]), math.hypot(float(first.se[0]), float(second.se[0]))
    return float(gain.mean()), float(gain.std() / math.sqrt(len(gain)))


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
    data = {name: value for name, value in kwargs.items() if name not in ("seed", "chunk", "indices", "progress")}
    provenance = Provenance.of_call(
        args, data, num_data=weights.shape[1], seed=kwargs.get("seed", 0), num_samples=num_samples
    )
    return summarize(weights, provenance)
