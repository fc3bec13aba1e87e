r"""Free bits: a floor under the KL, so that a latent is not switched off to save a little (Kingma et al. 2016).

.. math::
    \mathrm{loss} = -E[\log p(x|z)] + \sum_j \max(\lambda, \overline{\mathrm{KL}}_j)

where the KL of part j, a latent dimension, a latent site or all of them, is averaged over the batch. Below the floor a
part costs nothing more, so it has no reason to shrink.

Soft free bits (Chen et al. 2017) move a weight on the whole KL instead, which keeps a gradient everywhere:

.. math::
    \mathrm{loss} = -E[\log p(x|z)] + \gamma \, \overline{\mathrm{KL}}

after every step gamma rises by 10 % where the KL is over lambda by more than 5 %, never above 1, and falls by 10 %
where it is under lambda.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyrovae import handlers
from pyrovae.compat import LossTraits
from pyrovae.errors import IncompatibleError
from pyrovae.losses.regularised import RegularisedELBO, latent_sites, latent_terms

__all__ = ["FreeBits"]

_TOLERANCE, _RATE, _SMALLEST = 0.05, 0.1, 1e-4


class FreeBits(RegularisedELBO):
    """The ELBO with a floor under its KL; its penalty is sum_j max(lambda - KL_j, 0), or (gamma - 1) KL when soft.

    A KL weight (`handlers.anneal`) multiplies KL and floor alike.

    Args:
        floor: lambda, nats per datum and part.
        per: what has a floor: every latent "dimension" (independent Gaussians alone), every "group" (latent site; all
            together where the posterior does not factorise over sites), or "total".
        soft: soft free bits, of the total.
        num_particles: draws per datum.
        plate: the data plate, for guides that do not say; ours do.

    Attributes:
        gamma: the present weight of soft free bits.
    """

    traits = LossTraits(name="free-bits ELBO", needs_reparameterised=True, penalises=True, scores_traces=True)

    def __init__(
        self,
        floor: float = 0.5,
        per: Literal["dimension", "group", "total"] = "group",
        *,
        soft: bool = False,
        num_particles: int = 1,
        plate: str | None = "data",
    ) -> None:
        super().__init__(num_particles, plate=plate)
        if not floor > 0:
            raise ValueError(f"the floor under the KL must be positive, got {floor}")
        if per not in ("dimension", "group", "total"):
            raise ValueError(f"per must be 'dimension', 'group' or 'total', got {per!r}")
        if soft and per == "dimension":
            raise ValueError("soft free bits weigh the whole KL: pass per='total'")
        self.floor, self.per, self.soft = floor, "total" if soft else per, soft
        self.gamma = 1.0
        self._last_kl: list[float] = []

    def start(self) -> None:
        """Before the first step of a run: forget earlier ones."""
        self.gamma = 1.0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"gamma": self.gamma}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.gamma = state["gamma"]

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        self._last_kl.clear()
        loss = super().loss_and_grads(model, guide, *args, **kwargs)
        if self.soft and self._last_kl:
            kl = sum(self._last_kl) / len(self._last_kl)
            if kl > self.floor * (1 + _TOLERANCE):
                self.gamma = min(1.0, self.gamma * (1 + _RATE))
            elif kl < self.floor:
                self.gamma = max(_SMALLEST, self.gamma * (1 - _RATE))
        return float(loss)

    def _penalty(self, model_trace: Any, guide_trace: Any) -> Tensor:
        weight = handlers.kl_weight()
        if weight == 0:
            return torch.zeros(())
        if self.per == "dimension":
            kl = torch.cat([_per_dimension(name, guide_trace.nodes[name]["fn"], site["fn"])
                            for name, site in latent_sites(model_trace).items()])  # fmt: skip
        else:
            kl = torch.stack([values.mean() for values in latent_terms(model_trace, guide_trace).values()])
            if self.per == "total":
                kl = kl.sum(0, keepdim=True)
        if self.soft:
            self._last_kl.append(float(kl.detach()))
            return weight * (self.gamma - 1) * kl.sum()
        return weight * (self.floor - kl).clamp_min(0).sum()


def _per_dimension(name: str, q: Any, p: Any) -> Tensor:
    """KL of each dimension of a site, averaged over the batch, `[d]`."""
    event = len(q.event_shape)
    while isinstance(q, Independent) and isinstance(p, Independent):
        q, p = q.base_dist, p.base_dist
    try:
        if q.event_shape or p.event_shape:
            raise NotImplementedError
        kl = kl_divergence(q, p)
    except NotImplementedError:
        raise IncompatibleError(
            f"no KL per dimension is known at site {name!r} ({type(q).__name__} from {type(p).__name__}): pass "
            "per='group' or per='total'"
        ) from None
    return kl.movedim(-1 - event, 0).flatten(1).mean(0) if kl.dim() > 1 else kl.mean().reshape(1)
