"""Results as a table on the terminal and as the page `docs/reproduction.md`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from reproduction import EXPERIMENTS
from reproduction.experiment import Experiment
from reproduction.seeds import measured, over_seeds, pairs

__all__ = ["page", "show", "write_page"]

INTRODUCTION = """# Reproduction on real data

`python benchmarks/reproduce.py NAME --preset quick|paper` runs an experiment, `python benchmarks/reproduce.py --page`
writes this page from the results. `quick` fits in about an hour on two cores; `paper` is the published setting, for a
GPU. Data are looked up below `PYROVAE_DATA`.

All arms of an experiment start from the same decoder weights, see the same data for the same number of epochs (unless
a row says otherwise), and are evaluated on the same test data with the same seed. Bounds are in nats per datum, mean
± standard error over test data. Δ is the mean paired difference from the baseline with its standard error: over test
data of one run, so it does not count how much training differs from seed to seed. IWAE-S is the importance-weighted
bound with S draws from each arm's own posterior: a better posterior makes it tighter, too; IWAE at a tenth of the
draws and the share of k-hat above 0.7 say how far it can be trusted. MI is the mutual information of latents and test
data, at most the logarithm of their number; AU counts active latents; both count the noise of a search for posteriors,
too (SVI, SA-VAE). PPL is the perplexity of a word. "train s" is wall-clock, in brackets the seconds of all CPU threads
together, which other work on the machine moves less. "Published" numbers stand beside ours for orientation; what
differs is said below each table.
"""

BOUNDS = "Bounds of log p(x) on test data"
_PAGE_ONLY = ("ELBO", "Δ ELBO", "KL", "k-hat > 0.7")  # a terminal is narrow; the JSON and the page have everything


def show(experiment: Experiment, runs: list[dict[str, Any]]) -> None:
    """Print the tables of every run, and of all seeds together."""
    for results in runs:
        _show(experiment, results)
    if len(runs) > 1:
        console = _console()
        header, rows = over_seeds(runs)
        _print(console, f"{len(runs)} seeds together, means ± their standard error", header, rows)
        for title, columns, cells in measured(runs):
            _print(console, f"{title}; means ± standard deviation over seeds", columns, cells)
        for fact in _facts(experiment, runs):
            console.print(f"* {fact}", highlight=False)


def _facts(experiment: Experiment, runs: list[dict[str, Any]]) -> list[str]:
    return [*pairs(experiment, runs), *([] if experiment.facts is None else experiment.facts(runs))]


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)  # a log file has room


def _print(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", min_width=0 if number else 16)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _show(experiment: Experiment, results: dict[str, Any]) -> None:
    console = _console()
    for title, header, rows in _tables(experiment, results):
        left_out = set(_PAGE_ONLY) - {f"Δ {experiment.published_bound}"} if title.startswith(BOUNDS) else set()
        kept = [number for number, column in enumerate(header) if column not in left_out]
        _print(console, title, [header[number] for number in kept], [[row[n] for n in kept] for row in rows])
    for fact in _shortfalls(experiment, results):
        console.print(f"* {fact}", highlight=False)


def write_page(runs: Path, path: Path) -> None:
    """Collect every `results.json` below `runs` into the page; what it says of other experiments stays."""
    found = [json.loads(file.read_text()) for file in sorted(runs.glob("**/results.json"))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found, path.read_text() if path.exists() else ""))
    for experiment in EXPERIMENTS.values():
        for preset, some in _by_preset([results for results in found if results["experiment"] == experiment.name]):
            if experiment.picture is not None:
                picture = path.parent / _picture(experiment, preset)
                picture.parent.mkdir(exist_ok=True)
                experiment.picture(some).savefig(picture)


def _picture(experiment: Experiment, preset: str) -> str:
    return f"images/{experiment.name}-{preset}.png"


def page(found: list[dict[str, Any]], before: str = "") -> str:
    """The page, in Markdown; `before` is an earlier one, for experiments of which no results are at hand."""
    parts = [INTRODUCTION]
    for experiment in EXPERIMENTS.values():
        title = f"## {experiment.name}: "
        runs = [results for results in found if results["experiment"] == experiment.name]
        runs.sort(key=lambda results: (results["preset"], results["seed"]))
        if not runs and title in before:
            parts.append("\n" + title + before.split(title)[1].split("\n## ")[0].rstrip("\n") + "\n")
            continue
        parts.append(f"\n{title}{experiment.title}\n\nAfter {experiment.paper}. {experiment.settings}.\n")
        if not runs:
            parts.append("\nNot run yet.\n")
        for preset, some in _by_preset(runs):
            if experiment.picture is not None:
                parts.append(f"\n![{experiment.title}, {preset}]({_picture(experiment, preset)})\n")
            if len(some) > 1:
                parts.append(_over_seeds(experiment, preset, some))
        for results in runs:
            parts += _section(experiment, results)
        if experiment.remarks:
            parts.append("\n### What the numbers can be compared with\n\n" + _bullets(experiment.remarks))
    missing = [f"{e.name}: {fact}" for e in EXPERIMENTS.values() for fact in e.missing]
    parts.append("\n## Published columns that cannot be reached with the data at hand\n\n" + _bullets(missing))
    return "".join(parts)


def _by_preset(runs: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Presets and the runs of each, one a seed."""
    return [(name, [r for r in runs if r["preset"] == name]) for name in dict.fromkeys(r["preset"] for r in runs)]


