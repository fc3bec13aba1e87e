"""The best members: closed forms on Gaussian posteriors, independent searches elsewhere, exact laws of short chains."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import optimize

from pyrovae.certification import law, problems
from pyrovae.certification.best import Best, modes
from pyrovae.certification.members import Mixtures, Normals
from pyrovae.models import PPCA


@pytest.fixture(scope="module")
def pca():
    return Best(problems.Pca())


@pytest.fixture(scope="module")
def bimodal():
    return Best(problems.Bimodal())


def test_diagonal_on_a_gaussian_is_the_closed_form(pca):
    """Mean m, variance 1 / diag(Lambda), and the gap that PPCA knows."""
    truth, precision = pca.problem.truth, pca.problem.curvature(pca.problem.start)
    mean, covariance = pca.diagonal.moments
    assert torch.allclose(mean, truth.mean.expand_as(mean), atol=1e-5)
    closed = torch.diag_embed(1 / precision.diagonal(dim1=-2, dim2=-1))
    assert torch.allclose(covariance, closed.expand_as(covariance), rtol=1e-5)
    assert isinstance(pca.problem.model, PPCA)
    assert torch.allclose(truth.log_evidence - pca.diagonal.best, pca.problem.model.factorised_gap(), atol=1e-9)
    assert float(pca.problem.model.factorised_gap()) > 0.4  # the gap is there to be found


def test_full_rank_laplace_and_averaged_on_a_gaussian_are_the_posterior(pca):
    truth = pca.problem.truth
    for found in (pca.full_rank, pca.laplace, pca.laplace_hessian, pca.averaged):
        mean, covariance = found.moments
        assert torch.allclose(mean, truth.mean.expand_as(mean), atol=1e-5)
        assert torch.allclose(covariance, truth.covariance.expand_as(covariance), atol=1e-5)
        assert torch.allclose(found.elbo, truth.log_evidence.expand_as(found.elbo), atol=1e-9)


def test_low_rank_lies_between_and_is_the_best_of_many(pca):
    """Rank one plus diagonal cannot be this posterior; scipy on the closed KL finds the same gap."""
    covariance = pca.problem.truth.covariance[0].numpy()
    precision = torch.linalg.inv(pca.problem.truth.covariance[0])

    def gap(p):
        """KL(N(0, D + f f') || N(0, Lambda^{-1}))."""
        p = torch.as_tensor(p)
        ours = torch.diag(p[:3].exp()) + torch.outer(p[3:], p[3:])
        return float(0.5 * ((precision @ ours).trace() - 3 - torch.logdet(precision @ ours)))

    generator = torch.Generator().manual_seed(3)
    found = min(
        optimize.minimize(gap, torch.randn(6, generator=generator).double().numpy(), method="Nelder-Mead",
                          options={"maxiter": 4000, "fatol": 1e-10, "xatol": 1e-7}).fun
        for _ in range(6)
    )  # fmt: skip
    ours = pca.problem.truth.log_evidence - pca.low_rank.best
    assert covariance.shape == (3, 3)
    assert torch.allclose(ours, torch.full_like(ours, found), atol=1e-6)
    assert 0.02 < found < 0.9 * float(pca.problem.model.factorised_gap())


def _dense_elbo(problem, locs, scales, weights, row):
    """ELBO of a 1-D mixture by the trapezoid rule: another rule than Gauss-Hermite."""
    u = torch.linspace(-8, 8, 40_001, dtype=torch.double)
    wide = u[:, None, None].expand(-1, len(problem.x), 1)
    joint = problem.log_joint(wide)[:, row]
    parts = torch.distributions.Normal(locs, scales)
    log_q = torch.logsumexp(weights.log() + parts.log_prob(u[:, None]), -1)
    return float(torch.trapezoid(log_q.exp() * (joint - log_q), u))


def test_diagonal_on_the_bimodal_is_the_best_of_a_grid(bimodal):
    """Every location and scale of a grid, the ELBO by dense integration; one side will do, by symmetry."""
    problem = bimodal.problem
    u = torch.linspace(-8, 8, 2001, dtype=torch.double)
    joint = problem.log_joint(u[:, None, None].expand(-1, 3, 1))
    locs = torch.linspace(0, 2, 81, dtype=torch.double)
    scales = torch.logspace(-1.5, 0.1, 61, dtype=torch.double)
    mesh = torch.cartesian_prod(locs, scales)  # [G, 2]
    log_q = torch.distributions.Normal(mesh[:, :1], mesh[:, 1:]).log_prob(u)
    q = log_q.exp() * (u[1] - u[0])
    values = q @ joint - (q * log_q).sum(-1, keepdim=True)  # [G, B]
    best, at = values.amax(0), mesh[values.argmax(0)]
    assert (best <= bimodal.diagonal.best + 1e-9).all()
    assert (bimodal.diagonal.best - best < 5e-3).all()  # the grid's own coarseness
    pick = bimodal.diagonal.nearest(at[:, :1], at[:, 1:, None] ** 2, 1e-4)
    mean, covariance = (part[pick, torch.arange(3)].flatten() for part in bimodal.diagonal.moments)
    assert ((mean - at[:, 0]).abs() < 0.05).all()
    assert ((covariance.sqrt() / at[:, 1]).log().abs() < 0.1).all()


def test_equally_good_members_are_all_kept(bimodal):
    """A Gaussian on either mode: the nearest one is chosen, and one that is worse never is."""
    for side in (-1.0, 1.0):
        mean = torch.full((3, 1), side).double()
        pick = bimodal.diagonal.nearest(mean, torch.full((3, 1, 1), 0.01).double(), 0.01)
        found = bimodal.diagonal.moments[0][pick, torch.arange(3)]
        assert (found[:2] * side > 0.9).all()
    worse = bimodal.diagonal.elbo < bimodal.diagonal.best - 0.01
    assert worse[:, 1].any()  # the second datum also has a local optimum that spans both modes
    pick = bimodal.diagonal.nearest(torch.zeros(3, 1).double(), torch.ones(3, 1, 1).double(), 0.01)
    assert not worse[pick, torch.arange(3)].any()


def test_mixture_on_the_bimodal(bimodal):
    """Its ELBO by another rule, no better neighbour, and half the mass on each mode."""
    found, problem = bimodal.mixture, bimodal.problem
    assert isinstance(found.members, Mixtures)
    pick = found.elbo.argmax(0)
    q = found.members.pick(pick)
    generator = torch.Generator().manual_seed(0)
    for row in range(3):
        locs, scales, weights = q.locs[0, row, :, 0], q.scales[0, row, :, 0], q.log_weights_[0, row].exp()
        here = _dense_elbo(problem, locs, scales, weights, row)
        assert here == pytest.approx(float(found.best[row]), abs=1e-6)
        assert torch.allclose(weights, torch.full((2,), 0.5).double(), atol=0.01)
        for _ in range(20):
            step = 0.02 * torch.randn(2, 2, generator=generator, dtype=torch.double)
            assert _dense_elbo(problem, locs + step[0] * scales, scales * step[1].exp(), weights, row) < here + 1e-9
    gap = problem.truth.log_evidence - found.best
    assert (gap > 0).all()
    assert (gap < 0.03).all()


def test_mixtures_agree_with_torch():
    """Density and moments against torch.distributions; ELBO of one component equals that of a Gaussian."""
    generator = torch.Generator().manual_seed(0)
    locs = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.double)
    scales, weights = locs.abs() + 0.3, torch.randn(4, 3, 2, generator=generator, dtype=torch.double).log_softmax(-1)
    q = Mixtures(weights, locs, scales)
    parts = torch.distributions.Independent(torch.distributions.Normal(locs, scales), 1)
    other = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weights), parts)
    u = torch.randn(5, 4, 3, 2, generator=generator, dtype=torch.double)
    assert torch.allclose(q.log_prob(u), other.log_prob(u))
    mean, covariance = q.moments()
    assert torch.allclose(mean, other.mean)
    assert torch.allclose(covariance.diagonal(dim1=-2, dim2=-1), other.variance)
    problem = problems.Banana()
    one = Mixtures(torch.zeros(4, 3, 1).double(), locs[:, :, :1], scales[:, :, :1])
    normal = Normals(locs[:, :, 0], scales[:, :, 0].diag_embed())
    assert torch.allclose(one.elbo(problem.log_joint, 20), normal.elbo(problem.log_joint, 20))
    # Draws: the same seed twice, so that log q drops out of the difference.
    first, nothing = (q.log_weights(lambda u, s=s: s * u[..., 0], 40_000, seed=0) for s in (1.0, 0.0))
    draws = first - nothing
    assert ((draws.mean(0) - mean[..., 0]).abs() < 4 * draws.std(0) / 200).all()


