"""Speed counts only at equal quality: the fast `Laplace` against the published algorithm after the same epochs.

Three epochs on 20,000 logit-transformed MNIST images, ELBO and IWAE-100 on 1,000 test images, paired: the fast one may
not be behind by more than three standard errors. The published algorithm takes five minutes of two cores; what has been
trained is kept below `runs/bench`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reproduction.laplace_quality import EXPERIMENT
from reproduction.page import show
from reproduction.runner import Options, run

ARMS = ("damped as published", "Newton")


def check(*, threads: int = 2) -> bool:
    """Train, evaluate and print; whether the quality is equal (or better)."""
    preset = replace(EXPERIMENT.presets["quick"], num_samples=100)
    results = run(EXPERIMENT, Options("quick", preset, Path("runs/bench/laplace-quality"), threads=threads, arms=ARMS))
    show(EXPERIMENT, [results])
    found = results["differences"]["Newton"]
    equal = all(bound["mean"] > -3 * bound["se"] for bound in found.values())
    numbers = ", ".join(
        f"{'IWAE-100' if name == 'IWAE' else name} {bound['mean']:+.2f} ± {bound['se']:.2f}"
        for name, bound in found.items()
    )
    print(f"equal quality: {'reached' if equal else 'MISSED'} (Newton minus published, nats: {numbers})")
    return equal


if __name__ == "__main__":
    check()
