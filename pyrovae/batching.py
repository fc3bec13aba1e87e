"""Which arguments of a model carry the data plate's rows, and how to take or repeat those rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyrovae.errors import BatchError

__all__ = ["Batched", "RowArguments", "Shared", "check_finite", "decided"]

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
        carries: which leaves do, where that is known: of some rows alone a shared tensor may have B rows by chance.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, batched: Batched = "auto",
        carries: tuple[bool, ...] | None = None,
    ) -> None:  # fmt: skip
        self.args, self.kwargs, self.size = args, kwargs, size
        self._batched = batched
        leaves = pytree.tree_flatten((args, kwargs))[0]
        self.shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))
        if batched != "auto":
            for key in batched:
                if (isinstance(key, int) and key >= len(args)) or (isinstance(key, str) and key not in kwargs):
                    raise BatchError(f"batched names the argument {key!r}, which this call does not have")
        known = _remembered(args, kwargs, size) if batched == "auto" else None
        self.carries = carries or known or tuple(c for _, c in self._leaves())

    def _leaves(self) -> Iterator[tuple[str | int, bool]]:
        """Of every leaf the argument it belongs to, and whether it looks like rows."""
        items: list[tuple[str | int, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        for key, value in items:
            taken = self._batched == "auto" or key in self._batched
            for leaf in pytree.tree_flatten(value, is_leaf=_is_shared)[0]:
                yield key, taken and _has_rows(leaf, self.size)

    def _map(self, change: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        carries = iter(self.carries)

        def leaf(value: Any) -> Any:
            return change(value) if next(carries) else value

        args = tuple(pytree.tree_map(leaf, value, is_leaf=_is_shared) for value in self.args)
        return args, {key: pytree.tree_map(leaf, value, is_leaf=_is_shared) for key, value in self.kwargs.items()}

    def repeat(self, times: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Every row `times` times, whole batch after whole batch (pairs with `.view(times, B)`)."""
        return self._map(lambda value: value.repeat(times, *[1] * (value.dim() - 1)))

    def repeated(self, times: int) -> RowArguments:
        """`repeat`, with what carries rows known."""
        return RowArguments(*self.repeat(times), self.size * times, self._batched, self.carries)

    def rows(self, index: slice | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of some of the rows."""
        return self._map(lambda value: value[index])

    def select(self, index: slice | Tensor) -> RowArguments:
        """`rows`, with what carries rows known."""
        size = len(range(self.size)[index]) if isinstance(index, slice) else len(index)
        return RowArguments(*self.rows(index), size, self._batched, self.carries)

    def with_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RowArguments:
        """Other arguments of the same nesting and sizes."""
        return RowArguments(args, kwargs, self.size, self._batched, self.carries)

    def tensors(self) -> list[Tensor]:
        """Those that carry rows."""
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            found.append(value)
            return value

        self._map(keep)
        return found

    def names(self) -> list[str]:
        """Which arguments were taken to carry rows, for messages."""
        keys = dict.fromkeys(key for (key, _), carries in zip(self._leaves(), self.carries, strict=True) if carries)
        return [f"argument {key}" if isinstance(key, int) else repr(key) for key in keys]


_decided: list[tuple[Any, tuple[bool, ...]]] = []


@contextmanager
def decided(rows: RowArguments) -> Iterator[None]:
    """Inside, calls with the arguments of some of these rows take the same tensors for rows.

    What a call of all rows shows, one of some may not: a shared tensor can be as long as a chunk.
    """
    _decided.append((pytree.tree_structure((rows.args, rows.kwargs), is_leaf=_is_shared), rows.carries))
    try:
        yield
    finally:
        _decided.pop()


def _remembered(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> tuple[bool, ...] | None:
    """What `decided` says of these arguments, where they can be some of its rows."""
    if not _decided:
        return None
    structure, carries = _decided[-1]
    leaves, found = pytree.tree_flatten((args, kwargs), is_leaf=_is_shared)
    if found != structure or not all(_has_rows(v, size) for v, c in zip(leaves, carries, strict=True) if c):
        return None
    return carries


def _has_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size


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
