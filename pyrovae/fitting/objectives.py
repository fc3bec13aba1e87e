"""The objectives and schedules of `pyrovae fit` by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import TraceEnum_ELBO

from pyrovae import losses
from pyrovae.compat import compatible
from pyrovae.optim import Adam
from pyrovae.schedules import AggressiveEncoder, DeepFirst, RecursiveSchedule, Schedule

__all__ = ["ENERGY_RATE", "LOSSES", "SCHEDULES", "build_loss", "build_optimizer", "build_schedule", "candidates"]

ENERGY_RATE = 0.2  # step size of energies, as a share of the others' (Pang et al. 2020)
_STEPS = 8  # of a diffusion's chain, for each datum in a training step: one alone is noisy

# Under one name, estimators of one objective: a guide gets the first that it goes with.
LOSSES: dict[str, tuple[Callable[[], Any], ...]] = {
    "elbo": (losses.ELBO, lambda: losses.ELBO("stratified"), lambda: losses.ELBO("stl"),
             lambda: losses.DiffusionELBO(_STEPS)),
    "iwae": (lambda: losses.IWAE(5), lambda: losses.IWAE(5, "reparam")),
    "infovae": (losses.InfoVAE,),
    "mae": (losses.MutualPosteriorDivergence,),
    "free-bits": (losses.FreeBits,),
    "recursive": (losses.RecursiveELBO,),
    "expected-log-joint": (losses.ExpectedLogJoint,),
    "chart-loss": (losses.ChartLoss,),
    "simple-diffusion": (lambda: losses.SimpleDiffusionLoss(_STEPS),),
}  # fmt: skip

SCHEDULES = ("none", "aggressive", "deep-first", "recursive")


def candidates(name: str, model: Any, guide: Any) -> list[Any]:
    """New losses of that name, one for each estimator; with a negative phase where the prior is tilted.

    Charts are summed over by Pyro's own ELBO.
    """
    if name == "elbo" and getattr(getattr(guide, "traits", None), "charts", False):
        return [TraceEnum_ELBO(max_plate_nesting=1)]
    found = [make() for make in LOSSES[name]]
    if not model.traits.tilted:
        return found
    # Penalties hold codes against the base: they stay what they are, and do not go with a tilt.
    return [loss if hasattr(loss, "penalty") else losses.EnergyELBO(loss) for loss in found]


def build_loss(name: str, model: Any, guide: Any) -> Any:
    """The objective of that name in the form the guide takes, the guide's own for an empty name.

    Raises:
        IncompatibleError: none of its forms goes with them.
    """
    if getattr(model, "classes", "collapsed") == "enumerated":
        return TraceEnum_ELBO(max_plate_nesting=1)  # the one that sums classes out
    traits = getattr(guide, "traits", None)
    if not name and (traits is None or not (traits.charts or "diffusion" in traits.latents)):
        return losses.default_loss(guide)
    found = candidates(name or "elbo", model, guide)
    return next((loss for loss in found if compatible(model, guide, loss) is None), found[0])


def build_optimizer(learning_rate: float, energy_rate: float = ENERGY_RATE) -> Adam:
    """Adam; energies take smaller steps, so that the prior's chain keeps up with them."""

    def slower(name: str) -> dict[str, float]:
        return {"lr": learning_rate * energy_rate} if "energy" in name.split(".") else {}

    return Adam(lr=learning_rate, per_parameter=slower)


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
