"""The step size of a short run, chosen by the KL divergence from its draws to the posterior.

    KL(q_s || p(z | x)) - log p(x) = -H(q_s) - E_{q_s}[log p(x, u)]          minimised over s, a mean over data

Two ways to what is not known, the entropy H:

    "sample"          from the draws alone, by nearest neighbours (`pyrovae.entropy`)
    "frozen-noise"    the paper's: given its noise a Langevin chain has a density (`DensityShortRun`)

Conditioning on the noise leaves entropy out, so the second prefers steps that are too small and chains that are biased:
on a posterior N(1, 1/10) from the prior N(0, 1), with K = 20 steps, it takes 0.119 where 0.201 is best, and ends at
mean 0.77 instead of 0.99.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.entropy import entropy
from pyrovae.guides.density_short_run import DensityShortRun
from pyrovae.guides.short_run import ShortRun
from pyrovae.runtime import evaluating, seeded

__all__ = ["StepSizes", "tune_step_size"]

_CANDIDATES = tuple(0.02 * 50 ** (i / 23) for i in range(24))


@dataclass(frozen=True)
class StepSizes:
    """What was tried.

    Attributes:
        criterion: "sample" or "frozen-noise".
        sizes: `[C]`, the largest step of the schedule.
        divergence: `[C]`, KL less log p(x), nats per datum; infinite where steps were not injective or ran away.
        best: the size with the smallest divergence.
        num_samples: chains per datum.
    """

    criterion: str
    sizes: Tensor
    divergence: Tensor
    best: float
    num_samples: int

    def __repr__(self) -> str:
        rows = "\n".join(
            f"  {float(size):8.4f}  {float(value):10.4f}{'  <' if float(size) == self.best else ''}"
            for size, value in zip(self.sizes, self.divergence, strict=True)
        )
        return f"step size by the {self.criterion} criterion: {self.best:.4g}\n      size  KL - log p(x)\n{rows}"


def tune_step_size(
    guide: ShortRun,
    *args: Any,
    criterion: Literal["sample", "frozen-noise"] = "sample",
    candidates: Sequence[float] = _CANDIDATES,
    num_samples: int = 400,
    seed: int = 0,
    **kwargs: Any,
) -> StepSizes:
    """Try step sizes on some data and set the guide's to the best.

    Args:
        guide: its schedule keeps its shape; the largest step becomes each candidate in turn.
        *args, **kwargs: data, as the guide is called.
        criterion: "sample" or "frozen-noise" (Langevin at temperature 1 only).
        candidates: step sizes, all positive.
        num_samples: chains per datum; all candidates share their random numbers.

    Raises:
        ValueError: no candidate gave a finite divergence.
    """
    if criterion not in ("sample", "frozen-noise"):
        raise ValueError(f"criterion must be 'sample' or 'frozen-noise', got {criterion!r}")
    if not candidates or not min(candidates) > 0:
        raise ValueError("the candidates must be positive step sizes")
    if criterion == "frozen-noise" and (guide.kernel != "langevin" or guide.temperature != 1.0):
        raise ValueError("the frozen-noise criterion is for Langevin steps at temperature 1: use criterion='sample'")
    before = guide.steps
    shape = [step / max(before) for step in before]
    found = []
    try:
        for size in candidates:
            guide.steps = [size * part for part in shape]
            with seeded(seed), torch.no_grad(), evaluating(guide.model, guide):
                found.append(_divergence(guide, criterion, num_samples, args, kwargs))
    finally:
        guide.steps = before
    values = torch.tensor(found, dtype=torch.double)
    if not torch.isfinite(values).any():
        raise ValueError("no step size gave a usable chain: try smaller candidates")
    best = float(candidates[int(values.argmin())])
    guide.steps = [best * part for part in shape]
    return StepSizes(criterion, torch.tensor(list(candidates)), values, best, num_samples)


def _divergence(guide: ShortRun, criterion: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    if criterion == "frozen-noise":
        density: Any = DensityShortRun(
            guide.model, guide.num_steps, guide.steps, guide.init, plate=guide.plate, batched=guide.batched
        )
        u, log_q, folded = density._walk(number, *args, **kwargs)
        if folded.any():
            return float("inf")
        gain = guide.space(*args, **kwargs).log_joint(u, *args, **kwargs) - log_q
        value = -gain.mean()
    else:
        u = guide.draws(number, *args, **kwargs)
        log_p = guide.space(*args, **kwargs).log_joint(u, *args, **kwargs)
        value = -(entropy(u) + log_p.mean(0)).mean() if torch.isfinite(u).all() else torch.tensor(float("inf"))
    return float(value) if torch.isfinite(value) else float("inf")
