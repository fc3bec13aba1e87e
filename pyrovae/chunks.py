"""Evaluation chunk by chunk: bounded memory, noise of every datum's own, finished chunks kept for a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae import noise, store
from pyrovae.batching import Batched, RowArguments, decided
from pyrovae.finished import Finished
from pyrovae.plates import read_plate
from pyrovae.runtime import evaluating, preserve_rng

__all__ = ["per_chunk"]


def per_chunk(
    function: Callable[..., Tensor],
    programs: tuple[Callable[..., Any], ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    plate: str | None,
    batched: Batched = "auto",
    seed: int = 0,
    chunk: int = 64,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    beside: tuple[Tensor, ...] = (),
) -> Tensor:
    """Evaluate `function(*rows, **rows) -> [S, b, ...]` on chunks of rows and join the results along dim 1.

    Runs without gradient, in evaluation mode, in an isolated parameter store, with per-datum noise; weights,
    buffers and the caller's random state stay as they were.

    Args:
        seed: with the datum's index, seeds its noise.
        chunk: rows evaluated at once.
        indices: index of each datum in its data set, when the rows are not rows 0..B-1.
        progress: label of a progress bar.
        resume: folder that keeps finished chunks; a run that was stopped goes on from there.
        settings: what else the numbers depend on, for that folder.
        beside: tensors `[B, ...]` that the programs do not take; their rows come before the others.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with torch.no_grad(), preserve_rng(), evaluating(*programs), store.isolated():
        if plate is None:
            whole = Finished(resume, programs, (beside, args, kwargs), {**(settings or {}), "seed": seed})
            known = whole.get("program")
            if known is None:
                with noise.per_datum(seed, [0]):
                    known = {"values": function(*beside, *args, **kwargs)}
                whole.put("program", known)
            return known["values"]
        size = read_plate(programs[0], plate, args, kwargs).size
        rows = RowArguments(args, kwargs, size, batched)
        indices = range(size) if indices is None else indices
        if len(indices) != size:
            raise ValueError(f"indices must name each of the {size} data, got {len(indices)}")
        if not _splits(programs[0], plate, rows, size, chunk):
            chunk = size
        starts: Any = range(0, size, chunk)
        if progress is not None:
            from tqdm.auto import tqdm

            starts = tqdm(starts, desc=progress, disable=None, leave=False)
        done = Finished(resume, programs, (beside, args, kwargs, list(indices)),
                        {**(settings or {}), "seed": seed, "chunk": chunk})  # fmt: skip
        parts = []
        for start in starts:
            stop = min(start + chunk, size)
            name = f"rows-{start:06d}"
            known = done.get(name)
            if known is None:
                some_args, some_kwargs = rows.rows(slice(start, stop)) if chunk < size else (args, kwargs)
                with noise.per_datum(seed, indices[start:stop]), decided(rows):
                    some_beside = (tensor[start:stop] for tensor in beside)
                    known = {"values": function(*some_beside, *some_args, **some_kwargs)}
                done.put(name, known)
            parts.append(known["values"])
        return torch.cat(parts, dim=1)


def _splits(program: Callable[..., Any], plate: str, rows: RowArguments, size: int, chunk: int) -> bool:
    """Whether the program runs on some of the rows (a plate of fixed size does not)."""
    if chunk >= size or not rows.names():
        return False
    some_args, some_kwargs = rows.rows(slice(0, chunk))
    return read_plate(program, plate, some_args, some_kwargs).size == chunk
