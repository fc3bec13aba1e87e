"""The guides that are certified, built for one problem.

Amortization is not on trial here: encoders are tables, one row of parameters for each datum, found by the datum itself,
so every datum can have any posterior of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import flows, guides
from pyrovae.certification.best import Best
from pyrovae.certification.problems import Problem
from pyrovae.errors import IncompatibleError
from pyrovae.families import Family, get_family
from pyrovae.guides.exact import Exact

__all__ = [
    "Lookup", "NotCertified", "amortized", "boosted", "dais", "density_short_run", "escalating", "exact", "flow",
    "hvae", "laplace", "local", "mixture", "recursive", "refined", "short_run", "unaided", "wide_start",
]  # fmt: skip

_DRAWS = 128  # per inner gradient of a refinement that is trained
_MANY_DRAWS = 256  # of one that is not


class NotCertified(Exception):
    """There is nothing exact to hold this guide against on this problem; the message says why."""


class Lookup(nn.Module):
    """A table in place of an encoder: the row of parameters that belongs to the datum it is given.

    Args:
        x: the data, `[B, *event]`, all different.
        values: where the rows start, `[B, P]`.
    """

    def __init__(self, x: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", x.reshape(len(x), -1).clone())
        self.values = nn.Parameter(values.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        keys: Any = self.keys
        match = (x.reshape(len(x), 1, -1) == keys).all(-1)  # [b, B]
        if not (match.sum(-1) == 1).all():
            raise ValueError("this table holds one row for each datum it was made for, and was asked for another datum")
        return self.values[match.to(torch.uint8).argmax(-1)]


def start(problem: Problem, family: Family) -> Tensor:
    """Narrow Gaussians at the problem's start, `[B, P]`; the two of a mixture on either side, along the first axis."""
    lam = family.init(len(problem.x), dtype=torch.double)
    blocks = family.blocks
    if "locs" in blocks:
        aside = torch.eye(problem.dim)[0].to(lam)
        lam[:, blocks["locs"]] = torch.cat([problem.start + aside, problem.start - aside], dim=-1)
    else:
        lam[:, blocks["loc"]] = problem.start
    for name, value in (("log_var", -2.0), ("log_vars", -1.0), ("log_diag", -1.0)):
        if name in blocks:
            lam[:, blocks[name]] += value
    return lam


def amortized(best: Best, family: str = "diagonal") -> guides.Amortized:
    problem = best.problem
    lam = start(problem, get_family(family, problem.dim))
    return guides.Amortized(problem.model, Lookup(problem.x, lam), family)


def flow(best: Best, kind: Callable[[int], flows.Flow]) -> guides.Amortized:
    """`kind` makes the flow for D dimensions."""
    problem = best.problem
    try:
        made = kind(problem.dim).double()
    except ValueError as error:  # one dimension cannot be coupled
        raise NotCertified(str(error)) from error
    lam = start(problem, made)
    if "context" in made.blocks:  # every datum a context of its own, from the beginning
        context = lam[:, made.blocks["context"]]
        context[:] = torch.eye(*context.shape).to(lam)
    return guides.Amortized(problem.model, Lookup(problem.x, lam), made)


def mixture(best: Best) -> guides.Mixture:
    """Two `Amortized` guides, started as the mixture family is."""
    problem = best.problem
    family = get_family("mixture", problem.dim)
    logits, locs, log_vars = (start(problem, family)[:, block] for block in family.blocks.values())
    parts = [guides.Amortized(problem.model, table) for table in _pair(problem, locs, log_vars)]
    return guides.Mixture(parts, weights=Lookup(problem.x, logits))


def recursive(best: Best) -> guides.RecursiveMixture:
    """The same two, the second added to the first."""
    problem = best.problem
    family = get_family("mixture", problem.dim)
    logits, locs, log_vars = (start(problem, family)[:, block] for block in family.blocks.values())
    weights = Lookup(problem.x, logits[:, :1])
    tables = _pair(problem, locs, log_vars)
    return guides.RecursiveMixture(problem.model, tables, trunk="separate", weights=weights)


