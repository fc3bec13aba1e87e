r"""MAE: mutual posterior-divergence regularisation (Ma, Zhou & Hovy 2019), against posteriors that are all alike.

For posteriors q_i = N(mu_i, diag s_i^2) of two data, per latent a,

.. math::
    K^a_{ij} = \tfrac12 \Big[ \frac{s_i^2 + (\mu_i - \mu_j)^2}{s_j^2} - \log \frac{s_i^2}{s_j^2} - 1 \Big]

the divergence m^a = E_{i != j} K^a_ij and its unevenness, sigma = sd over pairs of sum_a K^a_ij, enter the loss as

.. math::
    -\mathrm{ELBO} + \eta \sum_a \mathrm{softplus}(-m^a) + \gamma \sigma

so the reward of a latent saturates once its posteriors differ by a few nats. With mu ~ N(0, tau^2) and one s, the
expected m^a is tau^2 / s^2.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.nn.functional import softplus

from pyrovae.compat import LossTraits
from pyrovae.errors import IncompatibleError
from pyrovae.losses.elbo import Scored
from pyrovae.losses.regularised import RegularisedELBO, rows_of

__all__ = ["MutualPosteriorDivergence", "pair_divergences"]

_LOG_VAR = 7.0  # K grows as 1 / s_j^2: the authors' colour encoder is held here, too


class MutualPosteriorDivergence(RegularisedELBO):
    """The MAE objective; its penalty is eta * sum_a softplus(-m^a) + gamma * sigma.

    Pairs are those of the batch, site by site. A posterior flow is judged by the Gaussian it starts from, a full-rank
    Gaussian by its variances. A batch of one datum has no pairs, of two no spread: what is missing counts as zero.

    Args:
        eta: weight of diversity, nats.
        gamma: weight of evenness.
        num_particles: draws per datum.
        plate: the data plate, for guides that do not say; ours do.
    """

    traits = LossTraits(
        name="MAE", needs_reparameterised=True, needs_gaussian_base=True, penalises=True, scores_traces=True
    )

    def __init__(
        self, eta: float = 1.0, gamma: float = 0.01, *, num_particles: int = 1, plate: str | None = "data"
    ) -> None:
        super().__init__(num_particles, plate=plate)
        if eta < 0 or gamma < 0:
            raise ValueError(f"eta and gamma must not be negative, got {eta} and {gamma}")
        self.eta, self.gamma = eta, gamma

    def _penalty(self, model_trace: Any, guide_trace: Any) -> Tensor:
        total, compared = torch.zeros(()), False
        for name, site in guide_trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site) or isinstance(site["fn"], Unit | Scored):
                continue  # plates, factors, and draws whose density is another site's
            pairs = pair_divergences(*_gaussian(name, site["fn"]))
            compared = True
            count = len(pairs)
            total = total + self.eta * softplus(-pairs.mean(0)).sum() if count else total
            if self.gamma and count > 2:
                spread = pairs.sum(-1).var()
                total = total + self.gamma * (spread + 1e-12).sqrt()  # at equal pairs the root alone has no gradient
        if not compared:
            raise IncompatibleError(
                "MAE compares Gaussian posteriors, but this guide has none: take guides.Amortized with a Gaussian "
                "family or a flow"
            )
        return total


def pair_divergences(loc: Tensor, log_var: Tensor) -> Tensor:
    """K^a_ij of the ordered pairs i != j, `[B, d], [B, d] -> [B (B - 1), d]`, nats."""
    log_ratio = log_var.unsqueeze(1) - log_var
    square = (loc.unsqueeze(1) - loc).square()
    pairs = 0.5 * (log_ratio.exp() + square * (-log_var).exp() - log_ratio - 1)
    other = ~torch.eye(len(loc), dtype=torch.bool, device=loc.device)
    return pairs[other]


def _peeled(fn: Any) -> Any:
    while isinstance(fn, Independent | TransformedDistribution):
        fn = fn.base_dist
    return fn


def _gaussian(name: str, fn: Any) -> tuple[Tensor, Tensor]:
    """(loc, log-variance) of a site's Gaussian before any flow, `[B, d]`."""
    base = _peeled(fn)
    if not isinstance(base, Normal | MultivariateNormal | LowRankMultivariateNormal):
        raise IncompatibleError(
            f"MAE compares Gaussian posteriors, but that of site {name!r} is a {type(base).__name__}: take "
            "guides.Amortized with a Gaussian family or a flow"
        )
    event = len(fn.event_shape)
    loc, variance = (rows_of(t, event) for t in (base.mean, base.variance))
    return loc, variance.log().clamp(-_LOG_VAR, _LOG_VAR)
