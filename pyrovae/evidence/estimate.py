"""An estimate of log p(x) per datum, what kind of statement it is, and paired differences of two."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pyrovae.provenance import Provenance, require_comparable

__all__ = ["EXACT", "LOWER", "NO_BOUND", "UPPER", "Estimate", "difference"]

LOWER, UPPER, EXACT, NO_BOUND = "lower bound", "upper bound", "exact", "estimate"


@dataclass(frozen=True)
class Estimate:
    """An estimate per datum.

    Attributes:
        name: "ELBO", "IWAE-1000", ...
        kind: "lower bound", "upper bound", "exact" or "estimate" (of neither side).
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
