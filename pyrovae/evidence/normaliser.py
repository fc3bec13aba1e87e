r"""log Z of a tilted prior (`models.tilted`), by annealing from its base.

.. math::
    Z = E_{e \sim N(0, I)} \exp f(T(e))

is the evidence of a program whose latents are e and whose "likelihood" is the tilt. Annealed importance sampling takes
it from the base to the tilted prior: log of the mean weight, a lower bound of log Z in expectation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.errors import IncompatibleError, NormaliserError
from pyrovae.evidence.annealing import Schedule, ais
from pyrovae.evidence.estimate import LOWER, Estimate

__all__ = ["Normalised", "log_normaliser", "normalise"]

_LARGEST = 0.5  # nats of standard error (near 1, one chain has all of the weight), and of a rise beyond its own error
_ERRORS = 4.0  # standard errors


class Normalised(NamedTuple):
    """log Z, and by how much it rose when annealing took twice as many temperatures, with the rise's standard error."""

    log_z: Estimate
    rise: float
    rise_se: float


def log_normaliser(
    model: Any,
    *,
    num_chains: int = 256,
    num_temperatures: int = 1000,
    num_leapfrog: int = 3,
    schedule: Schedule = "sigmoid",
    seed: int = 0,
) -> Estimate:
    """A lower bound of log Z with its standard error, one value; the model stays as it is.

    `model.normalise(found.mean)` takes it off the tilt: results of the model are then "estimates" of log p(x), high by
    as much as this bound is low. Twice as many temperatures tell how much: the bound must not move. The error is common
    to all data. Fit for a few hundred latents; for one or two take a grid.

    Args:
        model: one that `models.tilted` is mixed into.
        Others as in `evidence.ais`.

    Example:
        >>> import torch
        >>> from pyrovae.models.energy_prior_vae import EnergyPriorVAE
        >>> from pyrovae.nets import MLP
        >>> model = EnergyPriorVAE(torch.nn.Linear(2, 5), 2, MLP([2, 16, 1]))
        >>> model.normalise(log_normaliser(model, num_temperatures=20).mean)
        >>> model.normalised
        True
    """
    if not hasattr(model, "unwhiten"):
        raise IncompatibleError(
            f"log Z is that of a tilted prior, which {type(model).__name__} does not have: its density is normalised"
        )
    origin: Tensor = model.origin

    def prior(rows: Tensor) -> None:
        with pyro.plate("data", len(rows)):
            eps = pyro.sample("eps", dist.Normal(torch.zeros_like(origin), torch.ones_like(origin)).to_event(1))
            flat = eps.reshape(-1, eps.shape[-1])
            pyro.factor("tilt", model.tilt(model.unwhiten(flat)).reshape(eps.shape[:-1]))

    found = ais(
        prior, origin.new_zeros(1), num_chains=num_chains, num_temperatures=num_temperatures,
        num_leapfrog=num_leapfrog, schedule=schedule, seed=seed,
    )  # fmt: skip
    # Of log Z itself the number is a bound, whether or not the model has been normalised.
    return replace(found, kind=LOWER)


def normalise(model: Any, *, num_temperatures: int = 500, seed: int = 0) -> Normalised:
    """Measure log Z twice, with half of the temperatures and with all, and put it into the model if it was found.

    Raises:
        NormaliserError: a standard error of half a nat or more, or a rise of more than that; the model stays
            unnormalised.
    """
    numbers = num_temperatures // 2, num_temperatures
    half, whole = (log_normaliser(model, num_temperatures=number, seed=seed) for number in numbers)
    se, rise, rise_se = float(whole.se[0]), whole.mean - half.mean, math.hypot(float(whole.se[0]), float(half.se[0]))
    if not (math.isfinite(whole.mean) and se < _LARGEST and rise < _LARGEST + _ERRORS * rise_se):
        raise NormaliserError(
            f"annealing did not find log Z: {whole.mean:.5g} with a standard error of {se:.2g} nats, {rise:+.3g} from "
            "half as many temperatures; the energy may have run away: train it for fewer epochs, or by smaller steps"
        )
    model.normalise(whole.mean)
    return Normalised(whole, rise, rise_se)
