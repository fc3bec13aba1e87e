"""The table on the terminal and `docs/certification.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrovae.certification.best import Best
from pyrovae.certification.checks import IWAE_DRAWS, Check, Error, iwae
from pyrovae.certification.joint_mode import PROBLEM, JointCheck
from pyrovae.certification.outcome import Outcome
from pyrovae.certification.recipes import SEARCHED, Rule
from pyrovae.certification.schools import best_gaussian, posterior

__all__ = ["COLUMNS", "JOINT_COLUMNS", "cells", "joint_rows", "joint_to_rich", "markdown", "to_rich"]

COLUMNS = ("guide", "mean", "covariance", "ELBO", "evidence", "k-hat", "verdict")
JOINT_COLUMNS = (
    "guide", "", "log p(y) - ELBO", "log p(y) - IWAE", "mean of tau", "sd of tau", "k-hat", "verdict",
)  # fmt: skip

FAMILIES = {
    "diagonal": "diagonal Gaussian",
    "low_rank": "rank one plus diagonal",
    "full_rank": "full-rank Gaussian",
    "mixture": "two diagonal Gaussians",
    "laplace": "at a mode, Fisher curvature",
    "laplace_hessian": "at a mode, Hessian",
    "averaged": "averaged gradient and curvature",
}

LEGEND = (
    "Errors against the standard, in brackets in standard errors; the worst entry over data and dimensions. mean in "
    f"standard deviations, covariance in sd_i sd_j, ELBO and evidence (IWAE-{IWAE_DRAWS}) in nats; > the standard is a "
    "lower bound. k-hat: median and largest."
)


def cells(check: Check) -> list[str]:
    """One row of the table."""
    khat = "" if check.khat is None else " / ".join("exact" if k == -math.inf else f"{k:.2f}" for k in check.khat)
    errors = [_error(error) for error in (check.mean, check.covariance, check.elbo, check.evidence)]
    return [check.guide, *errors, khat, check.verdict]


def _error(error: Error | None) -> str:
    if error is None:
        return ""
    value = f"{error.value:+.3f}{error.mark}" if abs(error.value) >= 5e-7 else "0"
    if error.mark or abs(error.value) < 5e-7 or not math.isfinite(error.z):
        return value if error.ok else f"{value} !"
    return f"{value} ({error.z:+.1f}){'' if error.ok else ' !'}"


def to_rich(outcome: Outcome) -> Any:
    """A `rich` table."""
    table = _table(f"Certification: {_summary(outcome.checks)}", LEGEND, ("problem", *COLUMNS))
    previous = ""
    for check in outcome.checks:
        if previous not in ("", check.problem):
            table.add_section()
        style = _STYLES.get(check.verdict, "")
        table.add_row(check.problem if check.problem != previous else "", *cells(check), style=style)
        previous = check.problem
    return table


def joint_to_rich(outcome: Outcome) -> Any:
    """A `rich` table of eight schools."""
    table = _table(f"{PROBLEM}: {_summary(outcome.joint)}", "Nats; standard errors of draws.", JOINT_COLUMNS)
    for row in joint_rows(outcome.joint):
        table.add_row(*row, style=_STYLES.get(row[-1], ""))
    return table


_STYLES = {"FAIL": "bold red", "local optimum": "yellow", "not certified": "dim"}


def _table(title: str, caption: str, columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    for column in columns:
        left = column in ("problem", "guide", "", "verdict")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _summary(checks: Sequence[Check | JointCheck]) -> str:
    counts = {word: sum(c.verdict == word for c in checks) for word in ("pass", *_STYLES)}
    local = f"{counts['local optimum']} in a local optimum, " if counts["local optimum"] else ""
    return f"{counts['pass']} pass, {local}{counts['FAIL']} fail, {counts['not certified']} not certified"


def joint_rows(checks: Sequence[JointCheck]) -> list[list[str]]:
    """Eight schools: what is exact, and the guides."""
    truth, rows = posterior(), []
    rows.append(["exact", "posterior", "", "", f"{truth.mean:.2f}", f"{truth.sd:.2f}", "", ""])
    for about, full_rank in (("best diagonal Gaussian", False), ("best full-rank Gaussian", True)):
        best = best_gaussian(full_rank)
        gap = f"{truth.log_evidence - best.elbo:.3f}"
        rows.append(["exact", about, gap, "", f"{best.mean:.2f}", f"{best.sd:.2f}", "", ""])
    for check in checks:
        gaps = [f"{value:.3f} ± {se:.3f}" for value, se in (check.gap, check.iwae_gap)]
        taus = [f"{value:.2f} ± {se:.2f}" for value, se in (check.tau_mean, check.tau_sd)]
        rows.append([check.guide, check.about, *gaps, *taus, f"{check.khat:.2f}", check.verdict])
    return rows


def markdown(outcome: Outcome) -> str:
    """The whole page."""
    parts = [
        _HEAD.format(
            summary=_summary((*outcome.checks, *outcome.joint)), trained=_tolerance(Rule()),
            searched=_tolerance(SEARCHED), draws=IWAE_DRAWS,
        )
    ]
    if outcome.checks:
        standards = [[f"`{name}`", words] for name, words in _standards(outcome).items()]
        parts.append(_block(["guide", "held against"], standards))
    for name, best in outcome.bests.items():
        parts.append(f"## {name}\n\n{best.problem.about}.")
        rows = _families(best)
        if rows:
            parts.append(_block(["standard", "log p(x) - ELBO", "log p(x) - IWAE", "mean", "sd"], rows))
        checks = [check for check in outcome.checks if check.problem == name]
        parts.append(_block(list(COLUMNS), [_marked(cells(check)) for check in checks]))
        parts += _notes(checks)
    if outcome.joint:
        rows = [_marked(row) for row in joint_rows(outcome.joint)]
        parts += [_JOINT, _block(list(JOINT_COLUMNS), rows), *_notes(outcome.joint)]
    return "\n\n".join([*parts, _origin(outcome)]) + "\n"


def _notes(checks: Sequence[Check | JointCheck]) -> list[str]:
    notes = [f"* `{c.guide}`: {c.verdict}: {'; '.join(c.reasons)}." for c in checks if c.reasons]
    return ["\n".join(notes)] if notes else []


_JOINT = f"""## {PROBLEM}

