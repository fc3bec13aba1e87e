"""The models and guides of `pyrovae compare`: nets sized to the data, one recipe per guide name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from pyrovae import guides, models
from pyrovae.guides.base import Guide
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.runtime import seeded

__all__ = ["FROZEN_EXTRAS", "GUIDES", "TUNED", "Net", "Recipe", "build_guide", "build_model", "hidden_width"]


def hidden_width(pixels: int) -> int:
    """Width of the two hidden layers of encoder and decoder."""
    return 128 if pixels <= 256 else 400


def build_model(pixels: int, latent_dim: int, likelihood: Any, seed: int, device: str) -> models.VAE:
    """The generative model: ReLU MLP decoder with two hidden layers; the same weights for the same seed."""
    width = hidden_width(pixels)
    with seeded(seed):
        decoder = LinearHeadDecoder(latent_dim, [width, width], (pixels,))
    return models.VAE(decoder, latent_dim, likelihood).to(device)


def _encoder(vae: models.VAE, outputs: int) -> nn.Module:
    pixels = cast(LinearHeadDecoder, vae.decoder).event_shape.numel()
    width = hidden_width(pixels)
    return MLP([pixels, width, width, outputs])


# A new encoder with so many outputs.
Net = Callable[[int], nn.Module]


def _amortized(vae: Any, net: Net, start: nn.Module | None) -> guides.Amortized:
    return guides.Amortized(vae, start if start is not None else net(2 * vae.latent_dim))


def _semi_amortized(vae: Any, net: Net, start: nn.Module | None) -> Guide:
    base = _amortized(vae, net, start)
    # Two antithetic pairs: with one draw per step, inner noise costs more than the steps gain on these small images.
    return guides.SemiAmortized(base, num_steps=10, step_size=0.05, num_samples=2, antithetic=True)


def _laplace(vae: Any, net: Net, start: nn.Module | None) -> Guide:
    if start is None:
        # The published schedule: it stops short of the mode, so the trained encoder keeps a say in where.
        return guides.Laplace(vae, net(vae.latent_dim), num_steps=4, update="damped")
    # Posteriors of small binary images span many linear pieces of the decoder: the curvature at one point is a noisy
    # stand-in for its average.
    return guides.Laplace(vae, start, num_steps=2, num_draws=8)


def _laplace_at_mode(vae: Any, net: Net, start: nn.Module | None) -> Guide:
    return guides.Laplace(vae, start, num_steps=4)


def _mixture(vae: Any, net: Net, start: nn.Module | None) -> Guide:
    return guides.Mixture([_amortized(vae, net, start), _amortized(vae, net, None)])


def _short_run(vae: Any, net: Net, start: nn.Module | None) -> Guide:
    return guides.ShortRun(vae, num_steps=20, step_size=0.3)


# From any model with a `latent_dim`, what makes its encoders, and an encoder to start from or None.
Recipe = Callable[[Any, Net, nn.Module | None], Guide]

GUIDES: dict[str, Recipe] = {
    "amortized": _amortized,
    "semi-amortized": _semi_amortized,
    "laplace": _laplace,
    "mixture": _mixture,
    "short-run": _short_run,
}


FROZEN_EXTRAS: dict[str, Recipe] = {
    "amortized (tuned)": _amortized,
    "laplace (at the mode)": _laplace_at_mode,
}

# Guides whose encoder is trained on the frozen decoder; a Laplace search needs only a start.
TUNED = ("amortized (tuned)", "semi-amortized", "mixture")


def build_guide(name: str, vae: models.VAE, seed: int, device: str, start: nn.Module | None = None) -> Guide:
    """A guide by name; with `start`, its encoder begins as a copy of that one."""
    recipes = {**GUIDES, **FROZEN_EXTRAS}
    if name not in recipes:
        raise ValueError(f"unknown guide {name!r}: choose from {', '.join(GUIDES)}")
    with seeded(seed):
        guide = recipes[name](vae, lambda outputs: _encoder(vae, outputs), copy.deepcopy(start))
    return guide.to(torch.device(device))