def _over_seeds(experiment: Experiment, preset: str, runs: list[dict[str, Any]]) -> str:
    seeds = ", ".join(str(results["seed"]) for results in runs)
    text = f"\n### {preset}, seeds {seeds} together\n\n"
    text += f"Means over seeds ± their standard error; Δ from {experiment.baseline} of the same seed:\n\n"
    text += _markdown(*over_seeds(runs))
    for title, columns, cells in measured(runs):
        text += f"\n{title}; means ± standard deviation over seeds:\n\n" + _markdown(columns, cells)
    facts = _facts(experiment, runs)
    return text + ("\n" + _bullets(facts) if facts else "")


def _section(experiment: Experiment, results: dict[str, Any]) -> list[str]:
    """One run."""
    settings = results["settings"]
    arm = next((arm for arm in results["arms"] if not arm["failed"]), None)
    versions = "" if arm is None else ", ".join(f"{k} {v}" for k, v in arm["provenance"]["versions"].items())
    digest = "" if arm is None else f"; sha256 {arm['provenance']['fingerprint'][:12]}"
    parts = [
        f"\n### {results['preset']}, seed {results['seed']}, {results['machine']}\n\n",
        f"{settings['epochs']} epochs on {results['train_rows']} training data "
        f"({settings['validation_rows']} held out), {results['test_rows']} test data. Data: {results['data']}; "
        f"{results['split']}{digest}. {versions}.\n",
    ]
    there = {arm["name"] for arm in results["arms"]}
    missing = [arm.name for arm in experiment.arms if results["preset"] in arm.presets and arm.name not in there]
    if missing:
        parts.append(f"\nNot run yet: {'; '.join(missing)}.\n")
    for title, header, rows in _tables(experiment, results):
        parts.append(f"\n{title}:\n\n" + _markdown(header, rows))
    facts = _shortfalls(experiment, results)
    if facts:
        parts.append("\nWhat did not come out:\n\n" + _bullets(facts))
    return parts


