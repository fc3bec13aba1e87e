"""Masked convolutions: pixel decoders in which a pixel sees only those before it in raster order.

A mask "A" hides the pixel itself, "B" shows it; rows below and pixels to the right are hidden by both. Only the image's
channels are masked: feature maps made of the latents may be looked at everywhere (van den Oord, Kalchbrenner &
Kavukcuoglu 2016).

One A layer and L - 1 B layers of size 3 x 3 see, away from the border, L pixels to the left and, j rows up, columns
from -L to +j: the triangle to the upper right is PixelCNN's blind spot.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

__all__ = ["GreyContext", "LocalPixelCNN", "MaskedConv2d", "PixelCNN"]


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees what lies before its pixel.

    Args:
        channels: of the input; the first `masked` of them are masked.
        out_channels: of the output.
        kernel_size: odd, or a pair of odd numbers.
        kind: "A" or "B".
        masked: number of masked channels; all by default.
    """

    mask: Tensor

    def __init__(
        self, channels: int, out_channels: int, kernel_size: int | tuple[int, int], kind: Literal["A", "B"],
        *, masked: int | None = None,
    ) -> None:  # fmt: skip
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if kind not in ("A", "B"):
            raise ValueError(f"kind must be 'A' or 'B', got {kind!r}")
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        super().__init__(channels, out_channels, (height, width), padding=(height // 2, width // 2))
        mask = torch.ones(1, channels, height, width)
        hidden = mask[:, : channels if masked is None else masked]
        hidden[:, :, height // 2 + 1 :] = 0
        hidden[:, :, height // 2, width // 2 + (kind == "B") :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class PixelCNN(nn.Module):
    """Gated residual PixelCNN with features of the latents beside the image.

    Args:
        channels: of the image.
        outputs: parameters per pixel.
        features: feature maps of the latents.
        width: of the hidden layers.
        kernel_sizes: one a layer; the first has mask A.

    Input: image `[B, channels, H, W]` and features `[B, features, H, W]`; output `[B, outputs, H, W]`.
    """

    def __init__(
        self, channels: int, outputs: int, features: int = 4, *, width: int = 32,
        kernel_sizes: tuple[int, ...] = (7, 7, 5, 5, 3, 3),
    ) -> None:  # fmt: skip
        super().__init__()
        if not kernel_sizes:
            raise ValueError("a PixelCNN needs at least one layer")
        first, *others = kernel_sizes
        self.first = MaskedConv2d(channels + features, width, first, "A", masked=channels)
        self.layers = nn.ModuleList(MaskedConv2d(width, 2 * width, size, "B") for size in others)
        self.out = nn.Sequential(nn.ELU(), nn.Conv2d(width, width, 1), nn.ELU(), nn.Conv2d(width, outputs, 1))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        h = self.first(torch.cat([x, features], 1))
        for layer in self.layers:
            value, gate = layer(nn.functional.elu(h)).chunk(2, dim=1)
            h = h + value.tanh() * gate.sigmoid()
        return self.out(h)


class LocalPixelCNN(nn.Module):
    """One exact window and 1 x 1 convolutions: a pixel sees `above` rows of `2 * aside + 1` pixels over it and `aside`
    pixels to its left, and nothing else of the image (Chen et al. 2017).

    Args:
        channels, outputs, features, width: as in `PixelCNN`.
        above, aside: of the window; 0 and 0 see no pixel, a factorised decoder.
        depth: number of 1 x 1 layers.
    """

    def __init__(
        self, channels: int, outputs: int, features: int = 4, *, above: int = 2, aside: int = 2, width: int = 32,
        depth: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        if above < 0 or aside < 0:
            raise ValueError(f"a window has no negative sides, got above={above}, aside={aside}")
        window = (2 * above + 1, 2 * aside + 1)
        self.first = MaskedConv2d(channels + features, width, window, "A", masked=channels)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.ELU(), nn.Conv2d(width, width, 1)]
        self.rest = nn.Sequential(*layers, nn.ELU(), nn.Conv2d(width, outputs, 1))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.rest(self.first(torch.cat([x, features], 1)))


class GreyContext(nn.Module):
    """Shows a masked net the grey values of colour images: what the colours are is left to z (Chen et al. 2017).

    Args:
        net: masked net of one channel (`PixelCNN`, `LocalPixelCNN`); its outputs are the parameters of three.

    Input: image `[B, 3, H, W]` and features `[B, F, H, W]`; output as the net's.

    Example:
        >>> net = GreyContext(PixelCNN(1, 20, features=2, width=8, kernel_sizes=(3, 3)))
        >>> net(torch.zeros(5, 3, 4, 4), torch.zeros(5, 2, 4, 4)).shape
        torch.Size([5, 20, 4, 4])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        if x.shape[-3] != 3:
            raise ValueError(f"grey values are made of 3 colours, got images with {x.shape[-3]} channels")
        red, green, blue = x.split(1, -3)
        return self.net(0.299 * red + 0.587 * green + 0.114 * blue, features)