def _pair(problem: Problem, locs: Tensor, log_vars: Tensor) -> list[Lookup]:
    """Tables of the parameters of two components, `[B, 2 D]` each."""
    pairs = zip(locs.chunk(2, -1), log_vars.chunk(2, -1), strict=True)
    return [Lookup(problem.x, torch.cat(pair, -1)) for pair in pairs]


def refined(best: Best, base: guides.FamilyGuide) -> guides.SemiAmortized:
    """Few steps, to be trained through."""
    antithetic = isinstance(base, guides.Amortized)
    return guides.SemiAmortized(base, 3, 0.2 * best.scale**2, num_samples=_DRAWS, antithetic=antithetic)


def unaided(best: Best) -> guides.SemiAmortized:
    """Many steps from an encoder that is never trained: what is right is the steps' doing."""
    size = {"loc": 0.3 * best.scale**2, "log_var": 0.1}
    return guides.SemiAmortized(amortized(best), 200, size, num_samples=_MANY_DRAWS, antithetic=True, max_norm=None)


def local(best: Best, family: str) -> guides.LocalSVI:
    return guides.LocalSVI(best.problem.model, base=amortized(best, family), num_samples=64)


def laplace(best: Best, **options: Any) -> guides.Laplace:
    problem = best.problem
    return guides.Laplace(problem.model, Lookup(problem.x, problem.start), **options)


def wide_start(problem: Problem) -> tuple[Tensor, Tensor]:
    """Location and scale of a Gaussian for chains to start from: the posterior's, shifted by half a deviation."""
    return problem.truth.mean + 0.5 * problem.truth.sd, problem.truth.sd


def boosted(best: Best) -> guides.BoostedVI:
    return guides.BoostedVI(best.problem.model, 2, num_draws=2000)


def dais(best: Best) -> guides.DAIS:
    _require_smooth(best.problem)
    return guides.DAIS(amortized(best), 4)


def _require_smooth(problem: Problem) -> None:
    if problem.kinks is not None:
        raise NotCertified(
            "trained by biased gradients: a leapfrog step jumps where the log-joint has a kink, which pathwise "
            "gradients miss"
        )


def hvae(best: Best) -> guides.HVAE:
    _require_smooth(best.problem)
    return guides.HVAE(amortized(best), 3, dim=best.problem.dim)


def escalating(best: Best) -> guides.Escalating:
    """A Gaussian so far away that no datum may end with it, then two searches."""
    problem = best.problem
    lam = start(problem, get_family("diagonal", problem.dim))
    lam[:, : problem.dim] += 6 * problem.truth.sd
    far = guides.Amortized(problem.model, Lookup(problem.x, lam))
    return guides.Escalating([far, local(best, "diagonal"), local(best, "full-rank")])


def exact(best: Best) -> Exact:
    try:
        return Exact(best.problem.model)
    except IncompatibleError as error:  # few models know their posterior
        raise NotCertified(str(error)) from error


def density_short_run(best: Best, num_steps: int) -> guides.DensityShortRun:
    return guides.DensityShortRun(best.problem.model, num_steps, best.step)


def short_run(best: Best, num_steps: int, *, from_guide: bool = False, num_leapfrog: int = 0) -> guides.ShortRun:
    """Langevin, or HMC with `num_leapfrog` steps; from the prior or from a guide that is not trained."""
    problem = best.problem
    init = None
    if from_guide:
        loc, scale = wide_start(problem)
        init = guides.Amortized(problem.model, Lookup(problem.x, torch.cat([loc, 2 * scale.log()], -1)))
    if num_leapfrog:
        return guides.ShortRun(problem.model, num_steps, best.step, "hmc", init, num_leapfrog=num_leapfrog)
    return guides.ShortRun(problem.model, num_steps, best.step, init=init)
