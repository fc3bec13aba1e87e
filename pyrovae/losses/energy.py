r"""The objective of models with a tilted prior: another objective, and the gradient of log Z.

.. math::
    L = E_q[\log p(x|z) + f(z) + \log p_0(z) - \log q(z|x)] - \log Z, \qquad
    \nabla \log Z = E_{p(z)}[\nabla f(z) + \nabla \log p_0(z)]

The log-joint of such a model (`models.tilted`) has no log Z, so the ELBO of its program is L + log Z. What is missing
is the gradient of log Z with respect to f's weights and to those of the base p0, wherever it has some: the negative
phase. One detached draw of the prior by the model's chain for every datum of the batch, scaled as the plate scales,

.. math::
    \tfrac{N}{B} \sum_b \big(f(z_b^-) + \log p_0(z_b^-)\big)

has N times it as its gradient; its value means nothing and is not reported. (Inside the model the chain would run
whenever the log-joint is asked for.) With a guide that has no density the first part is E_q[log p(x, z)]: maximum
likelihood with a sampler for the posterior (Pang, Han, Nijkamp, Zhu & Wu 2020); with one that has, it is an ELBO (Cui,
Wu & Han 2023).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor

from pyrovae import handlers
from pyrovae.compat import LossTraits, require_compatible
from pyrovae.errors import IncompatibleError, TrainingDiverged
from pyrovae.losses.chosen import chosen
from pyrovae.plates import read_plate

__all__ = ["EnergyELBO"]

_RUNAWAY = 1e9  # nats
_MEMORY = 0.05  # that a prior's chain may keep of its start


class EnergyELBO(PyroELBO):
    """An objective with the negative phase of a tilted prior, for stock SVI.

    What it reports is the objective plus log Z, in nats ("unnormalised"): log Z moves with training, so the curve may
    rise or fall without the model getting better or worse.

    Args:
        objective: the other objective, an ELBO, `IWAE` or `ExpectedLogJoint`; by default the guide's own, as `fit`
            takes it (E_q[log p(x, z)] without a density).

    Raises:
        IncompatibleError: a model without a tilt, or an objective with a penalty, which holds codes against the base.
        TrainingDiverged: an energy of the prior's draws that is not finite, or larger than 1e9.
    """

    traits = LossTraits(name="unnormalised ELBO", needs_density=None, negative_phase=True)

    def __init__(self, objective: Any = None) -> None:
        super().__init__()
        self.objective = None
        if objective is None:
            return
        if hasattr(objective, "penalty") or isinstance(objective, EnergyELBO):
            raise IncompatibleError(
                f"EnergyELBO adds a negative phase to a bound, not to {type(objective).__name__}: pass losses.ELBO(), "
                "losses.IWAE(K) or losses.ExpectedLogJoint()"
            )
        self.objective = _with_negative_phase(objective)
        if hasattr(objective, "traits"):
            self.traits = replace(self.objective.traits, name=f"unnormalised {objective.traits.name}")

    @property
    def name(self) -> str:
        """What the number is."""
        return f"unnormalised {getattr(self.objective, 'name', 'ELBO')}"

    def name_with(self, guide: Any) -> str:
        """What the number is of a guide."""
        inner = self._positive(guide)
        return f"unnormalised {getattr(inner, 'name', 'ELBO')}"

    def per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The objective per datum plus log Z (minus it, once the model is normalised), `[B]`, nats."""
        self._require(model, guide)
        found: Tensor = self._positive(guide).per_datum(model, guide, *args, **kwargs)
        return found

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        self._require(model, guide)
        return float(self._positive(guide).loss(model, guide, *args, **kwargs))

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._require(model, guide)
        surrogate = self._negative(model, guide, args, kwargs)
        loss: Tensor = self._positive(guide).differentiable_loss(model, guide, *args, **kwargs)
        return loss + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        self._require(model, guide)
        surrogate = self._negative(model, guide, args, kwargs)  # first: it may raise, and no gradient is left then
        loss = float(self._positive(guide).loss_and_grads(model, guide, *args, **kwargs))
        if surrogate.requires_grad:
            surrogate.backward()
        return loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("EnergyELBO leaves traces to its objective: call per_datum")

    def _require(self, model: Any, guide: Any) -> None:
        require_compatible(model, guide, self)
        if not hasattr(model, "negative_phase"):
            name = getattr(model, "__name__", type(model).__name__)
            raise IncompatibleError(
                f"EnergyELBO draws from a tilted prior, which {name} does not have: take models.EnergyPriorVAE or "
                "another of the models that models.tilted is mixed into, unwrapped"
            )

    def _positive(self, guide: Any) -> Any:
        return self.objective if self.objective is not None else _with_negative_phase(chosen(guide))

    def _negative(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Scalar, nats of all data: its gradient is that of N log Z."""
        model.forget_log_z()
        if model.chain.memory > _MEMORY:
            warnings.warn(
                f"the prior's {model.chain} keeps {model.chain.memory:.0%} of its start, so its draws stay behind the "
                "tilt and training may run away: take more steps, or a step size nearer to 0.4",
                stacklevel=3,
            )
        plate = read_plate(model, getattr(guide, "plate", None) or "data", args, kwargs)
        f, log_base = model.negative_phase(plate.size)
        if not (torch.isfinite(f) & (f.abs() < _RUNAWAY)).all():
            raise TrainingDiverged(
                "an energy of the prior's draws is not finite or above 1e9 in the negative phase; the weights are "
                "those before this step: lower the step size of the energy, clip gradients with max_norm, or give the "
                "prior's chain more and smaller steps"
            )
        # As in the first part: the tilt feels a KL weight, E_q[log p(x, z)] has none on the sites' own densities.
        weight = handlers.kl_weight()
        base_weight = weight if getattr(getattr(guide, "traits", None), "has_density", True) else 1.0
        return plate.full_size / plate.size * (weight * f + base_weight * log_base).sum()


def _with_negative_phase(objective: Any) -> Any:
    """The objective, no longer alone: it may now take a tilted model."""
    inner = copy.copy(objective)
    if hasattr(inner, "traits"):
        inner.traits = replace(inner.traits, negative_phase=True)
    return inner
