"""What can be asked of a finished run: bounds with more draws, long chains, a diagnosis. Each goes on where it stopped.

Finished chunks lie in the run's folder below `evaluate/` and `reference/`, named after the settings they depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyrovae import diagnose as diagnostics
from pyrovae import evidence, export, plots, report, table
from pyrovae import reference as references
from pyrovae.comparison.machine import set_threads
from pyrovae.comparison.saved import Saved, load
from pyrovae.table import Number, Row

__all__ = ["diagnose", "evaluate", "reference"]

Say = Callable[[Any], None]


def _open(folder: str | Path, threads: int | None) -> Saved:
    run = load(folder)
    set_threads(threads, run.images.event_shape[0], run.settings.batch_size)
    return run


def evaluate(
    folder: str | Path, *, guides: tuple[str, ...] = (), num_samples: int = 5000, num_data: int = 1000,
    temperatures: int = 0, seed: int = 0, threads: int | None = None, say: Say = print,
) -> list[Row]:  # fmt: skip
    """ELBO, IWAE, k-hat and, with temperatures, AIS of every guide on held-out data; writes `evaluation.json`."""
    run = _open(folder, threads)
    x = run.test[:num_data]
    rows = []
    for name, guide in run.chosen(guides).items():
        model = run.models[name]
        values: dict[str, Number | str] = {}
        place = run.folder / "evaluate"
        if guide.traits.has_density:
            weights = evidence.log_weights(
                model, guide, x, num_samples=num_samples, seed=seed, progress=f"evaluating {name}",
                resume=place / f"{name}-iwae-{num_samples}-{len(x)}-{seed}",
            )  # fmt: skip
            elbo, iwae = evidence.summarize(weights)
            khat = diagnostics.pareto_khat(weights)
            share = float((~(khat <= 0.7)).double().mean())
            values = {
                "ELBO": Number(elbo.mean, elbo.mean_se), "IWAE": Number(iwae.mean, iwae.mean_se),
                "k-hat": Number(float(khat.median())), "> 0.7": Number(share),
            }  # fmt: skip
        else:
            values = {"ELBO": "no density", "IWAE": "no density", "k-hat": "none", "> 0.7": "none"}
        if temperatures:
            found = evidence.ais(
                model, x, num_temperatures=temperatures, seed=seed, progress=f"annealing {name}",
                resume=place / f"{name}-ais-{temperatures}-{len(x)}-{seed}",
            )  # fmt: skip
            values["AIS"] = Number(found.mean, found.mean_se)
        origin = replace(run.provenance, num_data=len(x), num_samples=num_samples, seed=seed)
        rows.append(Row(name, values, origin))
    (run.folder / "evaluation.json").write_text(json.dumps([row.to_dict() for row in rows], indent=1))
    say(table.to_rich("lower bounds of log p(x), nats per datum, each guide with its own decoder", rows))
    return rows


def reference(
    folder: str | Path, *, guides: tuple[str, ...] = (), num_data: int = 100, num_chains: int = 8,
    target_ess: float = 2000.0, seed: int = 0, threads: int | None = None, say: Say = print,
) -> dict[str, references.Reference]:  # fmt: skip
    """Long chains under each guide's decoder, its guide held against them; writes `reference-<guide>.nc`."""
    run = _open(folder, threads)
    x = run.test[:num_data]
    found = {}
    for name, guide in run.chosen(guides).items():
        chains = references.hmc(
            run.models[name], x, num_chains=num_chains, target_ess=target_ess, seed=seed,
            resume=run.folder / "reference" / f"{name}-{len(x)}-{num_chains}-{target_ess:g}-{seed}",
        )  # fmt: skip
        say(f"decoder of {name}: {chains!r}")
        if chains.usable.any():
            say(f"  {references.compare(guide, chains, x, num_samples=2000, seed=seed)!r}")
        export.save(run.folder / f"reference-{name}.nc", chains, observed={"x": x})
        found[name] = chains
    return found


def diagnose(
    folder: str | Path, *, guides: tuple[str, ...] = (), num_data: int = 1000, num_reference: int = 100,
    num_gaps: int = 100, num_simulated: int = 1000, seed: int = 0, threads: int | None = None, say: Say = print,
) -> dict[str, diagnostics.Report]:  # fmt: skip
    """A report on each guide with its own decoder; writes `diagnosis.html`."""
    run = _open(folder, threads)
    x = run.test[:num_data]
    found = {}
    for name, guide in run.chosen(guides).items():
        one = diagnostics.report(
            run.models[name], guide, x, num_gaps=num_gaps, num_reference=num_reference, num_simulated=num_simulated,
            seed=seed,
        )  # fmt: skip
        origin = replace(run.provenance, num_data=len(x), num_samples=one.provenance.num_samples, seed=seed)
        found[name] = replace(one, guide=name, provenance=origin)
        say(f"{name}:")
        for sentence in one.verdict:
            say(f"  * {sentence}")
    sections = []
    split = {name: one.gaps for name, one in found.items() if one.gaps is not None}
    if len(split) > 1:
        bars = report.figure(plots.gaps(split), "gaps of all guides")
        sections.append(report.section("Where the guides lose, each with its own decoder", bars))
    for one in found.values():
        sections += report.diagnosis(one)
    lead = "; ".join(f"{name}: {one.verdict[0]}" for name, one in found.items())
    page = run.folder / "diagnosis.html"
    page.write_text(report.page(f"Diagnosis of {run.images.name}", lead, sections))
    say(f"see {page}")
    return found
