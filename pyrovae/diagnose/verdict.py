"""One call that says how wrong a guide is, where, and what to do about it.

Everything is per datum, in nats where it is a density. The verdict's words are read off the numbers by these rules:

* a gap is measured where it is more than three standard errors of its mean above zero, and little up to 0.05 nats;
* the encoder (or the family) is to blame where its part is more than twice the other's;
* a datum disagrees with the chains where the guide's mean is off by more than half a reference standard deviation in
  some latent, or the sliced W2 distance exceeds one half and three times its noise floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.batching import RowArguments, decided
from pyrovae.diagnose.calibration import Calibration, calibrate
from pyrovae.diagnose.collapse import Information, information
from pyrovae.diagnose.gaps import Gaps, gaps
from pyrovae.evidence import Estimate, log_weights, summarize
from pyrovae.losses.base import require_pair
from pyrovae.plates import read_plate
from pyrovae.provenance import Provenance
from pyrovae.psis import pareto_khat
from pyrovae.runtime import evaluating, preserve_rng
from pyrovae.store import isolated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.reference import Comparison, Reference

__all__ = ["Report", "report"]

_GOOD, _BAD = 0.5, 0.7  # of k-hat
_NATS, _ERRORS, _BLAME = 0.05, 3.0, 2.0
_ALONE = 0.5  # of the sum over data: one of them is the trouble
_OFF = 0.5  # reference standard deviations


@dataclass(frozen=True)
class Report:
    """What `report` found. Parts that the guide has no density for are None.

    Attributes:
        guide: its name.
        joint: the whole program is one datum (`plate=None`), so there is no encoder to blame.
        num_data: B.
        elbo, iwae: bounds of log p(x).
        khat, ess: `[B]`; effective number of importance draws as a share of them.
        gaps: on the first data.
        information: KL, mutual information, active units.
        reference, comparison: chains from the prior on the first data, and the guide held against them; `comparison`
            is None where no chain is ok.
        calibration: where it was asked for.
        seconds: what it cost.
    """

    guide: str
    joint: bool
    num_data: int
    elbo: Estimate | None
    iwae: Estimate | None
    khat: Tensor | None
    ess: Tensor | None
    gaps: Gaps | None
    information: Information | None
    reference: Reference | None
    comparison: Comparison | None
    calibration: Calibration | None
    provenance: Provenance
    seconds: float

    @property
    def worst(self) -> list[int]:
        """Data with the largest k-hat, worst first, ten at most."""
        if self.khat is None:
            return []
        order = self.khat.nan_to_num(nan=torch.inf).argsort(descending=True)
        return [int(i) for i in order[:10]]

    @property
    def disagreeing(self) -> list[int]:
        """Data on which the guide disagrees with chains that are ok."""
        c = self.comparison
        if c is None:
            return []
        far = (c.mean_error > _OFF) | ((c.sliced_w2 > _OFF) & (c.sliced_w2 > 3 * c.sliced_w2_floor))
        return [int(i) for i in far.nonzero().flatten()]

    @property
    def verdict(self) -> list[str]:
        """What the numbers say, a sentence each, the most important first."""
        return [
            *self._loss(), *self._weights(), *self._chains(), *self._knowledge(), *self._simulated(),
        ]  # fmt: skip

    def _loss(self) -> list[str]:
        g = self.gaps
        if self.elbo is None:
            return ["The guide has no density: its ELBO, its gaps and k-hat are unknown, and only chains can judge it."]
        if g is None:
            return []
        total, family, encoder = g.inference, g.approximation, g.amortization
        at_least = "" if g.log_evidence.kind == "exact" else "at least "
        lost = f"{at_least}{total.mean:.2f} ± {total.mean_se:.2f} nats per datum"
        # Its own error: the spread over data, which mean_se has, says nothing of what was measured on these.
        error = float(total.se.square().sum().sqrt()) / len(total.se)
        if not total.mean > _ERRORS * error:
            return [f"The guide loses nothing that can be measured on {len(g.status)} data ({lost})."]
        if not total.mean > _NATS:
            return [f"The guide loses little on {len(g.status)} data ({lost})."]
        largest, share = int(total.values.argmax()), float(total.values.max() / total.values.sum())
        alone = (
            f" Datum {largest} alone loses {float(total.values[largest]):.2f} nats, {share:.0%} of the sum."
            if share > _ALONE and len(g.status) > 2 else ""
        )  # fmt: skip
        fault = "training" if self.joint else "encoder"
        if encoder.mean > _BLAME * family.mean:
            words = f"The {fault}, not the family, loses {_part(encoder, total)} nats"
            refine = "" if self.joint else ", give it more capacity, or refine its posteriors (SemiAmortized, LocalSVI)"
            advice = f"Train it longer{refine}."
        elif family.mean > _BLAME * encoder.mean:
            words = f"The family, not the {fault}, loses {_part(family, total)} nats"
            richer = "" if "Diagonal" not in g.family else "full-rank, "
            advice = f"Take a richer one: {richer}a mixture, a flow, or chains (DAIS)."
        else:
            words = f"Family and {fault} lose {family.mean:.2f} and {encoder.mean:.2f} of {total.mean:.2f} nats"
            advice = f"A richer family and {'longer training' if self.joint else 'refined posteriors'} would both help."
        found = [f"{words} ({lost}, {len(g.status)} data). {advice}{alone}"]
        if g.flagged.any():
            found.append(
                f"For {int(g.flagged.sum())} of {len(g.status)} data the best member of the family was not reached: "
                "their parts are not to be trusted."
            )
        return found

    def _weights(self) -> list[str]:
        if self.khat is None or self.ess is None:
            return []
        good, bad = (int((self.khat <= _GOOD).sum()), int((~(self.khat <= _BAD)).sum()))
        words = f"k-hat is below {_GOOD} for {good} and above {_BAD} for {bad} of {self.num_data} data"
        if bad:
            words += f" (worst: {', '.join(str(i) for i in self.worst[: min(bad, 5)])})"
        share = float(self.ess.median())
        return [f"{words}; importance draws are worth {share:.0%} of their number in the median."]

    def _chains(self) -> list[str]:
        r = self.reference
        if r is None:
            return []
        number, ok = len(r.status), int(r.usable.sum())
        found = []
        if ok < number:
            found.append(
                f"Chains from the prior do not agree with each other, or are too few, for {number - ok} of {number} "
                f"data ({r.verdicts}): their posteriors may have several modes, and nothing here judges them."
            )
        if self.comparison is not None:
            bad = self.disagreeing
            where = f" ({', '.join(str(i) for i in bad[:5])}{', ...' if len(bad) > 5 else ''})" if bad else ""
            words = f"The guide is half a standard deviation or more off chains from the prior on {len(bad)} of {ok}"
            fine = 0 if self.khat is None else int((self.khat[bad] <= _BAD).sum())
            blind = f"; k-hat, which cannot see missed modes, is below {_BAD} for {fine} of them" if fine else ""
            found.append(f"{words} data{where}{blind}.")
        return found

    def _knowledge(self) -> list[str]:
        i = self.information
        if i is None:
            return []
        words = f"KL to the prior is {'at most ' if i.augmented else ''}{float(i.kl.mean()):.2f} nats per datum"
        if self.num_data == 1:  # what a latent tells apart takes two data
            return [words + "."]
        found = []
        dead = int((~i.active).sum())
        if dead:
            are, them = ("is", "it") if dead == 1 else ("are", "them")
            found.append(f"{dead} of {len(i.active)} latents {are} not active: the model does without {them}.")
        if i.mutual_information is not None:
            words += f", mutual information {i.mutual_information:.2f} nats"
            if i.mutual_information > i.cap - 0.5:
                words += f" (capped by log of {self.num_data} data, {i.cap:.2f}: more data would show more)"
        return [*found, words + "."]

    def _simulated(self) -> list[str]:
        c = self.calibration
        if c is None:
            return []
        if c.passed():
            return [f"On {len(c.ranks)} data the model made itself the guide is calibrated (ranks and TARP)."]
        shapes = sorted({shape for shape in c.shapes() if shape})
        how = f": {'; '.join(shapes)}" if shapes else ""
        return [
            f"On {len(c.ranks)} data the model made itself the guide is not calibrated (ranks p = {c.sbc_pvalue:.2g}, "
            f"TARP p = {c.tarp_pvalue:.2g}){how}."
        ]

    def __repr__(self) -> str:
        lines = [f"Report on {self.guide}, {self.num_data} data, nats per datum ({self.seconds:.0f} s)"]
        lines += [f"  * {sentence}" for sentence in self.verdict]
        for part in (self.elbo, self.iwae, self.gaps, self.information, self.comparison, self.calibration):
            if part is not None:
                lines += [f"  {line}" for line in repr(part).splitlines()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from pyrovae.report import diagnosis

        return "".join(diagnosis(self))

    def figures(self) -> dict[str, Figure]:
        """k-hat histogram, gap bars and calibration, as far as they are known: title -> figure."""
        from pyrovae import plots

        found = {}
        if self.khat is not None:
            found["k-hat of every datum"] = plots.khat_histogram(self.khat)
        if self.gaps is not None:
            found["Where the guide loses"] = plots.gaps({self.guide: self.gaps})
        if self.calibration is not None:
            found["Ranks on simulated data"] = plots.sbc(self.calibration)
            found["TARP on simulated data"] = plots.tarp(self.calibration)
            found["Coverage of intervals on simulated data"] = plots.coverage(self.calibration)
        return found


def _part(part: Estimate, total: Estimate) -> str:
    """A part that passes the whole, by the error of either, is all of it."""
    return f"all of {total.mean:.2f}" if part.mean > total.mean else f"{part.mean:.2f} of {total.mean:.2f}"


def report(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 1000,
    num_gaps: int = 100,
    num_reference: int = 100,
    num_simulated: int = 0,
    reference: Reference | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Report:
    """Everything the diagnostics say about a guide on these data, with a verdict in words.

    Args:
        model, guide: and the arguments both are called with.
        num_samples: importance draws per datum.
        num_gaps: data, from the first, whose gaps are split (local inference for each). 0 leaves it out.
        num_reference: data, from the first, on which chains from the prior are run. 0 leaves it out.
        num_simulated: data the model makes itself for calibration (an amortized guide); 0 leaves it out.
        reference: chains for the first data, where they exist already.
        seed: of everything random.
        progress: show bars.

    Raises:
        IncompatibleError: the guide was built for another model.
        ScaleError: a KL weight or scale is in force.
    """
    from pyrovae.reference import compare, hmc  # the references use this package's distances

    began = time.perf_counter()
    require_pair(model, guide, None)
    dense = hasattr(guide, "_sampler")
    number = 1
    if guide.plate is not None:
        with torch.no_grad(), preserve_rng(), evaluating(model), isolated():
            number = read_plate(model, guide.plate, args, kwargs).size
    provenance = Provenance.of_call(args, kwargs, num_data=number, seed=seed, num_samples=num_samples)

    rows = RowArguments(args, kwargs, number, guide.batched)

    def first(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args, kwargs) if guide.plate is None or count >= number else rows.rows(slice(0, count))

    elbo = iwae = khat = ess = known = split = None
    with decided(rows):
        if dense:
            weights = log_weights(
                model, guide, *args, num_samples=num_samples, seed=seed,
                progress="importance draws" if progress else None, **kwargs,
            )  # fmt: skip
            elbo, iwae = summarize(weights, provenance, model=model)
            khat = pareto_khat(weights)
            ess = (2 * torch.logsumexp(weights, 0) - torch.logsumexp(2 * weights, 0)).exp() / num_samples
            known = information(model, guide, *args, seed=seed, **kwargs)
            if num_gaps:
                some, named = first(num_gaps)
                split = gaps(
                    model, guide, *some, seed=seed, progress="local inference" if progress else None, **named
                )  # fmt: skip
        comparison = None
        if num_reference or reference is not None:
            some, named = first(len(reference.status) if reference is not None else num_reference)
            if reference is None:
                reference = hmc(
                    model, *some, plate=guide.plate, batched=guide.batched, seed=seed, progress=progress, **named
                )  # fmt: skip
            if reference.usable.any():
                comparison = compare(guide, reference, *some, num_samples=1000, seed=seed, **named)
        calibration = None
        if num_simulated:
            calibration = calibrate(model, guide, *args, num_data=num_simulated, seed=seed, **kwargs)
    return Report(
        guide.traits.name, guide.plate is None, number, elbo, iwae, khat, ess, split, known, reference, comparison,
        calibration, provenance, time.perf_counter() - began,
    )  # fmt: skip
