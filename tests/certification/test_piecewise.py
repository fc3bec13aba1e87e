"""The piecewise-affine problem and the exact guide: two ways to the same numbers, and rules that know of the kinks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyrovae import guides, losses
from pyrovae.certification import problems
from pyrovae.certification.best import Best
from pyrovae.certification.builders import Lookup
from pyrovae.certification.checks import certify, measure
from pyrovae.certification.members import Mixtures, Normals
from pyrovae.certification.recipes import RECIPES
from pyrovae.guides.amortized import Amortized
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
    by_cell = q.gaussians.factor.square()[q.cells.locate(u)]
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


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "local optimum"), (0.3, "FAIL")])
def test_a_worse_optimum_is_told_from_a_fault(kinked, shift, verdict):
    """A Gaussian put on the family's second-best optimum for the datum with two modes, and beside it."""
    standard = kinked.diagonal
    members, index = standard.members, standard.elbo.argmax(0)
    worse = standard.elbo[:, 2] < standard.best[2] - 0.05
    index[2] = torch.where(worse, standard.elbo[:, 2], -torch.inf).argmax()
    loc, tril = members.pick(index)
    lam = torch.cat([loc[0] + shift * tril[0, ..., 0], 2 * tril[0, ..., 0].log()], -1)
    guide = Amortized(kinked.problem.model, Lookup(kinked.problem.x, lam))
    check = measure("amortized", RECIPES["amortized"], standard, guide, kinked, seed=0, num_samples=10_000)
    assert check.verdict == verdict, check.reasons
    if verdict == "local optimum":
        lacking = float(standard.best[2] - standard.elbo[index[2], 2])
        assert f"up to {lacking:.2g} nats below the best member" in check.reasons[0]
    else:
        assert not check.elbo.ok


@pytest.mark.parametrize(("problem", "biased"), [(problems.PiecewiseAffine, True), (problems.Logistic, False)])
def test_leapfrog_steps_over_kinks_have_biased_gradients(problem, biased):
    """Automatic and finite differences of a DAIS bound in its step size, over the same draws."""
    x, model = problem().x, problem().model
    dim = problem().dim
    lam = torch.cat([torch.zeros(len(x), dim), torch.full((len(x), dim), -1.0)], -1).double()
    guide = guides.DAIS(Amortized(model, Lookup(x, lam)), 4)
    loss = losses.ELBO("stratified", num_particles=20_000)

    def value():
        torch.manual_seed(0)
        return loss.differentiable_loss(model, guide, x)

    def moved(by):
        with torch.no_grad():
            guide.step[0] += by
            found = float(value())
            guide.step[0] -= by
        return found

    guide.step.data[0] = 1.0
    (slope,) = torch.autograd.grad(value(), guide.step)
    difference = (moved(0.02) - moved(-0.02)) / 0.04
    assert (abs(float(slope[0]) - difference) > 0.05) == biased, (slope, difference)
