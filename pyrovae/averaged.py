"""Second-order expansions averaged over a Gaussian: the step from Laplace's method towards the best Gaussian.

By the theorems of Bonnet and Price, E_q[grad log p] and E_q[-Hessian log p] are the gradients of E_q[log p] with
respect to q's mean and (minus twice) its covariance, so the fixed point of Newton steps on the averages is the Gaussian
nearest to the posterior in KL(q || p) (Opper & Archambeau 2009). With Fisher information in the place of Hessians it is
close to that: 0.05 nats behind on a gamma scale, 0.009 on a banana.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae import handlers, noise
from pyrovae.curvature import Curvature, Expansion
from pyrovae.latents import LogJoint
from pyrovae.precision_normal import covariance_factor

__all__ = ["Averaged"]


class Averaged:
    """Expansions of one batch's log-joint: at a point, or averaged over M antithetic draws of a Gaussian around it.

    Args:
        log_joint: of the batch.
        mu: where the search begins, `[B, D]`.
        num_draws: M, even; 0 is the expansion at the point.
        hessian: as in `Curvature`.
        create_graph: expansions can be differentiated.
    """

    def __init__(self, log_joint: LogJoint, mu: Tensor, num_draws: int, hessian: bool, *, create_graph: bool) -> None:
        self.log_joint, self.create_graph, self.num_draws = log_joint, create_graph, num_draws
        self.beta = handlers.kl_weight()
        self.curvature = Curvature(log_joint, beta=self.beta, hessian=hessian)
        self.offsets: Tensor | None = None
        if num_draws:
            args, kwargs = log_joint.rows.repeat(num_draws)
            self.wide = Curvature(log_joint.space.bind(*args, **kwargs), beta=self.beta, hessian=hessian)
            eps = noise.normal(num_draws // 2, *mu.shape, like=mu)
            self.eps = torch.cat([eps, -eps])

    def at(self, mu: Tensor, previous: Expansion | None = None) -> Expansion:
        """The expansion at `mu: [B, D]`; averaged over N(mu, previous precision^-1) once there is a previous one."""
        if not self.num_draws or previous is None:
            return self.curvature.at(mu, create_graph=self.create_graph)
        scale_tril = covariance_factor(previous.precision)
        offsets = (scale_tril @ self.eps.unsqueeze(-1)).squeeze(-1)
        self.offsets = offsets.detach()
        points = self.wide.at((mu + offsets).flatten(0, 1), create_graph=self.create_graph)
        parts = [part.unflatten(0, (self.num_draws, -1)) for part in points]
        return Expansion(parts[0].mean(0), parts[1].mean(0), parts[2].mean(0), parts[3].any(0))

    def objective(self, mu: Tensor) -> Tensor:
        """What a step should increase, `[L, B, D] -> [L, B]`: the log-joint, averaged as the expansion was."""
        if self.offsets is None:
            return self.log_joint(mu, self.beta)
        return self.log_joint(mu.unsqueeze(1) + self.offsets, self.beta).mean(1)
