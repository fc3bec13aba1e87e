"""The importance-weighted bound (Burda, Grosse & Salakhutdinov 2016) and two estimators of its gradient.

    IWAE_K(x_b) = E log (1/K) sum_k w_k  <=  log p(x_b),   w_k = p(x_b, u_k) / q(u_k | x_b),   increasing in K

The log-mean-exp is taken per datum, of unscaled weights; N/B multiplies afterwards. (Pyro's `RenyiELBO` under a
subsampling scale or a KL weight is not a bound.)

`estimator="reparam"` differentiates this as it stands. The signal-to-noise ratio of its gradient for the guide falls
like 1 / sqrt(K) (Rainforth et al. 2018). `estimator="dreg"`, doubly reparameterised (Tucker, Lawson, Gu & Maddison
2019), has the same mean, and a ratio that rises like sqrt(K). With the normalised weights v_k = w_k / sum_j w_j,

    model:  sum_k v_k   d log p(x, u_k)
    guide:  sum_k v_k^2 d(log p(x, u_k) - log q(u_k)) / du_k  du_k

where log q holds its parameters lam constant and "guide" is every way to u_k, through the model's parameters too where
lam depends on them: the score term goes by E_q[f d log q / dlam] = E_q[df/du du/dlam], which holds at every lam. The
log-sum-exp of these log-weights brings one v_k by itself; a hook on u_k multiplies what arrives there by the other.

"dreg" is the default: at the same cost, K = 5, it ended 0.20 +- 0.02 nats (IWAE-1000) ahead on held-out digits (40
epochs, 6 seeds) with `Amortized`, 0.10 +- 0.03 with `SemiAmortized` (15 epochs, 4 seeds), 0.01 +- 0.02 with `Laplace`.
It is not always the quieter one, see `pyrovae.losses.elbo`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae import handlers
from pyrovae.compat import LossTraits
from pyrovae.errors import ScaleError
from pyrovae.losses.base import PerDatumLoss

__all__ = ["IWAE"]


class IWAE(PerDatumLoss):
    """Importance-weighted bound with K samples.

    Args:
        num_samples: K >= 1; 1 is the ELBO with a sampled KL.
        estimator: of the gradient, "dreg" or "reparam"; the value is the same.
    """

    traits = LossTraits(name="IWAE", needs_reparameterised=True)

    def __init__(self, num_samples: int, estimator: Literal["dreg", "reparam"] = "dreg") -> None:
        super().__init__(num_particles=num_samples)
        if estimator not in ("dreg", "reparam"):
            raise ValueError(f"the estimator of an IWAE must be 'dreg' or 'reparam', got {estimator!r}")
        self.estimator = estimator
        self.traits = replace(type(self).traits, needs_marginal=estimator == "dreg")

    @property
    def name(self) -> str:
        return f"IWAE-{self.num_particles}"

    def _per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        if handlers.kl_weight() != 1.0:
            raise ScaleError("IWAE under a KL weight is not a bound: anneal an ELBO instead")
        if self.estimator == "dreg" and torch.is_grad_enabled():
            weights = self._squared(guide, *args, **kwargs)
        else:  # without gradient both are the same number
            weights = guide._weighted(self.num_particles, *args, **kwargs)
        return torch.logsumexp(weights, 0) - math.log(self.num_particles)

    def _squared(self, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Log-weights `[K, B]` whose log-sum-exp has the doubly reparameterised gradient."""
        sampler = guide._sampler(*args, **kwargs)
        log_joint = guide.space(*args, **kwargs).bind(*args, **kwargs)
        u, _ = sampler.draw(self.num_particles)
        log_weights = log_joint(u) - sampler.frozen_log_prob(u)
        if u.requires_grad:
            share = log_weights.detach().softmax(0).unsqueeze(-1)
            u.register_hook(lambda gradient: gradient * share)
        return log_weights