Guides in joint mode on one posterior of ten latents: mu ~ N(0, 5), tau ~ HalfCauchy(5), eta_j ~ N(0, 1), y_j ~ N(mu +
tau eta_j, sigma_j), float32. The posterior of tau is exact (a grid in log tau; mu and eta integrate out), and so are
the best Gaussians. Gaussians make tau's tail too short. A Gaussian guide must be the best one; the mixtures and `dais`
must have more of tau's standard deviation than the best diagonal one, and not more than the posterior; `hvae`, whose
base is that Gaussian, must not fall below its ELBO."""

_HEAD = """# Certification

Every guide on every problem with an exact answer: **{summary}**.

This page is written by `pyrovae certify`, which exits with status 1 if any check fails.

## What is checked

A guide is held against the *best member of its family* on that problem, found without the guide: in closed form or by
Gauss-Hermite quadrature and L-BFGS over a posterior that is written out by hand (`pyrovae/certification/problems.py`),
so a known limit of a family is part of its standard and no excuse. Encoders are tables with one row per datum:
amortization is not on trial here. Training is stock SVI through `fit`.

An error passes if |error| <= 4 standard errors + tolerance, for every datum and every entry:

* mean, in standard deviations of the standard; covariance, each entry in units of sd_i sd_j;
* ELBO, nats: below the best member's by no more than the tolerance, above it never (beyond 4 standard errors);
* evidence, nats: IWAE with {draws} draws, against the IWAE of the best member's own weights at plain draws of its own
  (which miss what the best member misses), and never above log p(x) (beyond 4 standard errors).

Tolerances, for guides that stochastic gradients or random averages lead to their posterior: {trained}.
For the others: {searched}.

Standard errors are those of the draws, or those between calls where they are larger (some guides find a posterior
anew on each call). Training error has none: the tolerance is for it. In brackets: the error in standard errors.

Several members may be equally good (a Gaussian on either of two equal modes). A guide is held against the nearest of
those within the ELBO's tolerance of the best. Laplace's standard is the nearest mode. Worse optima exist, too, and
gradients followed from one start may end there: a guide that misses the best member, but is right by the same rule for
the nearest other optimum of its family, is marked "local optimum" with the nats it lacks. It is no pass, and no fault.

Some rows have other standards. The best member of a flow's family is not known: a flow must be at least as good as the
best Gaussian it contains (>), and its bounds must stay below log p(x). `ShortRun` has no density: its draws are held
against the exact law of the same number of steps, which is *not* the posterior. "Not certified" is no pass: it says
what is missing.

Before each table of guides: what the standards themselves lack against the posterior, from the least to the most over
data (ELBO and IWAE in nats, the latter a median of ten; the mean's error in the posterior's standard deviations, sd as
a ratio to the posterior's). k-hat is the median and the largest over data; "exact": all weights are equal."""


def _tolerance(rule: Rule) -> str:
    return f"mean {rule.mean:g}, covariance {rule.covariance:g}, ELBO and evidence {rule.elbo:g}"


def _standards(outcome: Outcome) -> dict[str, str]:
    return {check.guide: check.held_to for check in outcome.checks}


def _families(best: Best) -> list[list[str]]:
    """What the standards that were needed lose themselves, from the least to the most over data."""
    truth, rows = best.problem.truth, []
    for name, words in FAMILIES.items():
        found = vars(best).get(name)
        if found is None:
            continue
        pick = found.elbo.argmax(0)
        mean, covariance = (part[pick, torch.arange(len(pick))] for part in found.moments)
        sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        gap, shift = truth.log_evidence - found.best, ((mean - truth.mean) / truth.sd).abs()
        weights = found.members.pick(pick).log_weights(best.problem.log_joint, 10 * IWAE_DRAWS, 0)[:, 0]
        short = truth.log_evidence - iwae(weights, IWAE_DRAWS).quantile(0.5, 0)
        rows.append([words, _range(gap, 3), _range(short, 3), _range(shift, 2), _range(sd / truth.sd, 2)])
    return rows


def _range(values: Tensor, digits: int) -> str:
    """Smallest and largest."""
    low, high = (f"{float(v) + 1e-9:.{digits}f}" for v in (values.min(), values.max()))  # no minus before a zero
    return low if low == high else f"{low} to {high}"


def _marked(row: list[str]) -> list[str]:
    verdict = f"**{row[-1]}**" if row[-1] == "FAIL" else row[-1]
    return [f"`{row[0]}`", *(cell.replace("*", "\\*") for cell in row[1:-1]), verdict]


def _block(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _origin(outcome: Outcome) -> str:
    p, settings = outcome.provenance, outcome.settings
    command = "pyrovae certify"
    for option, names in (("guides", settings.guides), ("problems", settings.problems)):
        command += f" --{option} {','.join(names)}" if names else ""
    command += f" --seed {settings.seed}" + (" --quick" if settings.quick else "")
    versions = ", ".join(f"{name} {number}" for name, number in p.versions.items())
    return (
        f"## Where the numbers come from\n\n`{command}`: {p.num_samples} draws per datum, {p.dtype}, {p.threads} "
        f"thread(s), {outcome.seconds:.0f} s; {versions}. Data: sha256 {p.fingerprint}."
    )
