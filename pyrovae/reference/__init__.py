"""Reference posteriors, and guides held against them."""

from pyrovae.reference.compare import Comparison, compare
from pyrovae.reference.exact import exact
from pyrovae.reference.nuts import nuts
from pyrovae.reference.posterior import Reference

__all__ = ["Comparison", "Reference", "compare", "exact", "nuts"]
