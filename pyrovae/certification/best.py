r"""The best member of each family on a problem: what a guide is held against.

* `diagonal`, `low_rank`, `full_rank`, `mixture`: the members that minimise KL(q || p), found by L-BFGS on the exact
  (Gauss-Hermite) ELBO from many starts. On a Gaussian posterior they are closed forms: the diagonal one has the
  posterior's mean and variances 1 / diag(Lambda), the full-rank one is the posterior.
* `laplace`: N(mode, curvature(mode)^{-1}), modes by Newton's method with the exact Hessian.
* `posterior`: the posterior itself, for guides that are exact.
* `averaged`: the fixed point E_q[grad log p] = 0, q's precision = E_q[curvature], expectations by quadrature.

Local optima exist, and symmetric problems have several equally good members: all that are found are kept, and a guide
is held against the nearest of those that are as good as the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrovae.certification.members import Members, Mixtures, Normals, Posterior
from pyrovae.certification.problems import Problem
from pyrovae.certification.quadrature import LogDensity, gradient, hessian

__all__ = ["Best", "Candidates", "maximise", "modes"]

_STARTS = 12
_COARSE = {1: 30, 2: 12, 3: 6}  # Gauss-Hermite nodes a dimension while the starts are followed
_FINE = {1: 60, 2: 20, 3: 10}  # at the end of the search
_FINEST = {1: 150, 2: 50, 3: 16}  # for the ELBO that guides are held against
_RESOLVED = 1e-4  # nats by which two orders may differ
_FLAT = 1e-2  # slope of an optimum in any parameter, nats


@dataclass(frozen=True)
class Candidates:
    """Members of one family that a search ended at.

    Attributes:
        members: C of them for each of B data.
        elbo: `[C, B]`, nats; -inf where two orders of quadrature disagree, or the search stopped short of an optimum.
    """

    members: Members
    elbo: Tensor

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[C, B, D]` and covariance `[C, B, D, D]`."""
        return self.members.moments()

    @property
    def best(self) -> Tensor:
        """ELBO of the best member, `[B]`."""
        return self.elbo.amax(0)

    def nearest(self, mean: Tensor, covariance: Tensor, slack: float) -> Tensor:
        """Index `[B]` of the candidate with the nearest moments, of those within `slack` nats of the best."""
        ours, cov = self.moments
        variance = cov.diagonal(dim1=-2, dim2=-1)
        scale = variance.sqrt()
        shift = ((mean - ours) / scale).square().sum(-1)
        stretch = ((covariance - cov) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))).square().sum((-2, -1))
        return torch.where(self.elbo >= self.best - slack, shift + stretch, torch.inf).argmin(0)


