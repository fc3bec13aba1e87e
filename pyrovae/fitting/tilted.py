"""log Z of a trained prior that an energy tilts: measured once, kept with the weights."""

from __future__ import annotations

import math

from pyrovae import evidence
from pyrovae.fitting.outcome import Outcome
from pyrovae.table import Number

__all__ = ["measure"]

_TEMPERATURES = 500  # and half as many: the difference tells whether they were enough
_LARGEST_SE = 0.5  # nats; towards 1, a single chain of annealing has all of the weight
_ERRORS = 4.0  # standard errors


def measure(outcome: Outcome) -> None:
    """Normalise the model, where annealing finds log Z; else it stays unnormalised, and its log Z says why."""
    model, seed = outcome.model, outcome.settings.seed
    half, whole = (
        evidence.log_normaliser(model, num_temperatures=number, seed=seed)
        for number in (_TEMPERATURES // 2, _TEMPERATURES)
    )
    se = float(whole.se[0])
    if not (math.isfinite(whole.mean) and se < _LARGEST_SE):
        outcome.log_z = f"unknown: annealing did not find it (standard error {se:.2g} nats in {whole.mean:.5g})"
        outcome.told.append(
            "log Z of the prior could not be measured, so numbers of log p(x) are off by one unknown number, the same "
            "for all data: the energy may have run away; try fewer --epochs, or a smaller --learning-rate."
        )
        return
    model.normalise(whole.mean)
    outcome.log_z = Number(whole.mean, se)
    rise = whole.mean - half.mean
    if rise > _ERRORS * math.hypot(se, float(half.se[0])):
        outcome.told.append(
            f"The measured log Z is a lower bound and still rose by {rise:.2g} nats when annealing took twice as many "
            "temperatures: numbers of log p(x) are high by what it lacks."
        )
