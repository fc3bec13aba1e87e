"""Threads, random state and training flags: what an evaluation borrows and must give back."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["evaluating", "keep_frozen", "modules_of", "preserve_rng", "seeded", "threads"]

_SMALL_WORK = 1_000_000  # multiply-adds per row-batch below which a second thread only costs


def threads(requested: int | None = None, *, work: int = 0) -> int:
    """Set the number of torch threads and return it.

    On small nets two threads can be a hundred times slower than one on a busy machine, so the default is one
    thread below a million multiply-adds per batch.

    Args:
        requested: an explicit number; wins when given.
        work: multiply-adds of one batch through the largest net.
    """
    if requested is not None and requested < 1:
        raise ValueError(f"threads must be at least 1, got {requested}; leave it out for the default")
    number = requested or (1 if work < _SMALL_WORK else max(1, torch.get_num_threads()))
    torch.set_num_threads(number)
    return number


def modules_of(*programs: Any) -> list[nn.Module]:
    """The `nn.Module`s that Pyro programs run: the program itself, what it wraps, closes over or names globally."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
            for name in ("model", "global_guide"):  # programs that a guide keeps, which are not its submodules
                if item.__dict__.get(name) is not None:
                    visit(item.__dict__[name])
        elif isinstance(item, functools.partial):
            for part in (item.func, *item.args, *item.keywords.values()):
                visit(part)
        elif inspect.ismethod(item):
            visit(item.__self__)
        elif inspect.isfunction(item):
            names = inspect.getclosurevars(item)
            for value in names.nonlocals.values():
                visit(value)
            for value in names.globals.values():
                if isinstance(value, nn.Module) or inspect.isfunction(value) or isinstance(value, functools.partial):
                    visit(value)
        elif hasattr(item, "__dict__") and not isinstance(item, type | ModuleType):  # an object that holds its nets
            for value in vars(item).values():
                if isinstance(value, nn.Module) or (hasattr(value, "__dict__") and callable(value)):
                    visit(value)

    for program in programs:
        visit(program)
    return list(found.values())


@contextmanager
def evaluating(*programs: Callable[..., Any]) -> Iterator[None]:
    """Put every module the programs run into `eval()`; training and `requires_grad` flags come back afterwards."""
    roots = modules_of(*programs)
    flags = {module: module.training for root in roots for module in root.modules()}
    with keep_frozen(*roots):
        try:
            for module in flags:
                module.training = False
            yield
        finally:
            for module, flag in flags.items():
                module.training = flag


@contextmanager
def keep_frozen(*programs: Callable[..., Any]) -> Iterator[None]:
    """Give `requires_grad` flags back: registering a parameter in Pyro's store switches it on."""
    frozen = [p for p in _parameters(modules_of(*programs)) if not p.requires_grad]
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _parameters(roots: list[nn.Module]) -> Iterator[nn.Parameter]:
    """`Module.parameters` of all roots, without names: every posterior asks for them."""
    waiting, seen = list(roots), set()
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield from (p for p in module._parameters.values() if p is not None)
            waiting += [child for child in module._modules.values() if child is not None]


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Give torch's random state (CPU and any GPU in use) back as it was."""
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state_all(gpu)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run under fixed torch, numpy and python seeds; the caller's random state comes back. `None` does nothing."""
    if seed is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(preserve_rng())
        numpy_state, python_state = np.random.get_state(), random.getstate()
        stack.callback(np.random.set_state, numpy_state)
        stack.callback(random.setstate, python_state)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
