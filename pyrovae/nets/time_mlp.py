r"""A net that is told the time: what noise is in x_t, for diffusions of vectors.

.. math::
    \mathrm{embed}(t) = \big( \sin(t \omega_j), \cos(t \omega_j) \big)_j, \qquad \omega_j = 10000^{-j / J}

goes, through a layer of its own, into every hidden layer (Vaswani et al. 2017; Ho, Jain & Abbeel 2020).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["TimeMLP"]


class TimeMLP(nn.Module):
    """Fully connected, from x `[B, *event]` and steps `[B]` to `[B, *event]`.

    Args:
        event_shape: of x.
        hidden: widths of the hidden layers, at least one.
        embedding: number of sines and cosines, even.
        activation: module class between layers.

    Example:
        >>> TimeMLP((8, 8), hidden=(32, 32))(torch.zeros(5, 8, 8), torch.arange(1, 6)).shape
        torch.Size([5, 8, 8])
    """

    frequencies: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: Sequence[int] = (128, 128),
        *,
        embedding: int = 32,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("TimeMLP needs at least one hidden layer")
        if embedding < 2 or embedding % 2:
            raise ValueError(f"an embedding has as many sines as cosines, got {embedding} numbers")
        size = math.prod(event_shape)
        self.activation = activation()
        pairs = list(itertools.pairwise([size, *hidden]))
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairs)
        self.times = nn.ModuleList(nn.Linear(embedding, after) for _, after in pairs)
        self.head = nn.Linear(hidden[-1], size)
        half = embedding // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t.to(x.dtype).unsqueeze(-1) * self.frequencies
        embedded = torch.cat([phase.sin(), phase.cos()], -1)
        hidden = x.flatten(1)
        for layer, time in zip(self.layers, self.times, strict=True):
            hidden = self.activation(layer(hidden) + time(embedded))
        found: Tensor = self.head(hidden)
        return found.view(x.shape)
