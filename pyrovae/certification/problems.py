r"""Small problems with exact answers; every guide is held against them.

A `Problem` is an ordinary Pyro model with a handful of data, and beside it the same posterior written out by hand, in
unconstrained coordinates u. Nothing of the second half goes through Pyro or through `LatentSpace`, so the two check
each other:

    log_prior(u), log_likelihood(u)     nats per datum
    curvature(u)                        sum over observed sites of J' F J, plus the prior's negative Hessian: the
                                        precision of Laplace's approximation (F = Fisher information)
    truth                               mean, covariance and log p(x): closed form, or a grid in one or two dimensions
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.certification.quadrature import Moments, gaussian_moments, grid_moments, panel_moments
from pyrovae.models import PPCA
from pyrovae.models.piecewise_affine_vae import PiecewiseAffineVAE

__all__ = [
    "PROBLEMS", "SCHOOLS", "Banana", "Bimodal", "Correlated", "GammaScale", "Logistic", "Pca", "PiecewiseAffine",
    "Problem", "banana", "bimodal", "correlated", "eight_schools", "gamma_normal", "gamma_scale", "logistic", "ppca",
    "subsampled",
]  # fmt: skip

SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)
LOG_2PI = math.log(2 * math.pi)


def ppca(rows: int = 40, latent: int = 10, pixels: int = 30, noise: float = 0.5, seed: int = 0) -> tuple[PPCA, Tensor]:
    """pPCA in float64 and data from it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(pixels, latent, generator=generator, dtype=torch.double)
    model = PPCA(weight, noise=noise)
    z = torch.randn(rows, latent, generator=generator, dtype=torch.double)
    x = z @ weight.T + noise * torch.randn(rows, pixels, generator=generator, dtype=torch.double)
    return model, x


def correlated(x: Tensor) -> None:
    """a, b ~ N(0, 1), x | a, b ~ N(a + b, 1/9): the posterior's correlation is -1 / (1 + 1/9) = -0.9."""
    with pyro.plate("data", len(x)):
        zero = torch.zeros((), dtype=x.dtype)
        a = pyro.sample("a", dist.Normal(zero, 1.0))
        b = pyro.sample("b", dist.Normal(zero, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1 / 3), obs=x)


def bimodal(x: Tensor) -> None:
    """z ~ N(0, 1), x | z ~ N(z^2, 0.25^2): at x = 2.25 the posterior has modes at about -1.5 and 1.5."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.25), obs=x)


def banana(x: Tensor) -> None:
    """z ~ N(0, I_2), x | z ~ N(z_2 + z_1^2 / 2, 0.4^2): the posterior lies along a parabola."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 1] + 0.5 * z[..., 0] ** 2, 0.4), obs=x)


def gamma_scale(x: Tensor) -> None:
    """s ~ Gamma(3, 2), m ~ N(0, 1), x_j | m, s ~ N(m, s): location and (constrained) scale of a few numbers."""
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Gamma(torch.tensor(3.0, dtype=x.dtype), 2.0))
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(m.unsqueeze(-1).expand(x.shape), s.unsqueeze(-1)).to_event(1), obs=x)


def logistic(x: Tensor) -> None:
    """w ~ N(0, 4 I_2), x_j | w ~ Bernoulli(logits = w_1 + w_2 t_j): one logistic regression per datum."""
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 2.0).to_event(1))
        t = torch.linspace(-2, 2, x.shape[-1], dtype=x.dtype)
        pyro.sample("x", dist.Bernoulli(logits=w[..., :1] + w[..., 1:] * t).to_event(1), obs=x)


