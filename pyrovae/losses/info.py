r"""InfoVAE (Zhao, Song & Ermon 2019): mutual information and the aggregate posterior weighed apart.

.. math::
    L = E[\log p(x|z)] - (1 - \alpha) E_x \mathrm{KL}(q(z|x) \| p(z)) - (\alpha + \lambda - 1) D(q(z) \| p(z))

where q(z) = (1/N) sum_n q(z | x_n). With D = KL it equals ELBO + alpha I_q - (lambda - 1) KL(q(z) || p(z)).

| alpha, lambda | model |
| --- | --- |
| 0, 1 | the ELBO |
| 1 - lambda, lambda | beta-VAE with beta = lambda |
| 1, lambda > 0, D = MMD | MMD-VAE, Wasserstein autoencoder |

The reconstruction is a sum over pixels: authors who average it have lambda smaller by the number of pixels. The paper's
adversarial divergence is left out: its net's weights would belong to a loss, which no checkpoint keeps.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrovae import handlers
from pyrovae.compat import LossTraits
from pyrovae.errors import LatentError
from pyrovae.kernels import Kernel, kernel_of, mmd2, stein_direction
from pyrovae.losses.regularised import RegularisedELBO, latent_sites, latent_terms, rows_of

__all__ = ["InfoVAE"]


class InfoVAE(RegularisedELBO):
    """The InfoVAE objective; its penalty is -alpha KL + (alpha + lambda - 1) D(q(z) || p(z)).

    D compares the batch's draws, all latents of a datum as one vector, with as many from the prior; batches of 200 and
    more keep its noise small, a batch of one has no such term. A KL weight (`handlers.anneal`) acts on the KL alone.

    Args:
        alpha: weight of the mutual information, at most 1.
        lambda_: weight of the aggregate posterior's match, with alpha + lambda >= 1. The 1,000 that is quoted of the
            authors is for their kernel, whose MMD is some 15 times smaller at 10 latents; "stein" wants less, about 5.
        divergence: "mmd", the squared maximum mean discrepancy; "stein", KL(q(z) || p(z)) by its Stein variational
            gradient, which has no value: the objective is reported without it.
        kernel: "rbf", "imq" or "original" (`pyrovae.kernels`).
        bandwidth: the kernel's s^2; the number of latents by default.
        num_particles: draws per datum.
        plate: the data plate, for guides that do not say; ours do.

    Raises:
        ValueError: a negative weight, which would push q(z) away from the prior.
    """

    traits = LossTraits(name="InfoVAE", needs_reparameterised=True, penalises=True, scores_traces=True)

    def __init__(
        self,
        alpha: float = 0.0,
        lambda_: float = 50.0,
        divergence: Literal["mmd", "stein"] = "mmd",
        kernel: Kernel = "rbf",
        bandwidth: float | None = None,
        *,
        num_particles: int = 1,
        plate: str | None = "data",
    ) -> None:
        super().__init__(num_particles, plate=plate)
        if alpha > 1:
            raise ValueError(f"alpha must be at most 1, got {alpha}: beyond it the KL would be rewarded")
        if alpha + lambda_ < 1:
            raise ValueError(
                f"alpha + lambda must be at least 1, got {alpha + lambda_:g}: a negative weight on D(q(z) || p(z)) "
                "drives codes away from the prior (lambda counts from the ELBO's 1, not from 0)"
            )
        if divergence not in ("mmd", "stein"):
            raise ValueError(f"divergence must be 'mmd' or 'stein', got {divergence!r}")
        kernel_of(kernel, 1, bandwidth)  # bad arguments are told now, not in training
        self.alpha, self.lambda_, self.divergence = alpha, lambda_, divergence
        self.kernel, self.bandwidth = kernel, bandwidth

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        if self.divergence == "mmd" and self.alpha + self.lambda_ > 1:
            model_trace.prior = _prior(model, args, kwargs, set(latent_sites(model_trace)))
        return model_trace, guide_trace

    def _penalty(self, model_trace: Any, guide_trace: Any) -> Tensor:
        sites = latent_sites(model_trace)
        total = next(iter(sites.values()))["value"].new_zeros(())
        if self.alpha and handlers.kl_weight() > 0:
            kl = sum(latent_terms(model_trace, guide_trace).values(), total)
            total = total - self.alpha * handlers.kl_weight() * kl.mean()
        weight = self.alpha + self.lambda_ - 1
        if weight == 0:
            return total
        z = torch.cat([rows_of(site["value"], site["fn"].event_dim) for site in sites.values()], dim=1)
        if len(z) == 1:
            return total  # one code says nothing of their distribution
        kernel = kernel_of(self.kernel, z.shape[1], self.bandwidth)
        if self.divergence == "mmd":
            prior = torch.cat([rows_of(model_trace.prior[n], s["fn"].event_dim) for n, s in sites.items()], dim=1)
            return total + weight * mmd2(z, prior, kernel)
        if not z.requires_grad:
            return total
        score = _prior_score(sites)
        return total - weight * (stein_direction(z, score, kernel) * (z - z.detach())).sum(-1).mean()


def _prior_score(sites: dict[str, Any]) -> Tensor:
    """grad log p(z) at the draws, `[B, D]`, of sites that depend on one another, too; without the plate's N/B."""
    density = torch.stack([
        scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"]).sum() for site in sites.values()
    ]).sum()  # fmt: skip
    # A site that nothing trains needs no direction.
    moved = {name: site["value"] for name, site in sites.items() if site["value"].requires_grad}
    slopes = dict(zip(moved, torch.autograd.grad(density, list(moved.values()), retain_graph=True), strict=True))
    return torch.cat([
        rows_of(slopes.get(name, torch.zeros_like(site["value"])), site["fn"].event_dim) for name, site in sites.items()
    ], dim=1)  # fmt: skip


class _Enough(Exception):
    """Aborts the program once every latent has been drawn."""


class _Prior(poutine.messenger.Messenger):
    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            self.values[msg["name"]] = msg["value"]
            if len(self.values) == len(self.names):
                raise _Enough


def _prior(model: Any, args: Any, kwargs: Any, names: set[str]) -> dict[str, Tensor]:
    """Fresh draws of the latents, one per row, from a run of the model that stops at the last of them."""
    prior = _Prior(names)
    with poutine.block(), pyro.validation_enabled(False), prior:
        try:
            model(*args, **kwargs)
        except _Enough:
            return prior.values
    raise LatentError(f"the model drew {sorted(prior.values)} of its latents {sorted(names)} in a second run")
