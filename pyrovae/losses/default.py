"""The loss of a guide, and of its model's prior, when nobody says otherwise."""

from __future__ import annotations

from typing import Any

from pyrovae.losses.chosen import chosen
from pyrovae.losses.energy import EnergyELBO

__all__ = ["default_loss"]


def default_loss(guide: Any) -> Any:
    """The loss `fit` takes for a guide: ELBO, stratified or recursive for mixtures, E_q log p without a density; with
    a negative phase where the model's prior is tilted."""
    model = getattr(getattr(guide, "model", None), "traits", None)
    return EnergyELBO() if model is not None and model.tilted else chosen(guide)
