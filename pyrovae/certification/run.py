"""`pyrovae certify`: every guide on every exact problem."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrovae import runtime
from pyrovae.certification.best import Best
from pyrovae.certification.checks import Check, certify
from pyrovae.certification.page import markdown, to_rich
from pyrovae.certification.problems import PROBLEMS
from pyrovae.certification.recipes import RECIPES
from pyrovae.provenance import Provenance, fingerprint

__all__ = ["PAGE", "Outcome", "Settings", "run"]

PAGE = "docs/certification.md"
QUICK = ("ppca", "bimodal")


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        guides, problems: names; empty for all.
        seed: of training and evaluation.
        quick: two problems and half the draws.
        out: the page to write; by default `docs/certification.md`, and nothing for a part of the table.
        threads: torch threads.
    """

    guides: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    seed: int = 0
    quick: bool = False
    out: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for what, names, known in (("guides", self.guides, RECIPES), ("problems", self.problems, PROBLEMS)):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"unknown {what} {unknown}: choose from {', '.join(known)}")

    @property
    def whole(self) -> bool:
        """The full table."""
        return not (self.guides or self.problems or self.quick)

    @property
    def num_samples(self) -> int:
        return 10_000 if self.quick else 20_000

    @property
    def page(self) -> str | None:
        """Where the page goes; a part of the table never replaces the whole one unasked."""
        return self.out or (PAGE if self.whole else None)


@dataclass
class Outcome:
    """All checks; the table and the page are views of it."""

    settings: Settings
    provenance: Provenance
    bests: dict[str, Best]
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.verdict == "FAIL"]

    @property
    def passed(self) -> bool:
        """No check failed, and there was one."""
        return bool(self.checks) and not self.failed


def run(settings: Settings, say: Callable[[Any], None] = print) -> Outcome:
    """Certify, print a table, write the page."""
    from tqdm.auto import tqdm

    began = time.perf_counter()
    threads = runtime.threads(settings.threads)
    bests = {name: Best(PROBLEMS[name]()) for name in settings.problems or (QUICK if settings.quick else PROBLEMS)}
    data = [best.problem.x for best in bests.values()]
    outcome = Outcome(settings, Provenance(
        data="problems with exact answers", fingerprint=fingerprint(data), split="all", num_data=sum(map(len, data)),
        seed=settings.seed, num_samples=settings.num_samples, dtype="float64", threads=threads,
    ), bests)  # fmt: skip
    names = settings.guides or tuple(RECIPES)
    with tqdm(total=len(bests) * len(names), unit="check", disable=None) as bar:
        for best in bests.values():
            for name in names:
                bar.set_description(f"{name} on {best.problem.name}")
                with warnings.catch_warnings():
                    # Frozen parameters of a model are not registered in Pyro's store, which Pyro warns about.
                    warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
                    outcome.checks.append(
                        certify(name, RECIPES[name], best, seed=settings.seed, num_samples=settings.num_samples)
                    )
                bar.update()
    outcome.seconds = time.perf_counter() - began
    say(to_rich(outcome))
    for check in outcome.failed:
        say(f"FAIL {check.guide} on {check.problem}: {'; '.join(check.reasons)}")
    if settings.page is not None:
        path = Path(settings.page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(outcome))
        say(f"wrote {path}")
    return outcome
