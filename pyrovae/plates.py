"""The data plate: how many rows a call has, which rows they are, and how a log-density is reduced to one per row.

The plate is read from the model on every call, never from the shapes of the arguments: a messenger catches the
plate's subsample message and aborts the program there, so no decoder runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae.errors import PlateError
from pyrovae.runtime import preserve_rng

__all__ = ["DataPlate", "per_datum", "read_plate"]


@dataclass(frozen=True)
class DataPlate:
    """One call's data plate.

    Attributes:
        name: the plate's name.
        size: rows in this call, B.
        full_size: rows in the whole data set, N (equal to B without subsampling).
        indices: the rows asked for, `[B]`, or None.
    """

    name: str
    size: int
    full_size: int
    indices: Tensor | None

    def open(self) -> Any:
        """The same plate again, for a guide."""
        return pyro.plate(self.name, self.full_size, subsample=self.indices, dim=-1)


class _Found(Exception):
    """Aborts the program once the plate has been read."""


class _PlateProbe(poutine.messenger.Messenger):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.seen: dict[str, int] = {}
        self.plate: DataPlate | None = None

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not site_is_subsample(msg):
            return
        size, rows, value = msg["fn"].size, msg["fn"].subsample_size, msg["value"]
        self.seen[msg["name"]] = size
        if msg["name"] == self.name:
            rows = len(value) if value is not None else (size if rows is None else rows)
            if value is None and rows < size:
                raise PlateError(
                    f"plate {self.name!r} draws its own {rows} of {size} rows, so nobody knows which data a posterior "
                    "belongs to: pass the mini-batch and the plate's `subsample=idx` instead of `subsample_size`"
                )
            indices = torch.as_tensor(value) if value is not None and rows != size else value
            self.plate = DataPlate(self.name, rows, size, indices)
            raise _Found


def read_plate(model: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DataPlate:
    """Read the plate called `name` from a run of the model that stops where the plate opens.

    Raises:
        PlateError: no such plate (the message lists the plates there are), or one that draws its own rows.
    """
    probe = _PlateProbe(name)
    # Nothing is checked here: a recording reads the plate, too, and cannot branch on values.
    with preserve_rng(), torch.no_grad(), poutine.block(), pyro.validation_enabled(False), probe:
        try:
            model(*args, **kwargs)
        except _Found:
            assert probe.plate is not None
            return probe.plate
    plates = ", ".join(f"{plate!r} (size {size})" for plate, size in probe.seen.items()) or "none"
    raise PlateError(
        f"the model has no plate {name!r} (plates found: {plates}); put every latent and the observation inside "
        f"`pyro.plate({name!r}, ...)`, name the plate with plate='other', or pass plate=None to treat the whole "
        "program as one datum"
    )


def per_datum(value: Tensor, stack: tuple[Any, ...], plate: str | None) -> Tensor:
    """Reduce a site's log-density to one value per row, without the plate's subsampling scale.

    Args:
        value: scaled and masked log-density, batch dims only.
        stack: the site's `cond_indep_stack`.
        plate: name of the data plate, or None (joint mode: one value for the whole program).

    Returns:
        `[B]`, or `[1]` in joint mode.
    """
    if plate is None:
        return value.sum().reshape(1)
    frame = next(frame for frame in stack if frame.name == plate)
    value = value.expand(torch.broadcast_shapes(value.shape, (frame.size,)))
    value = value.flatten(0, -2).sum(0) if value.dim() > 1 else value
    return value * (frame.size / frame.full_size)
