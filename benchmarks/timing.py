"""Paired timing: two callables in turn, A B A B ..., medians and their ratio.

Times on a busy machine move; the ratio of two things measured side by side holds. The quartiles of the single pairs'
ratios say how well. Two threads that wait for each other on a busy machine are another matter: `--busy` takes one
thread and counts the CPU time it uses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

__all__ = ["Line", "Options", "arguments", "compare", "paired", "show"]

WARM_UP = 3


@dataclass(frozen=True)
class Options:
    """What a script was asked for; None leaves it to each line."""

    threads: int | None = None
    repeats: int | None = None
    busy: bool = False

    def clock(self) -> float:
        """Seconds."""
        return time.thread_time() if self.busy else time.perf_counter()


@dataclass(frozen=True)
class Line:
    """One comparison: medians in milliseconds, and what the ratio should be (None: for information)."""

    what: str
    ours: float
    baseline: str
    theirs: float
    quartiles: tuple[float, float]
    threads: int
    must: float | None
    aim: float | None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def reached(self) -> bool:
        return self.must is None or self.ratio <= self.must


def paired(
    ours: Callable[[], object], baseline: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Milliseconds of `repeats` calls of each, taken in turn after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM_UP + repeats):
        for kept, function in zip(times, (ours, baseline), strict=True):
            began = clock()
            function()
            if turn >= WARM_UP:
                kept.append(1000 * (clock() - began))
    return times


def compare(
    what: str,
    ours: Callable[[], object],
    baseline: str,
    theirs: Callable[[], object],
    options: Options,
    *,
    threads: int,
    repeats: int,
    must: float | None = None,
    aim: float | None = None,
) -> Line:
    """Time two callables against each other; `threads` and `repeats` hold where the options are silent."""
    threads = 1 if options.busy else options.threads or threads
    repeats = options.repeats or repeats
    torch.set_num_threads(threads)
    a, b = paired(ours, theirs, repeats, options.clock)
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if repeats > 1 else ratios * 3
    return Line(what, statistics.median(a), baseline, statistics.median(b), (low, high), threads, must, aim)


def show(lines: Sequence[Line], title: str) -> None:
    """Print lines as one table."""
    table = Table(title=title, caption="ratio of medians (quartiles of the single pairs' ratios); <= 1 is faster")
    left = ("what", "baseline")
    for column in ("what", "ms", "baseline", "ms", "threads", "ratio", "must reach", "aim"):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for line in lines:
        colour = "" if line.must is None else "[green]" if line.reached else "[red]"
        ratio = f"{colour}{line.ratio:.3f}{'' if line.reached else ' missed'}"
        low, high = line.quartiles
        table.add_row(
            line.what, f"{line.ours:.2f}", line.baseline, f"{line.theirs:.2f}", str(line.threads),
            f"{ratio} ({low:.2f}-{high:.2f})", _limit(line.must), _limit(line.aim),
        )  # fmt: skip
    Console(width=150).print(table)


def _limit(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"<= {ratio:.2f}x" if ratio > 0.5 else f"{1 / ratio:.3g}x faster"


def arguments(description: str | None) -> Options:
    """`--threads`, `--repeats` and `--busy`; left out, every line takes what it is stated for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="for every line (default: what the line is stated for)")
    parser.add_argument("--repeats", type=int, help="timed calls of each (default: more for the short ones)")
    parser.add_argument("--busy", action="store_true", help="one thread, its CPU time: for a machine in use")
    given = parser.parse_args()
    for name in ("threads", "repeats"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return Options(given.threads, given.repeats, given.busy)
