"""`pyrovae certify`: every guide on every exact problem."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrovae import runtime
from pyrovae.certification import joint_mode
from pyrovae.certification.best import Best
from pyrovae.certification.checks import certify
from pyrovae.certification.outcome import Outcome, Settings
from pyrovae.certification.page import joint_to_rich, markdown, to_rich
from pyrovae.certification.problems import PROBLEMS, SCHOOLS
from pyrovae.certification.recipes import RECIPES
from pyrovae.provenance import Provenance, fingerprint

__all__ = ["run"]


def run(settings: Settings, say: Callable[[Any], None] = print) -> Outcome:
    """Certify, print a table, write the page."""
    from tqdm.auto import tqdm

    began = time.perf_counter()
    threads = runtime.threads(settings.threads)
    bests = {name: Best(PROBLEMS[name]()) for name in settings.exact}
    data = [best.problem.x for best in bests.values()] + ([SCHOOLS[0][None]] if settings.joint else [])
    outcome = Outcome(settings, Provenance(
        data="problems with exact answers", fingerprint=fingerprint(data), split="all", num_data=sum(map(len, data)),
        seed=settings.seed, num_samples=settings.num_samples, dtype="float64", threads=threads,
    ), bests)  # fmt: skip
    names = settings.guides or tuple(RECIPES)
    with tqdm(total=len(bests) * len(names) + len(settings.joint), unit="check", disable=None) as bar:
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
        for name in settings.joint:
            bar.set_description(f"{name} on {joint_mode.PROBLEM}")
            outcome.joint.append(joint_mode.certify(name, seed=settings.seed, num_samples=settings.num_samples))
            bar.update()
    outcome.seconds = time.perf_counter() - began
    if outcome.checks:
        say(to_rich(outcome))
    if outcome.joint:
        say(joint_to_rich(outcome))
    for check in outcome.every:
        if check.verdict in ("FAIL", "local optimum"):
            say(f"{check.verdict} {check.guide} on {check.problem}: {'; '.join(check.reasons)}")
    if settings.page is not None:
        path = Path(settings.page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(outcome))
        say(f"wrote {path}")
    return outcome
