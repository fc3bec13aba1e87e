"""VAEs whose decoder is a PixelCNN, and the same decoder without a code: what several reproductions are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae import flows, guides
from pyrovae.autoregressive import AutoregressiveFlow, AutoregressiveImages
from pyrovae.models import PixelCNNVAE, no_latents
from pyrovae.nets import LinearHeadDecoder, PixelCNN
from reproduction.experiment import Preset, Setup, Split

__all__ = ["amortized", "iaf", "models", "without_latents"]

FEATURES = 4  # maps of z beside the image


class Unconditional(PyroModule):
    """p(x) of the decoder alone: feature maps that do not depend on a code. Site "x", plate "data"."""

    def __init__(self, net: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.maps = nn.ParameterDict({"x": torch.zeros(FEATURES, *shape)})

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", self._images(len(x)), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `[B]`, nats."""
        return self._images(len(x)).log_prob(x)

    def _images(self, number: int) -> AutoregressiveImages:
        maps: Tensor = self.maps["x"]
        return AutoregressiveImages(self.net, maps.expand(number, *maps.shape))


def pixelcnn(
    preset: Preset, split: Split, *, width: int, kernel_sizes: tuple[int, ...], transforms: int = 0
) -> PixelCNNVAE:
    """z to feature maps by an MLP, then a gated PixelCNN; with `transforms` an autoregressive flow for a prior."""
    features = LinearHeadDecoder(preset.latent_dim, preset.hidden, (FEATURES, *split.event_shape[1:]))
    net = PixelCNN(1, 1, FEATURES, width=width, kernel_sizes=kernel_sizes)
    prior = AutoregressiveFlow(preset.latent_dim, transforms, (2 * preset.latent_dim,)) if transforms else None
    return PixelCNNVAE(features, net, preset.latent_dim, prior=prior)


def unconditional(preset: Preset, split: Split, *, width: int, kernel_sizes: tuple[int, ...]) -> Unconditional:
    return Unconditional(PixelCNN(1, 1, FEATURES, width=width, kernel_sizes=kernel_sizes), split.event_shape[1:])


def models(width: int, kernel_sizes: tuple[int, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(`pixelcnn`, `unconditional`) of one size."""
    return (
        partial(pixelcnn, width=width, kernel_sizes=kernel_sizes),
        partial(unconditional, width=width, kernel_sizes=kernel_sizes),
    )


def amortized(parts: Setup) -> guides.Amortized:
    return guides.Amortized(parts.model, parts.encoder(2 * parts.dim))


def iaf(parts: Setup) -> guides.Amortized:
    flow = flows.IAF(dim=parts.dim, num_transforms=4, context=parts.dim, hidden=[2 * parts.dim])
    return guides.Amortized(parts.model, parts.encoder(flow.num_params), family=flow)


def without_latents(parts: Setup) -> Any:
    return no_latents
