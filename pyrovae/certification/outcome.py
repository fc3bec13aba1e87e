"""What a certification was asked for, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyrovae.certification import joint_mode
from pyrovae.certification.best import Best
from pyrovae.certification.checks import Check
from pyrovae.certification.joint_mode import JointCheck
from pyrovae.certification.problems import PROBLEMS
from pyrovae.certification.recipes import RECIPES
from pyrovae.provenance import Provenance

__all__ = ["PAGE", "QUICK", "Outcome", "Settings"]

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
        for what, names, known in (
            ("guides", self.guides, RECIPES), ("problems", self.problems, (*PROBLEMS, joint_mode.PROBLEM)),
        ):  # fmt: skip
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"unknown {what} {unknown}: choose from {', '.join(known)}")
        if not (self.exact or self.joint):
            raise ValueError(f"{joint_mode.PROBLEM} has no row for {list(self.guides)}: {', '.join(joint_mode.ROWS)}")

    @property
    def exact(self) -> tuple[str, ...]:
        """The problems whose data have latents of their own."""
        named = tuple(name for name in self.problems if name != joint_mode.PROBLEM)
        return named if self.problems else QUICK if self.quick else tuple(PROBLEMS)

    @property
    def joint(self) -> tuple[str, ...]:
        """The guides of eight schools."""
        asked = joint_mode.PROBLEM in self.problems if self.problems else not self.quick
        return tuple(name for name in joint_mode.ROWS if asked and name in (self.guides or joint_mode.ROWS))

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
    """All checks; the tables and the page are views of it."""

    settings: Settings
    provenance: Provenance
    bests: dict[str, Best]
    checks: list[Check] = field(default_factory=list)
    joint: list[JointCheck] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def every(self) -> list[Check | JointCheck]:
        """Checks of both kinds."""
        return [*self.checks, *self.joint]

    @property
    def failed(self) -> list[Check | JointCheck]:
        return [check for check in self.every if check.verdict == "FAIL"]

    @property
    def passed(self) -> bool:
        """No check failed, and there was one."""
        return bool(self.every) and not self.failed
