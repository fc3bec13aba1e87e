"""One latent: truncated normals and the posterior over intervals against adaptive quadrature."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from bench.piecewise_nets import log_joint, random_net
from scipy import integrate

from pyrovae.piecewise.truncated import quantile, truncated

FAR = torch.tensor([-1.6, 1.2], dtype=torch.double)  # 15 nats out for the net of seed 0, posterior over five cells


def double(*values):
    return [torch.tensor(value, dtype=torch.double) for value in values]


def by_quadrature(low, high):
    """log P, mean, variance: integrals of exp(-(u^2 - c^2) / 2) about the point c of the interval nearest to zero."""
    c = min(max(0.0, low), high)
    ends = (max(low, c - 45 / (1 + abs(c))) if c <= 0 else low, min(high, c + 45 / (1 + abs(c))) if c >= 0 else high)

    def moment(k):
        value, _ = integrate.quad(
            lambda u: (u - c) ** k * math.exp(-0.5 * (u - c) * (u + c)), *ends, epsabs=0 if k != 1 else 1e-16,
            epsrel=1e-13, limit=200, points=[c] if ends[0] < c < ends[1] else None,
        )  # fmt: skip
        return value

    mass, first, second = (moment(k) for k in range(3))
    shift = first / mass
    return math.log(mass) - 0.5 * c * c - 0.5 * math.log(2 * math.pi), c + shift, second / mass - shift**2


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1.0, 2.0), (3.0, 4.0), (5.0, math.inf), (-math.inf, -12.0), (20.0, 21.0), (-0.5, 30.0), (0.2, 0.25)],
)
def test_truncated_normals(low, high):
    log_p, mean, variance = (float(value) for value in truncated(*double(low, high)))
    expected = by_quadrature(low, high)
    assert log_p == pytest.approx(expected[0], abs=1e-11)
    assert abs(mean - expected[1]) < 1e-9 * math.sqrt(expected[2])
    assert variance == pytest.approx(expected[2], rel=1e-8)
    mirrored = [float(value) for value in truncated(*double(-high, -low))]
    assert mirrored == [log_p, -mean, variance]


def test_forty_deviations_out():
    """The asymptote of the hazard: E[u] = a + 1/a - 2/a^3 + 10/a^5, Var[u] = 1/a^2 - 6/a^4 + 50/a^6 - 518/a^8."""
    a = 40.0
    _, mean, variance = truncated(*double(a, math.inf))
    assert float(mean) == pytest.approx(a + 1 / a - 2 / a**3 + 10 / a**5, abs=1e-9)
    assert float(variance) == pytest.approx(1 / a**2 - 6 / a**4 + 50 / a**6 - 518 / a**8, rel=1e-7)


def test_empty_and_whole_intervals():
    log_p, mean, variance = truncated(*double([1.0, -math.inf, -math.inf], [1.0, math.inf, 0.0]))
    assert log_p.tolist() == pytest.approx([-math.inf, 0.0, -math.log(2)])
    assert mean.tolist() == pytest.approx([1.0, 0.0, -math.sqrt(2 / math.pi)])
    assert variance.tolist() == pytest.approx([0.0, 1.0, 1 - 2 / math.pi])


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 2.0), (3.0, 4.0), (-21.0, -20.0), (40.0, math.inf), (-math.inf, math.inf)]
)
def test_quantiles_invert_the_distribution_function(low, high):
    uniform = torch.linspace(0.001, 0.999, 21, dtype=torch.double)
    a, b = (torch.full_like(uniform, end) for end in (low, high))
    u = quantile(uniform, a, b)
    assert (u.diff() > 0).all()
    assert torch.allclose((truncated(a, u)[0] - truncated(a, b)[0]).exp(), uniform, atol=1e-11)


@pytest.mark.parametrize(("sizes", "noise"), [([1, 8, 2], 0.3), ([1, 8, 8, 2], 0.1), ([1, 16, 1], 0.3)])
def test_evidence_and_moments_are_those_of_adaptive_quadrature(sizes, noise):
    """1e-10 in log p(x), 1e-8 in E[z] and E[z^2]: near the data manifold, off it, far out."""
    model = random_net(sizes, noise)
    generator = torch.Generator().manual_seed(1)
    near = model.mean(torch.randn(2, 1, generator=generator, dtype=torch.double))
    x = torch.cat([near, 3 * torch.randn(2, sizes[-1], generator=generator, dtype=torch.double)])
    if sizes == [1, 8, 2]:
        x = torch.cat([x, FAR[None]])
    q = model.posterior(x)
    edges = [-15.0, *(edge for edge in model.cells().edges.tolist() if abs(edge) < 15), 15.0]
    peak = log_joint(model, x, torch.linspace(-15, 15, 30_001, dtype=torch.double)[:, None, None]).amax(0)

    def moments(z):
        density = (log_joint(model, x, torch.full((len(x), 1), z, dtype=torch.double)) - peak).exp()
        return torch.stack([density, z * density, z * z * density]).numpy()

    mass, first, second = sum(
        integrate.quad_vec(moments, a, b, epsabs=1e-14, epsrel=1e-13)[0] for a, b in itertools.pairwise(edges)
    )
    assert np.allclose(q.log_evidence, np.log(mass) + peak.numpy(), rtol=0, atol=1e-10)
    assert np.allclose(q.mean[:, 0], first / mass, rtol=0, atol=1e-8)
    assert np.allclose(q.second.sum(1)[:, 0, 0], second / mass, rtol=0, atol=1e-8)


def test_a_datum_far_out_is_spread_over_several_cells():
    q = random_net([1, 8, 2]).posterior(FAR[None])
    assert -15.5 < float(q.log_evidence) < -14.5
    assert int((q.weights > 0.01).sum()) == 5
    assert float(q.weights.sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_datum_a_thousand_deviations_out_is_still_finite_and_normalised():
    """Where probabilities underflow: the density still integrates to one on a grid around its mean."""
    model = random_net([1, 8, 2], noise=0.01)
    q = model.posterior(torch.tensor([[-30.0, 20.0]], dtype=torch.double))
    assert torch.isfinite(q.log_evidence).all()
    assert float(q.log_evidence) < -1e5
    sd = float(q.variance.sqrt())
    z = torch.linspace(float(q.mean) - 40 * sd, float(q.mean) + 40 * sd, 100_001, dtype=torch.double)
    density = q.log_prob(z[:, None, None]).exp()[:, 0]
    assert float(torch.trapezoid(density, z)) == pytest.approx(1.0, abs=1e-3)


def test_draws_have_the_moments_and_the_weights():
    model = random_net([1, 8, 2])
    x = torch.cat([FAR[None], model.mean(torch.tensor([[0.1], [-0.8]], dtype=torch.double))])
    q = model.posterior(x)
    torch.manual_seed(0)
    z = q.sample((100_000,))
    centred = z - q.mean
    assert (centred.mean(0).abs() < 4 * q.variance.sqrt() / 100_000**0.5).all()
    square = centred.square()
    assert ((square.mean(0) - q.variance).abs() < 4 * square.std(0) / 100_000**0.5).all()
    met = torch.nn.functional.one_hot(q.cells.locate(z), len(q.cells)).double().mean(0)
    assert ((met - q.weights).abs() < 4 * (q.weights * (1 - q.weights) / 100_000).sqrt() + 1e-9).all()


def test_expanded_for_particles():
    q = random_net([1, 8, 2]).posterior(torch.zeros(3, 2).double()).expand((5, 3))
    assert q.batch_shape == (5, 3)
    z = q.sample((2,))
    assert z.shape == (2, 5, 3, 1)
    assert q.log_prob(z).shape == (2, 5, 3)
    assert q.mean.shape == q.variance.shape == (5, 3, 1)
    assert q.log_prob(z[0, 0]).shape == (5, 3)


@pytest.mark.parametrize("far", [99.9, 100.1, 1e3, 1e5])
@pytest.mark.parametrize("width", [1e-4, 1e-2, math.inf])
def test_moments_far_out(far, width):
    """Against quadrature of y = far * t, of which the density is exp(-y - y^2 / (2 far^2)) on [0, far * width]."""

    def moment(k):
        end = min(far * width, 60.0)
        return integrate.quad(lambda y: y**k * math.exp(-y - 0.5 * (y / far) ** 2), 0, end, epsabs=0, epsrel=1e-13)[0]

    low = torch.tensor([far], dtype=torch.double)
    for sign in (1, -1):
        ends = (low, low + width) if sign > 0 else (-low - width, -low)
        _, mean, variance = truncated(*ends)
        first, second = moment(1) / moment(0), moment(2) / moment(0)
        assert float(sign * mean) - far == pytest.approx(first / far, rel=1e-9, abs=4e-16 * far)
        assert float(variance) == pytest.approx((second - first**2) / far**2, rel=1e-6)


def test_a_narrow_interval_is_nearly_uniform():
    low = torch.tensor([-5.0, -4e-8, 0.0, 3.0], dtype=torch.double)
    high = low + 1e-7
    log_p, mean, variance = truncated(low, high)
    width, middle = high - low, 0.5 * (low + high)
    torch.testing.assert_close(variance, width**2 / 12, rtol=1e-6, atol=0)
    torch.testing.assert_close((mean - low) / width, torch.full_like(low, 0.5), rtol=1e-6, atol=0)
    density = -0.5 * middle**2 - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_p, width.log() + density, rtol=0, atol=1e-13)
