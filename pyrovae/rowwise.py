"""Distributions of groups of rows, put together to one of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["RowWise"]


class RowWise(TorchDistribution):
    """Batch `[B]`, event `[D]`: row b is a row of one of several distributions.

    Args:
        parts: distributions of batch `[B_g]` and one event shape `[D]`.
        rows: which rows those of each are, `[B_g]`; together 0 to B - 1, each once.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, parts: Sequence[Any], rows: Sequence[Tensor]) -> None:
        self.parts, self.rows = list(parts), list(rows)
        order = torch.cat(self.rows)
        self.back = order.argsort()  # from the order of the parts to that of the rows
        super().__init__(order.shape, self.parts[0].event_shape, validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        draws = torch.cat([part.sample(sample_shape) for part in self.parts], -2)
        return draws[..., self.back, :]

    def log_prob(self, value: Tensor) -> Tensor:
        found = [part.log_prob(value[..., rows, :]) for part, rows in zip(self.parts, self.rows, strict=True)]
        return torch.cat(found, -1)[..., self.back]
