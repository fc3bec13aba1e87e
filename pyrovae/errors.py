"""The errors PyroVAE raises. Each message is one sentence: what was wrong, and what to do."""

from __future__ import annotations

__all__ = [
    "BatchError", "CheckpointError", "DataError", "IncompatibleError", "LatentError", "NoDensityError",
    "NormaliserError", "ParameterCollision", "PlateError", "QuadratureError", "ReferenceRefused", "ScaleError",
    "TrainingDiverged",
]  # fmt: skip


class PlateError(ValueError):
    """The data plate is missing, or a site lies outside it."""


class LatentError(ValueError):
    """A latent site that a continuous guide cannot treat."""


class BatchError(ValueError):
    """Arguments that do not split by rows of the data plate."""


class DataError(ValueError):
    """NaN, wrong shapes, or values outside a site's support."""


class ScaleError(ValueError):
    """A scale other than 1 where importance weights need the true joint density."""


class ParameterCollision(RuntimeError):
    """A parameter name in Pyro's store holds another module's tensor."""


class NoDensityError(NotImplementedError):
    """The guide has draws but no density."""


class IncompatibleError(ValueError):
    """A model, guide and loss that do not go together."""


class CheckpointError(RuntimeError):
    """A checkpoint that is truncated, or of another architecture or other data."""


class TrainingDiverged(FloatingPointError):
    """A non-finite loss or gradient; parameters are those before the step."""


class QuadratureError(ValueError):
    """A density of one or two dimensions that no grid encloses and resolves."""


class NormaliserError(ValueError):
    """log Z of a tilted prior that annealing does not find."""


class ReferenceRefused(ValueError):
    """A reference posterior that is not ok (unmixed, too few draws, divergent) cannot judge a guide."""
