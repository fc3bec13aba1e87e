"""Draws of guides over a reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.plots.base import COLORS, TRUTH, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["posterior"]


def posterior(
    reference: Tensor, guides: Mapping[str, Tensor], *, data: Sequence[int] = (0,), dims: tuple[int, int] | None = None
) -> Figure:
    """Guides' draws over a reference's in the plane of two latents, one row of panels per datum.

    Ellipses at two standard deviations: dark for the reference, coloured for the guide.

    Args:
        reference: `[T, B, D]`.
        guides: name -> `[S, B, D]`.
        data: which data.
        dims: the two latents; by default, per datum, the pair the reference finds most correlated.
    """
    figure = blank(2.3 * max(1, len(guides)) + 0.4, 2.3 * len(data) + 0.3)
    axes = figure.subplots(len(data), max(1, len(guides)), squeeze=False, sharex="row", sharey="row")
    for row, datum in enumerate(data):
        truth = reference[:, datum].detach().double()
        i, j = _correlated(truth) if dims is None else dims
        for column, (name, draws) in enumerate(guides.items()):
            axis, mine = axes[row, column], draws[:, datum].detach().double()
            axis.scatter(*_thin(truth, i, j), s=5, color=TRUTH, alpha=0.35, linewidths=0, label="reference")
            axis.scatter(*_thin(mine, i, j), s=5, color=COLORS[column % len(COLORS)], alpha=0.35, linewidths=0)
            axis.add_patch(_ellipse(truth[:, [i, j]], "#222222"))
            axis.add_patch(_ellipse(mine[:, [i, j]], COLORS[column % len(COLORS)]))
            axis.set_xlabel(f"$u_{{{i}}}$", labelpad=1)
            axis.tick_params(labelsize=7)
            if row == 0:
                axis.set_title(name, fontsize=10, color=COLORS[column % len(COLORS)])
            if column == 0:
                axis.set_ylabel(f"datum {datum}\n$u_{{{j}}}$", labelpad=1)
    return figure


def _ellipse(draws: Tensor, color: str) -> Any:
    """Two standard deviations of draws `[S, 2]`."""
    from matplotlib.patches import Ellipse

    values, vectors = torch.linalg.eigh(torch.cov(draws.T).cpu())
    width, height = (4 * values.clamp_min(0).sqrt()).tolist()
    angle = math.degrees(math.atan2(float(vectors[1, 0]), float(vectors[0, 0])))
    center = (float(draws[:, 0].mean()), float(draws[:, 1].mean()))
    return Ellipse(center, width, height, angle=angle, fill=False, edgecolor=color, linewidth=1.3)


def _correlated(draws: Tensor) -> tuple[int, int]:
    if draws.shape[1] == 1:
        return 0, 0
    correlation = torch.corrcoef(draws.T).abs().nan_to_num()
    correlation.fill_diagonal_(-1.0)
    return divmod(int(correlation.argmax()), draws.shape[1])


def _thin(draws: Tensor, i: int, j: int, number: int = 600) -> tuple[Any, Any]:
    some = draws[:: max(1, len(draws) // number)].cpu()
    return some[:, i].numpy(), some[:, j].numpy()
