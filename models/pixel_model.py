"""A masked decoder without a code (van den Oord, Kalchbrenner & Kavukcuoglu 2016): what it can do by itself.

    p(x) = prod_i p(x_i | x_{<i})

There is nothing to infer, so `log_prob` is exact; a `PixelCNNVAE` that is no better has not used its latents. Train it
with an empty guide: `fit(model, no_latents, data)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.autoregressive import AutoregressiveImages
from pyrovae.compat import ModelTraits

__all__ = ["PixelModel"]


class PixelModel(PyroModule):
    """Site "x", plate "data".

    Args:
        net: masked net over image and features, as in `PixelCNNVAE`; it is shown learned maps that are the same for all
            images.
        size: (H, W).
        num_features: feature maps F that the net expects.
        channels, pixels: as in `PixelCNNVAE`.

    Example:
        >>> from pyrovae.nets import PixelCNN
        >>> model = PixelModel(PixelCNN(1, 1, width=8, kernel_sizes=(3, 3)), (6, 5))
        >>> model(None, size=3).shape
        torch.Size([3, 1, 6, 5])
    """

    traits = ModelTraits(latents="none")

    def __init__(
        self,
        net: nn.Module,
        size: tuple[int, int],
        *,
        num_features: int = 4,
        channels: int = 1,
        pixels: Literal["bernoulli", "logistic"] = "bernoulli",
    ) -> None:
        super().__init__()
        like = next(net.parameters())
        self.net, self.channels, self.pixels = net, channels, pixels
        # In a plain module: Pyro would unfreeze parameters of the PyroModule itself.
        self.maps = nn.ParameterDict({"x": torch.zeros(num_features, *size, dtype=like.dtype, device=like.device)})

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        number = len(x) if x is not None else int(size or 0)
        with pyro.plate("data", number):
            found: Tensor = pyro.sample("x", self._images(number, x), obs=x)
            return found

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `[B]`, nats."""
        return self._images(len(x), x).log_prob(x)

    def _images(self, number: int, x: Tensor | None) -> AutoregressiveImages:
        net: Callable[[Tensor, Tensor], Tensor] = self.net
        maps: Tensor = self.maps["x"]
        images = AutoregressiveImages(net, maps.expand(number, *maps.shape), self.channels, self.pixels)
        if x is not None:
            images.check(x)
        return images
