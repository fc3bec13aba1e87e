"""The objectives and schedules of `pyrovae fit` by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import TraceEnum_ELBO

from pyrovae import losses
from pyrovae.compat import compatible
from pyrovae.schedules import AggressiveEncoder, DeepFirst, RecursiveSchedule, Schedule

__all__ = ["LOSSES", "SCHEDULES", "build_loss", "build_schedule", "candidates"]

# Under one name, estimators of one objective: a guide gets the first that it goes with.
LOSSES: dict[str, tuple[Callable[[], Any], ...]] = {
    "elbo": (losses.ELBO, lambda: losses.ELBO("stratified")),
    "iwae": (lambda: losses.IWAE(5), lambda: losses.IWAE(5, "reparam")),
    "infovae": (losses.InfoVAE,),
    "mae": (losses.MutualPosteriorDivergence,),
    "free-bits": (losses.FreeBits,),
    "recursive": (losses.RecursiveELBO,),
    "expected-log-joint": (losses.ExpectedLogJoint,),
}

SCHEDULES = ("none", "aggressive", "deep-first", "recursive")


def candidates(name: str) -> list[Any]:
    """New losses of that name, one for each estimator."""
    return [make() for make in LOSSES[name]]


def build_loss(name: str, model: Any, guide: Any) -> Any:
    """The objective of that name in the form the guide takes, the guide's own for an empty name.

    Raises:
        IncompatibleError: none of its forms goes with them.
    """
    if getattr(model, "classes", "collapsed") == "enumerated":
        return TraceEnum_ELBO(max_plate_nesting=1)  # the one that sums classes out
    if not name:
        return losses.default_loss(guide)
    found = candidates(name)
    return next((loss for loss in found if compatible(model, guide, loss) is None), found[0])


def build_schedule(name: str, *, groups: int = 1, steps: int = 1) -> Schedule | None:
    """A schedule by name, None for "none".

    Args:
        groups: latent groups of a ladder.
        steps: of the training; the last group comes in over the middle of it.
    """
    if name == "aggressive":
        return AggressiveEncoder()
    if name == "deep-first":
        stage = max(1, steps // (2 * groups))
        return DeepFirst(stage=stage, fade=stage)
    return RecursiveSchedule() if name == "recursive" else None
