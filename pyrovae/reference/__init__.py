"""Reference posteriors, and guides held against them."""

from pyrovae.reference.compare import Comparison, compare
from pyrovae.reference.exact import exact
from pyrovae.reference.hmc import hmc
from pyrovae.reference.nuts import nuts
from pyrovae.reference.posterior import ChainStatistics, Reference

__all__ = ["ChainStatistics", "Comparison", "Reference", "compare", "exact", "hmc", "nuts"]
