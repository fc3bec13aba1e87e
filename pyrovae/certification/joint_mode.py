"""Guides in joint mode, certified on eight schools: one posterior of ten latents that all data share.

A Gaussian makes the tail of tau, the standard deviation between schools, too short; the standard deviation of tau tells
guides apart (Yao et al. 2018).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from pyrovae import diagnose, evidence, guides, losses, store
from pyrovae.certification.problems import eight_schools
from pyrovae.certification.schools import best_gaussian, posterior
from pyrovae.families import MixtureOfNormals
from pyrovae.guides.base import DensityGuide
from pyrovae.runtime import seeded

__all__ = ["PROBLEM", "ROWS", "JointCheck", "Row", "certify", "measure"]

PROBLEM = "eight-schools"
_BLOCKS = 20  # of draws, for the standard error of a standard deviation
_BOUND = 4.0  # standard errors
_SLACK = 0.01  # nats, for training
_DRAWS = 100_000  # of tau


@dataclass(frozen=True)
class Row:
    """A guide, how it is trained and what it is held to.

    Attributes:
        aim: "diagonal", "full-rank": the best Gaussian of that family; "gain": more of tau's standard deviation than
            the best diagonal Gaussian has; "at least": that Gaussian's ELBO, and tau is not judged.
        loss, draws, steps, rate: of stock SVI with Adam, whose step size falls from `rate` to zero along a cosine.
    """

    about: str
    build: Callable[[Callable[..., Any]], DensityGuide]
    aim: Literal["diagonal", "full-rank", "gain", "at least"] = "gain"
    loss: Literal["reparam", "stl", "dreg", "stratified"] = "stratified"
    draws: int = 64
    steps: int = 500
    rate: float = 0.05


def _amortized(model: Callable[..., Any], family: str | Callable[[int], MixtureOfNormals]) -> guides.Amortized:
    return guides.Amortized(model, None, family, plate=None)


ROWS: dict[str, Row] = {
    "amortized": Row("diagonal Gaussian", lambda m: _amortized(m, "diagonal"), "diagonal", "stl", 2048),
    "amortized-full-rank": Row("full-rank Gaussian", lambda m: _amortized(m, "full-rank"), "full-rank", "stl", 2048),
    "amortized-mixture": Row(
        "five diagonal Gaussians", lambda m: _amortized(m, lambda dim: MixtureOfNormals(dim, 5)), draws=512
    ),
    "boosted-vi": Row(
        "six components",
        lambda m: guides.BoostedVI(m, 6, plate=None, tolerance=0.005, num_draws=2000), steps=0,
    ),
    "dais": Row("16 steps", lambda m: guides.DAIS(_amortized(m, "diagonal"), 16), rate=0.03),
    "hvae": Row("4 steps", lambda m: guides.HVAE(_amortized(m, "diagonal"), 4, dim=10), "at least"),
}  # fmt: skip


@dataclass(frozen=True)
class JointCheck:
    """What was found for one guide.

    Attributes:
        gap, iwae_gap: log p(y) less ELBO and IWAE, each with its standard error, nats.
        tau_mean, tau_sd: of the guide's draws, each with its standard error.
    """

    guide: str
    about: str
    verdict: str
    reasons: tuple[str, ...]
    gap: tuple[float, float]
    iwae_gap: tuple[float, float]
    tau_mean: tuple[float, float]
    tau_sd: tuple[float, float]
    khat: float
    seconds: float
    problem: str = PROBLEM


def certify(name: str, *, seed: int, num_samples: int) -> JointCheck:
    """Build, train and measure one guide."""
    began, row, model = time.perf_counter(), ROWS[name], eight_schools()
    with seeded(seed), store.fresh():
        guide = row.build(model)
        _train(model, guide, row)
        weights = evidence.log_weights(model, guide, num_samples=num_samples, seed=seed + 1)
    return measure(name, guide, weights, seed=seed, seconds=time.perf_counter() - began)


def _train(model: Callable[..., Any], guide: DensityGuide, row: Row) -> None:
    if not row.steps:
        return
    optimizer = pyro.optim.CosineAnnealingLR({
        "optimizer": torch.optim.Adam, "optim_args": {"lr": row.rate, "betas": (0.9, 0.95)}, "T_max": row.steps,
    })  # fmt: skip
    svi = SVI(model, guide, optimizer, losses.ELBO(row.loss, num_particles=row.draws))
    for _ in range(row.steps):
        svi.step()
        optimizer.step()


def measure(name: str, guide: DensityGuide, weights: Tensor, *, seed: int, seconds: float = 0.0) -> JointCheck:
    """Hold a trained guide, with its log-weights `[S, 1]`, against the posterior.

    A Gaussian must have the best one's ELBO, to 0.01 nats, and its standard deviation of tau, to a twentieth. Any other
    guide must have at least the best diagonal one's ELBO; one that is to gain, a larger standard deviation of tau, at
    most the posterior's. An ELBO above that of the family's best, or log p(y), is a fault. All beyond 4 standard
    errors.
    """
    row, truth = ROWS[name], posterior()
    with seeded(seed + 2):
        tau = guide.sample(_DRAWS)["tau"].flatten().double().unflatten(0, (_BLOCKS, -1))
    mean, sd = ((float(v.mean()), float(v.std()) / math.sqrt(_BLOCKS)) for v in (tau.mean(1), tau.std(1)))
    elbo, iwae = evidence.summarize(weights)[:2]
    best, gaussian = best_gaussian(row.aim == "full-rank"), row.aim in ("diagonal", "full-rank")
    room, ceiling = _BOUND * elbo.mean_se, best.elbo if gaussian else truth.log_evidence
    reasons = []
    if elbo.mean < best.elbo - room - _SLACK:
        reasons.append(f"ELBO {elbo.mean:.3f} below the best Gaussian's {best.elbo:.3f}")
    if elbo.mean > ceiling + room:
        reasons.append(f"ELBO {elbo.mean:.3f} above {ceiling:.3f}, which it cannot pass")
    if iwae.mean > truth.log_evidence + _BOUND * iwae.mean_se:
        reasons.append(f"IWAE {iwae.mean:.3f} above log p(y), {truth.log_evidence:.3f}")
    slack = _BOUND * sd[1]
    if gaussian and abs(sd[0] - best.sd) > slack + best.sd / 20:
        reasons.append(f"tau's standard deviation {sd[0]:.2f}, where the best Gaussian has {best.sd:.2f}")
    if row.aim == "gain" and not best.sd + slack < sd[0] < truth.sd + slack:
        reasons.append(f"tau's standard deviation {sd[0]:.2f} not between {best.sd:.2f} and {truth.sd:.2f}")
    return JointCheck(
        name, row.about, "FAIL" if reasons else "pass", tuple(reasons),
        (truth.log_evidence - float(elbo.mean), float(elbo.mean_se)),
        (truth.log_evidence - float(iwae.mean), float(iwae.mean_se)),
        mean, sd, float(diagnose.pareto_khat(weights)), seconds,
    )  # fmt: skip
