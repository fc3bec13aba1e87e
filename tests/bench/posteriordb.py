"""Posteriors of posteriordb (Magnusson et al.), as Pyro programs, with the moments of its 10,000 published draws.

Flat priors of the originals are normals too wide to move a moment. Left out, because their data are too many numbers to
write down or cannot be had: kidscore_momiq (434 rows), logearn_height (1,192), low_dim_gauss_mix (1,000), sblrc (drawn
by R's generator).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from bench import problems
from bench.posteriordb_data import AR, FIRST_YEAR, GARCH, GARCH_FIRST_SCALE, GP_X, GP_Y, TEMPERATURE

__all__ = ["POSTERIORS", "Published"]

_REFERENCE_DRAWS = 10_000
_WIDE = 100.0


@dataclass(frozen=True)
class Published:
    """A posterior and its published moments.

    Attributes:
        model: a program of one datum (joint mode), without arguments.
        moments: site and index -> (mean, sd or None, half of the last digit printed).
        derived: further quantities from the sites.
        start: unconstrained starting point near the mass, where the prior is too wide to start from.
    """

    model: Callable[[], None]
    moments: dict[tuple[str, int | None], tuple[float, float | None, float]]
    derived: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda sites: {}
    start: tuple[float, ...] | None = None

    @staticmethod
    def error(sd: float, rounding: float) -> float:
        """Standard error of a published mean, rounding included."""
        return sd / _REFERENCE_DRAWS**0.5 + rounding


def _double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.double)


def kilpisjarvi() -> None:
    """A line through 62 summers, not centred: intercept and slope are correlated to -0.99999."""
    y = torch.tensor(TEMPERATURE, dtype=torch.double)
    x = FIRST_YEAR + torch.arange(len(y), dtype=torch.double)
    alpha = pyro.sample("alpha", dist.Normal(_double(9.31290322580645), 100.0))
    beta = pyro.sample("beta", dist.Normal(_double(0.0), 0.0333333333333333))
    sigma = pyro.sample("sigma", dist.HalfNormal(_double(_WIDE)))
    pyro.sample("y", dist.Normal(alpha + beta * x, sigma).to_event(1), obs=y)


def ar5() -> None:
    """An autoregression of order 5."""
    y = torch.tensor(AR, dtype=torch.double)
    lags = torch.stack([y[5 - k : len(y) - k] for k in range(1, 6)], dim=-1)
    alpha = pyro.sample("alpha", dist.Normal(_double(0.0), 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(5, dtype=torch.double), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(_double(2.5)))
    pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y[5:])


def garch11() -> None:
    """sigma_t^2 = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 sigma_{t-1}^2, solved for sigma_1: powers of beta1."""
    y = torch.tensor(GARCH, dtype=torch.double)
    mu = pyro.sample("mu", dist.Normal(_double(0.0), _WIDE))
    alpha0 = pyro.sample("alpha0", dist.HalfNormal(_double(_WIDE)))
    alpha1 = pyro.sample("alpha1", dist.Uniform(_double(0.0), 1.0))
    share = pyro.sample("share", dist.Uniform(_double(0.0), 1.0))
    beta1 = share * (1 - alpha1)
    pyro.factor("flat", torch.log1p(-alpha1))  # the original is flat where alpha1 + beta1 < 1
    step = torch.arange(len(y), dtype=torch.double)
    lag = step[1:].unsqueeze(-1) - step[:-1] - 1
    power = torch.where(lag >= 0, (lag.clamp_min(0) * beta1.log()).exp(), 0.0)
    shock = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    later = power @ shock + GARCH_FIRST_SCALE**2 * (step[1:] * beta1.log()).exp()
    variance = torch.cat([_double(GARCH_FIRST_SCALE**2).unsqueeze(0), later])
    pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)


def gp_regr() -> None:
    """A Gaussian process at eleven points; sigma is the variance of the noise, as in the original."""
    x, y = torch.tensor(GP_X, dtype=torch.double), torch.tensor(GP_Y, dtype=torch.double)
    rho = pyro.sample("rho", dist.Gamma(_double(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(_double(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(_double(1.0)))
    apart = (x.unsqueeze(-1) - x) / rho
    covariance = alpha**2 * (-0.5 * apart**2).exp() + sigma * torch.eye(len(x), dtype=torch.double)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), covariance), obs=y)


POSTERIORS = {
    "kilpisjarvi": Published(
        kilpisjarvi,
        {("alpha", None): (-60.7, 30.0, 0.05), ("beta", None): (0.0176, 0.0075, 0.00005),
         ("sigma", None): (1.132, 0.108, 0.0005)},
    ),
    "arK": Published(
        ar5,
        {("beta", 0): (0.692, None, 0.0005), ("beta", 1): (0.439, None, 0.0005), ("beta", 2): (0.106, None, 0.0005),
         ("beta", 3): (-0.035, None, 0.0005), ("beta", 4): (-0.302, None, 0.0005),
         ("sigma", None): (0.1506, None, 0.00005)},
    ),
    "garch11": Published(
        garch11,
        {("mu", None): (5.050, 0.124, 0.0005), ("alpha0", None): (1.471, 0.572, 0.0005),
         ("alpha1", None): (0.567, 0.127, 0.0005), ("beta1", None): (0.293, 0.125, 0.0005)},
        derived=lambda sites: {"beta1": sites["share"] * (1 - sites["alpha1"])},
        start=(5.0, 0.3, 0.2, 0.5),
    ),
    "gp_regr": Published(
        gp_regr,
        {("rho", None): (6.87, 1.27, 0.005), ("alpha", None): (2.44, 0.78, 0.005),
         ("sigma", None): (1.83, 0.51, 0.005)},
    ),
    "eight_schools": Published(
        problems.eight_schools(), {("mu", None): (4.410, 3.309, 0.0005), ("tau", None): (3.602, 3.199, 0.0005)},
    ),
}  # fmt: skip
