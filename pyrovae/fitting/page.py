"""The page and the table that `pyrovae fit` ends with: words first, then pictures, then numbers, then where they come
from.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from pyrovae import plots
from pyrovae import report as parts
from pyrovae.evidence.estimate import LOWER, NO_BOUND, UNNORMALISED
from pyrovae.fitting.guides import NO_GUIDE
from pyrovae.fitting.material import Material
from pyrovae.fitting.outcome import Outcome
from pyrovae.fitting.picture import Picture
from pyrovae.fitting.pictures import left_out
from pyrovae.fitting.recipes import CHARTS, DIFFUSION, LANGUAGE_MODEL, TILTED
from pyrovae.fitting.sentences import Sentences
from pyrovae.table import Number

__all__ = ["lead", "pictures", "report", "sentences", "to_rich"]

_SHARES = ("k-hat above 0.7", "linear probe", "coverage", "coverage of test data")
_COUNTS = ("active latents", "latents", "charts in use", "charts", "steps")
_UNITS = "Nats per datum, mean ± standard error over test data."
_KINDS = {
    LOWER: "ELBO and IWAE are lower bounds of log p(x), the second the tighter one.",
    NO_BOUND: (
        "ELBO and IWAE are estimates of log p(x), not bounds: the log Z of the tilted prior that is taken off was "
        "measured by annealing, which finds it from below. Its error is common to all data and not in theirs."
    ),
    UNNORMALISED: (
        "ELBO and IWAE are lower bounds of log p(x) + log Z, with the unknown log Z of the tilted prior, the same for "
        "all data: they compare data, not models."
    ),
}
_LEGEND = (
    "k-hat above 0.7 marks data whose importance weights cannot be trusted. Mutual information is what a code tells "
    "about which of the N test data it is of, at most log N."
)
_CODES = (
    "A latent is active where its posterior mean moves with the data. The probe is a linear predictor of labels from "
    "posterior means: half of the test data to fit it, the rest to judge it."
)
_ATLAS = (
    "A chart is in use where the predictor likes it best for some test datum. Unfaithfulness is the distance of a "
    "generated datum to the nearest training datum, coverage the share of training data that are nearest to one of as "
    "many generated data as there are test data; test data show what is usual. A cycle residual is how far "
    "coordinates are from where they were after a way into another chart and back, where two charts hold a datum; the "
    "side of a chart is 1."
)
_STEPS = (
    "The ELBO is a lower bound of log p(x), the sum over all steps of the chain, with one draw of the noise at each. "
    "Values lie in [-1, 1]; the second line is the same bound for values in [0, 1], to be compared with other models. "
    "The chain should end where its prior is: that KL should be near 0."
)
_GRID = (
    "The exact divergences are integrals over a grid; the gap that Monte Carlo sees should agree with the first."
)


_SCORES = {LOWER: "log p(x) of at least", NO_BOUND: "log p(x) of about", UNNORMALISED: "log p(x) + log Z of at least"}


def report(outcome: Outcome, material: Material, shown: Sequence[str]) -> str:
    """The whole page."""
    o, missing = outcome, left_out(outcome)
    sections = [
        "".join(parts.paragraph(words) for words in o.told),
        parts.section("Training", parts.figure(_curves(o), "training curve"), parts.paragraph(_training(o), "soft")),
        *shown,
        *([parts.section("Left out", parts.paragraph(missing, "soft"))] if missing else []),
        parts.section("Numbers", _table(["", "value"], [[name, _text(name, value)] for name, value in
                                                        o.findings.numbers.items()]),
                      parts.paragraph(_legend(o), "soft")),
        *_groups(o),
        parts.section("Where the numbers come from", parts.facts(_facts(o, material))),
    ]  # fmt: skip
    return parts.page(f"{o.settings.model} on {o.provenance.data}", lead(o), sections)


def lead(outcome: Outcome) -> str:
    """What was done and found, in a sentence or two."""
    o, found = outcome, outcome.findings.numbers
    s = o.settings
    who = f"the {s.guide} guide" if s.model != LANGUAGE_MODEL else "no guide, as it has no latents"
    where = "" if s.manifold == "plane" else f", its latents on a {s.manifold},"
    first = (
        f"The model {s.model!r}{where} with {who} was trained on {o.objective} for {len(o.curve)} epochs"
        f"{'' if o.provenance.binarization != 'dynamic' else ' of newly binarised images'}."
    )
    best, more = o.findings.score, list[str]()
    if best is None:
        score = " This guide has draws but no density, so there is no bound of log p(x)"
    elif best[0] == "log p(x), exact":
        score = f" A test datum has log p(x) = {_text('', best[1])} nats on average"
    else:
        how = f"{best[0].partition(' (')[0]}{', less the measured log Z' if o.findings.kind == NO_BOUND else ''}"
        score = f" A test datum has {_SCORES[o.findings.kind]} {_text('', best[1])} nats on average ({how})"
    for name, words in (("perplexity", "is"), ("perplexity, at most", "is at most")):
        if isinstance(found.get(name), Number):
            more.append(f"its perplexity {words} {_text('', found[name])}")
    mutual, active = found.get("mutual information"), found.get("active latents")
    if isinstance(mutual, Number):
        cap = found["log N, the most it can be"]
        more.append(f"the code tells {_text('', mutual)} of at most {_text('', cap)} nats about which datum it is of")
    charts = found.get("charts in use")
    if isinstance(charts, Number):
        more.append(f"{charts.value:.0f} of {_text('charts', found['charts'])} charts are in use")
    if isinstance(active, Number):
        more.append(f"{active.value:.0f} of {_text('latents', found['latents'])} latents are in use")
    return first + score + "".join(f"{'; '}{words}" for words in more) + "."


def pictures(shown: Sequence[Picture]) -> list[str]:
    """A section for each picture."""
    return [parts.section(one.title, parts.figure(one.figure, one.title), parts.paragraph(one.words, "soft"))
            for one in shown]  # fmt: skip


def sentences(found: Sentences) -> list[str]:
    """Samples, reconstructions and a path, as text."""
    sections = []
    if found.reconstructions:
        sections.append(parts.section(
            "Reconstructed sentences", _table(["test sentence", "from its code"], found.reconstructions, wrap=True),
            parts.paragraph("The likeliest word after the ones before it, at the posterior mean of the sentence. A "
                            "model that does not use its code writes the same sentence every time.", "soft"),
        ))  # fmt: skip
    if found.path:
        sections.append(parts.section(
            "From one sentence to another", _list(found.path),
            parts.paragraph("Codes on the straight line between those of the first two test sentences.", "soft"),
        ))  # fmt: skip
    sections.append(parts.section(
        "Sample sentences", _list(found.samples), parts.paragraph("Draws of the model, word by word.", "soft")
    ))  # fmt: skip
    return sections


def to_rich(outcome: Outcome) -> Any:
    """A short table for the terminal."""
    from rich import box
    from rich.table import Table

    o = outcome
    where = "" if o.settings.manifold == "plane" else f" on a {o.settings.manifold}"
    table = Table(
        title=f"{o.settings.model}{where}, {o.settings.guide}, {o.objective} on {o.provenance.num_data} test data of "
        f"{o.provenance.data}, nats per datum", caption=" ".join(o.told), box=box.SIMPLE_HEAD, title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in o.findings.numbers.items():
        table.add_row(name, _text(name, value))
    kl = "KL to the base" if o.settings.model in TILTED else "KL"
    for group in o.findings.groups:
        table.add_row(f"{kl} of {group.name} ({group.active} of {group.size} latents active)", _text("KL", group.kl))
        if group.clustering is not None:
            c = group.clustering
            table.add_row(f"clusters of {group.name}, {c.used} of {len(c.table)} used",
                          f"Hungarian {c.hungarian:.1%}, many-to-one {c.many_to_one:.1%}")  # fmt: skip
    return table


def _groups(o: Outcome) -> list[str]:
    groups = o.findings.groups
    if not groups:
        return []
    rows = [[g.name, str(g.size), _text("KL", g.kl), f"{g.active} of {g.size}", _text("linear probe", g.probe)]
            for g in groups]  # fmt: skip
    kl = "KL to the base, nats" if o.settings.model in TILTED else "KL, nats"
    sections = [parts.section(
        "Latent groups", _table(["group", "latents", kl, "active", "linear probe"], rows),
        parts.paragraph(f"z1 is the shallowest group, z{len(groups)} the deepest.", "soft"),
    )]  # fmt: skip
    if groups[0].clusters is None:
        return sections
    rows = []
    for g in groups:
        if g.clustering is None:
            rows.append([g.name, str(0 if g.clusters is None else len(g.clusters.unique())), *["no labels"] * 4])
        else:
            c = g.clustering
            rows.append([g.name, f"{c.used} of {len(c.table)}", f"{c.hungarian:.1%}", f"{c.many_to_one:.1%}",
                         f"{c.nmi:.3f}", f"{c.ari:.3f}"])  # fmt: skip
    head = ["group", "clusters used", "Hungarian accuracy", "many-to-one accuracy", "NMI", "ARI"]
    words = (
        "Hungarian accuracy gives every cluster one class and every class one cluster; many-to-one names each cluster "
        "by its majority, and rises with the number of clusters. ARI is 0 on average for clusters at random; NMI is "
        "not, least of all with few data (about 0.2 for 100 data in 10 clusters)."
    )
    return [*sections, parts.section("Clusters against labels", _table(head, rows), parts.paragraph(words, "soft"))]


def _curves(o: Outcome) -> Any:
    figure = plots.training({"training": (o.objective, o.curve)})
    axis = figure.axes[0]
    if o.validation:
        axis.plot(*zip(*o.validation, strict=True), color=plots.COLORS[1], label="held out", linewidth=1.4)
        axis.legend(frameon=False, fontsize=8)
    if len(o.fits) > 1:
        axis.axvline(len(next(iter(o.fits.values())).curve) + 0.5, color="#999999", linewidth=1, linestyle=":")
    return figure


def _training(o: Outcome) -> str:
    """What the curve shows."""
    s, words = o.settings, [f"{o.objective[0].upper()}{o.objective[1:]} of the training data, mean of every epoch."]
    if o.settings.model in TILTED:
        words.append(
            "It lacks log Z of the prior, which moves with training: the curve may rise or fall without the model "
            "getting better or worse."
        )
    elif o.objective == "E_q log p(x,z)":
        words.append("It is no bound of log p(x).")
    elif o.objective not in ("ELBO", "log p(x)") and not o.objective.startswith("IWAE"):
        words.append("An objective with terms of its own, no bound: models are compared by the numbers below.")
    if s.warmup:
        words.append(f"The KL weight rose from 0.1 to 1 over {s.warmup} epochs: a curve may fall as it grows.")
    if len(o.fits) > 1:
        words.append("At the dotted line the clusters were placed among the codes.")
    if s.patience:
        stage = " of the last stage" if len(o.fits) > 1 else ""
        words.append(f"Kept are the weights of epoch {o.fit.best_epoch}{stage}, the best on held-out training data.")
    if s.schedule != "none":
        words.append(f"Schedule: {s.schedule}.")
    return " ".join(words)


def _legend(o: Outcome) -> str:
    """What the numbers are."""
    model, names = o.settings.model, o.findings.numbers
    if model == DIFFUSION:
        return f"{_UNITS} {_STEPS}"
    words = [_UNITS, _KINDS[o.findings.kind], _LEGEND, _ATLAS if model == CHARTS else _CODES]
    if any(name.startswith("KL(q ||") for name in names):
        words.append(_GRID)
    return " ".join(words)


def _facts(o: Outcome, material: Material) -> dict[str, Any]:
    origin = {k: v for k, v in o.provenance.to_dict().items() if k != "versions" and v not in ("", None)}
    others = {"classes": "vlac", "manifold": "vae"}  # options of one model
    s = {k: v for k, v in o.settings.to_dict().items() if k not in origin and v not in ("", None) and
         others.get(k, o.settings.model) == o.settings.model}  # fmt: skip
    guide = repr(o.guide) if s["guide"] != NO_GUIDE else NO_GUIDE
    seconds = {f"{name} (s)": f"{value:.1f}" for name, value in o.phases.items()}
    return {**origin, **o.provenance.versions, "parts": material.told, **s, "guide": guide, **seconds}


def _text(name: str, value: Number | str) -> str:
    if isinstance(value, str):
        return value
    if name in _COUNTS:
        return f"{value.value:.0f}"
    scale, digits, unit = (100, 1, " %") if name in _SHARES else (1, 3 if name == "log Z" else 2, "")
    spread = "" if value.se is None else f" ± {scale * value.se:.{digits}f}"
    return f"{scale * value.value:z.{digits}f}{spread}{unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, wrap: bool = False) -> str:
    """Rows of text; with `wrap`, cells are words that break into lines."""
    style = ' style="white-space: normal; text-align: left; font-weight: 400; width: 50%"' if wrap else ""
    top = "".join(f"<th{' style=' + chr(34) + 'text-align: left' + chr(34) if wrap else ''}>{html.escape(name)}</th>"
                  for name in head)  # fmt: skip
    body = "".join("<tr>" + "".join(f"<td{style}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line) or '<i>(no words)</i>'}</li>" for line in lines) + "</ul>"
