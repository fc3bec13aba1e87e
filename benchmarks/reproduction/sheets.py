"""Rows of images that arms draw: as bytes in the results file, and as one figure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["sheet", "to_bytes"]


def to_bytes(rows: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Grey values between 0 and 1, `[n, *event]` under each name, in 256 steps."""
    return {name: (255 * row.clamp(0, 1)).round().int().tolist() for name, row in rows.items()}


def sheet(runs: list[dict[str, Any]], size: tuple[int, ...] | None = None) -> Any:
    """What the arms of the first seed have drawn, a name a row."""
    from pyrovae import plots

    rows = {
        name: torch.tensor(row) / 255 for arm in runs[0]["arms"] for name, row in (arm.get("drawn") or {}).items()
    }  # fmt: skip
    return plots.images(rows, size)
