"""Which arguments of a model carry the data plate's rows, and how to take or repeat those rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyrovae.errors import BatchError

__all__ = ["Batched", "RowArguments", "Shared"]

Batched = Literal["auto"] | Sequence[str | int]


class Shared:
    """Tensors of a call that belong to all rows, whatever their shapes; `values` is a dict of them."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values


pytree.register_pytree_node(
    Shared, lambda shared: (list(shared.values.values()), list(shared.values)),
    lambda tensors, names: Shared(dict(zip(names, tensors, strict=True))),
)  # fmt: skip


class RowArguments:
    """Arguments of one call, with the tensors that have one row per datum told from the rest.

    Args:
        args, kwargs: as the model is called.
        size: rows in the data plate, B.
        batched: `"auto"` takes every tensor, nested ones too, whose first dimension is B; otherwise the names
            (keywords) and positions of the arguments that carry rows.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, batched: Batched = "auto") -> None:
        self.args, self.kwargs, self.size = args, kwargs, size
        self._batched = batched
        leaves = pytree.tree_flatten((args, kwargs))[0]
        self.shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))
        if batched != "auto":
            for key in batched:
                if (isinstance(key, int) and key >= len(args)) or (isinstance(key, str) and key not in kwargs):
                    raise BatchError(f"batched names the argument {key!r}, which this call does not have")

    def _map(self, change: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def leaf(value: Any) -> Any:
            carries = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.size
            return change(value) if carries else value

        def chosen(key: str | int, value: Any) -> Any:
            taken = self._batched == "auto" or key in self._batched
            return pytree.tree_map(leaf, value, is_leaf=_is_shared) if taken else value

        args = tuple(chosen(position, value) for position, value in enumerate(self.args))
        return args, {name: chosen(name, value) for name, value in self.kwargs.items()}

    def repeat(self, times: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Every row `times` times, whole batch after whole batch (pairs with `.view(times, B)`)."""
        return self._map(lambda value: value.repeat(times, *[1] * (value.dim() - 1)))

    def rows(self, index: slice | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of some of the rows."""
        return self._map(lambda value: value[index])

    def names(self) -> list[str]:
        """Which arguments were taken to carry rows, for messages."""
        found: list[str] = []
        for key, value in [*enumerate(self.args), *self.kwargs.items()]:
            if self._batched != "auto" and key not in self._batched:
                continue
            leaves = pytree.tree_flatten(value, is_leaf=_is_shared)[0]
            if any(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.size for leaf in leaves):
                found.append(f"argument {key}" if isinstance(key, int) else repr(key))
        return found


def _is_shared(value: Any) -> bool:
    return isinstance(value, Shared)


def check_finite(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `DataError` for NaN or infinite values in any tensor argument."""
    from pyrovae.errors import DataError

    for key, value in [*enumerate(args), *kwargs.items()]:
        for leaf in pytree.tree_flatten(value)[0]:
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
                bad = int((~torch.isfinite(leaf)).sum())
                label = f"argument {key}" if isinstance(key, int) else repr(key)
                raise DataError(f"{label} has {bad} NaN or infinite values: clean or mask them before inference")
