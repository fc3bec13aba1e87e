"""All speed lines in one table (`make bench`): ratios against a named baseline, measured side by side in this run.

After it the check that the speed of `Laplace` costs no quality, which trains for some minutes (`quality.py`).
"""

from __future__ import annotations

import sys

import quality
import speed_amortized
import speed_draws
import speed_ground_truth
import speed_laplace
import speed_log_joint
import speed_mixtures
import speed_semi_amortized
import torch
from timing import Line, arguments, show

PARTS = (speed_amortized, speed_semi_amortized, speed_laplace, speed_log_joint, speed_mixtures, speed_draws,
         speed_ground_truth)  # fmt: skip


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    found: list[Line] = []
    for part in PARTS:
        found += part.lines(options)
    show(found, "batch 128, 784-500-500-50 ReLU nets where no other size is stated; milliseconds, medians")
    try:
        quality.check(threads=options.threads or 2)
    except FileNotFoundError as error:
        sys.exit(f"Laplace's equal-quality check did not run: {error}")


if __name__ == "__main__":
    main()
