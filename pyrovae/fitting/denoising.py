"""A run with a diffusion: its ELBO step by step, and pictures without a code."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pyrovae import losses, plots
from pyrovae.chunks import per_chunk
from pyrovae.fitting.material import Material
from pyrovae.fitting.outcome import Findings, Outcome
from pyrovae.fitting.picture import Picture
from pyrovae.table import Number

__all__ = ["evaluate", "pictures"]

_VALUES = 20_000_000  # that the chains of some data may hold at once
_SAMPLES, _COLUMNS, _PAIRS, _STEPS = 36, 12, 5, 8
_DDIM = 50  # steps of the chain at most


def evaluate(model: Any, guide: Any, material: Material, seed: int) -> Findings:
    """The ELBO from every step of the chain, with one draw of the noise at each; what is known of codes is nothing."""
    x, loss = material.rows, losses.DiffusionELBO(None)
    pixels = model.event_shape.numel()

    def measure(some: Tensor) -> Tensor:
        return loss.per_datum(model, guide, some).unsqueeze(0)

    values = per_chunk(
        measure, (model, guide), (x,), {}, plate="data", seed=seed, progress="evaluation",
        chunk=max(1, _VALUES // (model.num_steps * pixels)),
    )[0].double()  # fmt: skip
    end = model.prior_kl(x).double()
    found: dict[str, Number | str] = {"ELBO": Number.over_data(values)}
    # x = 2 y - 1 halves the density of each of y's values.
    found["ELBO of values in [0, 1]"] = Number.over_data(values + pixels * math.log(2))
    found["KL of the chain's end to the prior"] = Number.over_data(end)
    found["steps"] = Number(model.num_steps)
    found["mutual information"] = "none: the latents are the datum and noise, by a process without parameters"
    return Findings(found)


def pictures(outcome: Outcome, material: Material) -> list[Picture]:
    """Samples, and ways between data."""
    model, x = outcome.model, material.rows
    made = model.generate(_SAMPLES, seed=outcome.settings.seed)
    found = [Picture(
        "Samples", plots.samples(material.planes(made), signed=True, columns=_COLUMNS),
        f"Noise, taken back in {model.num_steps} steps of the model's own chain; the last one shows the mean.",
    )]  # fmt: skip
    pairs = min(_PAIRS, len(x) // 2)
    steps = min(_DDIM, model.num_steps)
    path = model.interpolate(x[:pairs], x[pairs : 2 * pairs], steps=_STEPS, num_steps=steps)
    found.append(Picture(
        "Interpolations", plots.interpolations(material.planes(path).view(_STEPS, pairs, *material.form.image),
                                               signed=True),
        f"Two test data a row, taken to noise and back without chance (DDIM, {steps} steps); between them, the great "
        "circle of their noises.",
    ))  # fmt: skip
    return found

