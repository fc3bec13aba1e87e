"""The page and the table that `pyrovae fit` ends with: words first, then pictures, then numbers, then where they come
from.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from pyrovae import plots
from pyrovae import report as parts
from pyrovae.fitting.guides import NO_GUIDE
from pyrovae.fitting.material import Material
from pyrovae.fitting.outcome import Outcome
from pyrovae.fitting.pictures import Picture
from pyrovae.fitting.recipes import LANGUAGE_MODEL
from pyrovae.fitting.sentences import Sentences
from pyrovae.table import Number

__all__ = ["lead", "pictures", "report", "sentences", "to_rich"]

_SHARES = ("k-hat above 0.7", "linear probe")
_COUNTS = ("active latents", "latents")
_LEGEND = (
    "Nats per datum, mean ± standard error over test data. ELBO and IWAE are lower bounds of log p(x), the second the "
    "tighter one. k-hat above 0.7 marks data whose importance weights cannot be trusted. Mutual information is what a "
    "code tells about which of the N test data it is of, at most log N. A latent is active where its posterior mean "
    "moves with the data. The probe is a linear predictor of labels from posterior means: half of the test data to "
    "fit it, the rest to judge it."
)


def report(outcome: Outcome, material: Material, shown: Sequence[str]) -> str:
    """The whole page."""
    o = outcome
    sections = [
        "".join(parts.paragraph(words) for words in o.told),
        parts.section("Training", parts.figure(_curves(o), "training curve"), parts.paragraph(_training(o), "soft")),
        *shown,
        parts.section("Numbers", _table(["", "value"], [[name, _text(name, value)] for name, value in
                                                        o.findings.numbers.items()]),
                      parts.paragraph(_LEGEND, "soft")),
        *_groups(o),
        parts.section("Where the numbers come from", parts.facts(_facts(o, material))),
    ]  # fmt: skip
    return parts.page(f"{o.settings.model} on {o.provenance.data}", lead(o), sections)


def lead(outcome: Outcome) -> str:
    """What was done and found, in a sentence or two."""
    o, found = outcome, outcome.findings.numbers
    s = o.settings
    who = f"the {s.guide} guide" if s.model != LANGUAGE_MODEL else "no guide, as it has no latents"
    first = (
        f"The model {s.model!r} with {who} was trained on {o.objective} for {len(o.curve)} epochs"
        f"{'' if o.provenance.binarization != 'dynamic' else ' of newly binarised images'}."
    )
    exact = found.get("log p(x), exact")
    bounds = [(name, value) for name, value in found.items() if name.startswith("IWAE")]
    if isinstance(exact, Number):
        score = f" A test datum has log p(x) = {_text('', exact)} nats on average"
    elif bounds and isinstance(bounds[0][1], Number):
        score = f" A test datum has log p(x) of at least {_text('', bounds[0][1])} nats on average ({bounds[0][0]})"
    else:
        score = " This guide has draws but no density, so there is no bound of log p(x)"
    more = []
    for name, words in (("perplexity", "is"), ("perplexity, at most", "is at most")):
        if isinstance(found.get(name), Number):
            more.append(f"its perplexity {words} {_text('', found[name])}")
    mutual, active = found.get("mutual information"), found.get("active latents")
    if isinstance(mutual, Number):
        cap = found["log N, the most it can be"]
        more.append(f"the code tells {_text('', mutual)} of at most {_text('', cap)} nats about which datum it is of")
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
    table = Table(
        title=f"{o.settings.model}, {o.settings.guide}, {o.objective} on {o.provenance.num_data} test data of "
        f"{o.provenance.data}, nats per datum", caption=" ".join(o.told), box=box.SIMPLE_HEAD, title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in o.findings.numbers.items():
        table.add_row(name, _text(name, value))
    for group in o.findings.groups:
        table.add_row(f"KL of {group.name} ({group.active} of {group.size} latents active)", _text("KL", group.kl))
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
    sections = [parts.section(
        "Latent groups", _table(["group", "latents", "KL, nats", "active", "linear probe"], rows),
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
    s, words = o.settings, [f"{o.objective} of the training data, mean of every epoch."]
    if o.objective == "E_q log p(x,z)":
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


def _facts(o: Outcome, material: Material) -> dict[str, Any]:
    origin = {k: v for k, v in o.provenance.to_dict().items() if k != "versions" and v not in ("", None)}
    s = {k: v for k, v in o.settings.to_dict().items() if k not in origin and v not in ("", None)}
    guide = repr(o.guide) if s["guide"] != NO_GUIDE else NO_GUIDE
    seconds = {f"{name} (s)": f"{value:.1f}" for name, value in o.phases.items()}
    return {**origin, **o.provenance.versions, "parts": material.told, **s, "guide": guide, **seconds}


def _text(name: str, value: Number | str) -> str:
    if isinstance(value, str):
        return value
    if name in _COUNTS:
        return f"{value.value:.0f}"
    scale, digits, unit = (100, 1, " %") if name in _SHARES else (1, 2, "")
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
