"""Figures. Every function returns a matplotlib `Figure`; nothing is shown or saved."""

from pyrovae.plots.base import COLORS
from pyrovae.plots.pictures import (
    clusters,
    images,
    imputations,
    interpolations,
    reconstructions,
    samples,
    traversals,
)
from pyrovae.plots.posterior import posterior
from pyrovae.plots.topology import persistence
from pyrovae.plots.training import training
from pyrovae.plots.verdict import coverage, gaps, khat, khat_histogram, sbc, tarp

__all__ = [
    "COLORS", "clusters", "coverage", "gaps", "images", "imputations", "interpolations", "khat", "khat_histogram",
    "persistence", "posterior", "reconstructions", "samples", "sbc", "tarp", "training", "traversals",
]  # fmt: skip
