"""Every guide that is certified: how it is built for a problem, how it is trained, and what it is held against.

A new guide is one entry of `RECIPES`; a test checks that every guide of `pyrovae.guides.REGISTRY` has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor

from pyrovae import flows, losses
from pyrovae.certification.best import Best, Candidates
from pyrovae.certification.builders import (
    NotCertified,
    amortized,
    boosted,
    dais,
    density_short_run,
    escalating,
    exact,
    flow,
    hvae,
    laplace,
    local,
    mixture,
    recursive,
    refined,
    short_run,
    unaided,
    wide_start,
)  # fmt: skip
from pyrovae.certification.law import affine_law, langevin_law, normal_start, prior_start
from pyrovae.guides.base import Guide

__all__ = ["RECIPES", "SEARCHED", "Law", "Recipe", "Rule"]

LONG = 500  # SVI steps for what is slow: a component that has lost its weight, vectors that all data share
CHAIN, LEAPFROG = 8, 3  # steps of short runs, and leapfrog steps within one of HMC
_CHAINS = 64  # of what is slower still
_DRAWS, _MANY_DRAWS = 512, 2048  # per datum and SVI step: noise is what keeps training from the optimum


@dataclass(frozen=True)
class Law:
    """Moments alone: the exact law of a guide without density. Mean `[B, D]`, covariance `[B, D, D]`."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Rule:
    """How far a guide may stand from what it is held against, beyond 4 standard errors.

    Attributes:
        mean: in standard deviations.
        covariance: of any entry, in units of sd_i * sd_j (twice the relative error of a standard deviation).
        elbo: nats below the best member's, for ELBO and IWAE. An ELBO above it by more than 4 standard errors is a
            fault, always.
    """

    mean: float = 0.05
    covariance: float = 0.1
    elbo: float = 0.01


SEARCHED = Rule(1e-4, 1e-4, 1e-4)  # nothing stochastic: rounding and the end of a search


@dataclass(frozen=True)
class Recipe:
    """How one guide is certified.

    Attributes:
        build: the guide for a problem, untrained.
        standard: what it is held against.
        held_to: that, in words.
        loss: what it is trained with, or None for a guide with nothing to train.
        steps, rate: of SVI with Adam, whose step size falls from `rate` to zero along a cosine.
        rule: tolerances.
        aim: "best": the standard is the best member of the guide's family; "definition": what the guide is defined to
            be, at any mode or fixed point; "at least": the guide must be no worse, and its moments are not judged.
        ceiling: with "at least", the family whose best member bounds the ELBO from above; None is log p(x).
        pooled: some parameters serve all data, so only their mean ELBO is bounded from below.
        calls: how often the posterior is found anew while the draws are taken (more where finding it is random).
    """

    build: Callable[[Best], Guide]
    standard: Callable[[Best], Candidates | Law]
    held_to: str
    loss: Callable[[], Any] | None = None
    steps: int = 250
    rate: float = 0.1
    rule: Rule = Rule()
    aim: Literal["best", "definition", "at least"] = "best"
    ceiling: Callable[[Best], Candidates] | None = None
    pooled: bool = False
    calls: int = 20


def path() -> Any:
    """Path gradients: no noise where q is the posterior."""
    return losses.ELBO("stl", num_particles=_MANY_DRAWS)


def plain() -> Any:
    """One draw per component (mixtures), or plain draws with the density that a flow gives along with them."""
    return losses.ELBO("stratified", num_particles=_DRAWS)


def _law(best: Best, *, from_guide: bool = False, num_leapfrog: int = 0) -> Law:
    """The exact law of a short run."""
    problem = best.problem
    begin = normal_start(*wide_start(problem)) if from_guide else prior_start(problem)
    if problem.gaussian:
        return Law(*affine_law(problem, begin, CHAIN, best.step, num_leapfrog))
    if num_leapfrog:
        raise NotCertified("no law in closed form: several leapfrog steps on a posterior that is not Gaussian")
    try:
        return Law(*langevin_law(problem, begin, CHAIN, best.step))
    except ValueError as error:
        raise NotCertified(str(error)) from error


def chains() -> Any:
    """Plain draws, fewer."""
    return losses.ELBO("stratified", num_particles=_CHAINS)


def by_stages() -> Any:
    return losses.RecursiveELBO(num_particles=_DRAWS)


_diagonal, _full_rank, _mixture = attrgetter("diagonal"), attrgetter("full_rank"), attrgetter("mixture")
DIAGONAL, FULL_RANK = "the best diagonal Gaussian", "the best full-rank Gaussian"
LOW_RANK, MIXTURE = "the best Gaussian of rank one plus diagonal", "the best mixture of two diagonal Gaussians"
STEPPED = "on average over data at least the best diagonal Gaussian, from which it starts; at most log p(x)"
NESTED = "at least the best diagonal Gaussian, which it contains; at most log p(x)"

