"""What ours is timed against: the same algorithms in bare PyTorch, as one would write them by hand.

No Pyro, one `torch.optim.Adam` (default settings) over all parameters, sums over the batch. Every factory takes nets
and returns a training step `x: [B, X] -> loss`, nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from setting import Likelihood, Nets
from torch import Tensor, nn

__all__ = [
    "amortized",
    "folded_jacobian",
    "log_joint",
    "published_jacobian",
    "refine",
    "semi_amortized",
    "vlae",
    "vlae_elbo",
    "vlae_posterior",
]

Step = Callable[[Tensor], float]
Jacobian = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
LOG_2PI = math.log(2 * math.pi)


def step_on(
    loss: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], lr: float, *, fused: bool = False
) -> Step:
    """Gradient and Adam (torch's default is not fused on CPU)."""
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=fused or None)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        return value.item()

    return step


def log_likelihood(parts: Nets, z: Tensor, x: Tensor, likelihood: Likelihood) -> Tensor:
    """log p(x | z) summed over the batch."""
    output = parts.decoder(z)
    if likelihood == "bernoulli":
        return -F.binary_cross_entropy_with_logits(output, x, reduction="sum")
    scale = parts.noise_scale
    return -0.5 * ((x - output) / scale).square().sum() - x.numel() * (scale.log() + 0.5 * LOG_2PI)


def normal_kl(loc: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(loc, exp(log_var)) || N(0, 1)), summed."""
    return 0.5 * (log_var.exp() + loc.square() - 1 - log_var).sum()


def elbo(parts: Nets, loc: Tensor, log_var: Tensor, eps: Tensor, x: Tensor, likelihood: Likelihood) -> Tensor:
    """One-sample reconstruction and analytic KL, summed over the batch."""
    z = loc + (0.5 * log_var).exp() * eps
    return log_likelihood(parts, z, x, likelihood) - normal_kl(loc, log_var)


def amortized(parts: Nets, likelihood: Likelihood = "bernoulli", *, lr: float = 1e-3, fused: bool = False) -> Step:
    """A VAE's training step."""

    def loss(x: Tensor) -> Tensor:
        loc, log_var = parts.encoder(x).chunk(2, -1)
        return -elbo(parts, loc, log_var, torch.randn_like(loc), x, likelihood)

    return step_on(loss, parts.parameters(likelihood), lr, fused=fused)


def refine(
    parts: Nets, x: Tensor, noise: Tensor, *, step_size: float, momentum: float, max_norm: float
) -> tuple[Tensor, Tensor]:
    """Kim et al. (2018): a gradient step with momentum for each `noise: [K, B, D]`, clipped per datum and block."""

    def clip(gradient: Tensor) -> Tensor:
        return gradient * (max_norm / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1.0)

    loc, log_var = parts.encoder(x).chunk(2, -1)
    v_loc, v_log_var = torch.zeros_like(loc), torch.zeros_like(log_var)
    for eps in noise:
        value = elbo(parts, loc, log_var, eps, x, "bernoulli")
        g_loc, g_log_var = torch.autograd.grad(value, (loc, log_var), create_graph=True)
        v_loc, v_log_var = momentum * v_loc + clip(g_loc), momentum * v_log_var + clip(g_log_var)
        loc, log_var = loc + step_size * v_loc, log_var + step_size * v_log_var
    return loc, log_var


def semi_amortized(
    parts: Nets,
    num_steps: int = 20,
    *,
    step_size: float = 0.03,
    momentum: float = 0.5,
    max_norm: float = 5.0,
    lr: float = 5e-4,
) -> Step:
    """A semi-amortized VAE's training step, differentiated through all inner steps."""

    def loss(x: Tensor) -> Tensor:
        noise = torch.randn(num_steps + 1, len(x), parts.decoder.trunk[0].in_features)
        loc, log_var = refine(parts, x, noise[:-1], step_size=step_size, momentum=momentum, max_norm=max_norm)
        return -elbo(parts, loc, log_var, noise[-1], x, "bernoulli")

    return step_on(loss, parts.parameters("bernoulli"), lr)


