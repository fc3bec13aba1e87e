"""Figures. Every function returns a matplotlib `Figure`; nothing is shown or saved."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "images", "khat", "posterior", "training"]

# Okabe & Ito's palette: told apart by colour-blind readers.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
_TRUTH = "#777777"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that notebooks show whether or not pyplot is in use."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return Shown(figsize=(width, height), dpi=110, layout="constrained")


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
    figure = _figure(2.3 * max(1, len(guides)) + 0.4, 2.3 * len(data) + 0.3)
    axes = figure.subplots(len(data), max(1, len(guides)), squeeze=False, sharex="row", sharey="row")
    for row, datum in enumerate(data):
        truth = reference[:, datum].detach().double()
        i, j = _correlated(truth) if dims is None else dims
        for column, (name, draws) in enumerate(guides.items()):
            axis, mine = axes[row, column], draws[:, datum].detach().double()
            axis.scatter(*_thin(truth, i, j), s=5, color=_TRUTH, alpha=0.35, linewidths=0, label="reference")
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


def images(rows: Mapping[str, Tensor], image_shape: tuple[int, ...]) -> Figure:
    """Rows of pictures with labels, values in [0, 1]: name -> `[K, X]`."""
    count = max(len(value) for value in rows.values())
    figure = _figure(0.62 * count + 1.3, 0.66 * len(rows))
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
    figure = _figure(4.6 * len(kinds), 2.9)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(curves)}
    for axis, kind in zip(axes, kinds, strict=True):
        for name, (objective, values) in curves.items():
            if objective == kind:
                axis.plot(range(1, len(values) + 1), values, color=colors[name], label=name, linewidth=1.4)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{kind}, nats per datum")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def khat(values: Mapping[str, Tensor]) -> Figure:
    """Sorted per-datum k-hat of several guides, with the lines at 0.5 and 0.7."""
    figure = _figure(5.2, 2.9)
    axis = figure.subplots()
    for index, (name, khats) in enumerate(values.items()):
        ordered = khats.double().clamp(-1, 2).sort().values.cpu()
        share = torch.linspace(0, 1, len(ordered))
        axis.plot(ordered, share, color=COLORS[index % len(COLORS)], label=name, linewidth=1.4)
    for limit in (0.5, 0.7):
        axis.axvline(limit, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_xlabel("Pareto k-hat of a datum (below 0.5 good, above 0.7 unreliable)")
    axis.set_ylabel("share of data")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
