"""VAEs whose decoder is a PixelCNN, and the same decoder without a code: what several reproductions are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyrovae import flows, guides
from pyrovae.autoregressive import AutoregressiveFlow
from pyrovae.models import PixelCNNVAE, PixelModel, no_latents
from pyrovae.nets import LinearHeadDecoder, PixelCNN
from reproduction.experiment import Preset, Setup, Split

__all__ = ["amortized", "iaf", "models", "without_latents"]

FEATURES = 4  # maps of z beside the image


def pixelcnn(
    preset: Preset, split: Split, *, width: int, kernel_sizes: tuple[int, ...], transforms: int = 0
) -> PixelCNNVAE:
    """z to feature maps by an MLP, then a gated PixelCNN; with `transforms` an autoregressive flow for a prior."""
    features = LinearHeadDecoder(preset.latent_dim, preset.hidden, (FEATURES, *split.event_shape[1:]))
    net = PixelCNN(1, 1, FEATURES, width=width, kernel_sizes=kernel_sizes)
    prior = AutoregressiveFlow(preset.latent_dim, transforms, (2 * preset.latent_dim,)) if transforms else None
    return PixelCNNVAE(features, net, preset.latent_dim, prior=prior)


def unconditional(preset: Preset, split: Split, *, width: int, kernel_sizes: tuple[int, ...]) -> PixelModel:
    height, breadth = split.event_shape[1:]
    net = PixelCNN(1, 1, FEATURES, width=width, kernel_sizes=kernel_sizes)
    return PixelModel(net, (height, breadth), num_features=FEATURES)


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
