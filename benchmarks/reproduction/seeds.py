"""Runs of one experiment with several seeds, taken together: how much of a difference is training's luck."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

from reproduction.experiment import Experiment

__all__ = ["measured", "over_seeds", "pairs"]


def over_seeds(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every arm's bounds, its difference from the baseline, in how many seeds that is above zero, and
    what else was measured on it."""
    draws = runs[0]["settings"]["num_samples"]
    many = f"IWAE-{draws}"
    extra = _measured(runs[0])
    header = ["arm", "ELBO", many, f"Δ {many}", "above", *extra, "train s"]
    rows = []
    for name in (arm["name"] for arm in runs[0]["arms"]):
        arms = [_arm(results, name) for results in runs]
        if any(arm is None or arm["failed"] for arm in arms):
            rows.append([name, "failed", *[""] * (len(header) - 2)])
            continue
        gains = [results["differences"].get(name, {}).get("IWAE", {}).get("mean") for results in runs]
        known = [gain for gain in gains if gain is not None]
        rows.append([
            name, *(_mean([arm["numbers"][bound]["mean"] for arm in arms]) for bound in ("ELBO", many)),
            _mean(known, sign=True) if known else "",
            f"{sum(gain > 0 for gain in known)} of {len(known)}" if known else "",
            *(_mean([_value(arm, column) for arm in arms]) for column in extra),
            f"{statistics.mean(arm['seconds'] for arm in arms):.0f}",
        ])  # fmt: skip
    return header, rows


def measured(runs: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of the tables of further numbers, means ± standard deviations over seeds or how often an
    outcome was found, where an arm has several rows, arms differ in their columns or there are outcomes (the others
    stand in `over_seeds`)."""
    if _measured(runs[0]):
        return []
    found: dict[str, dict[tuple[str, ...], dict[str, list[Any]]]] = {}
    names: dict[str, list[str]] = {}
    records = [arm for results in runs for arm in results["arms"]]
    for name, row in [(arm["name"], row) for arm in records for row in arm.get("extra", ())]:
        words = {"arm": name, **{k: v for k, v in row.items() if k != "table" and not isinstance(v, dict)}}
        names.setdefault(row["table"], list(words))
        cells = found.setdefault(row["table"], {}).setdefault(tuple(map(str, words.values())), {})
        for column, value in row.items():
            if isinstance(value, dict):
                cells.setdefault(column, []).append(value.get("outcome", value.get("mean")))
    tables = []
    for title, rows in found.items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        body = [[*words, *(_spread(cells.get(column, [])) for column in columns)] for words, cells in rows.items()]
        tables.append((title, [*names[title], *columns], body))
    return tables


def _spread(values: list[Any]) -> str:
    if not values:
        return ""
    if isinstance(values[0], str):
        counts = Counter(values).most_common()
        return "; ".join(f"{outcome} {count} of {len(values)}" for outcome, count in counts)
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def pairs(experiment: Experiment, runs: list[dict[str, Any]]) -> list[str]:
    """The comparisons that the experiment is for, seed by seed."""
    facts = []
    for name, other in experiment.pairs:
        arms = [(_arm(results, name), _arm(results, other)) for results in runs]
        if any(a is None or b is None or a["failed"] or b["failed"] for a, b in arms):
            continue
        bound = f"IWAE-{runs[0]['settings']['num_samples']}"
        gains = [a["numbers"][bound]["mean"] - b["numbers"][bound]["mean"] for a, b in arms]
        above = sum(gain > 0 for gain in gains)
        facts.append(
            f"{name} less {other}, {bound}: {_mean(gains, sign=True)}; above in {above} of {len(gains)} seeds."
        )
    return facts


def _arm(results: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((arm for arm in results["arms"] if arm["name"] == name), None)


def _measured(results: dict[str, Any]) -> list[str]:
    """Further numbers of which every arm has one; of outcomes there is no mean."""
    rows = [arm.get("extra", ()) for arm in results["arms"] if not arm["failed"]]
    if not rows or not all(len(some) == 1 and some[0].keys() == rows[0][0].keys() for some in rows):
        return []
    numbers = {column: value for column, value in rows[0][0].items() if isinstance(value, dict)}
    return [] if any("outcome" in value for value in numbers.values()) else list(numbers)


def _value(arm: dict[str, Any], column: str) -> float:
    return float(arm["extra"][0][column]["mean"])


def _mean(values: list[float], *, sign: bool = False) -> str:
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"
