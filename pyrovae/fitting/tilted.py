"""log Z of a trained prior that an energy tilts: measured once, kept with the weights."""

from __future__ import annotations

from pyrovae import evidence
from pyrovae.errors import NormaliserError
from pyrovae.fitting.outcome import Outcome
from pyrovae.table import Number

__all__ = ["measure"]

_TEMPERATURES = 500
_ERRORS = 4.0  # standard errors


def measure(outcome: Outcome) -> None:
    """Normalise the model, where annealing finds log Z; else it stays unnormalised, and its log Z says why."""
    try:
        found = evidence.normalise(outcome.model, num_temperatures=_TEMPERATURES, seed=outcome.settings.seed)
    except NormaliserError as error:
        outcome.log_z = f"unknown: {error}"
        outcome.told.append(
            "log Z of the prior could not be measured, so numbers of log p(x) are off by one unknown number, the same "
            "for all data: the energy may have run away; try a tenth of the --energy-rate "
            f"({outcome.settings.energy_rate:g} here), or fewer --epochs."
        )
        return
    outcome.log_z = Number(found.log_z.mean, float(found.log_z.se[0]))
    if found.rise > _ERRORS * found.rise_se:
        outcome.told.append(
            f"The measured log Z is a lower bound and still rose by {found.rise:.2g} nats when annealing took twice as "
            "many temperatures: numbers of log p(x) are high by what it lacks."
        )
