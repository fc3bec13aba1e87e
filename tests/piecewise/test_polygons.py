"""Two latents against quadrature of another kind, and draws against moments."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from bench.piecewise_nets import log_joint, random_net
from scipy import integrate
from torch import nn

from pyrovae.models import PiecewiseAffineVAE
from pyrovae.piecewise import TruncatedNormals, gaussians, intervals
from pyrovae.piecewise.cells import augmented


def along_a_line(model, x, t):
    """z_2 held at t: a net of one latent, whose evidence is known in closed form and tested by itself."""
    (weight, bias), *rest = model.layers_and_noise()[0]
    layers = [(weight[:, :1], bias + weight[:, 1] * t), *rest]
    cells = intervals(layers, model.leak)
    q = TruncatedNormals(cells, gaussians(augmented(layers, cells.factors)[-1], model.noise, x), torch.double)
    return float(q.log_evidence) - 0.5 * t * t - 0.5 * math.log(2 * math.pi), float(q.mean), float(q.variance)


def by_lines(model, x):
    """log p(x), E[z_1], E[z_2], E[z_1^2], E[z_1 z_2], E[z_2^2] of one datum: scipy's quadrature over z_2."""
    ticks = np.linspace(-12, 12, 241)
    levels = np.array([along_a_line(model, x, t)[0] for t in ticks])
    peak = levels.max()
    inside = ticks[levels > peak - 40]
    assert ticks[0] < inside[0]
    assert inside[-1] < ticks[-1]
    corners = {float(height) for corner in model.cells().vertices for height in corner[:, 1]}
    low, high = inside[0] - 0.1, inside[-1] + 0.1
    ends = [low, *(height for height in sorted(corners) if low < height < high), high]

    def moments(t):
        level, mean, variance = along_a_line(model, x, t)
        return math.exp(level - peak) * np.array([1, mean, t, variance + mean**2, mean * t, t * t])

    total = sum(
        integrate.quad_vec(moments, a, b, epsabs=1e-11, epsrel=1e-10, quadrature="gk15")[0]
        for a, b in itertools.pairwise(ends)
        if b > a + 1e-12
    )
    return torch.tensor([math.log(total[0]) + peak, *(total[1:] / total[0])], dtype=torch.double)


def found(q):
    first, second = q.first.sum(1), q.second.sum(1)
    return torch.stack([q.log_evidence, *first.T, second[:, 0, 0], second[:, 0, 1], second[:, 1, 1]], -1)


@pytest.mark.parametrize(
    ("sizes", "noise", "x"),
    [
        ([2, 6, 2], 0.3, [[2.0, -1.5]]),
        ([2, 5, 3], 0.05, [[0.5, 0.2, 0.1]]),
        ([2, 3, 3, 1], 0.1, [[0.3]]),
    ],
)
def test_evidence_and_moments_are_those_of_another_quadrature(sizes, noise, x):
    model = random_net(sizes, noise, seed=1)
    x = torch.tensor(x, dtype=torch.double)
    ours = found(model.posterior(x))
    for row in range(len(x)):
        assert torch.allclose(ours[row], by_lines(model, x[row : row + 1]), rtol=0, atol=1e-8)


def test_a_plain_grid_agrees():
    """Trapezoid in both dimensions: coarse at the kinks, but nothing of ours in it."""
    model = random_net([2, 6, 6, 2], noise=0.6, seed=2)
    x = torch.tensor([[0.0, 0.0], [2.0, 1.0]], dtype=torch.double)
    ticks = torch.linspace(-7, 7, 701, dtype=torch.double)
    z = torch.cartesian_prod(ticks, ticks).unsqueeze(1)
    values = log_joint(model, x, z)
    log_evidence = values.logsumexp(0) + 2 * math.log(14 / 700)
    weights = values.softmax(0)
    q = model.posterior(x)
    assert torch.allclose(q.log_evidence, log_evidence, rtol=0, atol=1e-4)
    mean = (weights.unsqueeze(-1) * z).sum(0)
    assert torch.allclose(q.mean, mean, rtol=0, atol=1e-3)
    assert torch.allclose(q.variance, (weights.unsqueeze(-1) * (z - mean) ** 2).sum(0), rtol=1e-3)


def test_the_square_grows_until_nothing_leaks():
    """A datum 300 nats out asks for a larger square; a larger one still changes nothing."""
    model = random_net([2, 6, 2], noise=0.1, seed=3)
    x = torch.tensor([[6.0, -5.0], [0.0, 0.0]], dtype=torch.double)
    q = model.posterior(x)
    assert q.cells.box > 20
    wider = model._over(model.cells(5 * q.cells.box), x)
    assert torch.allclose(q.log_evidence, wider.log_evidence, rtol=0, atol=1e-9)
    assert torch.allclose(q.mean, wider.mean, rtol=0, atol=1e-9)
    alone = model.posterior(x[1:])  # in its own, smaller square
    assert alone.cells.box < q.cells.box
    assert torch.allclose(alone.log_evidence, q.log_evidence[1:], rtol=0, atol=1e-9)


def test_a_datum_beyond_the_largest_square_is_refused():
    from pyrovae.errors import DataError

    model = random_net([2, 4, 2], noise=1e-4, seed=0)
    with pytest.raises(DataError, match="scale the data, or start from a larger noise"):
        model.posterior(torch.full((1, 2), 1e3).double())


def test_densities_are_those_of_the_net_and_draws_have_the_moments():
    model = random_net([2, 6, 6, 2], noise=0.3, seed=2)
    x = torch.cat([model.mean(torch.tensor([[0.3, -0.4]], dtype=torch.double)), torch.full((1, 2), 3.0).double()])
    q = model.posterior(x)
    torch.manual_seed(0)
    z = q.sample((40_000,))
    weights = log_joint(model, x, z) - q.log_prob(z)
    assert torch.allclose(weights, q.log_evidence.expand_as(weights), rtol=0, atol=1e-9)
    centred = z - q.mean
    assert (centred.mean(0).abs() < 4 * q.variance.sqrt() / 200).all()
    outer = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    assert ((outer.mean(0) - q.covariance_matrix).abs() < 4 * outer.std(0) / 200).all()
    met = torch.nn.functional.one_hot(q.cells.locate(z), len(q.cells)).double().mean(0)
    assert ((met - q.weights).abs() < 4.5 * (q.weights * (1 - q.weights) / 40_000).sqrt() + 1e-6).all()
    wide = q.expand((3, 2))
    assert wide.log_prob(wide.sample((5,))).shape == (5, 3, 2)


@pytest.mark.parametrize("noise", [1e-1, 1e-4, 1e-8])
def test_a_ridge_keeps_its_digits_however_small_the_noise(noise):
    """One output of two latents: Sigma^-1 is nearly singular. Closed forms of log p(x) and of log q at the mean."""
    slope = torch.tensor([1.0, 1.25], dtype=torch.double)
    first, last = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        last.weight.copy_(slope.unsqueeze(0))
        first.bias.zero_()
        last.bias.zero_()
    model, x = PiecewiseAffineVAE([first, last], leak=1.0, noise=noise), torch.tensor([[0.75]], dtype=torch.double)
    q, s = model.posterior(x), float(model.noise.detach())
    variance = s * s + float(slope @ slope)
    truth = -0.5 * (0.75**2 / variance + math.log(2 * math.pi * variance))
    assert float(q.log_evidence) == pytest.approx(truth, abs=1e-12)
    peak = -math.log(2 * math.pi) + 0.5 * math.log(1 + float(slope @ slope) / s**2)
    assert float(q.log_prob(q.mean)) == pytest.approx(peak, abs=1e-12)
