"""What guides that draw by chains share: one chain per particle, and densities on an augmented space.

A chain whose steps are deterministic given its noise (momenta, refreshments) has a density of everything it drew. With
r the density of a reversed chain that starts at the end point u_K,

    log p(x, u_K) - log q,     log q = log q(u_0, noise) - log r(noise | u_K)

is an importance weight: its exponential has the mean p(x), so its mean is a lower bound of log p(x). The density of u_K
alone is not known.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.runtime import get_plates
from torch import Tensor

from pyrovae import noise
from pyrovae.compat import GuideTraits
from pyrovae.emission import emit_weighted
from pyrovae.errors import NoDensityError
from pyrovae.guides.base import DensityGuide, FamilyGuide, Sampler
from pyrovae.guides.refined import start_of
from pyrovae.guides.side_term import share
from pyrovae.latents import LatentSpace

__all__ = ["ChainGuide", "FromBase", "particles"]


def particles(name: str, space: LatentSpace) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many chains Pyro's particle plate asks for, and what shapes their results `[P, B, ...]` for it.

    Plain code in a guide runs once for all vectorised particles, so it must be told to run one chain for each.
    """
    frames = [frame for frame in get_plates() if frame.vectorized]
    if len(frames) > 1:
        raise NotImplementedError(
            f"{name} inside the plates {[frame.name for frame in frames]}: only Pyro's particle plate is known"
        )
    if not frames:
        return 1, lambda value: value[0]
    padding = -1 - frames[0].dim - (0 if space.plate is None else 1)
    return frames[0].size, lambda value: value.reshape(len(value), *[1] * padding, *value.shape[1:])


class ChainGuide(DensityGuide):
    """A guide that draws `u` together with the density of the whole chain."""

    @abstractmethod
    def _chain(self, *args: Any, **kwargs: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Number S -> end points `[S, B, D]` and log q of the chains `[S, B]`; part of a program."""

    def _posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise NoDensityError(
            f"{type(self).__name__} knows the density of its whole chain, not that of the end point: use "
            "guide.log_weights (which are valid importance weights), or guide.sample for draws"
        )

    def _sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        return Sampler(self._chain(*args, **kwargs), self._posterior, chain=True)

    def stratified(self, num_samples: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Equally weighted draws: log-weights `[S, B]`, draws `[S, B, D]`, log q `[S, B]`."""
        u, log_q = self._chain(*args, **kwargs)(num_samples)
        return torch.full_like(log_q, -math.log(num_samples)), u, log_q

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        number, shape = particles(type(self).__name__, space)
        u, log_q = self._chain(*args, **kwargs)(number)
        return lambda: emit_weighted(space.structure, shape(u), shape(log_q))


class FromBase(ChainGuide):
    """A chain whose steps, learnt with it, begin at the draws of a guide with a Gaussian family.

    Args:
        base: the start.
        num_steps: K.
        step_size: where the step sizes begin, in standard deviations of the base.
        max_step_size: they stay below, by a sigmoid.
    """

    traits = GuideTraits(name="chain", marginal=False, stratified=True)

    def __init__(self, base: FamilyGuide, num_steps: int, step_size: float, max_step_size: float) -> None:
        name = type(self).__name__
        if not isinstance(base, FamilyGuide) or not base.traits.gaussian_sites:
            raise TypeError(
                f"{name} starts from a guide with a Gaussian family (Amortized with 'diagonal', 'full-rank' or "
                f"'low-rank', SemiAmortized or LocalSVI on one), got {base!r}"
            )
        if not 0 < step_size < max_step_size:
            raise ValueError(f"step_size must lie between 0 and max_step_size={max_step_size:g}, got {step_size:g}")
        super().__init__(base.model, plate=base.plate, batched=base.batched)
        self.base, self.num_steps, self.max_step_size = base, num_steps, max_step_size

    def _logit(self, value: float, highest: float = 1.0) -> Tensor:
        """What a sigmoid takes to `value / highest`; the base's dtype and device."""
        logit = torch.tensor(math.log(value / (highest - value)), dtype=torch.double)
        return logit.to(next(self.base.parameters(), torch.zeros(())))

    def _describe(self) -> str:
        return f"base={self.base!r}, num_steps={self.num_steps}, "

    def _start(self, *args: Any, **kwargs: Any) -> tuple[Any, Callable[[int], tuple[Tensor, Tensor]]]:
        """The base's distribution, and number S -> draws and log q of the base."""
        family, (lam, term) = self.base.family(*args, **kwargs), start_of(self.base, *args, **kwargs)
        extra = share(term)

        def draw(number: int) -> tuple[Tensor, Tensor]:
            eps = noise.normal(number, len(lam), family.noise_dim, like=lam)
            u, log_q = family.rsample_and_log_prob(lam, eps)
            return u, log_q - extra

        q = family(lam)
        for part in (q, getattr(q, "base_dist", q)):
            part._validate_args = False  # a chain that runs away costs its own weight, not everyone's: see `weigh`
        return q, draw