def published_jacobian(decoder: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """A ReLU decoder's output `[B, X]` and its Jacobian, transposed: `[B, X, D]` by masks as in the released code."""
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    hidden, jacobian = layers[0](z), layers[0].weight
    for _, layer in pairwise(layers):
        mask = (hidden > 0).to(hidden.dtype)
        jacobian = layer.weight @ (jacobian * mask.unsqueeze(-1))
        hidden = layer(hidden.relu())
    return hidden, jacobian.mT


def folded_jacobian(decoder: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `[B, D, X]`: the batch folds into one matrix product a layer, which is faster."""
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    hidden, jacobian = layers[0](z), layers[0].weight.T
    for _, layer in pairwise(layers):
        mask = (hidden > 0).to(hidden.dtype)
        jacobian = (jacobian * mask.unsqueeze(1)) @ layer.weight.T
        hidden = layer(hidden.relu())
    return hidden, jacobian


def vlae_posterior(
    parts: Nets,
    x: Tensor,
    likelihood: Likelihood,
    num_steps: int,
    jacobian: Jacobian = published_jacobian,
    *,
    step_size: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Park et al. (2019): T damped Newton updates from the encoder's mean; the mean `[B, D]` and the Cholesky factor of
    the precision `[B, D, D]`, with gradients through everything."""
    mu = parts.encoder(x).chunk(2, -1)[0]
    eye = torch.eye(mu.shape[-1], dtype=mu.dtype)
    for t in range(num_steps + 1):
        output, rows = jacobian(parts.decoder, mu)
        if likelihood == "gaussian":
            weight = 1 / parts.noise_scale.square()
            precision = eye + weight * (rows @ rows.mT)
            residual = weight * (x - output)
        else:
            p = output.sigmoid()
            precision = eye + (rows * (p * (1 - p)).unsqueeze(1)) @ rows.mT
            residual = x - p
        factor = torch.linalg.cholesky(precision)
        if t == num_steps:
            break
        gradient = (rows @ residual.unsqueeze(-1)).squeeze(-1) - mu
        mu = mu + step_size / (t + 1) * torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    return mu, factor


def vlae_elbo(
    parts: Nets,
    x: Tensor,
    eps: Tensor,
    likelihood: Likelihood,
    num_steps: int,
    jacobian: Jacobian = published_jacobian,
) -> Tensor:
    """The one-sample ELBO of N(mu, (L L')^{-1}), all terms sampled, at u = mu + L'^{-1} eps; summed over the batch."""
    mu, factor = vlae_posterior(parts, x, likelihood, num_steps, jacobian)
    z = mu + torch.linalg.solve_triangular(factor.mT, eps.unsqueeze(-1), upper=True).squeeze(-1)
    log_prior = -0.5 * (z.square() + LOG_2PI).sum()
    log_q = -0.5 * (eps.square() + LOG_2PI).sum() + factor.diagonal(dim1=-2, dim2=-1).log().sum()
    return log_likelihood(parts, z, x, likelihood) + log_prior - log_q


def vlae(
    parts: Nets,
    likelihood: Likelihood,
    num_steps: int = 4,
    jacobian: Jacobian = published_jacobian,
    *,
    lr: float = 5e-4,
) -> Step:
    """A variational Laplace autoencoder's training step."""

    def loss(x: Tensor) -> Tensor:
        eps = torch.randn(len(x), parts.decoder.trunk[0].in_features)
        return -vlae_elbo(parts, x, eps, likelihood, num_steps, jacobian)

    return step_on(loss, parts.parameters(likelihood), lr)


def log_joint(parts: Nets, x: Tensor) -> Callable[[Tensor], Tensor]:
    """log p(x, z) of a Bernoulli decoder, `[B, D] -> [B]`."""

    def run(z: Tensor) -> Tensor:
        likelihood = -F.binary_cross_entropy_with_logits(parts.decoder(z), x, reduction="none").sum(-1)
        return likelihood - 0.5 * (z.square() + LOG_2PI).sum(-1)

    return run
