"""The importance-weighted bound (Burda, Grosse & Salakhutdinov 2016).

    IWAE_K(x_b) = E log (1/K) sum_k p(x_b, z_k) / q(z_k | x_b)  <=  log p(x_b),   increasing in K

The log-mean-exp is taken per datum, of unscaled weights; N/B multiplies afterwards. (Pyro's `RenyiELBO` under a
subsampling scale or a KL weight is not a bound.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrovae import handlers
from pyrovae.compat import LossTraits
from pyrovae.errors import ScaleError
from pyrovae.losses.base import PerDatumLoss

__all__ = ["IWAE"]


class IWAE(PerDatumLoss):
    """Importance-weighted bound with K samples, by reparameterised gradients.

    Args:
        num_samples: K >= 1; 1 is the ELBO with a sampled KL.
    """

    traits = LossTraits(name="IWAE", needs_reparameterised=True)

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_particles=num_samples)

    @property
    def name(self) -> str:
        return f"IWAE-{self.num_particles}"

    def _per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        if handlers.kl_weight() != 1.0:
            raise ScaleError("IWAE under a KL weight is not a bound: anneal an ELBO instead")
        weights = guide._weighted(self.num_particles, *args, **kwargs)
        return torch.logsumexp(weights, 0) - math.log(self.num_particles)
