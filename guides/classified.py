r"""Classes of a mixture prior by a net of their own (Willetts, Roberts & Holmes 2019; Kingma et al. 2014, "M2").

For `models.VLAC` with classes y_l and latents z_l, one pair for every group, three posteriors are in use:

.. math::
    A: q(y | x) \, q(z | x, y) \qquad B: q(z | x) \, p(y | z) \qquad C: q(z | x) \prod_l q(y_l | x)

B needs no classifier: its classes are summed out of the model, so any guide of z does (`Amortized`). C and A have one,
whose output is a clustering in one pass. With r = q(y | x) and one draw of z (of each class, in A),

.. math::
    C: \log p(x|z) + \sum_l \sum_k r_{lk} \log \frac{\pi_{lk} N(z_l; \mu_{lk}, s_{lk})}{r_{lk}} - \log q(z|x)

    A: \sum_k r_k \Big[ \log p(x|z_k) + \log \frac{\pi_k N(z_k; \mu_k, s_k)}{r_k} - \log q(z_k | x, k) \Big]

At the same z, C is never above B, and equal to it where r_l are the responsibilities p(y_l | z_l).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.emission import emit
from pyrovae.errors import IncompatibleError
from pyrovae.families import DiagonalNormal, Family, MixtureOfNormals
from pyrovae.guides.amortized import encode, first_argument, require_net, run_encoder
from pyrovae.guides.base import FamilyGuide
from pyrovae.latents import LatentSpace

__all__ = ["Classified"]


class Classified(FamilyGuide):
    """Sites "y1" .. "yL" by a classifier, "z1" .. "zL" by an encoder; for a `VLAC` with `classes="enumerated"`.

    Train it with `TraceEnum_ELBO(max_plate_nesting=1)`, which sums over the classes. To all else it is a guide of z
    alone: `posterior`, `draws` and evidence are those of q(z | x), in C a diagonal Gaussian, in A the mixture over y.

    Args:
        model: a `models.VLAC` with `classes="enumerated"`.
        encoder: C: module from the data to `[B, 2 D]`, locations of all latents, deepest group first, and their
            log-variances, as for `Amortized`. A: to `[B, 2 K D]`, locations of class 0, of class 1 and so on, and the
            log-variances in the same order.
        classifier: module from the data to logits of the classes, those of all groups side by side, shallowest first,
            `[B, K_1 + .. + K_L]`.
        factorisation: "C", z and y independent given x, one run of the decoder; or "A", z given y, K runs, for models
            of one group.
        batched: as in `LatentSpace`.

    Note:
        Of the library's own losses, C refuses those that look at z alone, which would leave the classifier as it is.
        With A they train the mixture's own ELBO, never below A's. Classes that a frozen classifier has got wrong stay
        wrong: start the components where codes are (`VLAC.start_clusters`).

    Raises:
        IncompatibleError: the model's classes are not enumerated, or A with several groups.

    Example:
        >>> from pyro.infer import TraceEnum_ELBO
        >>> from pyrovae import models
        >>> model = models.VLAC(nn.Linear(3, 4), [2, 1], [3, 5], "gaussian", classes="enumerated")
        >>> guide = Classified(model, nn.Linear(4, 6), nn.Linear(4, 8))
        >>> with pyro.get_param_store().scope():
        ...     value = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, torch.zeros(7, 4))
        >>> guide.clusters(torch.zeros(7, 4), level=1).shape
        torch.Size([7, 5])
    """

    traits = GuideTraits(name="Classified", reparameterised=False, stratified=True)

    def __init__(
        self,
        model: Any,
        encoder: nn.Module,
        classifier: nn.Module,
        factorisation: Literal["C", "A"] = "C",
        *,
        batched: Batched = "auto",
    ) -> None:
        if not hasattr(model, "num_clusters"):  # guides know models by what they have
            raise TypeError(f"Classified is for a models.VLAC, whose groups have classes, got {type(model).__name__}")
        if factorisation not in ("C", "A"):
            raise ValueError(f"factorisation must be 'C' or 'A' (guides.Amortized is B), got {factorisation!r}")
        if model.classes != "enumerated":
            raise IncompatibleError(
                "the classes of this VLAC are summed out, so a classifier has no site: build the model with "
                "VLAC(..., classes='enumerated')"
            )
        if factorisation == "A" and len(model.sizes) > 1:
            times = " x ".join(map(str, model.num_clusters))
            raise IncompatibleError(
                f"A runs the decoder for every combination of the groups' classes, here {times} times a datum: take "
                "factorisation='C', or guides.Amortized, which is B"
            )
        require_net(encoder)
        require_net(classifier)
        super().__init__(model, plate="data", batched=batched)
        self.factorisation, self.encoder, self.classifier = factorisation, encoder, classifier
        self.latent_dim, self.num_clusters = model.latent_dim, tuple(model.num_clusters)
        self.traits = GuideTraits(
            name=f"Classified({factorisation})", reparameterised=False, gaussian_sites=factorisation == "C",
            gaussian_base=factorisation == "C", stratified=True,
            trained_by="pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)" if factorisation == "C" else "",
        )  # fmt: skip

    def _describe(self) -> str:
        return f"factorisation={self.factorisation!r}, "

    def family(self, *args: Any, **kwargs: Any) -> Family:
        if self.factorisation == "C":
            return DiagonalNormal(self.latent_dim)
        return MixtureOfNormals(self.latent_dim, self.num_clusters[0])

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_argument(*args, **kwargs)
        if self.factorisation == "C":
            return encode(self.encoder, x, self.family())
        expected = 2 * self.num_clusters[0] * self.latent_dim
        moments = _rows("encoder", self.encoder, x, expected, "locations and log-variances of all classes")
        return torch.cat([self._logits(x), moments], -1)

    def _logits(self, x: Any) -> Tensor:
        """`[B, K_1 + .. + K_L]`."""
        return _rows("classifier", self.classifier, x, sum(self.num_clusters), "logits of all groups")

    def clusters(self, x: Tensor, level: int = 0) -> Tensor:
        """q(y_l | x), `[B, K_l]`; level 0 is the shallowest group."""
        if not 0 <= level < len(self.num_clusters):
            raise ValueError(f"the model has groups 0 to {len(self.num_clusters) - 1}, got {level}")
        with self._aside():
            return torch.softmax(self._of_level(self._logits(x), level), -1)

    def _of_level(self, logits: Tensor, level: int) -> Tensor:
        return logits.split(self.num_clusters, -1)[level]

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        q = self._posterior(*args, **kwargs)
        if self.factorisation == "A":
            return lambda: _emit_given_class(q)
        logits = self._logits(first_argument(*args, **kwargs))

        def write() -> None:
            for level in range(len(self.num_clusters)):
                _emit_class(level, self._of_level(logits, level))
            emit(space.structure, q)

        return write


def _emit_class(level: int, logits: Tensor) -> Tensor:
    classes = dist.Categorical(logits=logits)
    found: Tensor = pyro.sample(f"y{level + 1}", classes, infer={"enumerate": "parallel"})
    return found


def _emit_given_class(q: Any) -> None:
    """A class, and z by the component of a mixture that it names."""
    y = _emit_class(0, q.logits)
    pyro.sample("z1", dist.Normal(Vindex(q.locs)[..., y, :], Vindex(q.scales)[..., y, :]).to_event(1))


def _rows(name: str, net: nn.Module, x: Any, expected: int, what: str) -> Tensor:
    """A net's output, one row of `expected` numbers for every datum."""
    found = run_encoder(net, x)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[-1] != expected:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the {name} must return {what}, [B, {expected}], one row per datum, but returned {shape}")
    return found
