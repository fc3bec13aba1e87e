r"""Many small nets side by side, of which every row goes through one: the maps of an atlas.

.. math::
    h_0 = z, \qquad h_k = \phi(h_{k-1} W_{k,c} + b_{k,c}), \qquad \mathrm{Lip}(c) \le \prod_k \|W_{k,c}\|_2

for activations of slope at most 1 (Tanh, ReLU, Softplus).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ChartMLP"]


class ChartMLP(nn.Module):
    """N fully connected nets of the same widths; a row's net is chosen by an index.

    Where rows and indices broadcast (all nets at all rows: indices `[N, 1]`, rows `[B, i]`), it is one batched product.

    Args:
        num_charts: N.
        sizes: widths, input and output included.
        activation: module class between layers; smooth ones make smooth charts.

    Example:
        >>> nets = ChartMLP(3, [2, 16, 5])
        >>> nets(torch.zeros(7, 2), torch.arange(3).unsqueeze(1)).shape
        torch.Size([3, 7, 5])
    """

    def __init__(self, num_charts: int, sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        if num_charts < 1 or len(sizes) < 2:
            raise ValueError(f"ChartMLP needs a chart and an input and an output width, got {num_charts}, {sizes}")
        self.num_charts, self.sizes = num_charts, tuple(sizes)
        self.activation = activation()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(before)  # as in nn.Linear
            self.weights.append(torch.empty(num_charts, before, after).uniform_(-bound, bound))
            self.biases.append(torch.empty(num_charts, after).uniform_(-bound, bound))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Rows `[*R, i]` and indices `[*C]`, whose batch dims broadcast, to `[*(R, C), o]`."""
        lead = max(z.dim() - 1, c.dim())
        hidden, c = z.view(*[1] * (lead + 1 - z.dim()), *z.shape), c.view(*[1] * (lead - c.dim()), *c.shape)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if k:
                hidden = self.activation(hidden)
            hidden = torch.einsum("...i,...io->...o", hidden, weight[c]) + bias[c]
        return hidden

    def lipschitz(self) -> Tensor:
        """Product of the layers' spectral norms, `[N]`."""
        norms = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in self.weights])
        return norms.prod(0)
