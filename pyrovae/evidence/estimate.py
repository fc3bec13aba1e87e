"""An estimate of log p(x) per datum, what kind of statement it is, and paired differences of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyrovae.provenance import Provenance, require_comparable
from pyrovae.runtime import modules_of

__all__ = ["EXACT", "LOWER", "NO_BOUND", "UNNORMALISED", "UPPER", "Estimate", "difference", "kind_of"]

LOWER, UPPER, EXACT, NO_BOUND = "lower bound", "upper bound", "exact", "estimate"
UNNORMALISED = "unnormalised"


@dataclass(frozen=True)
class Estimate:
    """An estimate per datum.

    Attributes:
        name: "ELBO", "IWAE-1000", ...
        kind: "lower bound", "upper bound", "exact", "estimate" (of neither side) or "unnormalised" (off by the log Z of
            the model's prior, the same for all data: see `evidence.log_normaliser`).
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


def kind_of(model: Any, kind: str) -> str:
    """What a statement of this kind about a program's log-joint is about log p(x).

    Where the prior is tilted (`models.tilted`), the program's density lacks log Z: "unnormalised". Once it has been
    measured a bound is none any more, because the log Z taken off is itself one from below.
    """
    modules = [module for root in modules_of(model) for module in root.modules()]
    tilted: list[Any] = [m for m in modules if getattr(getattr(m, "traits", None), "tilted", False)]
    if not tilted:
        return kind
    return NO_BOUND if all(m.normalised for m in tilted if hasattr(m, "normalised")) else UNNORMALISED


def difference(first: Estimate, second: Estimate) -> tuple[float, float]:
    """(mean, standard error) of the paired difference `first - second` over the same data, nats per datum.

    Pairing takes the spread between data out: the error is far smaller than that of either mean. Two unnormalised
    estimates must be of one model.

    Raises:
        ValueError: other data, or one of them is unnormalised.
    """
    if (first.kind == UNNORMALISED) != (second.kind == UNNORMALISED):
        raise ValueError(
            "an unnormalised estimate is off by an unknown log Z: measure it first (evidence.log_normaliser and "
            "model.normalise)"
        )
    if first.values.shape != second.values.shape:
        raise ValueError(f"paired differences need the same data: {len(first.values)} against {len(second.values)}")
    if first.provenance is not None and second.provenance is not None:
        require_comparable(first.provenance, second.provenance)
    gain = first.values - second.values
    if len(gain) == 1:
        return float(gain[0]), math.hypot(float(first.se[0]), float(second.se[0]))
    return float(gain.mean()), float(gain.std() / math.sqrt(len(gain)))
