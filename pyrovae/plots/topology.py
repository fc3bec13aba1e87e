"""Barcodes of persistent homology."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyrovae.plots.base import COLORS, TRUTH, bare, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.diagnose.topology import Topology

__all__ = ["persistence"]


def persistence(found: Mapping[str, Topology], *, bars: int = 20) -> Figure:
    """Barcodes of several clouds, one a row and one degree a column: a bar from its birth to its death.

    Of the first choice of landmarks, after the density filter. Bars that count as features are coloured (relative to
    the reference where there is one, else by the gap ratio); an arrow is the component that never dies.

    Args:
        found: name -> `diagnose.topology` of it.
        bars: at most so many of a degree, the longest.
    """
    if not found or bars < 1:
        raise ValueError("a barcode needs at least one topology and one bar")
    degrees = max(len(one.betti) for one in found.values())
    figure = blank(2.3 * degrees + 0.6, 1.5 * len(found) + 0.5)
    axes = figure.subplots(len(found), degrees, squeeze=False, sharex="col")
    ends = [0.0] * degrees
    for row, (name, one) in enumerate(found.items()):
        counted = one.betti if one.betti_by_reference is None else one.betti_by_reference
        for degree in range(degrees):
            axis = axes[row, degree]
            axis.set_yticks([])
            bare(axis)
            if row == 0:
                axis.set_title(f"$H_{degree}$", fontsize=10)
            if row == len(found) - 1:
                axis.set_xlabel("scale", fontsize=8)
            axis.tick_params(labelsize=7)
            if degree >= len(counted):
                continue
            spans = one.filtered.diagrams[0][degree][:bars].tolist()
            if degree == 0:
                spans.insert(0, [0.0, 1.15 * max((death for _, death in spans), default=1.0)])
                axis.plot(spans[0][1], 0, ">", color=COLORS[0], markersize=5)
            ends[degree] = max(ends[degree], *(1.05 * death for _, death in spans), 0.0)
            for index, (birth, death) in enumerate(spans):
                color = COLORS[degree] if index < counted[degree] else TRUTH
                axis.plot([birth, death], [-index, -index], color=color, linewidth=1.6, solid_capstyle="butt")
            axis.text(0.98, 0.04, f"{counted[degree]}", transform=axis.transAxes, ha="right", fontsize=10,
                      color=COLORS[degree], bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        axes[row, 0].set_ylabel(name, fontsize=9)
    for axis, end in zip(axes[0], ends, strict=True):
        axis.set_xlim(0, end or 1)
    return figure