def test_modes_are_where_a_dense_grid_says(bimodal):
    """All three data, both signs; gradient zero to rounding."""
    problem = bimodal.problem
    u = torch.linspace(0.05, 4, 200_001, dtype=torch.double)
    at = u[problem.log_joint(u[:, None, None].expand(-1, 3, 1)).argmax(0)]
    found = bimodal.laplace.moments[0][..., 0]
    assert torch.allclose(found.abs(), at.expand_as(found), atol=1e-4)
    assert (found < 0).any()
    assert (found > 0).any()
    with pytest.raises(ValueError, match="no mode found"):
        modes(lambda u: torch.nn.functional.logsigmoid(u).sum(-1), torch.zeros(1, 2, 1).double())


def test_averaged_is_the_best_gaussian_where_fisher_is_the_hessian_and_not_elsewhere():
    """Logistic regression: J' F J is the Hessian, so two independent searches must agree. A banana: it is not."""
    logistic, banana = Best(problems.Logistic()), Best(problems.Banana())
    assert torch.allclose(logistic.averaged.best, logistic.full_rank.best, atol=1e-6)
    assert (banana.averaged.best < banana.full_rank.best - 3e-4).all()


def test_affine_law_is_that_of_its_definition():
    """Langevin on a Gaussian: 20,000 plain chains, written out here."""
    problem = problems.Correlated()
    step = 0.3
    mean, covariance = law.affine_law(problem, law.prior_start(problem), 5, step)
    precision, centre = problem.curvature(problem.start), problem.truth.mean
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(20_000, 3, 2, generator=generator, dtype=torch.double)
    for _ in range(5):
        pull = torch.einsum("bij,sbj->sbi", precision, centre - u)
        u = u + 0.5 * step**2 * pull + step * torch.randn(u.shape, generator=generator, dtype=torch.double)
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (((u.mean(0) - mean) / sd).abs() < 4 / math.sqrt(20_000)).all()
    assert ((u.var(0) / sd**2 - 1).abs() < 4 * math.sqrt(2 / 20_000)).all()


def test_grid_law_is_the_closed_form_on_a_gaussian():
    problem = problems.Correlated()
    begin = law.normal_start(problem.truth.mean + 0.3, 0.7 * torch.ones(3, 2).double())
    closed, grid = law.affine_law(problem, begin, 4, 0.25), law.langevin_law(problem, begin, 4, 0.25)
    for a, b in zip(closed, grid, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_grid_law_refuses_steps_that_explode():
    with pytest.raises(ValueError, match="too long for the tails"):
        law.langevin_law(problems.Bimodal(), law.prior_start(problems.Bimodal()), 3, 0.25)


def test_a_search_that_stops_short_is_no_standard(monkeypatch):
    monkeypatch.setattr("pyrovae.certification.best.maximise", lambda objective, start, steps: start)
    with pytest.raises(ValueError, match="stopped short of an optimum"):
        _ = Best(problems.Bimodal()).diagonal
