"""KL annealing, the one way to do it.

`anneal(beta)` multiplies by beta everything in the guide and every unobserved site of the model. Scaling one side
only is silently wrong: `TraceMeanField_ELBO` looks at the guide's scale alone, `Trace_ELBO` needs both, and a packed
guide has its entropy in an auxiliary site and a factor that a scale around the named site misses. A factor of the
prior counts as unobserved where it is written as `prior_factor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

__all__ = ["ExponentialSchedule", "KLSchedule", "LinearSchedule", "anneal", "kl_weight", "prior_factor"]

_weights: list[float] = []


def kl_weight() -> float:
    """The KL weight in force: the product of the open `anneal` blocks (guides with an inner objective read it)."""
    product = 1.0
    for weight in _weights:
        product *= weight
    return product


def prior_factor(name: str, log_factor: Tensor) -> None:
    """`pyro.factor` of a prior: the KL weight multiplies it as it does the latents' own densities.

    A plain `pyro.factor` in a model counts as likelihood, which keeps its weight.
    """
    pyro.factor(name, kl_weight() * log_factor)


class anneal(poutine.messenger.Messenger):
    """Scale the KL part of an objective by `beta >= 0`.

    Used as a block around a training step:

        >>> import torch, pyro
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> from pyrovae.handlers import anneal
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0., 1.))
        ...     pyro.sample("x", dist.Normal(z, 1.), obs=torch.tensor(0.))
        >>> with anneal(0.5):
        ...     sites = poutine.trace(model).get_trace().nodes
        >>> float(sites["z"]["scale"]), float(sites["x"]["scale"])
        (0.5, 1.0)
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        if not beta >= 0:
            raise ValueError(f"the KL weight must not be negative, got {beta}")
        self.beta = float(beta)

    def __enter__(self) -> Any:
        _weights.append(self.beta)
        return super().__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any:
        _weights.pop()
        return super().__exit__(exc_type, exc_value, traceback)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] or _is_guide_factor(msg["fn"]):
            msg["scale"] = msg["scale"] * self.beta


def _is_guide_factor(fn: Any) -> bool:
    # Pyro obliges guides, and only guides, to say has_rsample in pyro.factor.
    return isinstance(fn, Unit) and "has_rsample" in vars(fn)


@dataclass(frozen=True)
class LinearSchedule:
    """KL weight rising linearly from `start` to `end` over `steps` optimiser steps, constant afterwards."""

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.start < 0 or self.end < 0:
            raise ValueError("a KL schedule needs steps >= 1 and weights >= 0")

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class ExponentialSchedule:
    """KL weight 1 - exp(-t / `time`) at optimiser step t, and 1 from where that passes 0.99 (Zhao, Song & Ermon 2017).

    So a run ends at the objective it is judged by.
    """

    time: float = 2000.0

    def __post_init__(self) -> None:
        if not self.time > 0:
            raise ValueError(f"time must be positive, got {self.time}")

    @property
    def steps(self) -> int:
        """The first step at weight 1."""
        return math.ceil(self.time * math.log(100))

    def __call__(self, step: int) -> float:
        return 1.0 if step >= self.steps else -math.expm1(-step / self.time)


KLSchedule = LinearSchedule | ExponentialSchedule
