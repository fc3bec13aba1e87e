"""Probabilistic principal component analysis (Tipping & Bishop 1999): the VAE whose posterior is known.

    z ~ N(0, I_D),  x | z ~ N(W z + b, s^2 I_X)
    Lambda = I + W'W / s^2,   p(z | x) = N(Lambda^{-1} W'(x - b) / s^2, Lambda^{-1}),   p(x) = N(b, W W' + s^2 I)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.compat import ModelTraits

__all__ = ["PPCA"]


class PPCA(PyroModule):
    """Linear-Gaussian model with closed-form posterior and evidence.

    Args:
        weight: W, `[X, D]`.
        noise: s, the noise scale.
        bias: b, `[X]`; zero by default.

    Example:
        >>> import torch
        >>> model = PPCA(torch.ones(3, 1), noise=1.0)
        >>> x = torch.zeros(2, 3)
        >>> round(float(model.posterior(x).covariance_matrix[0, 0, 0]), 2)
        0.25
        >>> model.log_evidence(x).shape
        torch.Size([2])
    """

    traits = ModelTraits()

    def __init__(self, weight: Tensor, noise: float = 0.1, bias: Tensor | None = None) -> None:
        super().__init__()
        if weight.dim() != 2 or not noise > 0:
            raise ValueError("PPCA needs a weight of shape [X, D] and a positive noise scale")
        start = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
        # In a plain module: Pyro would unfreeze parameters of the PyroModule itself.
        self.parts = nn.ParameterDict(
            {"weight": weight.detach().clone(), "bias": start, "log_noise": torch.log(weight.new_tensor(noise))}
        )

    @property
    def weight(self) -> Tensor:
        """W, `[X, D]`."""
        return self.parts["weight"]

    @property
    def bias(self) -> Tensor:
        """b, `[X]`."""
        return self.parts["bias"]

    @property
    def log_noise(self) -> Tensor:
        """log s, scalar."""
        return self.parts["log_noise"]

    @property
    def latent_dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        weight, bias, scale = self.weight, self.bias, self.log_noise.exp()
        with pyro.plate("data", len(x) if x is not None else size):
            zero = weight.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            return pyro.sample("x", dist.Normal(z @ weight.T + bias, scale).to_event(1), obs=x)

    def precision(self) -> Tensor:
        """Posterior precision Lambda, `[D, D]`, the same for all data."""
        eye = torch.eye(self.latent_dim, dtype=self.weight.dtype, device=self.weight.device)
        return eye + self.weight.T @ self.weight / self.log_noise.exp() ** 2

    def posterior(self, x: Tensor) -> Any:
        """p(z | x), batch `[B]`, event `[D]`."""
        precision = self.precision()
        moment = (x - self.bias) @ self.weight / self.log_noise.exp() ** 2
        loc = torch.linalg.solve(precision, moment.T).T
        return dist.MultivariateNormal(loc, precision_matrix=precision.expand(len(x), -1, -1))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), `[B]`, nats."""
        noise = (2 * self.log_noise).exp().expand(len(self.bias))
        return dist.LowRankMultivariateNormal(self.bias, self.weight, noise).log_prob(x)

    def marginal(self, seen: Tensor) -> PPCA:
        """The model of some outputs alone, a copy: its `posterior` and `log_evidence` are those given these outputs.

        Args:
            seen: which, `[X]` bool.
        """
        return PPCA(self.weight.detach()[seen], float(self.log_noise.exp()), self.bias.detach()[seen])

    def factorised_gap(self) -> Tensor:
        """KL of the best factorised Gaussian from the posterior, nats: 0.5 (sum_j log Lambda_jj - log|Lambda|)."""
        precision = self.precision()
        return 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])

    def linear_head(self, site: str) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """(identity, W): the mean of x is linear in z."""
        return (lambda u: u, self.weight) if site == "x" else None
