"""The exact answers themselves: written-out posteriors against the engine, and quadrature against other rules."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate

from pyrovae import reference
from pyrovae.certification import problems, quadrature
from pyrovae.certification.problems import PROBLEMS
from pyrovae.curvature import Curvature
from pyrovae.latents import LatentSpace


@pytest.fixture(params=list(PROBLEMS))
def problem(request):
    return PROBLEMS[request.param]()


def test_written_out_densities_are_the_models(problem):
    """Log-joint, Jacobian included, and curvature: the hand-written formulas against the Pyro program."""
    space = LatentSpace(problem.model, problem.x)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(20, *problem.start.shape, generator=generator, dtype=torch.double)
    ours = problem.log_joint(u)
    assert torch.allclose(space.log_joint(u, problem.x), ours, rtol=1e-12, atol=1e-10)
    expansion = Curvature(space.bind(problem.x))
    for point in u[:5]:
        found = expansion.at(point)
        assert not found.floored.any()
        assert torch.allclose(found.precision, problem.curvature(point), rtol=1e-10, atol=1e-10)


def test_priors_are_normalised(problem):
    if problem.dim > 2:
        pytest.skip("a standard normal in three dimensions, in closed form")
    prior = quadrature.grid_moments(problem.log_prior, problem.bound, len(problem.x), problem.dim)
    assert prior.log_evidence.abs().max() < 1e-9


def test_truth_is_that_of_the_reference(problem):
    """Independent rules: a fixed grid (or one Newton step) here, a grid found per datum (or a closed form) there."""
    truth, other = problem.truth, reference.exact(problem.model, problem.x, num_samples=10)
    assert torch.allclose(truth.mean, other.mean, atol=1e-8)
    assert torch.allclose(truth.sd, other.sd, rtol=1e-8)
    assert torch.allclose(truth.log_evidence, other.log_evidence, atol=1e-8)


@pytest.mark.parametrize("name", ["banana", "gamma-scale"])
def test_truth_is_that_of_adaptive_cubature(name):
    """Third rule, with the covariance: scipy's adaptive nested quadrature of the first datum."""
    problem = PROBLEMS[name]()
    truth = problem.truth
    size = problem.start.shape

    def density(b: float, a: float) -> float:
        u = torch.tensor([a, b], dtype=torch.double).expand(size)
        return math.exp(float(problem.log_joint(u)[0] - truth.log_evidence[0]))

    spans = [(float(m - 9 * s), float(m + 9 * s)) for m, s in zip(truth.mean[0], truth.sd[0], strict=True)]
    (low_a, high_a), (low_b, high_b) = spans

    def expectation(f):
        value, _ = integrate.dblquad(
            lambda b, a: f(a, b) * density(b, a), low_a, high_a, low_b, high_b, epsabs=1e-5, epsrel=1e-5
        )
        return value

    m, c = truth.mean[0].tolist(), truth.covariance[0].tolist()
    assert expectation(lambda a, b: 1.0) == pytest.approx(1.0, abs=2e-4)
    assert expectation(lambda a, b: (a - m[0]) * (b - m[1])) == pytest.approx(c[0][1], abs=2e-4)


def test_gaussian_posteriors_are_told_as_such(problem):
    """`gaussian` is true where the log-joint is quadratic, and only there."""
    u = problem.truth.mean + problem.truth.sd * torch.tensor([[[-1.3]], [[0.4]], [[2.1]]]).double()
    hessians = -quadrature.hessian(problem.log_joint, u)
    constant = torch.allclose(hessians, hessians[:1].expand_as(hessians), rtol=1e-10)
    assert constant == problem.gaussian
    if constant:
        assert torch.allclose(hessians, problem.curvature(u), rtol=1e-10)


def test_the_correlation_is_what_the_docstring_says():
    truth = problems.Correlated().truth
    assert torch.allclose(truth.covariance[:, 0, 1] / truth.sd.prod(-1), torch.full((3,), -0.9).double())


def test_gauss_hermite_is_exact_for_polynomials():
    """E[x^2 y^4 z^6] = 1 * 3 * 15 under the standard normal, with 4 nodes a dimension and not with 3."""
    for points, exact in ((4, True), (3, False)):
        nodes, weights = quadrature.gauss_hermite(points, 3)
        value = float((weights * nodes[:, 0] ** 2 * nodes[:, 1] ** 4 * nodes[:, 2] ** 6).sum())
        assert (abs(value - 45) < 1e-9) == exact


def test_a_grid_that_misses_mass_or_detail_is_refused():
    def normal(sd):
        return lambda u: -0.5 * (u / sd).square().sum(-1)

    with pytest.raises(ValueError, match=r"falls by only 4\.5 nats"):
        quadrature.grid_moments(normal(1.0), 3.0, 1, 1)
    with pytest.raises(ValueError, match="does not resolve"):
        quadrature.grid_moments(normal(0.01), 9.0, 1, 2)
    fine = quadrature.grid_moments(normal(1.0), 9.0, 1, 2)
    assert torch.allclose(fine.covariance, torch.eye(2).double(), atol=1e-12)
    assert float(fine.log_evidence) == pytest.approx(math.log(2 * math.pi))
