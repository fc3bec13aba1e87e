"""The loss of a guide, and of its model's prior, when nobody says otherwise."""

from __future__ import annotations

from typing import Any

from pyrovae.losses.chosen import chosen
from pyrovae.losses.elbo import ELBO
from pyrovae.losses.energy import EnergyELBO

__all__ = ["default_loss"]


def default_loss(guide: Any) -> Any:
    """The loss `fit` takes for a guide: ELBO, stratified or recursive for mixtures, E_q log p without a density; with
    a negative phase where the model's prior is tilted, at draws where it has discrete latents to sum out."""
    model = getattr(getattr(guide, "model", None), "traits", None)
    if model is not None and model.tilted:
        return EnergyELBO()
    loss = chosen(guide)
    if model is not None and model.enumerated and loss.traits.scores_traces:
        return ELBO("stl" if guide.traits.marginal else "stratified")
    return loss
