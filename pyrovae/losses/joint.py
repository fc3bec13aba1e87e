"""E_q[log p(x, z)]: what a guide without density trains the model by. Not a bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyrovae.compat import LossTraits
from pyrovae.losses.base import PerDatumLoss

__all__ = ["ExpectedLogJoint"]


class ExpectedLogJoint(PerDatumLoss):
    """Mean log-joint at the guide's draws (Nijkamp et al. 2020): gradients reach the model only.

    In unconstrained coordinates: the log-Jacobian of constrained latents counts, as everywhere in `log_joint`.
    """

    traits = LossTraits(name="E_q log p(x,z)", needs_density=False)

    def _per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        u = guide._draws(self.num_particles, *args, **kwargs)
        log_joint = guide.space(*args, **kwargs).bind(*args, **kwargs)
        return log_joint(u).mean(0)
