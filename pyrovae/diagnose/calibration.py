r"""Is a guide calibrated? Checks on data the model makes itself, one pass of the guide for each, no refitting.

With :math:`(u, x)` drawn from the model and L draws of :math:`q(\cdot \mid x)`, all of this is uniform where q is the
posterior:

* *simulation-based calibration* (Talts et al. 2018): the rank of :math:`u_d` among the draws, in 0..L, latent by
  latent. A cup says that q is too narrow, a hump that it is too wide, a slope that it is off to one side;
* *interval coverage*: the share of data whose :math:`u_d` lies in the central interval of the draws;
* *TARP* (Lemos et al. 2023): the share of draws that lie nearer to a reference point r than u does.

The first two are blind to what a guide makes of x: one that returns the prior passes. TARP sees it if r depends on x:
here it is a ridge regression of u on x, fitted to other simulations, plus noise of its residual's size. Any r that is
independent of u given x is valid; one near the posterior has power.

p-values: chi-squared over 20 bins of ranks per latent, with Bonferroni's correction over latents; Kolmogorov-Smirnov
for TARP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae import noise, store
from pyrovae.batching import RowArguments, decided
from pyrovae.chunks import per_chunk
from pyrovae.errors import BatchError, IncompatibleError
from pyrovae.latents import LatentSpace
from pyrovae.losses.base import require_pair
from pyrovae.provenance import Provenance
from pyrovae.runtime import evaluating, seeded
from pyrovae.simulate import simulate

__all__ = ["Calibration", "calibrate"]

_ASIDE = 2.0  # residual standard deviations
_BINS = 20
_ERRORS = 4.0  # standard errors from which the words name a shape


@dataclass(frozen=True)
class Calibration:
    """How a guide's draws lie about the latents that the model drew.

    Attributes:
        guide: its name.
        ranks: `[N, D]`, of the latents among L draws, 0..L.
        num_draws: L.
        sbc_pvalues: `[D]`.
        levels: of the central intervals.
        coverage: `[levels, D]`, share of data inside; its standard error is sqrt(level (1 - level) / N).
        credibility: `[N]`, TARP's; uniform on [0, 1].
        tarp_pvalue: of its uniformity.
        provenance: of the numbers.
    """

    guide: str
    ranks: Tensor
    num_draws: int
    sbc_pvalues: Tensor
    levels: tuple[float, ...]
    coverage: Tensor
    credibility: Tensor
    tarp_pvalue: float
    provenance: Provenance

    @property
    def sbc_pvalue(self) -> float:
        """The smallest over latents, times their number (at most 1)."""
        return min(1.0, float(self.sbc_pvalues.min()) * len(self.sbc_pvalues))

    @property
    def fractional_ranks(self) -> Tensor:
        """`[N, D]` in (0, 1)."""
        return (self.ranks + 0.5) / (self.num_draws + 1)

    def passed(self, alpha: float = 0.01) -> bool:
        """Whether neither simulation-based calibration nor TARP rejects at this level (each at half of it)."""
        return min(self.sbc_pvalue, self.tarp_pvalue) >= alpha / 2

    def shapes(self) -> list[str]:
        """Per latent "too narrow", "too wide", "too high", "too low" or "": what mean and spread of its ranks say."""
        v = self.fractional_ranks
        number = len(v)
        slope = (v.mean(0) - 0.5) * math.sqrt(12 * number)
        spread = ((v - 0.5).square().mean(0) - 1 / 12) * math.sqrt(180 * number)  # Var (U - 1/2)^2 = 1/180
        found = []
        for tilt, cup in zip(slope.tolist(), spread.tolist(), strict=True):
            words = []
            if abs(cup) > _ERRORS:
                words.append("too narrow" if cup > 0 else "too wide")
            if abs(tilt) > _ERRORS:
                words.append("too low" if tilt > 0 else "too high")  # truths rank high where draws are low
            found.append(", ".join(words))
        return found

    def __repr__(self) -> str:
        number, dim = self.ranks.shape
        lines = [
            f"Calibration of {self.guide} on {number} simulated data, {self.num_draws} draws each, {dim} latents",
            f"  ranks (SBC):  p = {self.sbc_pvalue:.3g}{_verdict(self.sbc_pvalue)}",
            f"  TARP:         p = {self.tarp_pvalue:.3g}{_verdict(self.tarp_pvalue)}",
        ]
        for level, found in zip(self.levels, self.coverage, strict=True):
            se = math.sqrt(level * (1 - level) / number)
            lines.append(
                f"  {level:.0%} intervals cover {float(found.mean()):.1%} ({float(found.min()):.1%} to "
                f"{float(found.max()):.1%} over latents; standard error {se:.1%})"
            )
        counts: dict[str, int] = {}
        for shape in self.shapes():
            if shape:
                counts[shape] = counts.get(shape, 0) + 1
        lines += [f"  the guide is {shape} in {count} of {dim} latents" for shape, count in counts.items()]
        if self.sbc_pvalue >= 0.005 > self.tarp_pvalue and not counts:
            lines.append("  ranks are fine and TARP is not: the guide does not follow the data as the posterior does")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{self!r}</pre>"


def calibrate(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_data: int = 1000,
    num_draws: int = 99,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    observes: Mapping[str, int | str] | None = None,
    seed: int = 0,
    chunk: int = 256,
    progress: str | None = None,
    **kwargs: Any,
) -> Calibration:
    """Hold an amortized guide against latents the model drew.

    Args:
        model, guide: and arguments both can be called with: their covariates are kept (and repeated), observations
            are replaced by the model's own.
        num_data: N simulated data; as many again fit TARP's reference points.
        num_draws: L; 20 must divide L + 1 (the bins of the ranks).
        levels: of the central intervals.
        observes: observed site -> position or name of its argument, where that cannot be told.
        seed: makes the run repeatable.
        chunk: data evaluated at once; changes nothing else.
        progress: label of a progress bar.

    Raises:
        IncompatibleError: the guide was built for another model, or works on the whole program as one datum.
        DataError: the model cannot be simulated.
        BatchError: the rows of the arguments cannot be repeated.
        ValueError: numbers or levels out of range.
    """
    require_pair(model, guide, None)
    if num_data < 100:
        raise ValueError(f"calibration needs num_data of at least 100, got {num_data}")
    if num_draws < _BINS - 1 or (num_draws + 1) % _BINS:
        raise ValueError(f"num_draws + 1 must be a multiple of {_BINS} (99, 199, ...), got num_draws={num_draws}")
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must lie between 0 and 1, got {tuple(levels)}")
    if guide.plate is None:
        raise IncompatibleError(
            "calibration takes one pass for each simulated datum, so it needs a guide amortized over a data plate: "
            "this one has plate=None"
        )
    with seeded(noise.mix(seed, -3)), evaluating(model), store.isolated():
        space = LatentSpace(model, *args, plate=guide.plate, batched=guide.batched, **kwargs)
        u, rows, features = _simulated(space, args, kwargs, num_data, observes)
        other, _, other_features = _simulated(space, args, kwargs, num_data, observes)
        reference = _reference_points(other, other_features, features)
        jitter = torch.rand(num_data, dtype=torch.double)
    with decided(rows):
        draws = per_chunk(
            lambda *a, **k: guide.draws(num_draws, *a, **k), (model, guide), rows.args, rows.kwargs, plate=guide.plate,
            batched=guide.batched, seed=seed, chunk=chunk, progress=progress,
        ).double().cpu()  # fmt: skip
    if not draws.isfinite().all():
        raise ValueError("the guide drew values that are not finite: train it first, or take smaller steps")
    ranks = (draws < u).sum(0)
    sd = other.std(0)
    nearer = (_distance(draws, reference, sd) < _distance(u, reference, sd)).sum(0)
    credibility = (nearer + jitter) / (num_draws + 1)  # exactly uniform under calibration
    covered = torch.stack([_inside(ranks, num_draws, level) for level in levels])
    return Calibration(
        guide=guide.traits.name, ranks=ranks, num_draws=num_draws, sbc_pvalues=_chi_squared(ranks, num_draws),
        levels=tuple(levels), coverage=covered, credibility=credibility, tarp_pvalue=_kolmogorov(credibility),
        provenance=Provenance.of_call(args, kwargs, num_data=num_data, seed=seed, num_samples=num_draws),
    )  # fmt: skip


def _simulated(
    space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any], number: int,
    observes: Mapping[str, int | str] | None,
) -> tuple[Tensor, RowArguments, Tensor]:  # fmt: skip
    """N data: their latents `[N, D]`, the arguments, and everything in them that has one row a datum, `[N, F]`."""
    rows = space.bind(*args, **kwargs)
    if not rows.foldable:
        raise BatchError(
            "calibration repeats the rows of the arguments, which this model does not take (a plate of fixed size?): "
            "let the plate's size follow the data"
        )
    times = -(-number // rows.rows.size)
    many = rows.rows.repeated(times)
    u, new_args, new_kwargs = simulate(space, many.args, many.kwargs, observes)
    taken = many.with_values(new_args, new_kwargs).select(slice(0, number))
    features = torch.cat([leaf.reshape(number, -1).double().cpu() for leaf in taken.tensors()], dim=1)
    return u[:number].double().cpu(), taken, features


def _reference_points(u: Tensor, seen: Tensor, features: Tensor) -> Tensor:
    """Ridge regression of u on features, evaluated at others, with noise of the residual's size; `[N, D]`.

    All lie to one side of the posteriors: around a point in the middle a mean that is off changes few distances.
    """
    mean, sd = seen.mean(0), seen.std(0)
    keep = sd > 1e-8 * (1 + mean.abs())
    x, new = ((value[:, keep] - mean[keep]) / sd[keep] for value in (seen, features))
    centre = u.mean(0)
    number, width = x.shape
    strength = 0.05 * number
    if width <= number:
        weight = torch.linalg.solve(x.T @ x + strength * torch.eye(width, dtype=x.dtype), x.T @ (u - centre))
    else:
        weight = x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(number, dtype=x.dtype), u - centre)
    residual = (u - centre - x @ weight).std(0)
    aside = _ASIDE / math.sqrt(u.shape[1])
    return centre + new @ weight + residual * (aside + torch.randn(len(new), u.shape[1], dtype=u.dtype))


def _distance(u: Tensor, reference: Tensor, sd: Tensor) -> Tensor:
    return torch.linalg.vector_norm((u - reference) / sd, dim=-1)


def _inside(ranks: Tensor, num_draws: int, level: float) -> Tensor:
    """`[D]`, share of ranks in the central interval, in whole ranks as near to the level as L allows."""
    lowest = (num_draws + 1) * (1 - level) / 2
    position = ranks.double() + 0.5
    return ((position >= lowest) & (position < num_draws + 1 - lowest)).double().mean(0)


def _chi_squared(ranks: Tensor, num_draws: int) -> Tensor:
    """`[D]`, p-values of equal counts in the bins."""
    number, dim = ranks.shape
    bins = ranks * _BINS // (num_draws + 1)
    counts = torch.stack([torch.bincount(bins[:, d], minlength=_BINS) for d in range(dim)]).double()
    expected = number / _BINS
    statistic = ((counts - expected).square() / expected).sum(1)
    return torch.special.gammaincc(torch.full_like(statistic, (_BINS - 1) / 2), statistic / 2)


def _kolmogorov(values: Tensor) -> float:
    from scipy.stats import kstest

    return float(kstest(values.numpy(), "uniform").pvalue)


def _verdict(p: float) -> str:
    return "" if p >= 0.005 else "  REJECTED"
