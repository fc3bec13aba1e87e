"""EM: monotone where it is exact, the published curve, and M-steps that are stationary points."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bench.piecewise_nets import circle, random_net

from pyrovae.piecewise import fit_em
from pyrovae.piecewise.em import _expect, _residual, _solve

ROUNDING = 1e-10  # nats, of an increment


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_the_circle_s_curve_is_the_published_one_or_better(seed):
    """Small output layer, first layer fixed: from about -2.34 to -1.65 or, where the cells lie better, higher."""
    model, x = random_net([1, 8, 2], noise=0.55, seed=seed, output=0.1), circle()
    first = model.layers[0].weight.clone()
    result = fit_em(model, x, 60)
    assert float(result.log_likelihood[0]) == pytest.approx(-2.34, abs=0.06)
    assert -1.7 < float(result.log_likelihood[-1]) < -0.8
    assert float(result.log_likelihood.diff().min()) > 0
    assert float(model.noise) < 0.25
    assert torch.equal(model.layers[0].weight, first)
    assert float(model.log_evidence(x).mean()) == pytest.approx(float(result.log_likelihood[-1]), abs=1e-12)
    assert result.iterations == 60
    assert not result.converged


@pytest.mark.parametrize("seed", [1, 2, 6, 8])
def test_where_it_hardly_leaves_the_saddle_it_still_never_falls(seed):
    """These first layers leave the decoder near a constant for 60 iterations: increments down to 1e-6, all positive."""
    result = fit_em(random_net([1, 8, 2], noise=0.55, seed=seed, output=0.1), circle(), 60)
    assert float(result.log_likelihood.diff().min()) > 0
    assert float(result.log_likelihood[-1]) == pytest.approx(-2.16, abs=0.01)


@pytest.mark.parametrize(("sizes", "iterations"), [([1, 8, 8, 2], 30), ([2, 5, 2], 6)])
def test_monotone_for_deep_nets_and_two_latents(sizes, iterations):
    model = random_net(sizes, noise=0.55, seed=1)
    result = fit_em(model, circle(100), iterations)
    assert float(result.log_likelihood.diff().min()) > -ROUNDING
    assert float(result.log_likelihood[-1] - result.log_likelihood[0]) > 0.3


def expected_loss(posterior, weights, x, leak):
    """E|x - g(z)|^2 summed over data, layer by layer with signs held fixed: written out, cell by cell."""
    total = torch.zeros((), dtype=torch.double)
    for cell in range(posterior.weights.shape[1]):
        slope, offset = weights[0]
        for (weight, bias), q in zip(weights[1:], posterior.cells.factors, strict=True):
            slope, offset = weight @ (q[cell][:, None] * slope), weight @ (q[cell] * offset) + bias
        rest = x - offset
        m0, m1, m2 = posterior.weights[:, cell], posterior.first[:, cell], posterior.second[:, cell]
        total = total + (m0 * rest.square().sum(-1)).sum() - 2 * ((rest @ slope) * m1).sum()
        total = total + (slope.T @ slope * m2).sum()
    return total


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_layer_s_step_solves_its_system(depth):
    """The full step is where the expected squared error, signs fixed, has no slope in that layer; and it is lower."""
    model, x = random_net([1, 5, 4, 2], noise=0.4, seed=2), circle(60)
    posterior = model.posterior(x)
    weights, _ = model.layers_and_noise()
    before = expected_loss(posterior, weights, x, model.leak)
    weights[depth] = _solve(weights, _expect(posterior, x), depth, 0.0, 1.0)
    weights[depth] = tuple(part.clone().requires_grad_() for part in weights[depth])
    after = expected_loss(posterior, weights, x, model.leak)
    after.backward()
    after = after.detach()
    assert after < before - 1
    for part in weights[depth]:
        assert part.grad.abs().max() < 1e-6 * float(before)
    variance = _residual([tuple(part.detach() for part in layer) for layer in weights], _expect(posterior, x))
    assert float(variance) == pytest.approx(float(after) / 120, rel=1e-9)


def test_the_published_generalised_em_ends_higher_than_output_alone():
    """Damped sweeps of all layers; the curve is exact whether or not it falls on the way."""
    x = circle(200)
    start = random_net([1, 8, 2], noise=0.55, seed=1)
    alone, whole, again = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    options = {"layers": "all", "sweeps": 20, "damping": 0.05, "weight_variance": 100.0, "noise_from": 2}
    output, result = fit_em(alone, x, 40), fit_em(whole, x, 40, **options)
    assert result.log_likelihood[-1] > output.log_likelihood[-1] + 0.05
    assert float(whole.log_evidence(x).mean()) == pytest.approx(float(result.log_likelihood[-1]), abs=1e-12)
    assert not torch.equal(whole.layers[0].weight, start.layers[0].weight)
    assert torch.equal(fit_em(again, x, 40, **options).log_likelihood, result.log_likelihood)


def test_early_stop_and_the_words():
    model, x = random_net([1, 8, 2], noise=0.55, output=0.1), circle(100)
    result = fit_em(model, x, 500, tolerance=1e-3)
    assert result.converged
    assert 2 < result.iterations < 500
    assert abs(float(result.log_likelihood[-1] - result.log_likelihood[-2])) < 1e-3
    assert (result.log_likelihood.diff()[:-1].abs() >= 1e-3).all()
    assert "converged" in repr(result)
    assert f"in {result.iterations} iterations" in repr(result)


def test_linear_decoders_reach_the_maximum_of_ppca():
    """leak 1: the maximum is known in closed form (Tipping & Bishop 1999), noise = mean of the left-out eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.double) * torch.tensor([2.0, 0.6, 0.4]).double()
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    noise = values[:2].mean()
    best = -0.5 * (3 * math.log(2 * math.pi) + torch.log(values[2] * noise**2) + 3)
    model = random_net([1, 4, 3], leak=1.0)
    result = fit_em(model, x, 300)
    assert float(result.log_likelihood[-1]) == pytest.approx(float(best), abs=1e-6)
    assert float(model.noise**2) == pytest.approx(float(noise), rel=1e-4)


def test_float32_models_keep_their_dtype():
    model = random_net([1, 8, 2], noise=0.55, output=0.1).float()
    result = fit_em(model, circle(50).float(), 5)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert result.log_likelihood.dtype == torch.float64
    assert float(result.log_likelihood.diff().min()) > -1e-5  # parameters are rounded


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": 0}, "iterations >= 1"),
        ({"damping": 0.0}, "0 < damping"),
        ({"layers": "first"}, "'output' or 'all'"),
        ({"weight_variance": -1.0}, "must be positive"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fit_em(random_net([1, 4, 2]), circle(5), **options)


def test_data_without_noise_are_refused_at_the_end():
    """One datum: the decoder goes through it, and the likelihood has no maximum."""
    with pytest.raises(ValueError, match="noise has fallen to zero|fewer units"):
        fit_em(random_net([1, 8, 2]), circle(1), 2000)


@pytest.mark.parametrize("layers", ["output", "all"])
def test_where_the_data_lie_changes_nothing(layers):
    """Far from 0 the squares of which residuals are made agree in all their digits."""
    curves = []
    for shift in (0.0, 1e7):
        model = random_net([1, 8, 2], noise=0.55, seed=0, output=0.1)
        with torch.no_grad():
            model.layers[-1].bias.add_(shift)
        curves.append(fit_em(model, circle() + shift, 15, layers=layers, seed=1).log_likelihood)
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=1e-5)
    if layers == "output":
        assert float(curves[1].diff().min()) > -1e-6