def _tables(experiment: Experiment, results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of every table of a run."""
    draws = results["settings"]["num_samples"]
    few, many = f"IWAE-{max(1, draws // 10)}", f"IWAE-{draws}"
    has_published = any(arm["published"] is not None for arm in results["arms"])
    against = results["baseline"]
    header = ["arm", "epochs (best)", "train s (CPU)", "ELBO", few, many, "Δ ELBO", f"Δ {many}", "KL", "k-hat > 0.7"]
    known = [c for c in ("MI", "AU", "PPL") if any(c in arm.get("numbers", {}) for arm in results["arms"])]
    header[9:9] = known
    if has_published:
        header += ["published", "published Δ"]
    base = _published(results, against)
    rows = []
    for arm in results["arms"]:
        if arm["failed"]:
            rows.append([arm["name"], "failed", *[""] * (len(header) - 2)])
            continue
        n, gain = arm["numbers"], results["differences"].get(arm["name"], {})
        best = f" ({arm['best_epoch']})" if arm["validation"] else ""
        took = f"{arm['seconds']:.0f} ({arm['cpu_seconds']:.0f})"
        row = [
            arm["name"], f"{arm['epochs']}{best}", took, _value(n["ELBO"]), _value(n[few]), _value(n[many]),
            _value(gain.get("ELBO"), sign=True), _value(gain.get("IWAE"), sign=True),
            f"{n['KL']['mean']:.1f}" if "KL" in n else "", *(_known(n, column) for column in known),
            f"{100 * n['k-hat above 0.7']['mean']:.0f} %",
        ]  # fmt: skip
        if has_published:
            ours = arm["published"]
            row.append("" if ours is None else f"{ours:g}")
            row.append("" if ours is None or base is None or arm["name"] == against else f"{ours - base:+.4g}")
        rows.append(row)
    title = f"{BOUNDS}, Δ from {against}"
    if has_published:
        title += f"; published: {experiment.published}"
    return [(title, header, rows), *_extra(results)]


def _known(numbers: dict[str, Any], column: str) -> str:
    if column not in numbers:
        return ""
    return f"{numbers[column]['mean']:.0f}" if column == "AU" else _value(numbers[column])


def _extra(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Further measurements: rows of dicts, in which numbers are `{"mean", "se"}`, and what seeds may differ in but has
    no mean `{"outcome"}`."""
    rows = [{"arm": arm["name"], **row} for arm in results["arms"] for row in arm.get("extra", ())]
    tables = []
    for title in dict.fromkeys(row["table"] for row in rows):
        some = [{k: v for k, v in row.items() if k != "table"} for row in rows if row["table"] == title]
        header = list(dict.fromkeys(column for row in some for column in row))
        cells = [[_value(row[c]) if isinstance(row.get(c), dict) else str(row.get(c, "")) for c in header]
                 for row in some]  # fmt: skip
        tables.append((title, header, cells))
    return tables


def _shortfalls(experiment: Experiment, results: dict[str, Any]) -> list[str]:
    """What the results themselves say did not come out."""
    facts = []
    base, against = _published(results, results["baseline"]), results["baseline"]
    for arm in results["arms"]:
        name = arm["name"]
        if arm["failed"]:
            facts.append(f"{name}: {arm['failed']}")
            continue
        if arm["out_of_time"]:
            facts.append(
                f"{name} was stopped by its time limit after {arm['epochs']} of {results['settings']['epochs']} "
                "epochs: its differences are not at equal epochs."
            )
        if arm["validation"] and arm["best_epoch"] == arm["epochs"]:
            facts.append(f"{name} was still rising on the validation data when training ended.")
        gain = results["differences"].get(name, {}).get(experiment.published_bound)
        if gain is None or arm["published"] is None or base is None:
            continue
        expected = arm["published"] - base
        if gain["mean"] * expected < 0 or abs(gain["mean"]) < 2 * gain["se"]:
            facts.append(
                f"{name} against {against}: published {expected:+.4g} nats, here {_value(gain, sign=True)}"
                + (": the other sign." if gain["mean"] * expected < 0 else ": not told apart from zero.")
            )
    return facts


def _published(results: dict[str, Any], name: str) -> float | None:
    return next((arm["published"] for arm in results["arms"] if arm["name"] == name), None)


def _value(number: dict[str, Any] | None, *, sign: bool = False) -> str:
    if number is None:
        return ""
    if "outcome" in number:
        return str(number["outcome"])
    mean = f"{number['mean']:+.2f}" if sign else f"{number['mean']:.2f}"
    return mean if number["se"] is None or math.isnan(number["se"]) else f"{mean} ± {number['se']:.2f}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (header, rule, *rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _bullets(facts: Any) -> str:
    return "".join(f"* {fact}\n" for fact in facts)
