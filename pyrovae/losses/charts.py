r"""The published loss of chart autoencoders: the best chart redraws a datum, the predictor learns which one that was.

.. math::
    \min_a e_a - \sum_b \mathrm{softmax}(-e)_b \log P(x)_b + \lambda \, \overline{L}, \qquad
    e_a = \frac{\| x - D(D_a(E_a(E(x)))) \|^2}{2 \sigma^2}

with :math:`\overline L` the mean over charts of the product of spectral norms of E_a's layers, and of D_a's: maps that
cannot stretch cannot fold either (Schonsheck, Chen & Lai 2019, with sigma^2 = 1/2). No bound on log p(x).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrovae.compat import LossTraits
from pyrovae.losses.base import PerDatumLoss

__all__ = ["ChartLoss"]


class ChartLoss(PerDatumLoss):
    """For `guides.Charts` with its `models.ChartAutoencoder`.

    The loss sees neither the charts' weights p, nor the noise s, nor the width of q(z | c, x): set p with
    `model.set_weights(guide.frequencies(x))`, and train the others by `TraceEnum_ELBO` where densities are wanted.

    Args:
        lipschitz: lambda; 0 takes no penalty.
        noise: sigma. Errors far below its square leave all charts equally good in the predictor's eyes.
    """

    traits = LossTraits(name="minus the chart loss", needs_charts=True)

    def __init__(self, lipschitz: float = 1e-2, *, noise: float = 0.5**0.5) -> None:
        super().__init__()
        if not (lipschitz >= 0 and noise > 0):
            raise ValueError(f"the penalty's weight must not be negative, the noise positive: got {lipschitz}, {noise}")
        self.lipschitz, self.noise = lipschitz, noise

    def _per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        with model._pyro_context:  # so that SVI sees the model's parameters
            logits, squared = guide._errors(*args, **kwargs)
        errors = squared / (2 * self.noise**2)
        named = torch.sum(torch.softmax(-errors, -1) * torch.log_softmax(logits, -1), -1)
        return named - errors.amin(-1)

    def penalty(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """lambda L, scalar, in the loss's units per datum."""
        return self.lipschitz * (model.charts.lipschitz().mean() + guide.charts.lipschitz().mean())

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if self.lipschitz == 0:
            return loss
        plate = guide.space(*args, **kwargs).read_plate(*args, **kwargs)
        return loss + plate.full_size * self.penalty(model, guide)
