"""A normal differentiated through products: against the normal whose matrix is differentiated."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyrovae.precision_normal import PrecisionNormal, covariance_factor

ROWS, DIM = 3, 4


def _pair(theta, num_probes=2, *, lift=0.0):
    """N(mu(theta), Lambda(theta)^{-1}) in both forms; with `lift` the numbers have more than the products know of."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, ROWS, DIM, DIM, dtype=torch.double, generator=generator)
    loc = torch.randn(ROWS, DIM, dtype=torch.double, generator=generator) * theta[2]
    matrix = torch.eye(DIM, dtype=torch.double) + torch.einsum("k,kbij,kbhj->bih", theta[:2].exp(), roots, roots)
    whole = matrix + lift * torch.eye(DIM, dtype=torch.double)
    lazy = PrecisionNormal(loc, whole, lambda p: torch.einsum("bij,tbj->tbi", matrix, p), num_probes)
    return lazy, dist.MultivariateNormal(loc, scale_tril=covariance_factor(whole))


@pytest.fixture
def theta():
    return torch.tensor([0.3, -0.5, 0.7], dtype=torch.double, requires_grad=True)


def _weight():
    return torch.randn(ROWS, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("lift", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_values_are_those_of_the_normal(theta, lift, shape):
    lazy, plain = _pair(theta, lift=lift)
    torch.manual_seed(1)
    u = lazy.rsample(shape)
    torch.manual_seed(1)
    torch.testing.assert_close(u, plain.rsample(shape), rtol=1e-12, atol=1e-12)
    expected = plain.log_prob(u)
    torch.testing.assert_close(lazy.log_prob(u), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lazy.log_prob(u.clone()), expected, rtol=1e-10, atol=1e-10)  # not its own draw
    with torch.no_grad():
        torch.testing.assert_close(lazy.log_prob(u), expected, rtol=1e-10, atol=1e-10)


def test_moments_move_as_they_should(theta):
    """d E[f(u)] / d theta by draws, for f linear and quadratic, against the closed form."""
    lazy, plain = _pair(theta)
    a = _weight()
    mean = (a * plain.loc).sum()
    second = torch.einsum("bi,bij,bj->", a, plain.covariance_matrix, a) + ((a * plain.loc).sum(-1) ** 2).sum()
    closed = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in (mean, second)]
    torch.manual_seed(0)
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(400):
        u = lazy.rsample((20,))
        inner = (a * u).sum(-1)
        for kept, value in zip(found, (inner.sum(-1).mean(), inner.square().sum(-1).mean()), strict=True):
            kept.append(torch.autograd.grad(value, theta, retain_graph=True)[0])
    for kept, expected in zip(found, closed, strict=True):
        draws = torch.stack(kept)
        se = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - expected).abs() < 4 * se + 1e-12).all()
    assert torch.stack(found[1]).std(0)[:2].max() > 0


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_density_gradient_is_unbiased(theta, num_probes, own):
    """At a fixed draw (its own or another), with respect to the parameters and to the point."""
    lazy, plain = _pair(theta, num_probes)
    point = torch.randn(ROWS, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(3)).requires_grad_()
    inputs = (theta,) if own else (theta, point)

    def gradient(q, u):
        return torch.autograd.grad(q.log_prob(u).sum(), inputs, retain_graph=True)

    # The estimate of the trace is made with a draw, where there is one.
    exact = gradient(plain, lazy.at(point.detach()) if own else point)
    draws = [gradient(lazy, lazy.at(point.detach()) if own else point) for _ in range(600)]
    for number, expected in enumerate(exact):
        kept = torch.stack([draw[number] for draw in draws])
        se = kept.std(0) / len(kept) ** 0.5
        assert ((kept.mean(0) - expected).abs() < 4 * se + 1e-10).all()
    noise = torch.stack([draw[0] for draw in draws]).std(0)[:2]
    assert (noise > 0).all()  # the estimate is one


def test_more_probes_less_noise(theta):
    spread = []
    for num_probes in (1, 4):
        lazy, plain = _pair(theta, num_probes)
        u = plain.loc.detach() + 0.1
        torch.manual_seed(0)
        draws = [torch.autograd.grad(lazy.log_prob(u).sum(), theta, retain_graph=True)[0] for _ in range(400)]
        spread.append(torch.stack(draws).var(0)[:2])
    ratio = spread[0] / spread[1]
    assert ((ratio > 2.8) & (ratio < 5.6)).all()  # 4 expected; 400 draws give each variance to 7 %


def test_in_an_outer_plate_and_without_gradient(theta):
    lazy, plain = _pair(theta)
    wide = lazy.expand((7, ROWS))
    torch.manual_seed(0)
    u = wide.rsample()
    assert u.shape == (7, ROWS, DIM)
    torch.testing.assert_close(wide.log_prob(u), plain.log_prob(u), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(wide.log_prob(u).sum(), theta)
    assert gradient.isfinite().all()
    with torch.no_grad():
        assert not lazy.rsample().requires_grad
