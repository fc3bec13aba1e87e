"""What models, guides and losses have and need, and one function that says whether three of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

__all__ = ["GuideTraits", "LossTraits", "ModelTraits", "compatible", "require_compatible"]


@dataclass(frozen=True)
class ModelTraits:
    """What a model has.

    Attributes:
        latents: what kind of latent variables remain for a guide; "diffusion", a chain whose posterior is known.
        tilted: its prior has a factor whose normaliser depends on parameters (`models.tilted`).
        enumerated: its program has discrete latents, which a `LatentSpace` sums out and a trace does not.
        charts: it is an atlas, decoded chart by chart.
    """

    latents: Literal["continuous", "discrete", "mixed", "diffusion", "none"] = "continuous"
    tilted: bool = False
    enumerated: bool = False
    charts: bool = False


@dataclass(frozen=True)
class GuideTraits:
    """What a guide offers.

    Attributes:
        has_density: log q(z | x) can be evaluated.
        marginal: it is the density of z itself, not of z together with what a chain drew on the way.
        reparameterised: its whole gradient flows through its draws.
        gaussian_sites: every site's posterior is a Gaussian in closed form.
        gaussian_base: it is a Gaussian, or a flow from one.
        stratified: offers weighted draws (`Guide.stratified`).
        stages: is built up in stages, each with an objective of its own (`RecursiveMixture.stages`).
        charts: encodes a datum in every chart of an atlas (`Charts`).
        from_prior: scores draws of the prior, whose density must be known.
        trainable: can be trained itself.
        latents: the latents it can treat.
        trained_by: the only loss that trains all of it, where that is one of Pyro's own.
        needs_posterior: is made of the model's own `posterior`.
        name: as messages and tables write it.
    """

    name: str
    has_density: bool = True
    marginal: bool = True
    reparameterised: bool = True
    gaussian_sites: bool = False
    gaussian_base: bool = False
    stratified: bool = False
    stages: bool = False
    charts: bool = False
    from_prior: bool = False
    trainable: bool = True
    trained_by: str = ""
    needs_posterior: bool = False
    latents: tuple[str, ...] = ("continuous",)


@dataclass(frozen=True)
class LossTraits:
    """What a loss needs of its guide, and of its model.

    Attributes:
        needs_density: whether the guide must have a density (True) or must have none (False); None takes both.
        penalises: it has a penalty on the guide's posteriors.
        scores_traces: it scores the model's own trace, in which no discrete latent is summed out.
        diffusion: it takes single steps of a diffusion's chain.
        negative_phase: it adds the gradient of a tilted prior's log Z, and needs one.
    """

    name: str
    needs_density: bool | None = True
    needs_marginal: bool = False
    needs_reparameterised: bool = False
    needs_stratified: bool = False
    needs_stages: bool = False
    needs_charts: bool = False
    needs_gaussian_base: bool = False
    penalises: bool = False
    scores_traces: bool = False
    diffusion: bool = False
    negative_phase: bool = False


def compatible(model: Any = None, guide: Any = None, loss: Any = None) -> str | None:
    """Why a model, a guide and a loss do not go together, or None when they do.

    Each may be a class, an instance or None (not asked about); what carries no `traits` (a user's own Pyro function,
    stock `Trace_ELBO`) is taken at its word.

    Example:
        >>> from pyrovae import guides, losses
        >>> compatible(guide=guides.ShortRun, loss=losses.IWAE)
        'ShortRun has draws but no density, which IWAE needs: train it with losses.ExpectedLogJoint()'
    """
    m: ModelTraits | None = getattr(model, "traits", None)
    g: GuideTraits | None = getattr(guide, "traits", None)
    t: LossTraits | None = getattr(loss() if isinstance(loss, partial) else loss, "traits", None)
    if m and g and m.latents == "none":
        return f"the model has no latents, so {g.name} has nothing to infer: train it with guide=models.no_latents"
    if m and g and m.latents == "diffusion" and "diffusion" not in g.latents:
        return (
            f"the posterior of a diffusion's latents is known and has no parameters, so {g.name} has nothing to infer: "
            "train it with guides.ForwardProcess(model)"
        )
    if m and g and m.latents not in g.latents:
        return f"{g.name} treats {' and '.join(g.latents)} latents, but the model's are {m.latents}"
    if m and g and m.enumerated and g.from_prior:
        return f"the model has discrete latents, without which {g.name} knows no density of the prior: pass it init=..."
    if m and g and g.charts and not m.charts:
        return (
            f"{g.name} finds a datum in every chart of an atlas, and the model is none: take guides.Amortized, or "
            "build the guide for a models.ChartAutoencoder"
        )
    if t and (m or g):
        diffusion = m.latents == "diffusion" if m else g is not None and "diffusion" in g.latents
        if diffusion and not t.diffusion:
            return f"{t.name} takes no single steps of a diffusion's chain: train it with losses.DiffusionELBO()"
        if t.diffusion and not diffusion:
            return f"{t.name} is for models.Diffusion alone: use losses.ELBO()"
    if m and t and m.tilted and not t.negative_phase:
        return (
            f"the model's prior is tilted by an energy, and the gradient of {t.name} would leave out that of its "
            "log Z: train it with losses.EnergyELBO()"
        )
    if m and t and t.negative_phase and not m.tilted:
        return f"{t.name} draws from a tilted prior, which this model does not have: train it with losses.ELBO()"
    if g and g.needs_posterior and model is not None and not hasattr(model, "posterior"):
        return (
            f"{g.name} draws from model.posterior(x), which this model does not define (PPCA and PiecewiseAffineVAE "
            "do): take guides.Laplace, or guides.Amortized"
        )
    if not (g and t):
        return _enumerated(m, t)
    if not g.trainable:
        return f"{g.name} is for evaluation: train the guides it is made of, each by itself"
    if g.trained_by:
        return f"{t.name} would leave a part of {g.name} as it is: train it with {g.trained_by}"
    if t.needs_density and not g.has_density:
        return f"{g.name} has draws but no density, which {t.name} needs: train it with losses.ExpectedLogJoint()"
    if t.needs_density is False and g.has_density:
        return f"{t.name} ignores the density that {g.name} has: train it with losses.ELBO()"
    if t.needs_marginal and not g.marginal:
        return (
            f"{g.name} has the density of its whole chain alone, which the gradient of this {t.name} cannot use: take "
            "losses.ELBO(), or losses.IWAE(K, estimator='reparam')"
        )
    if t.needs_reparameterised and not g.reparameterised:
        return (
            f"{g.name} is not fully reparameterised, which {t.name} needs: use losses.ELBO(estimator='stratified'), "
            "or stock Trace_ELBO"
        )
    if t.needs_stratified and not g.stratified:
        return f"{g.name} offers no stratified draws, which {t.name} needs: use losses.ELBO()"
    if t.needs_stages and not g.stages:
        return f"{g.name} is not built up in stages, which the recursive {t.name} needs: use losses.ELBO()"
    if t.needs_charts and not g.charts:
        return f"{g.name} has no charts, which {t.name} compares: take guides.Charts, or losses.ELBO()"
    if t.penalises and g.needs_posterior:
        return f"{g.name} has nothing that a penalty on its posteriors could move, as {t.name} has: use losses.ELBO()"
    if t.needs_gaussian_base and not g.gaussian_base:
        return (
            f"{g.name} has no Gaussian of each datum, which {t.name} compares: take guides.Amortized with a Gaussian "
            "family or a flow"
        )
    return _enumerated(m, t)


def _enumerated(m: ModelTraits | None, t: LossTraits | None) -> str | None:
    if m is None or t is None or not (m.enumerated and t.scores_traces):
        return None
    return (
        f"the model has discrete latents, which this {t.name} cannot sum over: take losses.ELBO('stratified'), "
        "losses.ELBO('stl') or losses.IWAE(K), which do, or Pyro's TraceEnum_ELBO"
    )


def require_compatible(model: Any = None, guide: Any = None, loss: Any = None) -> None:
    """Raise `IncompatibleError` with the reason of `compatible`."""
    from pyrovae.errors import IncompatibleError

    reason = compatible(model, guide, loss)
    if reason is not None:
        raise IncompatibleError(reason)
