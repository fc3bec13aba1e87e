"""Training curves and pictures of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pyrovae.plots.base import COLORS, bare, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["images", "training"]


def images(rows: Mapping[str, Tensor], image_shape: tuple[int, ...]) -> Figure:
    """Rows of pictures with labels, values in [0, 1]: name -> `[K, X]`."""
    count = max(len(value) for value in rows.values())
    figure = blank(0.62 * count + 1.3, 0.66 * len(rows))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for axis_row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for column, axis in enumerate(axis_row):
            axis.set_axis_off()
            if column < len(pictures):
                axis.imshow(pictures[column].reshape(image_shape).cpu(), cmap="gray_r", vmin=0, vmax=1)
        axis_row[0].text(-0.15, 0.5, name, transform=axis_row[0].transAxes, ha="right", va="center", fontsize=9)
    return figure


def training(curves: Mapping[str, tuple[str, Sequence[float]]]) -> Figure:
    """Training curves, nats per datum: name -> (objective, one value per epoch); one panel per kind of objective."""
    kinds = list(dict.fromkeys(objective for objective, _ in curves.values()))
    figure = blank(4.6 * len(kinds), 2.9)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(curves)}
    for axis, kind in zip(axes, kinds, strict=True):
        for name, (objective, values) in curves.items():
            if objective == kind:
                axis.plot(range(1, len(values) + 1), values, color=colors[name], label=name, linewidth=1.4)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{kind}, nats per datum")
        axis.legend(frameon=False, fontsize=8)
        bare(axis)
    return figure
