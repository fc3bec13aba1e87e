"""VAEs with an autoregressive decoder (Gulrajani et al. 2017; Chen et al. 2017): a code beside the pixels before.

    z ~ N(0, I_D) or an autoregressive flow,   x | z ~ prod_i p(x_i | x_{<i}, features(z))

Whatever such a decoder can tell from the pixels around is modelled there: to say it through z costs KL as well. With
all pixels before in view, q(z | x) = p(z) can be the optimum; a small window leaves what is far apart to z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.autoregressive import AutoregressiveFlow, AutoregressiveImages
from pyrovae.compat import ModelTraits
from pyrovae.errors import DataError
from pyrovae.nets.masked import LocalPixelCNN

__all__ = ["LossyVAE", "PixelCNNVAE"]


class PixelCNNVAE(PyroModule):
    """Sites "z" and "x", plate "data".

    Args:
        features: module from `[..., D]` to feature maps `[..., F, H, W]`.
        net: masked net over image and features (`nets.PixelCNN`, `nets.LocalPixelCNN`).
        latent_dim: D.
        channels: of the images.
        pixels: "bernoulli" or "logistic" (8-bit values in [-1, 1]).
        prior: an `AutoregressiveFlow`, or None for N(0, I).

    Example:
        >>> from pyrovae.nets import LinearHeadDecoder, PixelCNN
        >>> model = PixelCNNVAE(LinearHeadDecoder(2, [8], (4, 6, 6)), PixelCNN(1, 1, width=8, kernel_sizes=(3, 3)), 2)
        >>> model(None, size=3).shape
        torch.Size([3, 1, 6, 6])
    """

    traits = ModelTraits()

    def __init__(
        self,
        features: nn.Module,
        net: nn.Module,
        latent_dim: int,
        *,
        channels: int = 1,
        pixels: Literal["bernoulli", "logistic"] = "bernoulli",
        prior: AutoregressiveFlow | None = None,
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        if prior is not None and prior.dim != latent_dim:
            raise ValueError(f"the prior has {prior.dim} latents, the model {latent_dim}")
        self.features, self.net, self.latent_dim = features, net, latent_dim
        self.channels, self.pixels, self.flow = channels, pixels, prior
        like = next(features.parameters())
        self.register_buffer("origin", torch.zeros(latent_dim, dtype=like.dtype, device=like.device))

    def prior(self) -> Any:
        """p(z), event `[D]`."""
        if self.flow is not None:
            return self.flow.distribution()
        return dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        net: Callable[[Tensor, Tensor], Tensor] = self.net
        with pyro.plate("data", len(x) if x is not None else size):
            z = pyro.sample("z", self.prior())
            maps = self.features(z.reshape(-1, self.latent_dim))
            maps = maps.reshape(*z.shape[:-1], *maps.shape[1:])
            images = AutoregressiveImages(net, maps, self.channels, self.pixels)
            if x is not None and x.shape[1:] != images.event_shape:
                raise DataError(
                    f"the data have shape {tuple(x.shape)}, but the decoder makes {tuple(images.event_shape)} per "
                    "datum: reshape either"
                )
            found: Tensor = pyro.sample("x", images, obs=x)
            return found


class LossyVAE(PixelCNNVAE):
    """The variational lossy autoencoder (Chen et al. 2017): a decoder that sees a small window, a flow as prior.

    Args:
        features, latent_dim, channels, pixels: as in `PixelCNNVAE`.
        num_features: feature maps F.
        above, aside: of the window (`nets.LocalPixelCNN`).
        outputs: parameters per pixel; one logit for each channel by default.
        width, depth: of the window's net.
        num_transforms, hidden: of the prior's flow; 0 transforms for N(0, I).
    """

    def __init__(
        self,
        features: nn.Module,
        latent_dim: int,
        *,
        num_features: int = 4,
        above: int = 2,
        aside: int = 2,
        channels: int = 1,
        pixels: Literal["bernoulli", "logistic"] = "bernoulli",
        outputs: int | None = None,
        width: int = 32,
        depth: int = 2,
        num_transforms: int = 4,
        hidden: tuple[int, ...] = (64,),
    ) -> None:
        net = LocalPixelCNN(
            channels, channels if outputs is None else outputs, num_features, above=above, aside=aside, width=width,
            depth=depth,
        )  # fmt: skip
        prior = AutoregressiveFlow(latent_dim, num_transforms, hidden) if num_transforms else None
        super().__init__(features, net, latent_dim, channels=channels, pixels=pixels, prior=prior)
