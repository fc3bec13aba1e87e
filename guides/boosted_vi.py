"""Boosted variational inference: a mixture for one posterior, or for each datum, without amortization.

    q(u | x_b) = sum_m w_bm N(u; mu_bm, diag(s_bm^2)),      components added one at a time (`pyrovae.boosting`)

for a single hard posterior (joint mode: a hierarchy, a regression) or a handful of data; an encoder for many data is
`RecursiveMixture`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae import handlers
from pyrovae.batching import Batched
from pyrovae.boosting import BoostedFit, Boosting
from pyrovae.compat import GuideTraits
from pyrovae.families import DiagonalNormal, Family, MixtureOfNormals
from pyrovae.guides.base import FamilyGuide
from pyrovae.runtime import evaluating, preserve_rng

__all__ = ["BoostedVI"]


class BoostedVI(FamilyGuide):
    """Every datum's mixture, built on each call.

    Args:
        model: the Pyro program.
        num_components: at most; a datum whose duality gap is below `tolerance` takes no more.
        **options: of `pyrovae.boosting.Boosting`: weights, bound, entropy, tolerance, restarts, num_steps, step_size,
            num_samples, num_draws, first.
        plate, batched: as in `LatentSpace`; `plate=None` boosts one joint posterior.

    Note:
        Building costs seconds. `fit(*args)` builds once and says how it went; its `lam` belongs to
        `guide.family(*args)`. In training the model is trained at a constant mixture.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 5.0))
        ...         pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)
        >>> x = torch.tensor([4.0])
        >>> guide = BoostedVI(model, num_components=2, num_steps=100)
        >>> with torch.random.fork_rng():
        ...     _ = torch.manual_seed(0)
        ...     fit = guide.fit(x)
        >>> sorted(round(v, 1) for v in guide.family(x)(fit.lam).locs.flatten().tolist())
        [-2.0, 2.0]
    """

    traits = GuideTraits(name="BoostedVI", reparameterised=False, stratified=True)

    def __init__(
        self,
        model: Callable[..., Any],
        num_components: int = 5,
        *,
        plate: str | None = "data",
        batched: Batched = "auto",
        **options: Any,
    ) -> None:
        super().__init__(model, plate=plate, batched=batched)
        self.boosting = Boosting(num_components, **options)

    def _describe(self) -> str:
        return f"num_components={self.boosting.num_components}, weights={self.boosting.weights!r}, "

    def family(self, *args: Any, **kwargs: Any) -> Family:
        return MixtureOfNormals(self.space(*args, **kwargs).dim, self.boosting.num_components)

    def fit(self, *args: Any, **kwargs: Any) -> BoostedFit:
        """Build and report; the model in evaluation mode, its weights and the random state as they were."""
        with self._aside(), evaluating(self.model, self), preserve_rng(), torch.no_grad():
            return self._build(*args, **kwargs)

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._build(*args, **kwargs).lam

    def _build(self, *args: Any, **kwargs: Any) -> BoostedFit:
        space = self.space(*args, **kwargs)
        log_joint = space.bind(*args, **kwargs)
        rows = log_joint.rows.size
        start = DiagonalNormal(space.dim).init(rows, dtype=space.dtype, device=space.device)
        return self.boosting.run(log_joint, start, handlers.kl_weight())
