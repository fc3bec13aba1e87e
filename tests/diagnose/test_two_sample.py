"""Distances and tests of two sets of draws: at their floor for equal laws, past it for errors that matter."""

from __future__ import annotations

import pytest
import torch

from pyrovae.diagnose import c2st, mmd2, w1


def draws(number, seed, shift=0.0, scale=1.0, dim=3, rows=2, dtype=torch.float64):
    """Correlated normals of other units, `[S, B, D]`, with a mean shifted by `shift` sds and sds scaled."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64) + torch.eye(dim)
    units = 10.0 ** torch.arange(dim, dtype=torch.float64)
    sd = (mixing @ mixing.T).diagonal().sqrt() * units
    x = torch.randn(number, rows, dim, generator=generator, dtype=torch.float64) @ mixing.T * units
    return (scale * x + shift * sd).to(dtype)


def test_w1_of_normals():
    """A shift moves it by as much; scales by |s - 1| E|z|; unequal numbers of draws."""
    exact = draws(20_000, 0)
    assert (w1(draws(15_000, 1), exact) < 0.03).all()
    torch.testing.assert_close(w1(exact + 0.3 * exact.std(0), exact), torch.full((2, 3), 0.3, dtype=torch.double))
    expected = torch.full((2, 3), 0.3 * (2 / torch.pi) ** 0.5, dtype=torch.double)
    torch.testing.assert_close(w1(draws(20_000, 2, scale=0.7), exact), expected, rtol=0.1, atol=0)
    assert w1(draws(40, 3, dim=1, rows=1), draws(30, 4, dim=1, rows=1)).shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_laws_cannot_be_told_apart(dtype):
    """p-values are spread over [0, 1] (40 data), the statistic is centred at zero, accuracies at one half."""
    a, b = draws(500, 5, rows=40, dtype=dtype), draws(500, 6, rows=40, dtype=dtype)
    value, p = mmd2(a, b)
    assert value.dtype == torch.float64
    assert abs(float(value.mean())) < 4 * float(value.std()) / 40**0.5
    assert 0.3 < float(p.mean()) < 0.7
    assert (p < 0.05).sum() <= 7  # a binomial(40, 0.05) is larger once in 500
    accuracy = c2st(a[:, :10], b[:, :10])
    assert ((accuracy - 0.5).abs() < 4 * 0.5 / 1000**0.5).all()


@pytest.mark.parametrize(("shift", "scale"), [(0.3, 1.0), (0.0, 0.7)])
def test_errors_that_matter_are_seen(shift, scale):
    a, b = draws(1000, 7, shift, scale), draws(1000, 8)
    value, p = mmd2(a, b)
    assert (value > 0).all()
    assert (p < 0.01).all()
    assert (c2st(a, b) > 0.5 + 4 * 0.5 / 2000**0.5).all()


def test_shapes_need_a_net():
    """A Gaussian against two modes of the same moments: the quadratic classifier guesses, the net does not."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1000, 1, 1), generator=generator).double() * 2 - 1
    modes = 0.95 * signs + (1 - 0.95**2) ** 0.5 * torch.randn(1000, 1, 1, generator=generator, dtype=torch.double)
    normal = torch.randn(1000, 1, 1, generator=generator, dtype=torch.double)
    assert float(c2st(normal, modes)) < 0.56
    x = torch.linspace(-6, 6, 10_001, dtype=torch.double)
    one, width = torch.distributions.Normal(0.0, 1.0).log_prob(x).exp(), (1 - 0.95**2) ** 0.5
    two = sum(torch.distributions.Normal(m, width).log_prob(x).exp() / 2 for m in (-0.95, 0.95))
    best = 0.5 + 0.25 * float(torch.trapezoid((one - two).abs(), x))  # of any classifier
    found = float(c2st(normal, modes, classifier="mlp"))
    assert best - 0.06 < found < best + 4 * 0.5 / 2000**0.5
    assert float(mmd2(normal, modes)[1]) < 0.01


def test_the_statistic_is_its_formula():
    a, b = draws(7, 1, dim=1, rows=1).flatten(), draws(7, 2, dim=1, rows=1).flatten()
    b = (b - b.mean()) / b.std()
    value, _ = mmd2(a.view(-1, 1, 1), b.view(-1, 1, 1))
    pooled = torch.cat([a, b])
    apart = (pooled[:, None] - pooled).square()
    middle = torch.stack([apart[i, j] for i in range(14) for j in range(i + 1, 14)]).median()
    kernel = sum((-apart / (2 * w * w * middle)).exp() for w in (0.5, 1.0, 2.0))
    within = sum(kernel[i, j] for block in (range(7), range(7, 14)) for i in block for j in block if i != j)
    expected = within / 42 - 2 * kernel[:7, 7:].sum() / 49
    torch.testing.assert_close(value[0], expected, rtol=1e-6, atol=1e-9)


def test_bad_input_is_refused():
    a, b = draws(20, 0), draws(20, 1)
    with pytest.raises(ValueError, match="num_permutations"):
        mmd2(a, b, num_permutations=0)
    with pytest.raises(ValueError, match="'quadratic' or 'mlp'"):
        c2st(a, b, classifier="tree")
    with pytest.raises(ValueError, match="at least 5 draws"):
        c2st(a[:3], b)
    for function in (mmd2, c2st, w1):
        with pytest.raises(ValueError, match="equal B and D"):
            function(a, b[:, :1])
        with pytest.raises(ValueError, match="constant"):
            function(a, torch.zeros_like(b))
