"""Amortized variational inference (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

    q(u | x) = family(lam),   lam = encoder(x):  one network for all data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.errors import DataError
from pyrovae.families import Family
from pyrovae.guides.base import FamilyGuide, Guide
from pyrovae.guides.own_family import OwnFamily, family_traits
from pyrovae.latents import LatentSpace

__all__ = ["Amortized"]


def first_argument(*args: Any, **kwargs: Any) -> Any:
    """The data: what an encoder is called with unless told otherwise."""
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise TypeError("the guide was called without arguments, so its encoder has no input: pass the data")


class Amortized(OwnFamily):
    """An encoder gives every datum's variational parameters.

    Args:
        model: the Pyro program.
        encoder: module from the data to `lam: [B, P]`, P = `family.num_params`; None (joint mode only) learns one
            constant `lam: [1, P]`.
        family: "diagonal", "full-rank", "low-rank", "mixture", a `Family` class, or a callable of D; or a flow, built
            (`flows.IAF(dim=8, context=16)`): its weights are trained and saved with the guide.
        encoder_input: picks the encoder's input from the guide's arguments; by default the first one.
        plate, batched: as in `LatentSpace`.
        example: with `encoder=None`, arguments on which the model can be run once (parameters are made here).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x.squeeze(-1))
        >>> guide = Amortized(model, torch.nn.Linear(1, 2))
        >>> guide.sample(7, torch.zeros(3, 1))["z"].shape
        torch.Size([7, 3])
    """

    traits = GuideTraits(name="Amortized", gaussian_sites=True, gaussian_base=True, stratified=True)
    encoder: nn.Module | None

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None,
        family: str | type[Family] | Callable[[int], Family] = "diagonal",
        *,
        encoder_input: Callable[..., Any] = first_argument,
        plate: str | None = "data",
        batched: Batched = "auto",
        example: tuple[Any, ...] = (),
    ) -> None:
        require_net(encoder)
        super().__init__(model, plate=plate, batched=batched)
        self._choose(family)
        label = family if isinstance(family, str) else type(family).__name__.lower()
        name = f"Amortized({label})" if isinstance(family, str | nn.Module) else "Amortized"
        self.traits = family_traits(name, family)
        self.encoder_input = encoder_input
        self.encoder = encoder
        if encoder is not None:
            return
        if plate is not None:
            raise ValueError(
                "encoder=None learns one constant posterior, which only joint mode has: pass plate=None, or an encoder"
            )
        self.constant = nn.Parameter(constant_start(self, example))

    def _describe(self) -> str:
        return f"family={self._family_name}, "

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        encoder = self.encoder  # read once: every access registers its parameters with Pyro
        if encoder is None:
            return self.constant
        return encode(encoder, self.encoder_input(*args, **kwargs), self.family(*args, **kwargs))


def encode(encoder: nn.Module, x: Any, family: Family) -> Tensor:
    """The encoder's output, checked against the family's width."""
    lam = run_encoder(encoder, x)
    if not isinstance(lam, Tensor) or lam.dim() != 2:
        shape = tuple(lam.shape) if isinstance(lam, Tensor) else type(lam).__name__
        raise ValueError(f"the encoder must return one row of parameters per datum, [B, P], but returned {shape}")
    family._check(lam)
    return lam


def require_net(encoder: Any) -> None:
    """Raise when a guide stands where its encoder should."""
    if isinstance(encoder, Guide):
        raise TypeError(f"the encoder is a {type(encoder).__name__}: pass the net itself, guide.encoder")


def run_encoder(encoder: nn.Module, x: Any) -> Any:
    """The encoder's output; a shape or precision it cannot take is reported with what to do."""
    try:
        return encoder(x)
    except RuntimeError as error:
        if not isinstance(x, Tensor):
            raise
        own = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), x.dtype)
        if x.is_floating_point() and x.dtype != own:
            raise DataError(
                f"the encoder computes in {own}, its input is {x.dtype}: convert the data with .to({own}), or encoder "
                f"and model with .to({x.dtype})"
            ) from error
        if "shape" not in str(error):
            raise
        raise ValueError(
            f"the encoder cannot take its input of shape {tuple(x.shape)} ({error}): use a net that can, or shape the "
            "input with encoder_input=lambda x: ..."
        ) from error


def constant_start(guide: FamilyGuide, example: tuple[Any, ...]) -> Tensor:
    """The family's start for a guide without encoder."""
    space = joint_space(guide, example)
    return guide.family(*example).init(1, dtype=space.dtype, device=space.device)


def joint_space(guide: Any, example: tuple[Any, ...]) -> LatentSpace:
    """The latent space of a joint-mode model, from a first run on `example`."""
    try:
        with torch.no_grad():
            return guide.space(*example)
    except TypeError as error:
        raise TypeError(
            f"encoder=None sizes its parameters from a first run of the model, which failed ({error}): pass "
            "example=(...), arguments on which the model can be run"
        ) from error
