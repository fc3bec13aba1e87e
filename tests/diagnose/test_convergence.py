"""R-hat and effective sample sizes against ArviZ, and against chains whose answer is known."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from torch import Tensor

from pyrovae.diagnose.convergence import ess_bulk, ess_tail, split_rhat

TOLERANCE = 1e-6
CASES = ["independent", "slow", "antithetic", "shifted", "scaled", "heavy", "ties", "two_values", "stuck"]


def _ar1(phi: float, chains: int, draws: int, columns: int) -> Tensor:
    """Stationary AR(1) chains of unit variance ``[C, S, K]``."""
    x = torch.randn(chains, draws, columns, dtype=torch.float64)
    for s in range(1, draws):
        x[:, s] = phi * x[:, s - 1] + math.sqrt(1 - phi**2) * x[:, s]
    return x


def _draws(case: str, chains: int, draws: int, columns: int = 3) -> Tensor:
    torch.manual_seed(3)
    phi = {"slow": 0.95, "antithetic": -0.6, "independent": 0.0}.get(case, 0.5)
    x = _ar1(phi, chains, draws, columns)
    if case == "shifted":
        x[0] += 1.5
    elif case == "scaled":
        x[0] *= 4
    elif case == "heavy":
        x = x**5
    elif case == "ties":
        x = (x * 2).round() / 2
    elif case == "two_values":
        x = (x > 0.3).double()
    elif case == "stuck":
        x[0] = x[0, :1]
    return x


def _arviz(x: Tensor, what: str) -> np.ndarray:
    columns = x.permute(2, 0, 1).numpy()
    if what == "rhat":
        return np.array([float(az.rhat(column)) for column in columns])
    return np.array([float(az.ess(column, method=what)) for column in columns])


@pytest.mark.parametrize(("chains", "draws"), [(4, 500), (2, 101), (8, 26), (3, 4), (2, 7)])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_arviz(case: str, chains: int, draws: int) -> None:
    x = _draws(case, chains, draws)
    varies = (x.flatten(0, 1).amin(0) < x.flatten(0, 1).amax(0)).numpy()
    assert varies.any()
    for ours, what in ((split_rhat, "rhat"), (ess_bulk, "bulk"), (ess_tail, "tail")):
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.where(varies, _arviz(x, what), np.nan)
        np.testing.assert_allclose(ours(x).numpy(), expected, rtol=TOLERANCE, err_msg=what)


@pytest.mark.parametrize("draws", [8, 10, 12, 14])
@pytest.mark.parametrize("case", ["slow", "antithetic", "independent"])
def test_agrees_with_arviz_where_the_sums_end_at_the_last_lag(case: str, draws: int) -> None:
    x = _draws(case, 2, draws, 100)
    np.testing.assert_allclose(ess_bulk(x).numpy(), _arviz(x, "bulk"), rtol=TOLERANCE)


def test_two_symmetric_values_have_a_bulk_rhat_only() -> None:
    """Every |x - median| is equal, so the folded R-hat is 0/0 and does not count."""
    x = torch.tensor([-1.0, 1.0]).repeat(4, 20)[..., None]
    with np.errstate(invalid="ignore"):
        expected = _arviz(x, "rhat")
    np.testing.assert_allclose(split_rhat(x).numpy(), expected, rtol=TOLERANCE)
    assert split_rhat(x).isfinite().all()


def test_one_chain_agrees_with_arviz_on_ess() -> None:
    x = _draws("slow", 1, 400)
    np.testing.assert_allclose(ess_bulk(x).numpy(), _arviz(x, "bulk"), rtol=TOLERANCE)
    np.testing.assert_allclose(ess_tail(x).numpy(), _arviz(x, "tail"), rtol=TOLERANCE)


def test_one_chain_has_an_rhat_between_its_halves() -> None:
    """Where ArviZ asks for two chains: one chain whose level jumps half-way has not mixed."""
    x = _draws("independent", 1, 2000, 1)
    assert float(split_rhat(x)) < 1.01
    x[:, 1000:] += 3
    # Two levels 3 apart: B/n = 4.5 against W = 1 before ranks, R-hat about 2; the ranks bring it to about 1.9.
    assert 1.5 < float(split_rhat(x)) < 2.5


def test_known_effective_sample_size() -> None:
    """The mean of an AR(1) chain has effective size n (1 - phi) / (1 + phi); normal scores change it little."""
    torch.manual_seed(4)
    phi, chains, draws, columns = 0.5, 4, 1000, 100
    sizes = ess_bulk(_ar1(phi, chains, draws, columns))
    expected = chains * draws * (1 - phi) / (1 + phi)
    # Truncation at the first negative pair biases tau by a few per cent at most; the rest is Monte Carlo.
    standard_error = float(sizes.std()) / math.sqrt(columns)
    assert abs(float(sizes.mean()) - expected) < 4 * standard_error + 0.02 * expected


def test_tells_mixed_from_unmixed() -> None:
    assert (split_rhat(_draws("independent", 4, 500)) < 1.01).all()
    assert (split_rhat(_draws("shifted", 4, 500)) > 1.1).all()
    assert (split_rhat(_draws("scaled", 4, 500)) > 1.1).all()  # seen by the folded R-hat only


def test_invariant_under_increasing_maps() -> None:
    x = _draws("slow", 4, 200)
    assert torch.equal(ess_bulk(x.exp()), ess_bulk(x))
    assert torch.equal(ess_tail(7 * x), ess_tail(x))


@pytest.mark.parametrize("measure", [split_rhat, ess_bulk, ess_tail])
def test_trailing_dimensions_are_independent(measure) -> None:  # type: ignore[no-untyped-def]
    x = torch.cat([_draws(case, 4, 60) for case in ("slow", "ties", "shifted", "heavy")], dim=2)
    together = measure(x.reshape(4, 60, 2, 6))
    alone = torch.stack([measure(x[..., k]) for k in range(12)]).reshape(2, 6)
    assert together.shape == (2, 6)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(measure(x.float()), measure(x.float().double()), rtol=0, atol=0)


@pytest.mark.parametrize("measure", [split_rhat, ess_bulk, ess_tail])
def test_undefined_columns_are_nan_and_harm_no_other(measure) -> None:  # type: ignore[no-untyped-def]
    x = _draws("slow", 4, 60, 4)
    alone = measure(x)[3]
    x[..., 0] = 2.0
    x[1, 5, 1] = math.nan
    x[1, 5, 2] = math.inf
    value = measure(x)
    assert value.isnan().tolist() == [True, True, True, False]
    torch.testing.assert_close(value[3], alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measure", [split_rhat, ess_bulk, ess_tail])
@pytest.mark.parametrize("shape", [(10,), (2, 3), (0, 10), (4, 3, 2)])
def test_too_few_draws_raise(measure, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"draws must be \[chains, draws >= 4"):
        measure(torch.zeros(shape))
