"""The contract every guide keeps.

A guide is a `PyroModule` whose root name is "guide", so its parameters are `guide.*` and never collide with the
model's. It opens the model's own data plate, never stores a batch size and never owns the model's parameters.

    guide(*args)                          the Pyro program, for stock SVI
    guide.posterior(*args)                Distribution over u, batch [B], event [D]
    guide.draws(num_samples, *args)       u: [S, B, D], unconstrained
    guide.sample(num_samples, *args)      site -> [S, B, ...] in the model's own space
    guide.log_weights(num_samples, *args) log p(x, z_s) - log q(z_s | x), [S, B], nats
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae import handlers, noise, store
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.emission import emit
from pyrovae.errors import NoDensityError, ScaleError
from pyrovae.families import Family
from pyrovae.latents import LatentSpace, LogJoint
from pyrovae.runtime import evaluating, keep_frozen, preserve_rng

__all__ = ["DensityGuide", "FamilyGuide", "Guide", "Sampler", "weigh"]

_BLOCK_ROWS = 1 << 16  # rows scored at once
_BLOCK_SAMPLES = 1000  # draws at once under per-datum noise: fixed, so that chunks of data change no number


class Guide(PyroModule):
    """What all guides share: the latent space, the collision check, the data plate and draws.

    Args:
        model: the Pyro program; kept, not owned.
        plate: name of the data plate, or None for joint mode.
        batched: which arguments carry rows, as `LatentSpace` takes it.
    """

    traits: GuideTraits

    def __init__(self, model: Callable[..., Any], *, plate: str | None = "data", batched: Batched = "auto") -> None:
        super().__init__("guide")
        self.__dict__["model"] = model  # not a submodule: the model's parameters are not the guide's
        self.plate, self.batched = plate, batched
        self.__dict__["_space"] = None
        self.__dict__["_ledger"] = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._describe()}plate={self.plate!r})"

    def _describe(self) -> str:
        return ""

    def space(self, *args: Any, **kwargs: Any) -> LatentSpace:
        """The model's latent space, found on the first call."""
        if self._space is None:
            self.__dict__["_space"] = LatentSpace(
                self.model, *args, plate=self.plate, batched=self.batched, **kwargs
            )
        return self._space

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """The Pyro program."""
        self.check_parameters(*args, **kwargs)
        self._run(args, kwargs)

    def check_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ParameterCollision` when Pyro's store holds another model's tensor under one of our names."""
        if self._ledger is None:
            ledger = store.Ledger()

            def both() -> None:
                self._run(args, kwargs)
                self.model(*args, **kwargs)

            with preserve_rng(), torch.no_grad(), evaluating(self.model, self):
                ledger.record(both)
            self.__dict__["_ledger"] = ledger
        self._ledger.check(f"{type(self).__name__} or its model")

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The program without the check."""
        self._program(self.space(*args, **kwargs), args, kwargs)

    def _program(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        write = self._prepare(space, args, kwargs)  # before the plate opens: inner runs of the model open it too
        plate = space.read_plate(*args, **kwargs)
        with plate.open() if plate is not None else nullcontext():
            write()

    @abstractmethod
    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Everything up to the sample statements; returns what writes them."""

    @abstractmethod
    def _draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """`[S, B, D]`."""

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Run hooks for a caller outside any Pyro program: unseen by traces; store and flags stay as they were."""
        with store.isolated(), poutine.block(), keep_frozen(self.model, self):
            yield

    @contextmanager
    def in_program(self) -> Iterator[None]:
        """Run hooks as part of a Pyro program, so that SVI sees the guide's parameters."""
        with self._pyro_context:
            yield

    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The variational posterior over `u`, batch `[B]`, event `[D]`."""
        raise NoDensityError(
            f"{type(self).__name__} has draws but no density: use guide.sample for draws, and another guide (or AIS) "
            "for evidence and k-hat"
        )

    def log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x, z_s) - log q(z_s | x), `[S, B]`, nats."""
        return self.posterior(*args, **kwargs)  # raises NoDensityError with its advice

    def draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Draws in unconstrained coordinates, `[S, B, D]`, without gradient."""
        _at_least_one(num_samples)
        with self._aside(), torch.no_grad():
            return self._draws(num_samples, *args, **kwargs)

    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws in the model's own space: site -> `[S, B, *event]` (joint mode: `[S, *batch, *event]`); no gradient."""
        return self.space(*args, **kwargs).constrain(self.draws(num_samples, *args, **kwargs))


class Sampler(NamedTuple):
    """A posterior found once, to be drawn from many times.

    Attributes:
        draw: number S -> reparameterised draws `[S, B, D]` and log q at them `[S, B]`.
        frozen_log_prob: u -> log q(u) with q's parameters held constant: gradient flows through `u` alone.
        chain: draws are ends of chains, some of which may run away.
    """

    draw: Callable[[int], tuple[Tensor, Tensor]]
    frozen_log_prob: Callable[[Tensor], Tensor]
    chain: bool = False


def weigh(sampler: Sampler, log_joint: LogJoint, num_samples: int) -> Tensor:
    """log p(x, u_s) - log q(u_s) at draws of a posterior, `[S, B]`; block by block, to bound memory.

    A chain that has run away to infinity has weight zero, with a warning (in training it stays NaN): the mean of the
    weights can only fall by that, so bounds remain bounds.
    """
    block = _BLOCK_SAMPLES if noise.active() else max(1, _BLOCK_ROWS // log_joint.rows.size)
    parts = []
    for start in range(0, num_samples, block):
        u, log_q = sampler.draw(min(block, num_samples - start))
        weights = log_joint(u) - log_q
        if sampler.chain and not torch.is_grad_enabled():
            weights = _without_runaways(weights)
        parts.append(weights)
    return torch.cat(parts)


def _without_runaways(weights: Tensor) -> Tensor:
    lost = weights.isnan()
    lost &= ~lost.all(0)  # all of a datum's: more is wrong than a step size
    if not lost.any():
        return weights
    warnings.warn(
        f"{int(lost.sum())} of {lost.numel()} chains ran away to infinity and count with weight zero: train the guide, "
        "or take smaller steps",
        stacklevel=4,
    )
    return weights.masked_fill(lost, -torch.inf)


class DensityGuide(Guide):
    """A guide with a density: subclasses give `_posterior` and `_sampler`."""

    @abstractmethod
    def _posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Distribution over `u`, batch `[B]`, event `[D]`."""

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        q = self._posterior(*args, **kwargs)
        return lambda: emit(space.structure, q)

    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        with self._aside():
            return self._posterior(*args, **kwargs)

    def _weighted(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """`log_weights` as part of a program (losses call it)."""
        log_joint = self.space(*args, **kwargs).bind(*args, **kwargs)
        return weigh(self._sampler(*args, **kwargs), log_joint, num_samples)

    @abstractmethod
    def _sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        """The posterior, found (refined) once, ready to be drawn from; part of a program (losses call it)."""

    def _draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        return self._sampler(*args, **kwargs).draw(num_samples)[0]

    def log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x, z_s) - log q(z_s | x), `[S, B]`, nats; the posterior is found once, then drawn from S times.

        Raises:
            ScaleError: a KL weight or a user's scale is in force.
        """
        _at_least_one(num_samples)
        if handlers.kl_weight() != 1.0:
            raise ScaleError(f"importance weights under a KL weight of {handlers.kl_weight():g}: evaluate with 1")
        with self._aside():
            self.space(*args, **kwargs).require_unit_scale(*args, **kwargs)
            return self._weighted(num_samples, *args, **kwargs)


class FamilyGuide(DensityGuide):
    """A density guide whose posterior is a `Family` at `lam(*args): [B, P]`."""

    @abstractmethod
    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        """The variational parameters, `[B, P]`."""

    @abstractmethod
    def family(self, *args: Any, **kwargs: Any) -> Family:
        """The family over the model's D latents."""

    def _posterior(self, *args: Any, **kwargs: Any) -> Any:
        return self.family(*args, **kwargs)(self.lam(*args, **kwargs))

    def _sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        family, lam = self.family(*args, **kwargs), self.lam(*args, **kwargs)

        def draw(number: int) -> tuple[Tensor, Tensor]:
            return family.rsample_and_log_prob(lam, noise.normal(number, len(lam), family.noise_dim, like=lam))

        return Sampler(draw, lambda u: family.frozen_log_prob(lam, u))

    def stratified(self, num_samples: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted draws, one per component: log-weights `[R, B]`, draws `[R, B, D]`, log q at them `[R, B]`."""
        family, lam = self.family(*args, **kwargs), self.lam(*args, **kwargs)
        eps = noise.normal(num_samples, len(lam), family.strata_noise_dim, like=lam)
        return family.stratified_and_log_prob(lam, eps)


def _at_least_one(num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


