"""Nets of the variational ladder autoencoder (Zhao, Song & Ermon 2017): latent groups at different depths.

    decoder   h_L = f_L(z_L),   h_l = f_l(inject(h_{l+1}, v_l(z_l))),  l = L-1 .. 1,   parameters = f_0(h_1)
    encoder   e_1 = g_1(x),   e_l = g_l(e_{l-1}),   heads: q(z_1 | x) on x itself, q(z_l | x) on e_{l-1}

Group 1 is the shallowest. The latents are one vector with the deepest group first, z = (z_L, ..., z_1): the order in
which the model draws its sites.

Layers are normalised datum by datum. The original's batch normalisation makes a datum's code depend on its batch, and
fails where all codes of a batch are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["LadderDecoder", "LadderEncoder"]

_SLOPE = 0.1  # of leaky ReLUs, as in the original


class LadderDecoder(nn.Module):
    """Latent groups `[..., D]`, deepest first, to the likelihood's parameters `[..., *event_shape]`.

    Args:
        sizes: latents of each group, shallowest first.
        event_shape: of one datum; `(channels, height, width)` with both a multiple of 4 for `architecture="conv"`.
        width: of the hidden layers.
        injection: how a group enters: "gated", h + g * v(z) with a learned g that starts at 0.1, or "concat".
        architecture: "mlp", or "conv", whose last stage is two transposed convolutions.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        event_shape: Sequence[int],
        width: int = 256,
        *,
        injection: Literal["gated", "concat"] = "gated",
        architecture: Literal["mlp", "conv"] = "mlp",
    ) -> None:
        super().__init__()
        _check(sizes, event_shape, architecture)
        if injection not in ("gated", "concat"):
            raise ValueError(f"injection must be 'gated' or 'concat', got {injection!r}")
        self.sizes, self.event_shape = tuple(sizes), torch.Size(event_shape)
        self.deepest = _dense(sizes[-1], width)
        self.inject = nn.ModuleList(_Inject(size, width, injection) for size in sizes[:-1])
        self.blocks = nn.ModuleList(_dense(width, width) for _ in sizes[:-1])
        self.out = _conv_out(width, self.event_shape) if architecture == "conv" else nn.Sequential(
            _dense(width, width), nn.Linear(width, self.event_shape.numel())
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        lead = z.shape[:-1]
        *others, deepest = z.reshape(-1, z.shape[-1]).split(self.sizes[::-1], dim=-1)[::-1]
        h = self.deepest(deepest)
        for inject, block, group in zip(self.inject[::-1], self.blocks[::-1], others[::-1], strict=True):
            h = block(inject(h, group))
        return self.out(h).reshape(*lead, *self.event_shape)


class LadderEncoder(nn.Module):
    """Data `[B, *event_shape]` to `(loc, log_var)` of all groups, `[B, 2 D]`, deepest group first in both.

    Args as in `LadderDecoder`. `trunk(x)` gives the deterministic features e_1 .. e_{L-1}.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        event_shape: Sequence[int],
        width: int = 256,
        *,
        architecture: Literal["mlp", "conv"] = "mlp",
    ) -> None:
        super().__init__()
        _check(sizes, event_shape, architecture)
        self.sizes, event_shape = tuple(sizes), torch.Size(event_shape)

        def reader() -> nn.Module:
            if architecture == "conv":
                return _conv_in(event_shape, width)
            return nn.Sequential(nn.Flatten(), _dense(event_shape.numel(), width), _dense(width, width))

        self.stages = nn.ModuleList(reader() if depth == 0 else _dense(width, width) for depth in range(len(sizes) - 1))
        self.shallow = reader()  # reads x by itself: what it needs is not what deeper groups do
        self.heads = nn.ModuleList(
            nn.Sequential(_dense(width, width), nn.Linear(width, 2 * size)) for size in self.sizes
        )

    def trunk(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        features = [self.shallow(x), *self.trunk(x)]
        parts = [head(h).chunk(2, dim=-1) for head, h in zip(self.heads, features, strict=True)]
        return torch.cat([torch.cat([part[k] for part in parts[::-1]], -1) for k in (0, 1)], -1)


class _Inject(nn.Module):
    """A latent group into the features of the group above it."""

    def __init__(self, size: int, width: int, injection: str) -> None:
        super().__init__()
        self.value = _dense(size, width)
        self.gate = nn.Parameter(torch.full((width,), 0.1)) if injection == "gated" else None
        self.mix = nn.Linear(2 * width, width) if injection == "concat" else None

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        v = self.value(z)
        return h + self.gate * v if self.mix is None else self.mix(torch.cat([h, v], -1))


def _dense(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, after), nn.RMSNorm(after), nn.LeakyReLU(_SLOPE))


def _conv_in(event_shape: torch.Size, width: int) -> nn.Sequential:
    channels, height, breadth = event_shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 4, 2, 1), nn.GroupNorm(4, 32), nn.LeakyReLU(_SLOPE),
        nn.Conv2d(32, 64, 4, 2, 1), nn.GroupNorm(4, 64), nn.LeakyReLU(_SLOPE),
        nn.Flatten(), _dense(64 * (height // 4) * (breadth // 4), width),
    )  # fmt: skip


def _conv_out(width: int, event_shape: torch.Size) -> nn.Sequential:
    channels, height, breadth = event_shape
    return nn.Sequential(
        _dense(width, 64 * (height // 4) * (breadth // 4)), nn.Unflatten(1, (64, height // 4, breadth // 4)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.GroupNorm(4, 32), nn.LeakyReLU(_SLOPE),
        nn.ConvTranspose2d(32, channels, 4, 2, 1),
    )  # fmt: skip


def _check(sizes: Sequence[int], event_shape: Sequence[int], architecture: str) -> None:
    if len(sizes) < 1 or min(sizes) < 1:
        raise ValueError(f"a ladder needs groups of at least one latent, shallowest first, got {list(sizes)}")
    if architecture not in ("mlp", "conv"):
        raise ValueError(f"architecture must be 'mlp' or 'conv', got {architecture!r}")
    if architecture == "conv" and (len(event_shape) != 3 or event_shape[1] % 4 or event_shape[2] % 4):
        raise ValueError(
            f"conv nets take images (channels, height, width) with sides divisible by 4, got {tuple(event_shape)}"
        )
