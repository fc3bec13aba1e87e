"""Short-run inference for text on SNLI sentences; arms as in short_run_ptb."""

from __future__ import annotations

from reproduction.short_run_ptb import experiment

__all__ = ["EXPERIMENT"]

EXPERIMENT = experiment(
    "snli", "SNLI sentences",
    ("Only sentences of SNLI's test part are at hand, without the labels of their pairs: there is no classification "
     "of codes, and 10,346 training sentences instead of 100,000.",),
    full_noise=("quick", "paper"), train_rows=4000,
)  # fmt: skip
