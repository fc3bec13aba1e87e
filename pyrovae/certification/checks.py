"""One guide on one problem: train it, draw from it, and hold it against its standard.

    |error| <= 4 standard errors + tolerance

for every entry of mean and covariance and for the ELBO of every datum; an ELBO may not be *above* the best member's,
nor IWAE above log p(x), by more than 4 standard errors. A guide that misses the best member is held, by the same rule,
against the nearest of its family's other optima.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import pyro
import torch
from torch import Tensor

from pyrovae import diagnose, evidence, noise
from pyrovae.certification.best import Best, Candidates
from pyrovae.certification.builders import NotCertified
from pyrovae.certification.members import Members
from pyrovae.certification.problems import Problem
from pyrovae.certification.recipes import Law, Recipe, Rule
from pyrovae.errors import TrainingDiverged
from pyrovae.guides.base import Guide
from pyrovae.runtime import evaluating, seeded
from pyrovae.training import fit

__all__ = ["IWAE_DRAWS", "Check", "Error", "certify", "iwae", "measure", "train"]

IWAE_DRAWS = 2_500  # of every IWAE that is compared
_BOUND = 4.0  # standard errors
_REPEATS = 32  # of the standard's IWAE
_ROUNDING = 1e-6  # nats


@dataclass(frozen=True)
class Error:
    """The entry of an estimate that comes closest to its bounds, or oversteps them most.

    Attributes:
        value: estimate less what it is held against.
        se: its standard error.
        ok: within bounds.
        mark: ">" where the standard is a lower bound, else "".
        against: what the value is an error from.
    """

    value: float
    se: float
    ok: bool
    mark: str = ""
    against: str = "its standard"

    @property
    def z(self) -> float:
        """In standard errors."""
        if self.se > 0:
            return self.value / self.se
        return 0.0 if self.value == 0 else math.copysign(math.inf, self.value)


@dataclass(frozen=True)
class Check:
    """What was found for one guide on one problem.

    Attributes:
        verdict: "pass", "local optimum" (right for a worse optimum of the guide's family than the best, which
            following gradients from one start may well find), "FAIL" or "not certified".
        reasons: of anything but a pass.
        mean, covariance, elbo, evidence: errors in standard deviations, sd_i * sd_j and nats; None where not judged.
        khat: (median, maximum) over data.
        seconds: training and evaluation.
    """

    problem: str
    guide: str
    verdict: str
    held_to: str
    reasons: tuple[str, ...] = ()
    mean: Error | None = None
    covariance: Error | None = None
    elbo: Error | None = None
    evidence: Error | None = None
    khat: tuple[float, float] | None = None
    seconds: float = 0.0


def train(problem: Problem, recipe: Recipe, guide: Guide, seed: int) -> None:
    """Stock SVI on all data at once."""
    if recipe.loss is None:
        return
    optimizer = pyro.optim.CosineAnnealingLR({
        "optimizer": torch.optim.Adam, "optim_args": {"lr": recipe.rate, "betas": (0.9, 0.95)}, "T_max": recipe.steps,
    })  # fmt: skip
    loss = recipe.loss()
    fit(problem.model, guide, problem.x, loss=loss, optimizer=optimizer, epochs=recipe.steps, seed=seed, progress=False)


def certify(name: str, recipe: Recipe, best: Best, *, seed: int, num_samples: int) -> Check:
    """Build, train and measure.

    Args:
        best: the standards of the problem.
        num_samples: draws per datum.
    """
    began, problem = time.perf_counter(), best.problem
    try:
        with seeded(seed):
            standard, guide = recipe.standard(best), recipe.build(best)
    except NotCertified as reason:
        return Check(problem.name, name, "not certified", recipe.held_to, (str(reason),))
    try:
        train(problem, recipe, guide, seed)
    except TrainingDiverged as error:
        return Check(problem.name, name, "FAIL", recipe.held_to, (str(error),), seconds=time.perf_counter() - began)
    return measure(name, recipe, standard, guide, best, seed=seed, num_samples=num_samples, began=began)


def measure(
    name: str, recipe: Recipe, standard: Candidates | Law, guide: Guide, best: Best, *, seed: int,
    num_samples: int, began: float | None = None,
) -> Check:  # fmt: skip
    """Hold a trained guide against its standard."""
    began = time.perf_counter() if began is None else began
    problem, rule = best.problem, recipe.rule
    found: dict[str, Error] = {}
    lacking = None  # nats of a worse optimum than the best
    draws = _draws(guide, problem, num_samples, recipe.calls, seed)
    if not torch.isfinite(draws).all():
        return Check(problem.name, name, "FAIL", recipe.held_to, ("draws that are not finite",))
    khat = None
    if isinstance(standard, Law):
        found.update(_moments(draws, standard.mean, standard.covariance, rule))
    else:
        weights = _weights(guide, problem, num_samples, recipe.calls, seed)
        if not torch.isfinite(weights).all():
            return Check(problem.name, name, "FAIL", recipe.held_to, ("importance weights that are not finite",))

        def against(near: Tensor, target: Tensor) -> dict[str, Error]:
            found: dict[str, Error] = {}
            if recipe.aim != "at least":
                mean, covariance = (part[near, _rows(problem)] for part in standard.moments)
                found.update(_moments(draws, mean, covariance, rule))
            found["elbo"] = _elbo(weights, target, best, recipe)
            found["evidence"] = _evidence(weights.flatten(0, 1), standard.members.pick(near), best, recipe, seed)
            return found

        near = _nearest(draws, standard, recipe)
        own = standard.elbo[near, _rows(problem)]
        found = against(near, own if recipe.aim == "definition" else standard.best)
        if recipe.aim != "definition" and not _all_well(found):
            near = standard.nearest(*_first_two(draws), math.inf)
            own = standard.elbo[near, _rows(problem)]
            local = against(near, own)
            if _all_well(local):
                found, lacking = local, float((standard.best - own).max())
        values = diagnose.pareto_khat(weights.flatten(0, 1))
        khat = float(values.median()), float(values.max())
    if lacking is not None:
        verdict = "local optimum"
        reasons: tuple[str, ...] = (f"an optimum of its family up to {lacking:.2g} nats below the best member",)
    else:
        verdict = "pass" if _all_well(found) else "FAIL"
        reasons = tuple(
            f"{what} off {error.against} by {error.value:+.3g} ({error.z:+.1f} se)"
            for what, error in found.items()
            if not error.ok
        )
    return Check(
        problem.name, name, verdict, recipe.held_to, reasons, **found, khat=khat, seconds=time.perf_counter() - began,
    )  # fmt: skip


def _all_well(found: dict[str, Error]) -> bool:
    return all(error.ok for error in found.values())


def _rows(problem: Problem) -> Tensor:
    return torch.arange(len(problem.x))


def _draws(guide: Guide, problem: Problem, num_samples: int, calls: int, seed: int) -> Tensor:
    """`[R, S / R, B, D]`: R calls, each of which finds the posterior anew."""
    parts = []
    with evaluating(problem.model, guide):
        for call in range(calls):
            with seeded(noise.mix(seed, call) % 2**31):
                parts.append(guide.draws(num_samples // calls, problem.x))
    return torch.stack(parts)


def _weights(guide: Guide, problem: Problem, num_samples: int, calls: int, seed: int) -> Tensor:
    """log p(x, u) - log q(u), `[R, S / R, B]`."""
    return torch.stack([
        evidence.log_weights(
            problem.model, guide, problem.x, num_samples=num_samples // calls, seed=noise.mix(seed, call) % 2**31
        )
        for call in range(calls)
    ])  # fmt: skip


def _mean_and_se(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over calls and draws of `[R, N, ...]`, and its standard error.

    The larger of two: draws taken as independent, and calls taken as independent (ten of them at least, or they say too
    little about their own spread).
    """
    se = values.flatten(0, 1).std(0) / math.sqrt(values.shape[0] * values.shape[1])
    if len(values) >= 10:
        se = torch.maximum(se, values.mean(1).std(0) / math.sqrt(len(values)))
    return values.mean((0, 1)), se


