"""Which site made a training step's loss or gradient non-finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.runtime import preserve_rng

__all__ = ["diagnose_nan"]


def diagnose_nan(model: Any, guide: Any, rows: tuple[Tensor, ...], loss: float, gradients: list[str]) -> str:
    """A phrase that names the first site, in program order, with a non-finite value, parameter or log-density.

    Args:
        gradients: names of the parameters whose gradient is not finite.
    """
    with preserve_rng(), torch.no_grad(), poutine.block():
        try:
            guide_trace = poutine.trace(guide).get_trace(*rows)
            found = _first_bad(guide_trace, "guide")
            if found is None:
                replayed = poutine.replay(model, trace=guide_trace)
                found = _first_bad(poutine.trace(replayed).get_trace(*rows), "model")
        except (ValueError, RuntimeError) as error:  # validation stops at the same fault: its words name the site
            found = f"the programs raise {str(error).splitlines()[0]!r}"
    what = "the loss is not finite" if not math.isfinite(loss) else f"the gradient of {gradients[0]!r} is not finite"
    return f"{what} ({found or 'every site is finite when run again: a rare draw'})"


def _first_bad(trace: Any, owner: str) -> str | None:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        for parameter in getattr(site["fn"], "arg_constraints", {}):
            value = getattr(site["fn"], parameter, None)
            if isinstance(value, Tensor) and not torch.isfinite(value).all():
                return f"site {name!r} of the {owner}: its {parameter} is not finite"
        if isinstance(site["value"], Tensor) and not torch.isfinite(site["value"]).all():
            return f"site {name!r} of the {owner}: its value is not finite"
        if not torch.isfinite(site["fn"].log_prob(site["value"])).all():
            return f"site {name!r} of the {owner}: its log-density is not finite"
    return None
