"""Small problems with exact answers; every guide is held against them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyrovae.models import PPCA

__all__ = ["bimodal", "eight_schools", "gamma_normal", "ppca", "subsampled"]

SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def ppca(rows: int = 40, latent: int = 10, pixels: int = 30, noise: float = 0.5, seed: int = 0):
    """pPCA in float64 and data from it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(pixels, latent, generator=generator, dtype=torch.double)
    model = PPCA(weight, noise=noise)
    z = torch.randn(rows, latent, generator=generator, dtype=torch.double)
    x = z @ weight.T + noise * torch.randn(rows, pixels, generator=generator, dtype=torch.double)
    return model, x


def bimodal(x):
    """z ~ N(0, 1), x | z ~ N(z^2, 0.25^2): at x = 2.25 the posterior has modes at about -1.5 and 1.5."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.25), obs=x)


def gamma_normal(x):
    """Two sites, one constrained: s ~ Gamma(3, 2), z ~ N(0, I_2), x | s, z ~ N(s * (z_1 + z_2), 1) in R^3."""
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Gamma(torch.tensor(3.0, dtype=x.dtype), 2.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        loc = (s * z.sum(-1)).unsqueeze(-1).expand(*s.shape, 3)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def subsampled(x, index, size: int = 100):
    """z_n ~ N(0, 1), x_n | z_n ~ N(z_n, 1), a plate of `size` of which the rows `index` are given."""
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def eight_schools(centred: bool = False):
    """Rubin's eight schools as one datum: mu ~ N(0, 5), tau ~ HalfCauchy(5), J = 8."""
    y, sigma = SCHOOLS

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("J", 8):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model
