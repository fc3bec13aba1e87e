"""What our losses share: one value per datum first, the plate's scale N/B afterwards.

    loss = -(N / B) * sum_b per_datum_b
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor

from pyrovae import store
from pyrovae.compat import LossTraits, require_compatible
from pyrovae.errors import IncompatibleError

__all__ = ["PerDatumLoss", "require_pair"]


def require_pair(model: Any, guide: Any, loss: Any) -> None:
    """Raise when model, guide and loss do not go together, or the guide was built for another model."""
    require_compatible(model, guide, loss)
    built_for = getattr(guide, "model", None)
    # Pyro's own guides keep the model wrapped: like all that carries no traits, they are taken at their word.
    if hasattr(guide, "traits") and built_for is not None and built_for is not model:
        raise IncompatibleError(
            f"this {type(guide).__name__} was built for another model: build a guide for the model it is used with"
        )


class PerDatumLoss(PyroELBO):
    """A loss computed from a guide's own hooks; subclasses give `_per_datum`."""

    traits: LossTraits

    def __init__(self, num_particles: int = 1) -> None:
        if num_particles < 1:
            raise ValueError(f"a loss needs at least one sample, got {num_particles}")
        super().__init__(num_particles=num_particles)

    @property
    def name(self) -> str:
        """What the number is, as progress bars and tables write it."""
        return self.traits.name

    @abstractmethod
    def _per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """`[B]`, differentiable, without N/B; may carry a gradient-only surrogate."""

    def _require(self, model: Any, guide: Any) -> None:
        """Raise when the three do not go together, or the guide lacks the hooks that these losses are made of."""
        require_pair(model, guide, self)
        if not hasattr(guide, "in_program"):
            name = getattr(guide, "__name__", type(guide).__name__)
            raise IncompatibleError(
                f"losses.{type(self).__name__} takes one of pyrovae.guides, got {name}: use losses.ELBO() or one of "
                "Pyro's own losses with it"
            )

    def per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The objective per datum, `[B]`, nats, larger is better."""
        self._require(model, guide)
        with store.isolated(), poutine.block(), guide.in_program():
            return self._per_datum(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """-(N / B) * sum of the per-datum objective."""
        self._require(model, guide)
        with guide.in_program():
            guide.check_parameters(*args, **kwargs)
            value = self._per_datum(model, guide, *args, **kwargs)
            plate = guide.space(*args, **kwargs).read_plate(*args, **kwargs)
        scale = 1.0 if plate is None else plate.full_size / plate.size
        return -scale * value.sum()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} works per datum and stores no traces: call per_datum")