def _moments(draws: Tensor, mean: Tensor, covariance: Tensor, rule: Rule) -> dict[str, Error]:
    """Errors of mean and covariance in units of the standard's standard deviations."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    centred = (draws - mean) / scale
    correlation = covariance / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return {
        "mean": _within(*_mean_and_se(centred), rule.mean),
        "covariance": _within(*_shifted(centred.unsqueeze(-1) * centred.unsqueeze(-2), correlation), rule.covariance),
    }


def _shifted(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    mean, se = _mean_and_se(values)
    return mean - target, se


def _within(error: Tensor, se: Tensor, below: float, above: float | Tensor | None = None, mark: str = "") -> Error:
    """The entry closest to its bounds, `-(4 se + below) <= error <= 4 se + above`."""
    above = below if above is None else above
    room = torch.where(error < 0, torch.as_tensor(below).to(error), torch.as_tensor(above).to(error))
    allowed = _BOUND * se + room
    worst = int((error.abs() / allowed.clamp_min(1e-300)).nan_to_num(nan=math.inf).argmax())
    value, limit = float(error.flatten()[worst]), float(allowed.flatten()[worst])
    return Error(value, float(se.flatten()[worst]), abs(value) <= limit, mark)


def _nearest(draws: Tensor, standard: Candidates, recipe: Recipe) -> Tensor:
    if recipe.aim == "at least":
        return standard.elbo.argmax(0)
    return standard.nearest(*_first_two(draws), math.inf if recipe.aim == "definition" else recipe.rule.elbo)


def _first_two(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[B, D]` and covariance `[B, D, D]` of draws."""
    flat = draws.flatten(0, 1)
    centred = flat - flat.mean(0)
    return flat.mean(0), torch.einsum("sbd,sbe->bde", centred, centred) / len(flat)


