"""Exact inference for continuous piecewise-affine decoders: cells, posteriors over them, EM."""

from pyrovae.piecewise.cells import Cells, Intervals, Polygons, factors_at, intervals, polygons
from pyrovae.piecewise.em import EMResult, fit_em
from pyrovae.piecewise.evidence import differentiable_evidence
from pyrovae.piecewise.gaussians import CellGaussians, gaussians
from pyrovae.piecewise.polygons import PolygonNormals
from pyrovae.piecewise.posterior import CellPosterior
from pyrovae.piecewise.truncated import TruncatedNormals

__all__ = [
    "CellGaussians", "CellPosterior", "Cells", "EMResult", "Intervals", "PolygonNormals", "Polygons",
    "TruncatedNormals", "differentiable_evidence", "factors_at", "fit_em", "gaussians", "intervals", "polygons",
]  # fmt: skip
