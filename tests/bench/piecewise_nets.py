"""Random piecewise-affine models, and noisy circles for them to fit."""

from __future__ import annotations

import math

import torch

from pyrovae.models.piecewise_affine_vae import PiecewiseAffineVAE


def random_net(sizes, noise=0.3, seed=0, output=1.0, leak=0.1):
    """Weights and biases N(0, 1), those of the output layer times `output`; float64, frozen."""
    generator = torch.Generator().manual_seed(seed)
    model = PiecewiseAffineVAE(sizes, leak=leak, noise=noise).double().requires_grad_(False)
    for parameter in model.layers.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    for parameter in model.layers[-1].parameters():
        parameter.mul_(output)
    model.parts["log_noise"].fill_(math.log(noise))  # it was made in float32
    return model


def circle(rows=500, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(rows, generator=generator, dtype=torch.double)
    return torch.stack([angle.cos(), angle.sin()], -1) + noise * torch.randn(rows, 2, generator=generator).double()


def log_joint(model, x, z):
    """log p(x, z) through the net alone, `[..., B, D] -> [..., B]`."""
    prior = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), 1.0).log_prob(z).sum(-1)
    return prior + torch.distributions.Normal(model.mean(z), model.noise).log_prob(x).sum(-1)
