"""The piecewise-affine problem and the exact guide: two ways to the same numbers, and rules that know of the kinks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyrovae.certification import problems
from pyrovae.certification.best import Best
from pyrovae.certification.checks import certify
from pyrovae.certification.members import Mixtures, Normals
from pyrovae.certification.recipes import RECIPES
from pyrovae.guides.exact import Exact


@pytest.fixture(scope="module")
def kinked():
    return Best(problems.PiecewiseAffine())


def test_by_hand_and_by_the_library(kinked):
    """Quadrature on the density written out against closed forms cell by cell."""
    problem = kinked.problem
    q = problem.model.posterior(problem.x)
    assert torch.allclose(q.log_evidence, problem.truth.log_evidence, rtol=0, atol=1e-11)
    assert torch.allclose(q.mean, problem.truth.mean, rtol=0, atol=1e-10)
    assert torch.allclose(q.covariance_matrix, problem.truth.covariance, rtol=0, atol=1e-10)
    assert torch.allclose(problem.kinks, problem.model.cells().edges, rtol=0, atol=1e-12)
    assert int((q.weights[2] > 0.01).sum()) == 6
    assert -14.5 < float(q.log_evidence[2]) < -13.5
    u = torch.linspace(-3.03, 3.04, 61, dtype=torch.double)[:, None, None].expand(-1, 3, 1)
    by_cell = (1 / q.gaussians.covariance)[q.cells.locate(u)]
    assert torch.allclose(problem.curvature(u), by_cell, rtol=1e-12)


def test_expectations_between_kinks_are_those_of_a_dense_rule(kinked):
    """ELBOs of a Gaussian and of a mixture, by the trapezoid rule on 400,001 points; plain Gauss-Hermite is far off."""
    problem = kinked.problem
    u = torch.linspace(-12, 12, 400_001, dtype=torch.double)
    joint = problem.log_joint(u[:, None, None].expand(-1, 3, 1))
    locs = torch.tensor([0.3, -0.8, 1.4]).double()[None, :, None]
    normal = Normals(locs, torch.full((1, 3, 1, 1), 0.6).double())
    q = torch.distributions.Normal(locs[0, :, 0], 0.6).log_prob(u[:, None])
    expected = torch.trapezoid(q.exp() * (joint - q), u, dim=0)
    found = normal.elbo(problem.log_joint, 60, problem.kinks)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(normal.elbo(problem.log_joint, 60)[0], expected, rtol=0, atol=1e-4)
    weights = torch.tensor([0.3, 0.7]).double().log().expand(1, 3, 2)
    mixture = Mixtures(weights, torch.stack([locs, locs + 1], 2), torch.full((1, 3, 2, 1), 0.5).double())
    q = mixture.log_prob(u[:, None, None, None].expand(-1, 1, 3, 1))[:, 0]
    expected = torch.trapezoid(q.exp() * (joint - q), u, dim=0)
    found = mixture.elbo(problem.log_joint, 60, problem.kinks)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_standards_that_are_searched_exist(kinked):
    """Modes lie inside cells, where slopes vanish; a fixed point of averaged slopes is found; all below log p(x)."""
    for found in (kinked.laplace, kinked.averaged, kinked.full_rank):
        gap = kinked.problem.truth.log_evidence - found.best
        assert (gap > 0).all()
        assert (gap < 0.8).all()
    assert (kinked.full_rank.best >= kinked.laplace.best - 1e-9).all()


@pytest.mark.parametrize("name", ["ppca", "piecewise-affine"])
def test_the_exact_guide_is_the_posterior(name):
    best = Best(problems.PROBLEMS[name]())
    check = certify("exact", RECIPES["exact"], best, seed=0, num_samples=4000)
    assert check.verdict == "pass", check.reasons
    assert abs(check.elbo.value) < 1e-9
    assert abs(check.evidence.value) < 1e-9


def test_a_model_without_posterior_has_no_exact_guide():
    check = certify("exact", RECIPES["exact"], Best(problems.Bimodal()), seed=0, num_samples=10)
    assert check.verdict == "not certified"
    assert "does not define" in check.reasons[0]


class Shifted(Exact):
    """Draws a fifth of a deviation off."""

    def _drawn(self, q, number, args, kwargs):
        return super()._drawn(q, number, args, kwargs) + 0.2 * q.variance.sqrt()


def test_a_shifted_one_fails(kinked):
    recipe = replace(RECIPES["exact"], build=lambda best: Shifted(best.problem.model))
    check = certify("exact", recipe, kinked, seed=0, num_samples=4000)
    assert check.verdict == "FAIL"
    assert not check.mean.ok
