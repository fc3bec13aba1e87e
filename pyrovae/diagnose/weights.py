"""Per-datum diagnostics of a guide's importance weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyrovae.psis import pareto_khat

__all__ = ["khat"]


def khat(model: Callable[..., Any], guide: Any, *args: Any, num_samples: int = 1000, **kwargs: Any) -> Tensor:
    """Pareto k-hat of every datum's importance weights, `[B]` (Yao, Vehtari, Simpson & Gelman 2018).

    Below 0.5 good, 0.5 to 0.7 usable with reweighting, above 0.7 unreliable. It judges the region the guide covers:
    a missed mode leaves no trace in it (a single Gaussian on one of two equal, distant modes reads below 0.7).

    Options as in `evidence.log_weights`.
    """
    from pyrovae.evidence import log_weights

    return pareto_khat(log_weights(model, guide, *args, num_samples=num_samples, **kwargs))
