"""What `fit` goes through, batch by batch: rows of tensors in random order, or sentences of about one length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.errors import DataError

if TYPE_CHECKING:
    from pyrovae.data.text import Sentences

__all__ = ["Rows"]


class Rows:
    """Data of the same number of rows each.

    Args:
        data: a tensor `[N, ...]`, a tuple of them, or `pyrovae.data.Sentences`.
        what: what messages call it.

    Attributes:
        tensors: of the data.
        sentences: the data where they are sentences, else None.

    Raises:
        TypeError, DataError: what is no such thing; no rows, numbers that differ, values that are not finite.
    """

    def __init__(self, data: Any, what: str = "data") -> None:
        self.sentences: Sentences | None = data if hasattr(data, "tokens") else None
        self.tensors: tuple[Tensor, ...] = data if isinstance(data, tuple) else (getattr(data, "tokens", data),)
        if not self.tensors or not all(isinstance(t, Tensor) and t.dim() > 0 for t in self.tensors):
            raise TypeError(
                f"{what} must be a tensor [N, ...], a tuple of them, or sentences (of a data set: images.train)"
            )
        sizes = {len(t) for t in self.tensors}
        if len(sizes) != 1 or 0 in sizes:
            raise DataError(f"the {what} tensors must have the same, positive number of rows, got {sorted(sizes)}")
        if any(tensor.is_floating_point() and not torch.isfinite(tensor).all() for tensor in self.tensors):
            raise DataError(f"{what} has NaN or infinite values: clean or mask them before training")

    def __len__(self) -> int:
        return len(self.tensors[0])

    def order(self, batch_size: int) -> Tensor:
        """A random order of all rows, `[N]`: an epoch's batches, one after another, the ragged one last."""
        if self.sentences is not None:
            return self.sentences.order(batch_size)
        return torch.randperm(len(self))

    def in_order(self, batch_size: int) -> list[Tensor]:
        """All rows once, the same way every time."""
        if self.sentences is not None:
            return self.sentences.batches(batch_size)
        return list(torch.arange(len(self)).split(batch_size))

    def take(self, index: Tensor) -> tuple[Tensor, ...]:
        """Some rows; of sentences, up to the end of the longest."""
        if self.sentences is not None:
            return (self.sentences.rows(index),)
        return tuple(tensor[index] for tensor in self.tensors)
