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
from pyrovae.nets.masked import GreyContext, LocalPixelCNN, PixelCNN

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
            if x is not None:
                images.check(x)
            found: Tensor = pyro.sample("x", images, obs=x)
            return found


class LossyVAE(PixelCNNVAE):
    """The variational lossy autoencoder (Chen et al. 2017): a decoder that sees a small window, a flow as prior.

    Args:
        features, latent_dim, channels, pixels: as in `PixelCNNVAE`.
        num_features: feature maps F.
        window: what a pixel sees of the image: "exact", a rectangle (`nets.LocalPixelCNN`), or "stacked", what layers
            of 3 x 3 reach, with a blind spot to the upper right (`nets.PixelCNN`).
        context: "colour", or "grey" for the grey values alone of the window's pixels (three channels; the colours of
            one pixel still follow one another). What is not shown is left to z.
        above, aside, depth: of the exact window and its net; 2 each by default.
        layers: L of the stacked window, which reaches L pixels up and to the left; 6 by default.
        outputs: parameters per pixel; one logit for each channel by default.
        width: of the window's net.
        num_transforms, hidden: of the prior's flow; 0 transforms for N(0, I). In short runs a flow can take over what
            the code would say: see `diagnose.information`.

    Example:
        >>> from pyrovae.nets import LinearHeadDecoder
        >>> features = LinearHeadDecoder(2, [8], (4, 3, 3))
        >>> model = LossyVAE(features, 2, window="stacked", layers=2, context="grey", channels=3, pixels="logistic",
        ...                  outputs=20)
        >>> model(None, size=2).shape
        torch.Size([2, 3, 3, 3])
    """

    def __init__(
        self,
        features: nn.Module,
        latent_dim: int,
        *,
        num_features: int = 4,
        window: Literal["exact", "stacked"] = "exact",
        context: Literal["colour", "grey"] = "colour",
        above: int | None = None,
        aside: int | None = None,
        depth: int | None = None,
        layers: int | None = None,
        channels: int = 1,
        pixels: Literal["bernoulli", "logistic"] = "bernoulli",
        outputs: int | None = None,
        width: int = 32,
        num_transforms: int = 4,
        hidden: tuple[int, ...] = (64,),
    ) -> None:
        if context not in ("colour", "grey"):
            raise ValueError(f"context must be 'colour' or 'grey', got {context!r}")
        if context == "grey" and channels != 3:
            raise ValueError(f"a grey context is of images with 3 channels, got channels={channels}")
        shown, parameters = 1 if context == "grey" else channels, channels if outputs is None else outputs
        net: nn.Module
        if window == "exact":
            if layers is not None:
                raise ValueError("layers are of a stacked window: an exact one has sides, above=... and aside=...")
            up, left, deep = (2 if side is None else side for side in (above, aside, depth))
            net = LocalPixelCNN(shown, parameters, num_features, above=up, aside=left, width=width, depth=deep)
        elif window == "stacked":
            if any(side is not None for side in (above, aside, depth)):
                raise ValueError("above, aside and depth are of an exact window: a stacked one has layers=...")
            sizes = (3,) * (6 if layers is None else layers)
            net = PixelCNN(shown, parameters, num_features, width=width, kernel_sizes=sizes)
        else:
            raise ValueError(f"window must be 'exact' or 'stacked', got {window!r}")
        prior = AutoregressiveFlow(latent_dim, num_transforms, hidden) if num_transforms else None
        super().__init__(
            features, GreyContext(net) if context == "grey" else net, latent_dim, channels=channels, pixels=pixels,
            prior=prior,
        )  # fmt: skip
