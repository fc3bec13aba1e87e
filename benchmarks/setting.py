"""What the speed lines share: images of 784 pixels, 784-500-500-50 ReLU nets, our training step under stock SVI."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI
from torch import Tensor, nn

from pyrovae import data, losses, models
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.runtime import seeded

__all__ = ["Likelihood", "Nets", "images", "nets", "svi_step", "vae"]

Likelihood = Literal["bernoulli", "gaussian"]
NOISE_FLOOR = 1e-2


@dataclass
class Nets:
    """Encoder and decoder as plain modules, and the logarithm of the Gaussian noise (above its floor)."""

    encoder: nn.Module
    decoder: LinearHeadDecoder
    log_noise: nn.Parameter

    def copy(self) -> Nets:
        """The same weights again, in tensors of their own."""
        return copy.deepcopy(self)

    @property
    def noise_scale(self) -> Tensor:
        return NOISE_FLOOR + self.log_noise.exp()

    def parameters(self, likelihood: Likelihood) -> list[nn.Parameter]:
        noise = [self.log_noise] if likelihood == "gaussian" else []
        return [*self.encoder.parameters(), *self.decoder.parameters(), *noise]


def images(likelihood: Likelihood, *, side: int = 28) -> Tensor:
    """The digits that ship with the package, enlarged: `[1500, side * side]`, binary, or grey with a little noise."""
    grey = data.load("digits", binarization="none").train.reshape(-1, 1, 8, 8)
    large = F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False).flatten(1).clamp(0, 1)
    with seeded(0):
        if likelihood == "bernoulli":
            return torch.bernoulli(large)
        return large - large.mean(0) + 0.05 * torch.randn_like(large)


def nets(pixels: int, hidden: int, dim: int) -> Nets:
    """Untrained ReLU nets with two hidden layers; the encoder gives `(loc, log_var)`."""
    with seeded(0):
        decoder = LinearHeadDecoder(dim, [hidden, hidden], (pixels,))
        encoder = MLP([pixels, hidden, hidden, 2 * dim])
    return Nets(encoder, decoder, nn.Parameter(torch.tensor(-1.0)))


def vae(parts: Nets, likelihood: Likelihood) -> models.VAE:
    """The Pyro model that holds the decoder."""
    latent_dim = next(parts.decoder.parameters()).shape[1]
    model = models.VAE(parts.decoder, latent_dim, likelihood, noise_floor=NOISE_FLOOR)
    if likelihood == "gaussian":
        model.noise["log"] = parts.log_noise
    return model


def svi_step(guide: Any, optimizer: Any) -> Callable[[Tensor], float]:
    """A training step of stock SVI with the default loss; one guide at a time has Pyro's parameter store."""
    pyro.clear_param_store()
    svi = SVI(guide.model, guide, optimizer, losses.ELBO())
    return lambda x: float(svi.step(x))