class Best:
    """The best members for one problem, each found when it is asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def _candidates(self, members: Normals | Mixtures, settled: Tensor | bool = True) -> Candidates:
        """With their ELBO; `settled [C, B]` says where a search ended at an optimum.

        Raises:
            ValueError: the best of them, for some datum, is none.
        """
        joint, dim = self.problem.log_joint, self.problem.dim
        with torch.no_grad():
            fine, finest = (members.elbo(joint, points[dim], self.problem.kinks) for points in (_FINE, _FINEST))
        resolved = torch.where((fine - finest).abs() < _RESOLVED, finest, -torch.inf)
        sound = torch.where(torch.as_tensor(settled), resolved, -torch.inf)
        if not (sound.amax(0) > resolved.amax(0) - _RESOLVED).all():
            raise ValueError(f"{self.problem!r}: the search for a best member stopped short of an optimum")
        return Candidates(members, sound)

    @cached_property
    def posterior(self) -> Candidates:
        truth = self.problem.truth
        itself = Posterior(*(part.unsqueeze(0) for part in truth))
        return Candidates(itself, itself.log_evidence)

    @cached_property
    def diagonal(self) -> Candidates:
        return self._search(lambda loc, log_sd, _: Normals(loc[..., 0, :], log_sd[..., 0, :].exp().diag_embed()))

    @cached_property
    def full_rank(self) -> Candidates:
        dim = self.problem.dim
        rows, columns = torch.tril_indices(dim, dim, offset=-1)

        def member(loc: Tensor, log_sd: Tensor, rest: Tensor) -> Normals:
            below = torch.zeros(*rest.shape[:-1], dim, dim, dtype=rest.dtype)
            below[..., rows, columns] = rest
            return Normals(loc[..., 0, :], log_sd[..., 0, :].exp().diag_embed() + below)

        return self._search(member, rest=len(rows))

    @cached_property
    def low_rank(self) -> Candidates:
        """W W' + diagonal, of the rank that `LowRankNormal` takes by default: floor(sqrt(D))."""
        dim = self.problem.dim
        rank = math.isqrt(dim)

        def member(loc: Tensor, log_sd: Tensor, rest: Tensor) -> Normals | Mixtures:
            factor = rest.unflatten(-1, (dim, rank))
            covariance = factor @ factor.mT + (2 * log_sd[..., 0, :]).exp().diag_embed()
            return Normals(loc[..., 0, :], torch.linalg.cholesky(covariance))

        return self._search(member, rest=dim * rank)

    @cached_property
    def mixture(self) -> Candidates:
        """Two diagonal components."""

        def member(loc: Tensor, log_sd: Tensor, rest: Tensor) -> Normals | Mixtures:
            log_weights = torch.nn.functional.logsigmoid(torch.cat([rest, -rest], dim=-1))
            return Mixtures(log_weights, loc, log_sd.exp())

        return self._search(member, components=2, rest=1)

    def _search(
        self, member: Callable[[Tensor, Tensor, Tensor], Normals | Mixtures], *, components: int = 1, rest: int = 0
    ) -> Candidates:
        """Local optima of the ELBO over `member(loc [C, B, M, D], log_sd [C, B, M, D], rest [C, B, R])`."""
        problem, truth = self.problem, self.problem.truth
        generator = torch.Generator().manual_seed(0)
        shape = (_STARTS, len(problem.x))

        def random(*size: int) -> Tensor:
            return torch.randn(*shape, *size, generator=generator, dtype=torch.double)

        sd = truth.sd.unsqueeze(1)
        loc = truth.mean.unsqueeze(1) + sd * random(components, problem.dim)
        log_sd = sd.log() - random(components, problem.dim).abs()
        theta = torch.cat([loc.flatten(2), log_sd.flatten(2), 0.1 * random(rest)], dim=-1)

        def build(p: Tensor) -> Normals | Mixtures:
            size = components * problem.dim
            locs, log_sds = (p[..., i * size : (i + 1) * size].unflatten(-1, (components, -1)) for i in (0, 1))
            return member(locs, log_sds, p[..., 2 * size :])

        def coarse(p: Tensor) -> Tensor:
            return build(p).elbo(problem.log_joint, _COARSE[problem.dim], problem.kinks)

        def fine(p: Tensor) -> Tensor:
            return build(p).elbo(problem.log_joint, _FINE[problem.dim], problem.kinks)

        theta = maximise(fine, maximise(coarse, theta, 500), 60)
        settled = gradient(fine, theta).abs().amax(-1) < _FLAT
        with torch.no_grad():
            return self._candidates(build(theta), settled)

    @cached_property
    def _modes(self) -> Tensor:
        """Modes `[C, B, D]`, the first from the problem's start (several may be the same)."""
        problem = self.problem
        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(_STARTS, *problem.start.shape, generator=generator, dtype=torch.double)
        start = torch.cat([problem.start.unsqueeze(0), problem.truth.mean + problem.truth.sd * spread])
        return modes(problem.log_joint, start)

    @cached_property
    def laplace(self) -> Candidates:
        """N(mode, curvature^{-1})."""
        return self._gaussians(self._modes, self.problem.curvature(self._modes))

    @cached_property
    def laplace_hessian(self) -> Candidates:
        """N(mode, -Hessian^{-1})."""
        return self._gaussians(self._modes, -hessian(self.problem.log_joint, self._modes))

    def _gaussians(self, loc: Tensor, precision: Tensor) -> Candidates:
        return self._candidates(Normals(loc, torch.linalg.cholesky(torch.linalg.inv(precision))))

    @cached_property
    def scale(self) -> float:
        """The posterior's finest length: one over the root of the largest curvature at any mode."""
        return float(torch.linalg.eigvalsh(self.problem.curvature(self._modes)).max() ** -0.5)

    @property
    def step(self) -> float:
        """Step size of short runs: half the finest length."""
        return 0.5 * self.scale

    @cached_property
    def averaged(self) -> Candidates:
        """The Gaussian at which gradient and curvature, both averaged over it, are those of itself."""
        problem = self.problem
        q = self.laplace.members
        assert isinstance(q, Normals)
        for _ in range(500):
            u, weights = q.nodes(_FINE[problem.dim], problem.kinks)
            slope = (weights.unsqueeze(-1) * gradient(problem.log_joint, u)).sum(0)
            precision = (weights[..., None, None] * problem.curvature(u)).sum(0)
            old = q.moments()
            step = torch.linalg.solve(precision, slope)
            covariance = 0.5 * (old[1] + torch.linalg.inv(precision))
            q = Normals(old[0] + 0.5 * step, torch.linalg.cholesky(covariance))
            if max(float(step.abs().max()), float((q.moments()[1] - old[1]).abs().max())) < 1e-9:
                return self._candidates(q)
        raise ValueError(f"{problem!r}: gradient and curvature averaged over a Gaussian found no fixed point")


def maximise(objective: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Local maxima of independent objectives, `[C, B, P] -> [C, B]`, by L-BFGS on their sum."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=steps, history_size=50, tolerance_grad=1e-6, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -objective(theta).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return theta.detach()


def modes(log_joint: LogDensity, start: Tensor) -> Tensor:
    """Modes near `start: [C, B, D]`: Newton steps on the exact Hessian's absolute eigenvalues, halved until they climb.

    Raises:
        ValueError: a search did not end where the gradient is zero and the Hessian negative definite.
    """
    u = start.clone()
    lengths = 0.5 ** torch.arange(20, dtype=u.dtype)
    for _ in range(200):
        slope = gradient(log_joint, u)
        values, vectors = torch.linalg.eigh(hessian(log_joint, u))
        in_basis = (vectors.mT @ slope.unsqueeze(-1)).squeeze(-1) / values.abs().clamp_min(1e-3)
        step = (vectors @ in_basis.unsqueeze(-1)).squeeze(-1)
        if step.abs().max() < 1e-12 and (values < 0).all():
            return u
        reached = log_joint(u + lengths[:, None, None, None] * step)
        # Close to the mode rounding hides what a step gains: the full one is taken there.
        length = torch.where(step.abs().amax(-1) < 1e-5, 1.0, lengths[reached.argmax(0)])
        u = u + length.unsqueeze(-1) * step
    raise ValueError(f"no mode found after 200 steps: gradient {float(slope.abs().max()):.1g}")
