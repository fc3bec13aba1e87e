"""Fully connected encoders and decoders.

A decoder that ends in a linear layer may say so with `trunk` (latents to features) and `head` (the last `nn.Linear`);
Laplace guides then differentiate the trunk only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MLP", "LinearHeadDecoder", "Table"]


class MLP(nn.Sequential):
    """Fully connected net on flattened inputs: linear layers with an activation between them.

    Args:
        sizes: widths, input and output included.
        activation: module class between layers.

    Example:
        >>> MLP([64, 32, 8])(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 8])
    """

    def __init__(self, sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> None:
        if len(sizes) < 2:
            raise ValueError(f"an MLP needs an input and an output width, got {list(sizes)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), activation()]
        super().__init__(*layers[:-1])


class LinearHeadDecoder(nn.Module):
    """MLP decoder: `trunk` (hidden layers) and `head` (linear), output reshaped to `event_shape`.

    Args:
        latent_dim: D.
        hidden: widths of the hidden layers, at least one.
        event_shape: shape of one datum's parameters.
        activation: module class between layers.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden: Sequence[int],
        event_shape: Sequence[int],
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("LinearHeadDecoder needs at least one hidden layer")
        self.event_shape = torch.Size(event_shape)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([latent_dim, *hidden]):
            layers += [nn.Linear(before, after), activation()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(hidden[-1], self.event_shape.numel())

    def forward(self, z: Tensor) -> Tensor:
        """`[..., D]` to `[..., *event_shape]`."""
        return self.head(self.trunk(z)).reshape(*z.shape[:-1], *self.event_shape)


class Table(nn.Module):
    """One row of parameters per datum, `[B, P]`, in the place of an encoder: for those B data, in their order.

    Args:
        rows: the first values, `[B, P]`.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.rows):
            raise ValueError(f"this table holds the parameters of {len(self.rows)} data, but was called with {len(x)}")
        return self.rows
