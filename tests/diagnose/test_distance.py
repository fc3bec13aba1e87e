"""Distances between sets of draws against their closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyrovae.diagnose.distance import correlation_error, sd_ratio, sliced_w2, standardized_mean_error

MEASURES = [standardized_mean_error, sd_ratio, correlation_error, sliced_w2]
Measure = Callable[[Tensor, Tensor], Tensor]


def _pair(s: int = 300, t: int = 500, batch: int = 3, dim: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    mix = torch.randn(batch, dim, dim, dtype=torch.float64)
    a = torch.randn(s, batch, dim, dtype=torch.float64)
    b = torch.einsum("bde,sbe->sbd", mix, torch.randn(t, batch, dim, dtype=torch.float64)) + 0.5
    return a, b


@pytest.mark.parametrize(("s", "t"), [(20_000, 20_000), (20_000, 12_000)])
@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 0.7), (1.0, 2.0)])
def test_two_normals_in_one_dimension(shift: float, scale: float, s: int, t: int) -> None:
    torch.manual_seed(6)
    sd_b = 3.0
    a = sd_b * (shift + scale * torch.randn(s, 1, 1, dtype=torch.float64))
    b = sd_b * torch.randn(t, 1, 1, dtype=torch.float64)
    spread = scale - 1
    exact = math.hypot(shift, spread)
    # In units of the reference's sd: the mean difference has variance v, the sd difference half of it, ...
    v = scale**2 / s + 1 / t
    # ... W2 the one got by the chain rule, and dividing by the reference's own sd adds W^2 / (2 t).
    variance = (shift**2 * v + spread**2 * v / 2) / exact**2 + exact**2 / (2 * t)
    # Sampling noise that no shift or scale explains adds about v loglog(n) / 2 to W2 squared.
    bias = v * math.log(math.log(t)) / 2 / exact
    value = float(sliced_w2(a, b))
    assert abs(value - exact) < 4 * math.sqrt(variance) + bias
    # sd_a / sd_b: relative variance 1/2s + 1/2t; the mean error has variance v, and that of its unit.
    assert float(sd_ratio(a, b)) == pytest.approx(scale, rel=4 * math.sqrt(0.5 / s + 0.5 / t))
    error = math.sqrt(v + shift**2 / (2 * t))
    assert abs(float(standardized_mean_error(a, b)) - shift) < 4 * error


def test_exact_shift_in_many_dimensions() -> None:
    """b shifted by delta: W2 along theta is theta . delta, whose square averages |delta|^2 / D over the sphere."""
    dim, directions = 5, 2000
    _, b = _pair(dim=dim)
    sd = b.std(0)
    delta = torch.tensor([0.3, 0.0, -1.0, 0.2, 0.4], dtype=torch.float64)
    a = b + delta * sd
    torch.testing.assert_close(standardized_mean_error(a, b), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    squared = float(delta.square().sum())
    # cos^2 with a fixed vector is Beta(1/2, (D-1)/2): mean 1/D, variance 2 (D-1) / (D^2 (D+2)).
    standard_error = squared * math.sqrt(2 * (dim - 1) / (dim**2 * (dim + 2)) / directions)
    value = sliced_w2(a, b, num_directions=directions).square()
    assert (value - squared / dim).abs().max() < 4 * standard_error
    torch.testing.assert_close(value, value[:1].expand(3), rtol=1e-10, atol=0)  # the same directions for every datum


def test_exact_scale_in_one_dimension() -> None:
    """Draws stretched by c about their mean: W2 = |c - 1| sd with the sd that divides by n."""
    _, b = _pair(dim=1)
    a = b.mean(0) + 0.4 * (b - b.mean(0))
    n = b.shape[0]
    expected = torch.full((3,), 0.6 * math.sqrt((n - 1) / n), dtype=torch.float64)
    torch.testing.assert_close(sliced_w2(a, b), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sd_ratio(a, b), torch.full((3, 1), 0.4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_unequal_numbers_of_draws_use_the_quantile_functions() -> None:
    """By hand: {0, 6} against {0, 3, 6}: the quantile functions differ by 3 on (1/3, 2/3), 0 elsewhere."""
    a = torch.tensor([6.0, 0.0])[:, None, None]
    b = torch.tensor([3.0, 0.0, 6.0])[:, None, None]
    assert float(sliced_w2(a, b)) == pytest.approx(math.sqrt(9 / 3) / 3, abs=1e-12)  # sd of b is 3
    # Repeating every draw changes no law, so nothing but the unbiased sd of b may change.
    a, b = _pair(40, 60)
    assert torch.allclose(sliced_w2(a.repeat(3, 1, 1), b), sliced_w2(a, b), rtol=1e-12, atol=0)


def test_images_are_compared_in_their_own_unit() -> None:
    """Shifted by delta, W2 squared averages |delta|^2 / D over directions; constant pixels, as in corners, are fine."""
    _, b = _pair(dim=4)
    b[..., 0] = 0.25
    delta = torch.tensor([0.5, 0.0, 2.0, -1.0], dtype=torch.float64)
    value = sliced_w2(b + delta, b, num_directions=4000, standardize=False).square()
    standard_error = float(delta.square().sum()) * math.sqrt(2 * 3 / (16 * 6) / 4000)
    assert (value - delta.square().sum() / 4).abs().max() < 4 * standard_error
    torch.testing.assert_close(sliced_w2(3 * b + delta, 3 * b, standardize=False),
                               sliced_w2(b + delta / 3, b, standardize=False) * 3)  # fmt: skip
    with pytest.raises(ValueError, match="constant"):
        sliced_w2(b + delta, b)


def test_correlation_error_of_known_correlations() -> None:
    torch.manual_seed(7)
    s, rho = 20_000, 0.8
    z = torch.randn(s, 1, 2, dtype=torch.float64)
    a = torch.randn(s, 1, 2, dtype=torch.float64)
    b = torch.stack([z[..., 0], rho * z[..., 0] + math.sqrt(1 - rho**2) * z[..., 1]], dim=-1) * 5 - 2
    # A correlation has standard error (1 - rho^2) / sqrt(s); the matrix holds the difference twice.
    standard_error = math.sqrt(2) * math.sqrt((1 - rho**2) ** 2 + 1) / math.sqrt(s)
    assert abs(float(correlation_error(a, b)) - math.sqrt(2) * rho) < 4 * standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "dim"), [(3, 4), (1, 4), (3, 1), (1, 1)])
def test_identity(batch: int, dim: int, dtype: torch.dtype) -> None:
    _, b = _pair(batch=batch, dim=dim)
    b = b.to(dtype)
    shuffled = b[torch.randperm(len(b))]  # the order of the draws says nothing
    zero = torch.zeros(batch, dtype=torch.float64)
    torch.testing.assert_close(standardized_mean_error(shuffled, b), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(correlation_error(shuffled, b), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(sliced_w2(shuffled, b), zero, rtol=0, atol=1e-12)
    ones = torch.ones(batch, dim, dtype=torch.float64)
    torch.testing.assert_close(sd_ratio(shuffled, b), ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_each_datum_is_on_its_own(measure: Measure) -> None:
    a, b = _pair()
    alone = torch.cat([measure(a[:, i : i + 1], b[:, i : i + 1]) for i in range(3)])
    together = measure(a, b)
    assert together.shape == ((3, 4) if measure is sd_ratio else (3,))
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
def test_units_and_origin_do_not_matter(measure: Measure) -> None:
    a, b = _pair()
    scale = torch.tensor([1e-3, 2.0, 50.0, 1e4], dtype=torch.float64)
    torch.testing.assert_close(measure(a * scale + 7, b * scale + 7), measure(a, b), rtol=1e-7, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
def test_float32_input_is_computed_in_float64(measure: Measure) -> None:
    a, b = _pair()
    value = measure(a.float(), b.float())
    assert value.dtype == torch.float64
    assert torch.equal(value, measure(a.float().double(), b.float().double()))


def test_directions_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    a, b = _pair()
    state = torch.get_rng_state()
    first = sliced_w2(a, b, num_directions=10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(sliced_w2(a, b, num_directions=10, seed=1), first)
    assert not torch.equal(sliced_w2(a, b, num_directions=10, seed=2), first)


def test_constant_guide_draws() -> None:
    a, b = _pair()
    a[:, 1, 2] = 0.0
    assert correlation_error(a, b).isnan().tolist() == [False, True, False]
    assert float(sd_ratio(a, b)[1, 2]) == 0.0


@pytest.mark.parametrize("measure", MEASURES)
def test_loud_failures(measure: Measure) -> None:
    a, b = _pair()
    with pytest.raises(ValueError, match=r"equal B and D, got \(300, 2, 4\) and \(500, 3, 4\)"):
        measure(a[:, :2], b)
    with pytest.raises(ValueError, match="equal B and D"):
        measure(a[..., :3], b)
    with pytest.raises(ValueError, match="equal B and D"):
        measure(a[:, 0], b[:, 0])
    with pytest.raises(ValueError, match="a has 1 draws"):
        measure(a[:1], b)
    with pytest.raises(ValueError, match="b has 1 draws"):
        measure(a, b[:1])
    for value in (math.nan, math.inf):
        bad = b.clone()
        bad[9, 2, 0] = value
        with pytest.raises(ValueError, match="b has NaN or infinite draws at datum 2"):
            measure(a, bad)
    bad = b.clone()
    bad[:, 1, 3] = 0.1
    with pytest.raises(ValueError, match="constant at datum 1, dimension 3"):
        measure(a, bad)


def test_no_direction() -> None:
    a, b = _pair()
    with pytest.raises(ValueError, match="num_directions must be at least 1, got 0"):
        sliced_w2(a, b, num_directions=0)
