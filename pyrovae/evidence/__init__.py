"""How large is log p(x)? Bounds from below and above, per datum with standard errors."""

from pyrovae.evidence.annealing import ais, reverse_ais, temperatures
from pyrovae.evidence.bracket import Bracket, bdmc, bracket
from pyrovae.evidence.estimate import Estimate, difference
from pyrovae.evidence.importance import elbo, iwae, log_weights, summarize
from pyrovae.evidence.normaliser import Normalised, log_normaliser, normalise

__all__ = [
    "Bracket", "Estimate", "Normalised", "ais", "bdmc", "bracket", "difference", "elbo", "iwae", "log_normaliser",
    "log_weights", "normalise", "reverse_ais", "summarize", "temperatures",
]  # fmt: skip
