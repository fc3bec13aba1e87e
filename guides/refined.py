"""What guides that improve another guide's variational parameters share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pyrovae import noise
from pyrovae.emission import emit
from pyrovae.guides.base import FamilyGuide, Sampler
from pyrovae.guides.side_term import emit_term, share
from pyrovae.latents import LatentSpace

__all__ = ["Refined", "RefinedGuide", "start_of"]


class Refined(NamedTuple):
    """Refined parameters `lam: [B, P]`, and the term of value zero that trains the base, `[B]` or None."""

    lam: Tensor
    term: Tensor | None = None


def start_of(base: FamilyGuide, *args: Any, **kwargs: Any) -> Refined:
    """Where refinement of `base` starts; a base that is itself refined keeps its term."""
    if isinstance(base, RefinedGuide):
        return base._refine(*args, **kwargs)
    return Refined(base.lam(*args, **kwargs))


class RefinedGuide(FamilyGuide):
    """A family guide whose `lam` comes with a term that trains its base."""

    @abstractmethod
    def _refine(self, *args: Any, **kwargs: Any) -> Refined:
        """Part of a program."""

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._refine(*args, **kwargs).lam

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        refined = self._refine(*args, **kwargs)
        q = self.family(*args, **kwargs)(refined.lam)

        def write() -> None:
            emit(space.structure, q)
            emit_term(space, refined.term)

        return write

    def _sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        family, refined = self.family(*args, **kwargs), self._refine(*args, **kwargs)
        lam, term = refined.lam, share(refined.term)

        def draw(number: int) -> tuple[Tensor, Tensor]:
            u, log_q = family.rsample_and_log_prob(lam, noise.normal(number, len(lam), family.noise_dim, like=lam))
            return u, log_q - term

        return Sampler(draw, lambda u: family.frozen_log_prob(lam, u) - term)

    def stratified(self, num_samples: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        family, refined = self.family(*args, **kwargs), self._refine(*args, **kwargs)
        eps = noise.normal(num_samples, len(refined.lam), family.strata_noise_dim, like=refined.lam)
        log_weights, u, log_q = family.stratified_and_log_prob(refined.lam, eps)
        return log_weights, u, log_q - share(refined.term)