def gamma_normal(x: Tensor) -> None:
    """Two sites, one constrained: s ~ Gamma(3, 2), z ~ N(0, I_2), x | s, z ~ N(s * (z_1 + z_2), 1) in R^3."""
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Gamma(torch.tensor(3.0, dtype=x.dtype), 2.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        loc = (s * z.sum(-1)).unsqueeze(-1).expand(*s.shape, 3)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def subsampled(x: Tensor, index: Tensor, size: int = 100) -> None:
    """z_n ~ N(0, 1), x_n | z_n ~ N(z_n, 1), a plate of `size` of which the rows `index` are given."""
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def eight_schools(centred: bool = False) -> Callable[[], None]:
    """Rubin's eight schools as one datum: mu ~ N(0, 5), tau ~ HalfCauchy(5), J = 8."""
    y, sigma = SCHOOLS

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("J", 8):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model


def _normal(value: Tensor, loc: Any, scale: float | Tensor) -> Tensor:
    """log N(value; loc, scale^2), elementwise."""
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return -0.5 * ((value - loc) / scale) ** 2 - log_scale - 0.5 * LOG_2PI


class Problem(ABC):
    """A model, its data and its posterior written out by hand.

    Attributes:
        name: as tables write it.
        about: one line for the page.
        model, x: the Pyro program and its data, float64.
        dim: D.
        gaussian: the posterior is a Gaussian.
        start: `[B, D]`, where searches and training begin.
        kinks: `[K]`, ascending, where the log-joint of one latent is not smooth; None where it is.
        bound: half the width of the box `[-bound, bound]^D` outside which posterior and prior have no mass to speak of.
    """

    name: str
    about: str
    model: Callable[..., Any]
    x: Tensor
    dim: int = 2
    gaussian = False
    bound = 9.0
    kinks: Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(B = {len(self.x)}, D = {self.dim})"

    @property
    def start(self) -> Tensor:
        return torch.full((len(self.x), self.dim), 0.5, dtype=torch.double)

    @abstractmethod
    def log_prior(self, u: Tensor) -> Tensor:
        """log p(u), log-Jacobian included, `[..., B, D] -> [..., B]`."""

    @abstractmethod
    def log_likelihood(self, u: Tensor) -> Tensor:
        """log p(x | u), `[..., B, D] -> [..., B]`."""

    @abstractmethod
    def curvature(self, u: Tensor) -> Tensor:
        """Fisher information of the observed sites plus the prior's negative Hessian, `[..., B, D, D]`."""

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u), `[..., B, D] -> [..., B]`."""
        return self.log_prior(u) + self.log_likelihood(u)

    @cached_property
    def truth(self) -> Moments:
        """Posterior mean `[B, D]`, covariance `[B, D, D]` and log evidence `[B]`."""
        if self.gaussian:
            return gaussian_moments(self.log_joint, self.curvature, self.start)
        if self.kinks is not None:
            ends = torch.tensor([self.bound]).double()
            return panel_moments(self.log_joint, torch.cat([-ends, self.kinks, ends]), len(self.x))
        return grid_moments(self.log_joint, self.bound, len(self.x), self.dim)


class Pca(Problem):
    name = "ppca"
    about = "Probabilistic PCA, 3 latents, 5 pixels: a correlated Gaussian posterior, in closed form"
    dim, gaussian = 3, True

    def __init__(self) -> None:
        self.model, self.x = ppca(rows=3, latent=3, pixels=5, noise=1.0, seed=55)
        self.model.requires_grad_(False)
        self.weight, self.noise = self.model.weight.detach(), 1.0

    def log_prior(self, u: Tensor) -> Tensor:
        return _normal(u, 0.0, 1.0).sum(-1)

    def log_likelihood(self, u: Tensor) -> Tensor:
        return _normal(self.x, u @ self.weight.T, self.noise).sum(-1)

    def curvature(self, u: Tensor) -> Tensor:
        precision = torch.eye(3).double() + self.weight.T @ self.weight / self.noise**2
        return precision.expand(*u.shape, 3)


class Correlated(Problem):
    name = "correlated"
    about = "Two scalar sites that are observed through their sum: a Gaussian posterior of correlation -0.9"
    gaussian = True

    def __init__(self) -> None:
        self.model, self.x = correlated, torch.tensor([-1.0, 0.3, 2.0]).double()

    def log_prior(self, u: Tensor) -> Tensor:
        return _normal(u, 0.0, 1.0).sum(-1)

    def log_likelihood(self, u: Tensor) -> Tensor:
        return _normal(self.x, u.sum(-1), 1 / 3)

    def curvature(self, u: Tensor) -> Tensor:
        return (torch.eye(2).double() + 9.0).expand(*u.shape, 2)


class Bimodal(Problem):
    name = "bimodal"
    about = "The square of one latent is observed: two narrow modes, far apart for two data and touching for the third"
    dim = 1
    bound = 8.0

    def __init__(self) -> None:
        self.model, self.x = bimodal, torch.tensor([2.25, 1.0, 0.3]).double()

    def log_prior(self, u: Tensor) -> Tensor:
        return _normal(u, 0.0, 1.0).sum(-1)

    def log_likelihood(self, u: Tensor) -> Tensor:
        return _normal(self.x, u[..., 0] ** 2, 0.25)

    def curvature(self, u: Tensor) -> Tensor:
        return (1 + 64 * u**2).unsqueeze(-1)


class Banana(Problem):
    name = "banana"
    about = "A sum of one latent and half the square of another is observed: a posterior bent along a parabola"

    def __init__(self) -> None:
        self.model, self.x = banana, torch.tensor([-0.5, 0.4, 1.0]).double()

    def log_prior(self, u: Tensor) -> Tensor:
        return _normal(u, 0.0, 1.0).sum(-1)

    def log_likelihood(self, u: Tensor) -> Tensor:
        return _normal(self.x, u[..., 1] + 0.5 * u[..., 0] ** 2, 0.4)

    def curvature(self, u: Tensor) -> Tensor:
        jacobian = torch.stack([u[..., 0], torch.ones_like(u[..., 0])], dim=-1)
        return torch.eye(2).double() + jacobian.unsqueeze(-1) * jacobian.unsqueeze(-2) / 0.4**2


class GammaScale(Problem):
    """u = (log s, m): log Gamma(s; 3, 2) + log s = 3 log s - 2 s + 3 log 2 - log 2."""

    name = "gamma-scale"
    about = "Location and Gamma-distributed scale of four numbers: two sites, one constrained (u = log scale)"
    bound = 12.0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        raw = torch.randn(3, 4, generator=generator, dtype=torch.double)
        self.model = gamma_scale
        self.x = torch.tensor([[0.5], [-1.0], [2.0]]).double() + torch.tensor([[1.0], [0.5], [2.0]]).double() * raw

    def log_prior(self, u: Tensor) -> Tensor:
        log_s = u[..., 0]
        return 3 * log_s - 2 * log_s.exp() + 3 * math.log(2) - math.lgamma(3) + _normal(u[..., 1], 0.0, 1.0)

    def log_likelihood(self, u: Tensor) -> Tensor:
        return _normal(self.x, u[..., 1:], u[..., :1].exp()).sum(-1)

    def curvature(self, u: Tensor) -> Tensor:
        scale, count = u[..., 0].exp(), self.x.shape[-1]
        return torch.diag_embed(torch.stack([2 * scale + 2 * count, 1 + count / scale**2], dim=-1))


class Logistic(Problem):
    name = "logistic"
    about = "Logistic regression with two coefficients and ten binary answers per datum"
    bound = 24.0

    def __init__(self) -> None:
        self.model = logistic
        answers = ["0001011111", "0000100111", "1011100100"]
        self.x = torch.tensor([[float(answer) for answer in row] for row in answers]).double()
        t = torch.linspace(-2, 2, 10, dtype=torch.double)
        self.design = torch.stack([torch.ones_like(t), t], dim=-1)

    def log_prior(self, u: Tensor) -> Tensor:
        return _normal(u, 0.0, 2.0).sum(-1)

    def log_likelihood(self, u: Tensor) -> Tensor:
        logits = u @ self.design.T
        return (self.x * logits - torch.nn.functional.softplus(logits)).sum(-1)

    def curvature(self, u: Tensor) -> Tensor:
        p = torch.sigmoid(u @ self.design.T)
        return 0.25 * torch.eye(2).double() + torch.einsum("ji,...j,jk->...ik", self.design, p * (1 - p), self.design)


class PiecewiseAffine(Problem):
    """Units are positive where w z + v > 0; the slope of the decoder is W_2 (q * w), q = 1 there and 0.1 elsewhere."""

    name = "piecewise-affine"
    about = "A leaky-ReLU net of one latent, 8 units, 2 pixels: a posterior with kinks, for one datum far out two modes"
    dim = 1

    def __init__(self) -> None:
        self.weight, self.bias = torch.tensor([
            [0.4, -0.2, -0.3, -1.2, 1.0, -0.6, 0.6, 0.5], [-0.4, -1.0, 1.3, 0.7, -1.3, -1.2, -0.1, -0.9]
        ]).double()  # fmt: skip
        self.output, self.offset = torch.tensor([
            [-2.1, 0.4, 1.2, 0.5, 0.6, -1.5, 1.8, 0.7], [1.1, 0.5, -1.2, 0.1, 1.5, 0.5, 0.3, 1.4]
        ]).double(), torch.tensor([-0.8, -0.3]).double()  # fmt: skip
        self.noise = 0.5
        self.x = torch.tensor([[1.3, -2.3], [1.1, -2.9], [3.9, -1.1]]).double()
        self.kinks = (-self.bias / self.weight).sort().values
        model = PiecewiseAffineVAE([1, 8, 2], leak=0.1).double().requires_grad_(False)
        layers = (self.weight.unsqueeze(-1), self.bias), (self.output, self.offset)
        model.set_layers_and_noise(layers, torch.tensor(self.noise).double())
        self.model = model

    def log_prior(self, u: Tensor) -> Tensor:
        return _normal(u, 0.0, 1.0).sum(-1)

    def log_likelihood(self, u: Tensor) -> Tensor:
        hidden = u * self.weight + self.bias
        mean = torch.maximum(hidden, 0.1 * hidden) @ self.output.T + self.offset
        return _normal(self.x, mean, self.noise).sum(-1)

    def curvature(self, u: Tensor) -> Tensor:
        share = 0.1 + 0.9 * (u * self.weight + self.bias > 0).double()
        slope = (share * self.weight) @ self.output.T
        return (1 + slope.square().sum(-1) / self.noise**2)[..., None, None]


PROBLEMS: dict[str, Callable[[], Problem]] = {
    problem.name: problem for problem in (Pca, Correlated, Bimodal, Banana, GammaScale, Logistic, PiecewiseAffine)
}
