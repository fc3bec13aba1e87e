r"""How many components, loops and cavities has a cloud of images? Betti numbers from persistence diagrams.

With bars :math:`\ell_1 \ge \ell_2 \ge \dots` of one degree, means over several choices of landmarks
(`pyrovae.diagnose.persistence`), two rules say how many are features of the shape and not of the sampling.

*Gap ratio*, of a cloud by itself. Bars below a floor :math:`f = 0.05 \times` the median pairwise distance cannot be
told apart and count as f, as does the bar after the last (in H1 and above: in H0 every landmark has a bar, and that
all are apart is no finding). Then

.. math::
    \hat\beta = j^* \ \text{if}\ \rho_{j^*} \ge 2, \ \text{else}\ 0, \qquad
    j^* = \arg\max_j \rho_j, \quad \rho_j = \frac{\max(\ell_j, f)}{\max(\ell_{j+1}, f)} .

So one bar alone counts if it is longer than 2f, a tenth of the median distance, and many bars without a gap are noise
however long they are. H0 has one component more, the one that never dies.

*Relative to a reference*, a sample of the true shape with as many landmarks: bars longer than

.. math::
    \tau_k = \tfrac12\, \ell^{\mathrm{ref}}_{\beta_k} \ \text{if}\ \beta_k > 0 \text{ bars of the reference are true},
    \qquad \tau_k = 2 \max(\ell^{\mathrm{ref}}_1, f)\ \text{if none is.}

Where they fail. The gap rule: features of sizes so different that the largest gap lies between them; few noise bars,
of which one is longer than 2f or twice the next, as in H2 of the Klein bottle over Z3 (0.88, where the feature over Z2
has 2.67); noise so large that it shortens features to less than twice its own bars (pixel noise of 0.1 on the torus is
on the edge); too few landmarks, for noise bars grow with their spacing (the torus needs 150, the Klein bottle 250).
The reference rule mends these where truth is known, and sees nothing shorter than half of it; take its reference over
Z2 where the field under test may have fewer bars. Neither sees density: samples that bridge two components, or
outliers, alter H0 and H1 with a few points in a thousand, which the density filter takes away. From a cloud of even
density it takes good points and leaves holes, which lengthen noise bars and shorten cavities (H2 of 300 landmarks of
the Klein bottle: 2.3 for 2.7). So numbers stand with and without it, and several choices of landmarks are averaged.

After Jin et al., Implications of data topology for deep generative models (2024), whose rules are not known to us; the
gap and the reference rule are our own. Stability of diagrams: Cohen-Steiner, Edelsbrunner & Harer (2007).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae.data.geometry import require_prime
from pyrovae.diagnose.persistence import Persistence, bottleneck, dense, persistence
from pyrovae.errors import DataError
from pyrovae.provenance import Provenance

__all__ = ["Topology", "gap_betti", "topology"]

_RATIO, _FLOOR = 2.0, 0.05
_SHOWN = 4


@dataclass(frozen=True, eq=False, repr=False)
class Topology:
    """Components, loops and cavities of a cloud.

    Attributes:
        prime: size of the field.
        num_landmarks: of each choice.
        normalised: whether lengths are in median pairwise distances (else in the units of the points).
        filtered: diagrams after the density filter.
        unfiltered: diagrams of all points, or None.
        known: Betti numbers given as true.
        reference: what it was held against, or None.
        distances: `[S, degrees]`, bottleneck distance to the reference, choice by choice, or None.
        provenance: of the numbers.
    """

    prime: int
    num_landmarks: int
    normalised: bool
    filtered: Persistence
    unfiltered: Persistence | None
    known: tuple[int, ...] | None
    reference: Topology | None
    distances: Tensor | None
    provenance: Provenance

    @property
    def betti(self) -> tuple[int, ...]:
        """By the gap ratio, after the density filter."""
        return self._by_gap(self.filtered)

    @property
    def betti_unfiltered(self) -> tuple[int, ...] | None:
        """By the gap ratio, of all points."""
        return None if self.unfiltered is None else self._by_gap(self.unfiltered)

    @property
    def betti_by_reference(self) -> tuple[int, ...] | None:
        """Bars longer than the reference's `thresholds`, after the density filter."""
        return self._by_reference(self.filtered)

    @property
    def betti_by_reference_unfiltered(self) -> tuple[int, ...] | None:
        """Bars longer than the reference's `thresholds`, of all points."""
        return None if self.unfiltered is None else self._by_reference(self.unfiltered)

    @property
    def agreement(self) -> tuple[float, ...]:
        """Share of landmark seeds whose own bars give `betti`, by degree."""
        floors = self._floors(self.filtered)
        return tuple(
            sum(gap_betti(own, floor=float(f), degree=k) == number for own, f in zip(bars, floors, strict=True))
            / len(bars)
            for k, (number, bars) in enumerate(zip(self.betti, self._bars(self.filtered), strict=True))
        )

    @property
    def thresholds(self) -> tuple[float, ...]:
        """What bars of another cloud must exceed, by degree, where this is the reference."""
        floor = float(self._floors(self.filtered).mean())
        found = []
        for k, (number, bars) in enumerate(zip(self.known or self.betti, self._bars(self.filtered), strict=True)):
            true = number - 1 if k == 0 else number  # the component that never dies has no length
            mean = bars.mean(0)
            if true > len(mean):
                raise ValueError(f"the reference has {len(mean)} bars in H{k}, but {true} are to be true")
            longest = float(mean[0]) if len(mean) else 0.0
            found.append(float(mean[true - 1]) / 2 if true else _RATIO * max(longest, floor))
        return tuple(found)

    @property
    def noise_floor(self) -> tuple[float, ...] | None:
        """Mean bottleneck distance between two choices of landmarks of the reference, by degree."""
        if self.reference is None or len(self.reference.filtered.diagrams) < 2:
            return None
        pairs = list(itertools.combinations(self.reference.filtered.diagrams, 2))
        return tuple(sum(bottleneck(a[k], b[k]) for a, b in pairs) / len(pairs) for k in range(len(self.betti)))

    def longest(self, degree: int, num: int = _SHOWN) -> Tensor:
        """The longest bars of a degree, means over landmark seeds, up to `num` of them, `[<= num]`."""
        return self.filtered.bars(degree).mean(0)[:num]

    def _bars(self, of: Persistence) -> list[Tensor]:
        return [of.bars(k) for k in range(len(of.diagrams[0]))]

    def _floors(self, of: Persistence) -> Tensor:
        return _FLOOR * (torch.ones_like(of.scale) if self.normalised else of.scale)

    def _by_gap(self, of: Persistence) -> tuple[int, ...]:
        floor = float(self._floors(of).mean())
        return tuple(gap_betti(bars.mean(0), floor=floor, degree=k) for k, bars in enumerate(self._bars(of)))

    def _by_reference(self, of: Persistence) -> tuple[int, ...] | None:
        if self.reference is None:
            return None
        pairs = zip(self.reference.thresholds, self._bars(of), strict=True)
        return tuple(int((bars.mean(0) > least).sum()) + (k == 0) for k, (least, bars) in enumerate(pairs))

    def __repr__(self) -> str:
        seeds = len(self.filtered.diagrams)
        unit = "median pairwise distances" if self.normalised else "units of the points"
        lines = [
            f"Topology over Z{self.prime}: Betti numbers {self.betti} by the gap ratio"
            + ("" if self.reference is None else f", {self.betti_by_reference} relative to the reference"),
            f"  {self.num_landmarks} landmarks of {self.filtered.num_points} of {self.provenance.num_data} points "
            f"(density filter), {seeds} choice{'s' if seeds > 1 else ''}; lengths in {unit}",
        ]
        floor = self.noise_floor
        for k, share in enumerate(self.agreement):
            bars = ", ".join(f"{length:.3g}" for length in self.longest(k).tolist()) or "none"
            line = f"  H{k}: longest bars {bars}; {share:.0%} of the choices agree"
            if self.reference is not None and self.distances is not None:
                line += f"; threshold {self.reference.thresholds[k]:.3g}"
                line += f"; bottleneck distance {float(self.distances[:, k].mean()):.3g}"
                line += "" if floor is None else f" (noise floor {floor[k]:.3g})"
            lines.append(line)
        if self.unfiltered is not None:
            same = "" if self.reference is None else f", {self.betti_by_reference_unfiltered} relative to the reference"
            lines.append(f"  without the density filter: {self.betti_unfiltered}{same}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{self!r}</pre>"


def topology(
    x: Tensor, *, prime: int = 2, max_degree: int = 2, num_landmarks: int = 300, num_seeds: int = 3, seed: int = 0,
    normalise: bool = False, unfiltered: bool = True, known: Sequence[int] | None = None,
    reference: Topology | None = None, progress: str | None = None,
) -> Topology:  # fmt: skip
    """Betti numbers and persistence diagrams of a cloud of points.

    H2 of 300 landmarks takes 5 to 40 seconds for each choice of them, and twice that with `unfiltered`; time and memory
    grow with the fourth power of their number.

    Args:
        x: points `[N, *event]`.
        prime: size of the field, 2 or 3 usually.
        max_degree: highest degree, 0 to 2.
        num_landmarks: of each choice.
        num_seeds: choices of landmarks.
        seed: of the first choice; the others follow it.
        normalise: measure in median pairwise distances of the landmarks, so that a scale of pixels drops out.
        unfiltered: also take the diagrams of all points.
        known: the true Betti numbers, of a reference (its gap-ratio numbers are taken for true otherwise).
        reference: `topology` of a sample of the truth, with as many landmarks and the same `normalise`.
        progress: label of a progress bar.

    Raises:
        DataError: too few different points, or NaN or infinite values.
        ValueError: numbers out of range, or a reference that was computed otherwise.
        ImportError: ripser is not installed.
    """
    if x.dim() < 2:
        raise DataError(f"points must be [N, *event], got {list(x.shape)}")
    points = x.detach().flatten(1)
    if not points.isfinite().all():
        raise DataError("NaN or infinite values have no topology: leave those points out")
    if not 0 <= max_degree <= 2:
        raise ValueError(f"max_degree must be 0, 1 or 2, got {max_degree}")
    require_prime(prime)
    if num_landmarks < 3 or num_seeds < 1:
        raise ValueError(f"at least 3 landmarks and 1 choice of them are needed, got {num_landmarks} and {num_seeds}")
    if known is not None and len(known) != max_degree + 1:
        raise ValueError(f"known must have a number for each of H0..H{max_degree}, got {tuple(known)}")
    if reference is not None:
        _require_alike(reference, max_degree, num_landmarks, normalise)

    from tqdm.auto import tqdm

    settings: dict[str, Any] = {
        "prime": prime, "max_degree": max_degree, "num_landmarks": num_landmarks,
        "seeds": range(seed, seed + num_seeds), "normalise": normalise,
    }  # fmt: skip
    clouds = [points[dense(points)], *([points] if unfiltered else [])]
    with tqdm(total=len(clouds) * num_seeds, desc=progress, unit="choice", disable=None if progress else True,
              leave=False) as bar:  # fmt: skip
        found = [persistence(cloud, bar=bar, **settings) for cloud in clouds]
    result = Topology(
        prime=prime, num_landmarks=num_landmarks, normalised=normalise, filtered=found[0],
        unfiltered=found[1] if unfiltered else None, known=None if known is None else tuple(known),
        reference=reference, distances=None,
        provenance=Provenance.of_call((x,), {}, num_data=len(x), seed=seed),
    )  # fmt: skip
    return result if reference is None else replace(result, distances=_distances(found[0], reference.filtered))


def gap_betti(bars: Tensor, *, floor: float, degree: int) -> int:
    """The number of features by the gap-ratio rule, from the lengths `[n]` of one degree, longest first.

    >>> gap_betti(torch.tensor([2.1, 2.0, 0.6, 0.5]), floor=0.15, degree=1)
    2
    >>> gap_betti(torch.tensor([0.7, 0.65, 0.6, 0.4]), floor=0.25, degree=1)
    0
    """
    lengths = bars.clamp_min(floor)
    if degree > 0:
        lengths = torch.cat([lengths, lengths.new_full((1,), floor)])
    ratios = lengths[:-1] / lengths[1:]
    found = 0
    if len(ratios) and float(ratios.max()) >= _RATIO:
        found = int(ratios.argmax()) + 1
    return found + (degree == 0)


def _distances(found: Persistence, reference: Persistence) -> Tensor:
    """`[S, degrees]`: choice by choice, round the reference's where it has fewer."""
    pairs = zip(found.diagrams, itertools.cycle(reference.diagrams), strict=False)
    return torch.tensor([[bottleneck(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs])


def _require_alike(reference: Topology, max_degree: int, num_landmarks: int, normalise: bool) -> None:
    ours = {"max_degree": max_degree, "num_landmarks": num_landmarks, "normalise": normalise}
    theirs = {"max_degree": len(reference.filtered.diagrams[0]) - 1, "num_landmarks": reference.num_landmarks,
              "normalise": reference.normalised}  # fmt: skip
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"the reference was computed with {name}={theirs[name]}, not {value}: bars do not compare; compute "
                "both alike"
            )
