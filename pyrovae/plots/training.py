"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyrovae.plots.base import COLORS, bare, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["training"]


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
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(f"{kind}, nats per datum")
        axis.legend(frameon=False, fontsize=8)
        bare(axis)
    return figure
