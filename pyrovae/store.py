"""Pyro's global parameter store, kept from mixing up two models.

The store maps a name to a tensor. When a second model uses the same names, its own tensors are never registered and
the optimiser steps the first model's: nothing is trained and nothing is said. Two cures:

* `Ledger` remembers which tensor a program registers under each name, found by running it in empty stores, and
  raises `ParameterCollision` when the current store holds another tensor there;
* `isolated` runs an evaluation in a store of its own, in which bare `pyro.param` values of the caller are visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.errors import ParameterCollision

__all__ = ["Ledger", "fresh", "isolated"]


@contextmanager
def fresh() -> Iterator[dict[str, Any]]:
    """An empty parameter store; the caller's comes back afterwards, and `state` holds what was in this one."""
    with pyro.get_param_store().scope() as state:
        try:
            yield state
        finally:  # after an error, too
            state.update(pyro.get_param_store().get_state())


@contextmanager
def isolated() -> Iterator[None]:
    """A store that holds only the caller's bare `pyro.param` values; what is registered inside is forgotten.

    Tensors that modules own are left out (a module registers its own again), so two models that were trained one
    after the other can both be evaluated.
    """
    state = pyro.get_param_store().get_state()
    bare = {name: value for name, value in state["params"].items() if not isinstance(value, torch.nn.Parameter)}
    inner = {"params": bare, "constraints": {name: state["constraints"][name] for name in bare}}
    with pyro.get_param_store().scope(inner):
        yield


class Ledger:
    """The tensors that a program's modules register, by name."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self.bare: set[str] = set()

    def record(self, run: Callable[[], Any]) -> None:
        """Run the program in two empty stores: a name whose tensor is the same in both belongs to a module."""
        registered = []
        for _ in range(2):
            with fresh(), poutine.block():
                run()
                registered.append(dict(pyro.get_param_store()._params))
        first, second = registered
        self._tensors.update({name: value for name, value in first.items() if second.get(name) is value})
        self.bare |= set(first) - set(self._tensors)

    def check(self, owner: str) -> None:
        """Raise `ParameterCollision` when the current store holds another tensor under one of the names."""
        current = pyro.get_param_store()._params
        for name, tensor in self._tensors.items():
            other = current.get(name)
            if other is not None and other is not tensor:
                raise ParameterCollision(
                    f"parameter {name!r} of {owner} is taken in Pyro's store by another model's tensor, so it would "
                    "silently not be trained: call pyro.clear_param_store() first, or train inside "
                    "`with pyro.get_param_store().scope():` (pyrovae.fit does)"
                )
