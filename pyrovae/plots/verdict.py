"""What the diagnostics found: k-hat of every datum, gaps, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae.plots.base import COLORS, bare, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.diagnose.calibration import Calibration
    from pyrovae.diagnose.gaps import Gaps

__all__ = ["coverage", "gaps", "khat", "khat_histogram", "sbc", "tarp"]

_SIMULATIONS = 2000  # of uniform ranks, for the envelope


def khat(values: Mapping[str, Tensor]) -> Figure:
    """Sorted per-datum k-hat of several guides, with the lines at 0.5 and 0.7."""
    figure = blank(5.2, 2.9)
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
    bare(axis)
    return figure


def khat_histogram(values: Tensor, worst: int = 3) -> Figure:
    """How many data have which k-hat, with the lines at 0.5 and 0.7 and the indices of the worst data."""
    figure = blank(5.2, 2.9)
    axis = figure.subplots()
    shown = values.double().cpu().nan_to_num(posinf=2.0).clamp(-1, 2)
    axis.hist(shown.numpy(), bins=30, color=COLORS[0], alpha=0.85)
    for limit in (0.5, 0.7):
        axis.axvline(limit, color="#999999", linewidth=0.8, linestyle=":")
    height = axis.get_ylim()[1]
    for place, index in enumerate(values.double().argsort(descending=True)[:worst].tolist()):
        axis.annotate(
            f"datum {index}", (float(shown[index]), 0.3), (float(shown[index]), height * (0.5 - 0.13 * place)),
            fontsize=8, color=COLORS[1], ha="center", arrowprops={"arrowstyle": "-", "color": COLORS[1], "lw": 0.7},
        )  # fmt: skip
    axis.set_xlabel("Pareto k-hat of a datum (below 0.5 good, above 0.7 unreliable)")
    axis.set_ylabel("data")
    bare(axis)
    return figure


def gaps(found: Mapping[str, Gaps]) -> Figure:
    """Stacked bars of the approximation and the amortization gap, nats per datum: name -> gaps.

    Beside them the gaps of the single data, sorted, of the first guide. Error bars are standard errors of the mean.
    """
    figure = blank(8.2, max(2.4, 0.55 * len(found) + 1.5))
    bars, single = figure.subplots(1, 2)
    for row, (name, one) in enumerate(found.items()):
        left, right = one.approximation, one.amortization
        first = "family (approximation gap)" if row == 0 else None
        second = "encoder (amortization gap)" if row == 0 else None
        bars.barh(row, left.mean, color=COLORS[0], label=first, height=0.6)
        bars.barh(row, right.mean, left=left.mean, color=COLORS[4], label=second, height=0.6)
        bars.errorbar(one.inference.mean, row, xerr=one.inference.mean_se, color="#222222", capsize=3, linewidth=1)
        bars.text(0, row + 0.42, name, fontsize=9, ha="left", va="center")
    bars.set_yticks([])
    bars.set_ylim(-0.5, len(found) - 0.2)
    bars.set_xlabel("log p(x) - ELBO, nats per datum")
    figure.legend(*bars.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper left", ncols=2)
    bare(bars)
    name, one = next(iter(found.items()))
    order = one.inference.values.argsort(descending=True).cpu()
    family = one.approximation.values.double().cpu()[order].clamp_min(0)
    encoder = one.amortization.values.double().cpu()[order].clamp_min(0)
    ticks = torch.arange(len(order))
    single.bar(ticks, family, color=COLORS[0], width=1.0)
    single.bar(ticks, encoder, bottom=family, color=COLORS[4], width=1.0)
    single.set_xlabel(f"{name}: {len(order)} data, by gap")
    single.set_ylabel("nats")
    bare(single)
    return figure


def sbc(found: Calibration, dims: int = 8) -> Figure:
    """Rank histograms of the latents with the band that holds 99 % of all counts, and the ranks' ECDF minus the line.

    The grey envelope of the right panel holds 95 % of all curves of uniform ranks, whole (by simulation).
    """
    number, dim = found.ranks.shape
    shown = min(dim, dims)
    columns = math.ceil(math.sqrt(shown))
    figure = blank(9.2, 3.4)
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1], squeeze=False)[0]
    grid = left.subplots(math.ceil(shown / columns), columns, squeeze=False).flatten()
    bins = 20
    low, high = _binomial_band(number, 1 / bins)
    for d, axis in enumerate(grid):
        if d >= shown:
            axis.set_axis_off()
            continue
        axis.axhspan(low, high, color="#dddddd", linewidth=0)
        axis.hist(found.fractional_ranks[:, d].numpy(), bins=bins, range=(0, 1), color=COLORS[0], alpha=0.85)
        axis.set_title(f"$u_{{{d}}}$  p = {float(found.sbc_pvalues[d]):.2g}", fontsize=8, pad=2)
        axis.tick_params(labelsize=6)
        bare(axis)
    axis = right.subplots()
    ticks = torch.linspace(0, 1, found.num_draws + 2, dtype=torch.double)[1:]
    lower, upper = _envelope(number, found.num_draws)
    axis.fill_between(ticks, lower, upper, color="#dddddd", linewidth=0)
    for d in range(dim):
        counts = torch.bincount(found.ranks[:, d], minlength=found.num_draws + 1).double()
        axis.plot(ticks, counts.cumsum(0) / number - ticks, linewidth=1.0, color=COLORS[d % len(COLORS)])
    axis.set_xlabel("rank, as a share")
    axis.set_ylabel("ECDF minus uniform")
    bare(axis)
    return figure


def tarp(found: Calibration) -> Figure:
    """Expected coverage of TARP regions against their credibility; the envelope holds 95 % of all calibrated curves."""
    figure = blank(3.6, 3.3)
    axis = figure.subplots()
    number = len(found.credibility)
    ticks = torch.linspace(0, 1, 101, dtype=torch.double)
    curve = torch.searchsorted(found.credibility.sort().values, ticks, right=True).double() / number
    lower, upper = _envelope(number, 100)
    axis.fill_between(ticks[1:], ticks[1:] + lower[:100], ticks[1:] + upper[:100], color="#dddddd", linewidth=0)
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    axis.plot(ticks, curve, color=COLORS[0], linewidth=1.4)
    axis.set_xlabel("credibility")
    axis.set_ylabel("expected coverage")
    axis.set_title(f"TARP, p = {found.tarp_pvalue:.2g}", fontsize=9)
    bare(axis)
    return figure


def coverage(found: Calibration) -> Figure:
    """Coverage of central intervals minus their level, one point a latent; bars of two standard errors."""
    figure = blank(3.6, 3.0)
    axis = figure.subplots()
    axis.axhline(0, color="#999999", linewidth=0.8, linestyle=":")
    number, dim = found.ranks.shape
    for level, covered in zip(found.levels, found.coverage, strict=True):
        spread = torch.linspace(-0.015, 0.015, dim) if dim > 1 else torch.zeros(1)
        axis.errorbar(level, 0, yerr=2 * math.sqrt(level * (1 - level) / number), color="#999999", capsize=6)
        axis.scatter(level + spread, covered - level, s=14, color=COLORS[0], zorder=3)
    axis.set_xticks(found.levels, [f"{level:.0%}" for level in found.levels])
    axis.set_xlabel("central interval")
    axis.set_ylabel("share of data inside, minus level")
    bare(axis)
    return figure


def _binomial_band(number: int, share: float) -> tuple[float, float]:
    from scipy.stats import binom

    low, high = binom.ppf([0.005, 0.995], number, share)
    return float(low), float(high)


def _envelope(number: int, num_draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """A band that holds that share of all ECDFs of N uniform ranks, whole, minus the line; `[L + 1]` each."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, num_draws + 1, (_SIMULATIONS, number), generator=generator)
    counts = torch.zeros(_SIMULATIONS, num_draws + 1).scatter_add_(1, ranks, torch.ones_like(ranks, dtype=torch.float))
    ticks = torch.linspace(0, 1, num_draws + 2, dtype=torch.double)[1:]
    curves = counts.double().cumsum(1) / number - ticks
    # Of equal width in standard errors everywhere: the simultaneous band of Saeilynoja, Buerkner & Vehtari (2022).
    sd = (ticks * (1 - ticks) / number).sqrt().clamp_min(1e-12)
    sd[-1] = math.inf
    width = float((curves / sd).abs().amax(1).quantile(level))
    half = width * (ticks * (1 - ticks) / number).sqrt()
    return -half, half
