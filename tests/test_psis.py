"""k-hat against ArviZ and against tails whose shape is known."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from torch import Tensor

from pyrovae.psis import pareto_khat, psis_smooth

S, N = 1000, 6


def _exponential(*shape: int) -> Tensor:
    return -torch.rand(*shape, dtype=torch.float64).log()


def _log_weights(kind: str, draws: int = S, columns: int = N) -> Tensor:
    torch.manual_seed(1)
    z = torch.randn(draws, columns, dtype=torch.float64)
    if kind == "normal":  # log-normal weights, spreads from mild to hopeless
        return z * torch.linspace(0.2, 4.0, columns, dtype=torch.float64)
    if kind == "bounded":  # q wider than p: k < 0
        return -0.5 * 3 * z.square()
    if kind == "t":  # three degrees of freedom: heavy tails even of the log weights
        return z / torch.randn(3, draws, columns, dtype=torch.float64).square().mean(0).sqrt()
    if kind == "cauchy":  # one or two draws carry everything, the others underflow beside them
        return 100 * z / torch.randn(draws, columns, dtype=torch.float64).abs()
    if kind == "underflow":  # more than five, fewer than M weights are above the smallest float64
        return 800 * z
    if kind == "pareto":
        return torch.linspace(0.1, 1.2, columns, dtype=torch.float64) * _exponential(draws, columns)
    if kind == "ties":  # the tail is shorter than M in some columns
        return (z * 8).round() / 8
    raise AssertionError(kind)


@pytest.mark.parametrize("draws", [25, 26, 100, 1000, 5003])
@pytest.mark.parametrize("kind", ["normal", "bounded", "t", "cauchy", "underflow", "pareto", "ties"])
def test_agrees_with_arviz(kind: str, draws: int) -> None:
    log_weights = _log_weights(kind, draws)
    smoothed, khat = psis_smooth(log_weights)
    expected_smoothed, expected = az.psislw(log_weights.T.numpy())
    if kind not in ("ties", "cauchy", "underflow"):
        assert np.isfinite(expected).all()
    np.testing.assert_allclose(khat.numpy(), expected, rtol=0, atol=1e-6)
    # Tied tail draws may be given their quantiles in another order, so values are compared sorted.
    got, want = smoothed.T.sort(dim=1).values.numpy(), np.sort(expected_smoothed, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(pareto_khat(log_weights), khat, rtol=0, atol=0, equal_nan=True)


def test_a_tail_of_fewer_than_five_is_inf_and_one_of_five_is_not() -> None:
    base = torch.zeros(100, dtype=torch.float64)
    four, five = base.clone(), base.clone()
    four[:4] = torch.arange(1.0, 5.0)
    five[:5] = torch.arange(1.0, 6.0)
    assert pareto_khat(torch.stack([four, five], dim=1)).isposinf().tolist() == [True, False]


def test_smoothing_keeps_the_place_of_each_weight() -> None:
    log_weights = _log_weights("normal")
    smoothed, _ = psis_smooth(log_weights)
    expected, _ = az.psislw(log_weights.T.numpy())
    np.testing.assert_allclose(smoothed.numpy(), expected.T, rtol=0, atol=1e-8)
    np.testing.assert_allclose(smoothed.exp().sum(0).numpy(), np.ones(N), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0])
def test_recovers_a_known_pareto_shape(k: float) -> None:
    """Exceedances of a Pareto law are exactly generalised Pareto with its shape."""
    torch.manual_seed(2)
    draws, columns = 4000, 400
    khat = pareto_khat(k * _exponential(draws, columns))
    n = math.ceil(3 * math.sqrt(draws))
    shrink = n / (n + 10)
    expected = shrink * k + (1 - shrink) * 0.5
    # One fit has the maximum-likelihood standard error (1 + k) / sqrt(n), shrunk by the prior.
    one = shrink * (1 + k) / math.sqrt(n)
    # The estimator's own bias is of order 1/n: a tenth of one fit's standard error is allowed for it.
    assert abs(float(khat.mean()) - expected) < 4 * one / math.sqrt(columns) + 0.1 * one
    # The sd over columns has a relative standard error of 1 / sqrt(2 columns) = 3.5 %.
    assert float(khat.std()) == pytest.approx(one, rel=4 / math.sqrt(2 * columns))


@pytest.mark.parametrize("kind", ["normal", "t", "cauchy", "pareto", "ties"])
def test_each_column_is_on_its_own(kind: str) -> None:
    log_weights = _log_weights(kind)
    single = torch.stack([pareto_khat(log_weights[:, i]) for i in range(N)])
    torch.testing.assert_close(pareto_khat(log_weights), single, rtol=0, atol=0, equal_nan=True)


def test_batch_shape_and_chunks_and_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    log_weights = _log_weights("normal")
    khat = pareto_khat(log_weights)
    assert khat.dtype == torch.float64
    assert torch.equal(pareto_khat(log_weights.reshape(S, 2, 3)), khat.reshape(2, 3))
    # An offset costs the digits it shifts out: 500 nats leave 1e-13 of the log weights.
    torch.testing.assert_close(pareto_khat(log_weights - 500.0), khat, rtol=0, atol=1e-9)
    monkeypatch.setattr("pyrovae.psis._CHUNK", 1)
    assert torch.equal(pareto_khat(log_weights), khat)


def test_leaves_its_input_alone() -> None:
    log_weights = _log_weights("normal")
    before = log_weights.clone()
    psis_smooth(log_weights)
    psis_smooth(log_weights[:, 0])
    assert torch.equal(log_weights, before)


def test_constant_weights_are_an_exact_posterior() -> None:
    log_weights = _log_weights("normal")
    log_weights[:, 2] = -123.4
    log_weights[:, 3] = -723.4 + 4e-10 * torch.rand(S, dtype=torch.float64)
    log_weights[:, 4] = (-723.4 + 2e-4 * torch.rand(S, dtype=torch.float64)).float()  # what rounding leaves of an image
    khat = pareto_khat(log_weights)
    assert khat.isneginf().tolist() == [False, False, True, True, True, False]
    smoothed, _ = psis_smooth(log_weights)
    torch.testing.assert_close(smoothed[:, 2], torch.full((S,), -math.log(S), dtype=torch.float64), rtol=0, atol=1e-12)


def test_weight_zero_is_allowed() -> None:
    log_weights = _log_weights("pareto")
    log_weights[::2] = -math.inf
    expected = az.psislw(log_weights.T.numpy())[1]
    np.testing.assert_allclose(pareto_khat(log_weights).numpy(), expected, rtol=0, atol=1e-6)
    log_weights[4:] = -math.inf  # four weights left, two of them zero
    assert pareto_khat(log_weights).isposinf().all()


def test_float32_input() -> None:
    """Rounding the log weights to float32 is all that may change."""
    log_weights = _log_weights("normal").float()
    assert torch.equal(pareto_khat(log_weights), pareto_khat(log_weights.double()))


def test_gradient_is_cut() -> None:
    assert not pareto_khat(_log_weights("normal").requires_grad_()).requires_grad


def test_errors_say_which_datum() -> None:
    log_weights = _log_weights("normal")
    with pytest.raises(ValueError, match=r"at least 25 draws.*\(24, 6\)"):
        pareto_khat(log_weights[:24])
    for value in (math.nan, math.inf):
        bad = log_weights.clone()
        bad[17, 4] = value
        with pytest.raises(ValueError, match=r"NaN or \+inf log weights at datum 4"):
            pareto_khat(bad)
        with pytest.raises(ValueError, match=r"datum \(1, 1\)"):
            pareto_khat(bad.reshape(S, 2, 3))
        with pytest.raises(ValueError, match="the only datum"):
            pareto_khat(bad[:, 4])
    bad = log_weights.clone()
    bad[:, 1] = -math.inf
    with pytest.raises(ValueError, match="datum 1 are -inf"):
        psis_smooth(bad)
