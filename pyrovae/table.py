"""Tables of results for the terminal, and the rule that only comparable numbers stand in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyrovae.provenance import Provenance, require_comparable

__all__ = ["COLUMNS", "LEGEND", "Number", "Row", "cells", "columns_of", "to_rich"]

COLUMNS = (
    "guide", "ELBO", "IWAE", "AIS", "Δ ELBO", "Δ IWAE", "k-hat", "> 0.7", "mean error", "sd ratio", "sliced W2",
    "ms", "train s",
)  # fmt: skip

LEGEND = (
    "ELBO, IWAE, AIS: lower bounds of log p(x), nats per datum, mean ± standard error over held-out data; Δ: paired "
    "difference per datum. k-hat: median over data, and share above 0.7. mean error, sd ratio, sliced W2: against "
    "long chains, with the noise floor (half of their draws against the other) in brackets. ms: one posterior, batched."
)


@dataclass(frozen=True)
class Number:
    """A value with its standard error, or with the noise floor it is to be read against."""

    value: float
    se: float | None = None
    floor: float | None = None

    @classmethod
    def over_data(cls, values: Tensor) -> Number:
        """Mean of one value per datum, with its standard error."""
        values = values.double()
        return cls(float(values.mean()), float(values.std()) / math.sqrt(len(values)))

    def to_dict(self) -> dict[str, float | None]:
        finite = {"value": self.value, "se": self.se, "noise_floor": self.floor}
        return {name: x if x is None or math.isfinite(x) else None for name, x in finite.items()}


@dataclass(frozen=True)
class Row:
    """One guide's results; a number that does not exist says why in words.

    Attributes:
        guide: its name.
        values: column -> a `Number`, or a reason in words.
        provenance: of all its numbers.
    """

    guide: str
    values: dict[str, Number | str]
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number with its standard error, and where it comes from."""
        numbers = {k: v.to_dict() if isinstance(v, Number) else {"reason": v} for k, v in self.values.items()}
        return {"guide": self.guide, **numbers, "provenance": self.provenance.to_dict()}


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A row as text, one cell per column."""
    return [row.guide if column == "guide" else _text(column, row.values.get(column)) for column in columns]


_DIGITS = {"ms": 3, "train s": 1}
_BARE = ("ms", "train s", "k-hat")  # their standard errors are in the JSON


def _text(column: str, number: Number | str | None) -> str:
    if number is None or isinstance(number, str):
        return number or ""
    digits = _DIGITS.get(column, 2)
    if column == "> 0.7":
        return f"{100 * number.value:.0f} %"
    value = f"{number.value:+.{digits}f}" if column.startswith("Δ") else f"{number.value:.{digits}f}"
    if number.floor is not None:
        return f"{value} ({number.floor:.{digits}f})"
    return value if number.se is None or column in _BARE else f"{value} ± {number.se:.{digits}f}"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns in which any row has something to say; raises when the rows are not comparable."""
    if rows:
        require_comparable(rows[0].provenance, *(row.provenance for row in rows[1:]))
    return [c for c in COLUMNS if c == "guide" or any(row.values.get(c) is not None for row in rows)]


def to_rich(title: str, rows: Sequence[Row], caption: str = "") -> Any:
    """A `rich` table.

    Raises:
        ValueError: the rows' provenances are not comparable (other data, binarisation, likelihood, split).
    """
    from rich import box
    from rich.table import Table

    columns = columns_of(rows)
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "guide" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row, columns))
    return table
