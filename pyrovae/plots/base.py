"""What all figures share: colours, and a figure that notebooks show by themselves."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "TRUTH", "bare", "blank"]

# Okabe & Ito's palette: told apart by colour-blind readers.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
TRUTH = "#777777"


def blank(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that notebooks show whether or not pyplot is in use."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return Shown(figsize=(width, height), dpi=110, layout="constrained")


def bare(axis: Any) -> None:
    """Take the upper and the right edge off."""
    axis.spines[["top", "right"]].set_visible(False)
