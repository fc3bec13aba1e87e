"""The page that `pyrovae compare` writes: what a person would rather look at than the table."""

from __future__ import annotations

import html
from pathlib import Path

import torch
from torch import Tensor

from pyrovae import plots, report
from pyrovae.comparison.outcome import Outcome, no_density
from pyrovae.comparison.recipes import TUNED
from pyrovae.runtime import evaluating, seeded
from pyrovae.table import LEGEND, Number, Row

__all__ = ["verdict", "write_report"]


def write_report(outcome: Outcome, test: Tensor, path: Path) -> None:
    """Write the self-contained HTML page."""
    o = outcome
    frozen = o.references[o.frozen_from]
    shown = list(range(min(3, frozen.draws.shape[2])))
    sections = [
        report.section(
            "Posteriors of one frozen decoder, against long chains",
            report.figure(
                plots.posterior(frozen.pooled, {name: o.draws[name] for name in o.settings.guides}, data=shown),
                "scatter of each guide's draws over those of long chains",
            ),
            report.paragraph(
                "Grey: batched HMC. Colour: the guide. Each row is one held-out datum, in the plane of the two latents "
                "that the chains find most correlated; ellipses at two standard deviations, dark for the chains.",
                "soft",
            ),
        ),
        report.section(
            "One frozen decoder: the guides compared",
            report.paragraph(
                f"All guides are posteriors of the same decoder (trained with {o.frozen_from}, then frozen). Encoders "
                f"start from that run's; those of {', '.join(TUNED)} get {o.settings.tune_epochs} more epochs. Laplace "
                "averages gradient and curvature over 8 draws here; 'at the mode' is the textbook form. Differences "
                f"are paired per datum, against {o.frozen_from} as it was trained."
            ),
            report.table(o.frozen),
        ),
        report.section(
            "End to end: one model trained under each guide",
            report.table(o.end_to_end),
            report.paragraph(
                f"{LEGEND} Every row has its own decoder: model and guide are judged together. {no_density(o)} "
                "k-hat below 0.5 is good, above 0.7 unreliable; it cannot see a missed mode.", "soft",
            ),
        ),
        report.section("Training", report.figure(plots.training(
            {name: (f.objective, f.curve) for name, f in o.fits.items()}), "training curves")),
        report.section("Reconstructions and samples", report.figure(
            plots.images(_pictures(o, test), o.data.image_shape), "reconstructions and samples"),
            report.paragraph("Above: held-out data and the decoder's mean at one posterior draw. Below: the decoder's "
                             "mean at draws from the prior.", "soft")),
        *_diagnosis(o),
        report.section("Where the numbers come from", report.facts({
            **{k: v for k, v in o.provenance.to_dict().items() if k != "versions"}, **o.provenance.versions,
            **{f"{name} (s)": f"{seconds:.1f}" for name, seconds in o.phases.items()},
            **{f"chains, decoder of {name}": repr(r) for name, r in o.references.items()},
        })),
    ]  # fmt: skip
    path.write_text(report.page(f"PyroVAE on {o.data.name}", verdict(o), sections))


def _diagnosis(o: Outcome) -> list[str]:
    """k-hat of every datum, gaps, and calibration on simulated data."""
    own = {name: value for name, value in o.khats.items() if "frozen" not in name}
    sections = []
    if own:
        pictures = [report.figure(plots.khat(own), "per-datum k-hat")]
        if o.frozen_from in own:
            pictures.append(report.figure(plots.khat_histogram(own[o.frozen_from]), "histogram of k-hat"))
        words = f"All guides; below, {o.frozen_from} with its worst data."
        sections.append(report.section("k-hat, datum by datum", *pictures, report.paragraph(words, "soft")))
    if o.gaps:
        sections.append(report.section(
            "Where the guides lose", report.figure(plots.gaps(o.gaps), "gap bars"),
            report.paragraph(
                "Each guide with its own decoder, nats per datum: what the best member of its family would still lose "
                "(approximation), and what its encoder loses on top (amortization).", "soft",
            ),
        ))  # fmt: skip
    if o.calibration is not None:
        c = o.calibration
        sections.append(report.section(
            f"Calibration of {o.frozen_from} on {len(c.ranks)} data the model made itself",
            report.figure(plots.sbc(c), "rank histograms"), report.figure(plots.tarp(c), "TARP"),
            report.figure(plots.coverage(c), "coverage of intervals"), f"<pre>{html.escape(repr(c))}</pre>",
        ))  # fmt: skip
    return sections


def verdict(outcome: Outcome) -> str:
    """What the frozen-decoder table says, in words."""
    gains = [(row, row.values.get("Δ ELBO")) for row in outcome.frozen]
    better = [(r, g) for r, g in gains if isinstance(g, Number) and g.se is not None and g.value > 3 * g.se]
    base = outcome.frozen_from
    if not better:
        first = f"On one frozen decoder no guide beats {base}'s ELBO by more than three standard errors."
    else:
        names = "; ".join(f"{r.guide} by {g.value:.2f} ± {g.se:.2f}" for r, g in better)
        first = f"On one frozen decoder these guides beat {base}'s ELBO, in nats per datum: {names}."
    nearest = min(outcome.frozen, key=_distance)
    w2 = nearest.values.get("sliced W2")
    if not isinstance(w2, Number):
        return first
    near = f"{nearest.guide} (sliced W2 {w2.value:.2f}, noise floor {w2.floor:.2f})"
    return f"{first} Nearest to the reference chains is {near}."


def _distance(row: Row) -> float:
    w2 = row.values.get("sliced W2")
    return w2.value if isinstance(w2, Number) else float("inf")


def _pictures(outcome: Outcome, test: Tensor) -> dict[str, Tensor]:
    x = test[:14]
    rows: dict[str, Tensor] = {"data": x}
    with torch.no_grad(), seeded(outcome.settings.seed):
        for name, guide in outcome.guides.items():
            with evaluating(guide.model, guide):
                rows[name] = outcome.models[name].mean(guide.sample(1, x)["z"][0])
        for name, vae in outcome.models.items():
            torch.manual_seed(outcome.settings.seed)
            z = torch.randn(14, vae.latent_dim, device=x.device)
            with evaluating(vae):
                rows[f"samples, {name}"] = vae.mean(z)
    return rows
