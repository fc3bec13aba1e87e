"""Figures. Every function returns a matplotlib `Figure`; nothing is shown or saved."""

from pyrovae.plots.base import COLORS
from pyrovae.plots.posterior import posterior
from pyrovae.plots.training import images, training
from pyrovae.plots.verdict import coverage, gaps, khat, khat_histogram, sbc, tarp

__all__ = [
    "COLORS", "coverage", "gaps", "images", "khat", "khat_histogram", "posterior", "sbc", "tarp", "training",
]  # fmt: skip