def _elbo(weights: Tensor, target: Tensor, best: Best, recipe: Recipe) -> Error:
    """ELBO less that of the standard, `target [B]`."""
    rule, (value, se) = recipe.rule, _mean_and_se(weights)
    if recipe.aim != "at least":
        return _within(value - target, se, rule.elbo, rule.elbo if recipe.aim == "definition" else _ROUNDING)
    ceiling = best.problem.truth.log_evidence if recipe.ceiling is None else recipe.ceiling(best).best
    error, above = value - target, ceiling - target + _ROUNDING
    if recipe.pooled:
        whole = _within(error.mean(), se.square().sum().sqrt() / len(se), rule.elbo, above.mean(), ">")
        each = _within(error, se, math.inf, above, ">")
        return whole if each.ok else each
    return _within(error, se, rule.elbo, above, ">")


def _evidence(weights: Tensor, own: Members, best: Best, recipe: Recipe, seed: int) -> Error:
    """IWAE less that of the standard's own weights, at plain draws and with as many of them.

    Importance weights of a Gaussian have no finite variance where the posterior's tails are heavier, and miss a mode
    that no draw finds; the standard's share both. Medians over blocks of draws are compared, because now and then one
    weight outweighs a block, with the spread of the standard's blocks (between quartiles) for a standard error. Above
    log p(x), which IWAE bounds from below, a guide's may not be at all.
    """
    problem, rule = best.problem, recipe.rule
    size = min(IWAE_DRAWS, len(weights))
    ours = iwae(weights, size)
    theirs = iwae(own.log_weights(problem.log_joint, _REPEATS * size, noise.mix(seed, -1) % 2**31)[:, 0], size)
    middle, spread = _median_and_spread(ours)
    target, usual = _median_and_spread(theirs)
    error, variance = middle - target, torch.maximum(spread, usual) ** 2 / len(ours) + usual**2 / len(theirs)
    se = (math.pi / 2 * variance).sqrt()  # of medians
    pooled = evidence.summarize(weights)[1]
    excess = _within(middle - problem.truth.log_evidence, pooled.se, math.inf, _ROUNDING)
    if not excess.ok:
        return replace(excess, against="log p(x)")
    if recipe.aim == "at least":
        return _within(error, se, rule.elbo, math.inf, ">")
    return _within(error, se, rule.elbo)


def _median_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Over the first dimension: the median, and the standard deviation that normal values with these quartiles have."""
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75]).to(values), 0)
    return middle, (high - low) / 1.349


def iwae(weights: Tensor, size: int) -> Tensor:
    """IWAE of blocks of `size` weights, `[S, B] -> [S / size, B]`."""
    blocks = weights[: len(weights) // size * size].unflatten(0, (-1, size))
    return torch.logsumexp(blocks, 1) - math.log(size)
