"""Where the engine's random numbers come from.

Outside a `per_datum` block, `normal` is `torch.randn`. Inside one, row b of the batch is drawn from its own
generator, seeded by (seed, datum index): an evaluation then gives the same numbers whatever the order or the size
of its chunks, and on any device (the numbers are drawn on the CPU).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["active", "mix", "normal", "per_datum", "row_seeds", "rows", "suspended"]

_generators: list[torch.Generator] | None = None


@contextmanager
def per_datum(seed: int, indices: Sequence[int]) -> Iterator[None]:
    """Draw row b of every batch from a generator seeded by (seed, indices[b])."""
    global _generators
    outer = _generators
    _generators = [torch.Generator().manual_seed(mix(seed, index)) for index in indices]
    try:
        yield
    finally:
        _generators = outer


@contextmanager
def rows(index: Tensor) -> Iterator[None]:
    """Draw for some of the rows alone, `index: [b]`; the generators of the others stay where they are."""
    global _generators
    outer = _generators
    if outer is not None:
        _generators = [outer[row] for row in index.tolist()]
    try:
        yield
    finally:
        _generators = outer


@contextmanager
def suspended() -> Iterator[None]:
    """Draw from torch's global state inside a `per_datum` block, for programs that know of nothing else."""
    global _generators
    outer, _generators = _generators, None
    try:
        yield
    finally:
        _generators = outer


def active() -> bool:
    """Whether a `per_datum` block is open."""
    return _generators is not None


def row_seeds() -> list[int]:
    """One fresh seed per row, for programs that draw from torch's global state (a model's own prior)."""
    assert _generators is not None
    return [int(torch.randint(2**62, (), generator=generator)) for generator in _generators]


def normal(num_samples: int, rows: int, dim: int, *, like: Tensor) -> Tensor:
    """Standard normal draws, shape `[num_samples, rows, dim]`, in the dtype and on the device of `like`."""
    if _generators is None:
        return torch.randn(num_samples, rows, dim, dtype=like.dtype, device=like.device)
    if len(_generators) != rows:
        raise RuntimeError(f"per_datum was opened for {len(_generators)} data, but {rows} rows were drawn")
    draws = [torch.randn(num_samples, dim, dtype=like.dtype, generator=generator) for generator in _generators]
    return torch.stack(draws, dim=1).to(like.device)


def mix(seed: int, index: int) -> int:
    """splitmix64 finaliser of (seed, index): neighbouring pairs give unrelated seeds."""
    mask = 2**64 - 1
    x = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) & (2**63 - 1)
