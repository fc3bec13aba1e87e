"""What a program is, as a fingerprint: weights, buffers, plain attributes, code and what a closure holds.

Numbers that were computed by one program are not taken for those of another: finished parts of an evaluation, and
reference posteriors, carry it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyrovae.provenance import fingerprint

__all__ = ["program_identity"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def program_identity(*programs: Any) -> str:
    """A hash of models and guides as they are now, with the bare `pyro.param` values that their code names.

    Of other objects in a closure (a data loader, a tokeniser) the class and the plain attributes count.
    """
    digest, found = hashlib.sha256(), _Description()
    for program in programs:
        for item in found.of(program):
            digest.update(repr(item).encode())
    return digest.hexdigest()


class _Description:
    """A program taken apart, every object once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        params = pyro.get_param_store()._params
        self.bare = {name: value for name, value in params.items() if not isinstance(value, nn.Parameter)}

    def of(self, value: Any) -> Iterator[Any]:
        """Strings and bytes that say it."""
        if (plain := _plain(value)) is not None:
            yield plain
        elif isinstance(value, Tensor):
            yield fingerprint([value.detach()])
        elif id(value) in self.seen:
            return
        else:
            self.seen.add(id(value))
            yield from self._compound(value)

    def _compound(self, value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for key in sorted(value, key=repr):
                yield repr(key)
                yield from self.of(value[key])
        elif isinstance(value, tuple | list):
            for item in value:
                yield from self.of(item)
        elif isinstance(value, nn.Module):
            yield from self._module(value)
        elif isinstance(value, partial):  # Pyro's handlers wrap a program in one
            yield from self.of((value.func, value.args, value.keywords))
        elif hasattr(value, "__code__"):
            yield from self._function(value)
        else:
            yield type(value).__qualname__
            for name, part in sorted(getattr(value, "__dict__", {}).items()):
                if isinstance(part, Tensor | nn.Module | dict) or _plain(part) is not None or hasattr(part, "__code__"):
                    yield name
                    yield from self.of(part)

    def _module(self, module: nn.Module) -> Iterator[Any]:
        for name, value in sorted(module.state_dict().items()):
            yield name
            yield from self.of(value)
        for name, part in module.named_modules():
            yield name, type(part).__qualname__
            for key, value in sorted(vars(part).items()):
                if key != "training" and not key.startswith("_") and (plain := _plain(value)) is not None:
                    yield key, plain
            if hasattr(part.forward, "__code__"):
                yield from self._code(part.forward.__code__)

    def _function(self, function: Callable[..., Any]) -> Iterator[Any]:
        code: CodeType = function.__code__
        yield from self._code(code)
        if hasattr(function, "__self__"):  # a method
            yield from self.of(function.__self__)
        for cell in getattr(function, "__closure__", None) or ():
            try:
                yield from self.of(cell.cell_contents)
            except ValueError:  # a cell that is still empty
                yield "empty"
        yield from self.of(getattr(function, "__defaults__", None) or ())
        yield from self.of(getattr(function, "__kwdefaults__", None) or {})
        for name in code.co_names:  # numbers and functions of the module it was written in
            value = function.__globals__.get(name)
            own = getattr(value, "__module__", None) == function.__module__ and hasattr(value, "__code__")
            if isinstance(value, Tensor) or own or (name in function.__globals__ and _plain(value) is not None):
                yield name
                yield from self.of(value)

    def _code(self, code: CodeType) -> Iterator[Any]:
        yield code.co_code
        yield code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from self._code(constant)
            elif isinstance(constant, frozenset):  # whose order is not the same in every process
                yield sorted(map(repr, constant))
            else:
                yield constant
                if isinstance(constant, str) and constant in self.bare:
                    yield fingerprint([self.bare[constant].detach()])


def _plain(value: Any) -> str | None:
    """A `repr` that says the value, or None."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple | list) and all(_plain(item) is not None for item in value):
        return repr(value)
    return None