RECIPES: dict[str, Recipe] = {
    "amortized": Recipe(amortized, _diagonal, DIAGONAL, path),
    "amortized-full-rank": Recipe(lambda best: amortized(best, "full-rank"), _full_rank, FULL_RANK, path),
    "amortized-low-rank": Recipe(lambda best: amortized(best, "low-rank"), attrgetter("low_rank"), LOW_RANK, path),
    "amortized-mixture": Recipe(lambda best: amortized(best, "mixture"), _mixture, MIXTURE, plain, LONG),
    "amortized-householder": Recipe(
        lambda best: flow(best, lambda dim: flows.Householder(dim, max(1, dim - 1))), _full_rank, FULL_RANK, plain,
        LONG,
    ),
    "amortized-iaf": Recipe(
        lambda best: flow(best, lambda dim: flows.IAF(dim, 2, 3, (16,))), _diagonal, NESTED, plain, aim="at least"
    ),
    "amortized-coupling": Recipe(
        lambda best: flow(best, lambda dim: flows.Coupling(dim, 2, 3, (16,))), _diagonal, NESTED, plain, aim="at least"
    ),
    "amortized-spline": Recipe(
        lambda best: flow(best, lambda dim: flows.Spline(dim, 1, 3, (16,))), _diagonal, NESTED, plain, aim="at least"
    ),
    "mixture": Recipe(mixture, _mixture, MIXTURE, plain, LONG),
    "recursive-mixture": Recipe(
        recursive, _diagonal, "at least the best diagonal Gaussian; at most the best mixture of two", by_stages, LONG,
        aim="at least", ceiling=_mixture,
    ),
    "boosted-vi": Recipe(
        boosted, _diagonal, "at least the best diagonal Gaussian; at most the best mixture of two", aim="at least",
        ceiling=_mixture, calls=1,
    ),
    "semi-amortized": Recipe(lambda best: refined(best, amortized(best)), _diagonal, DIAGONAL, path),
    "semi-amortized-mixture": Recipe(lambda best: refined(best, mixture(best)), _mixture, MIXTURE, plain, LONG),
    "semi-amortized-untrained": Recipe(unaided, _diagonal, DIAGONAL, calls=2),
    "local-svi": Recipe(lambda best: local(best, "diagonal"), _diagonal, DIAGONAL, calls=1),
    "local-svi-full-rank": Recipe(lambda best: local(best, "full-rank"), _full_rank, FULL_RANK, calls=1),
    "laplace": Recipe(
        lambda best: laplace(best, num_steps=50), attrgetter("laplace"), "a mode, with the Fisher curvature there",
        rule=SEARCHED, aim="definition", calls=1,
    ),
    "laplace-hessian": Recipe(
        lambda best: laplace(best, num_steps=50, curvature="hessian"), attrgetter("laplace_hessian"),
        "a mode, with the Hessian there", rule=SEARCHED, aim="definition", calls=1,
    ),
    "laplace-averaged": Recipe(
        lambda best: laplace(best, num_steps=40, num_draws=2000), attrgetter("averaged"),
        "a fixed point of gradient and Fisher curvature averaged over the Gaussian", aim="definition", calls=2,
    ),
    "laplace-averaged-8": Recipe(
        lambda best: laplace(best, num_steps=4, num_draws=8), attrgetter("laplace"),
        "at least Laplace's method; at most the best full-rank Gaussian", aim="at least", ceiling=_full_rank,
    ),
    "short-run": Recipe(
        lambda best: short_run(best, CHAIN), _law, f"the law of {CHAIN} Langevin steps from the prior", rule=SEARCHED
    ),
    "short-run-from-guide": Recipe(
        lambda best: short_run(best, CHAIN, from_guide=True), lambda best: _law(best, from_guide=True),
        f"the law of {CHAIN} Langevin steps from a guide", rule=SEARCHED,
    ),
    "density-short-run": Recipe(
        lambda best: density_short_run(best, CHAIN), _law, f"the law of {CHAIN} Langevin steps from the prior",
        rule=SEARCHED,
    ),
    "dais": Recipe(dais, _diagonal, STEPPED, chains, rate=0.05, aim="at least", pooled=True),
    "hvae": Recipe(hvae, _diagonal, STEPPED, chains, rate=0.05, aim="at least", pooled=True),
    "escalating": Recipe(
        escalating, _diagonal, "at least the best diagonal Gaussian; at most the best full-rank one", aim="at least",
        ceiling=_full_rank, calls=1,
    ),
    "short-run-hmc": Recipe(
        lambda best: short_run(best, CHAIN, num_leapfrog=LEAPFROG), lambda best: _law(best, num_leapfrog=LEAPFROG),
        f"the law of {CHAIN} HMC trajectories from the prior", rule=SEARCHED,
    ),
    "exact": Recipe(exact, attrgetter("posterior"), "the posterior", rule=SEARCHED, calls=1),
}  # fmt: skip
