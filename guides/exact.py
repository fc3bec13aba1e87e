"""The exact posterior as a guide, for models that know theirs.

    q(u | x) = p(u | x),   so   log p(x, u) - log q(u | x) = log p(x)   for every draw u

The ELBO is the evidence and has no variance. The posterior is a constant: of the two derivatives of the ELBO only that
of log p(x, u) is left, so stock SVI with this guide *is* the EM algorithm with an exact E-step and gradient M-steps,
and its gradient has the mean d log p(x) (Fisher's identity).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae import noise
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits, require_compatible
from pyrovae.emission import emit_weighted
from pyrovae.guides.base import DensityGuide, Sampler
from pyrovae.guides.chain import particles
from pyrovae.latents import LatentSpace
from pyrovae.runtime import preserve_rng

__all__ = ["Exact"]


class Exact(DensityGuide):
    """Draws from `model.posterior(*args)`; has no parameters.

    Args:
        model: a model with `posterior(*args)`: a distribution over its unconstrained latents, batch `[B]`, event `[D]`
            (PPCA, PiecewiseAffineVAE, a conjugate model of your own).
        plate, batched: as in `LatentSpace`.

    Raises:
        IncompatibleError: the model has no `posterior`.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyrovae.models import PPCA
        >>> model, x = PPCA(torch.ones(3, 1).double()), torch.randn(4, 3).double()
        >>> with pyro.get_param_store().scope():
        ...     loss = SVI(model, Exact(model), pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).evaluate_loss(x)
        >>> bool(abs(loss + model.log_evidence(x).sum()) < 1e-9)
        True
    """

    traits = GuideTraits(name="Exact", stratified=True, needs_posterior=True)

    def __init__(self, model: Callable[..., Any], *, plate: str | None = "data", batched: Batched = "auto") -> None:
        require_compatible(model, type(self))
        super().__init__(model, plate=plate, batched=batched)

    def _posterior(self, *args: Any, **kwargs: Any) -> Any:
        space = self.space(*args, **kwargs)
        plate = space.read_plate(*args, **kwargs)
        with torch.no_grad():
            found = self.model.posterior(*args, **kwargs)
        expected = (1 if plate is None else plate.size,), (space.dim,)
        shapes = tuple(found.batch_shape), tuple(found.event_shape)
        if shapes != expected:
            raise ValueError(
                f"model.posterior has batch {shapes[0]} and event {shapes[1]}, where the model's unconstrained latents "
                f"need {expected[0]} and {expected[1]}"
            )
        return found

    def _sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        q = self._posterior(*args, **kwargs)

        def draw(number: int) -> tuple[Tensor, Tensor]:
            u = self._drawn(q, number, args, kwargs)
            with torch.no_grad():
                return u, q.log_prob(u)

        return Sampler(draw, q.log_prob)

    def _drawn(self, q: Any, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`[S, B, D]`; under per-datum noise every row is drawn by itself, from its own seed."""
        if not noise.active():
            return q.sample((number,))
        bound = self.space(*args, **kwargs).bind(*args, **kwargs)
        parts = []
        for row, seed in enumerate(noise.row_seeds()):
            if bound.foldable:
                some = bound.rows.select(slice(row, row + 1))
                with torch.no_grad():
                    q = self.model.posterior(*some.args, **some.kwargs)
            with preserve_rng():
                torch.manual_seed(seed)
                parts.append(q.sample((number,)))
            if not bound.foldable:  # rows that cannot be taken out are drawn together
                break
        return torch.cat(parts, dim=1)

    def stratified(self, num_samples: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Equally weighted draws: log-weights `[S, B]`, draws `[S, B, D]`, log q `[S, B]`."""
        u, log_q = self._sampler(*args, **kwargs).draw(num_samples)
        return torch.full_like(log_q, -math.log(num_samples)), u, log_q

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        number, shape = particles("Exact", space)
        u, log_q = self._sampler(*args, **kwargs).draw(number)
        # With its own density in place of closed KLs, whose value would vary with the draw.
        return lambda: emit_weighted(space.structure, shape(u), shape(log_q))
