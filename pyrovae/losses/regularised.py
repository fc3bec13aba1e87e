"""What objectives with a term of the whole batch share.

    loss = -(N / B) sum_b ELBO_b + N * penalty,      penalty in nats per datum

The ELBO part has a value per datum; the penalty is one number for the mini-batch. Such an objective is no bound on
log p(x): models are compared by their ELBO or importance-weighted bound, which `pyrovae.evidence` gives.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyrovae import handlers, store
from pyrovae.errors import IncompatibleError
from pyrovae.losses.elbo import ReparamELBO, Term, terms

__all__ = ["RegularisedELBO", "latent_sites", "latent_terms", "rows_of"]


class RegularisedELBO(ReparamELBO):
    """The ELBO with a penalty on the batch; subclasses give `_penalty`.

    `per_datum` is the ELBO part, `penalty` the other.
    """

    def __init__(self, num_particles: int = 1, *, plate: str | None = "data") -> None:
        if num_particles < 1:
            raise ValueError(f"a loss needs at least one sample, got {num_particles}")
        super().__init__(num_particles=num_particles, plate=plate)

    @property
    def name(self) -> str:  # type: ignore[override]  # not the ELBO's
        return self.traits.name

    @abstractmethod
    def _penalty(self, model_trace: Any, guide_trace: Any) -> Tensor:
        """Scalar, nats per datum, differentiable."""

    def penalty(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The batch's term, scalar, nats per datum; smaller is better."""
        total = torch.zeros(())
        with store.isolated():  # not blocked: annealing outside must reach the sites
            for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
                total = total + self._penalty(model_trace, guide_trace) / self.num_particles
        return total

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        # Kept with the trace: Pyro passes nothing else on to the value of a particle.
        guide_trace.plate = getattr(guide, "plate", self.plate)
        if guide_trace.plate is None:
            raise IncompatibleError(
                f"{self.name} compares the data of a batch, but this guide takes the program as one datum (plate=None)"
            )
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[float, Tensor]:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        frame = next(
            frame
            for site in latent_sites(model_trace).values()
            for frame in site["cond_indep_stack"]
            if frame.name == guide_trace.plate
        )
        penalty = frame.full_size * self._penalty(model_trace, guide_trace)
        return loss + penalty.item(), surrogate + penalty


def latent_sites(model_trace: Any) -> dict[str, Any]:
    """The trace's latent sites by name; their values are the guide's draws."""
    return {
        name: site
        for name, site in model_trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and type(site["fn"]).__name__ != "_Subsample"
    }


def rows_of(value: Tensor, event_dim: int) -> Tensor:
    """A site's value `[*inner, B, *event]` as `[B, d]`."""
    return value.movedim(-1 - event_dim, 0).flatten(1) if value.dim() > 1 else value.unsqueeze(1)


def latent_terms(model_trace: Any, guide_trace: Any) -> dict[str, Tensor]:
    """KL per datum and site, `[B]`, nats, as it is at KL weight 1 (the one in force must be positive).

    One entry per latent site where the posterior factorises over them (analytic, or at the draw), else a single
    entry "all".
    """
    weight = handlers.kl_weight()
    found: list[Term] = [t for t in terms(model_trace, guide_trace, guide_trace.plate) if t.part != "observed"]
    if all(term.part == "latent" for term in found):
        return {term.site: -term.value / weight for term in found}
    total = -found[0].value
    for term in found[1:]:
        total = total - term.value
    return {"all": total / weight}
