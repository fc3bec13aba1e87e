"""The variational autoencoder's generative model (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

    z ~ N(0, I_D),   x | z ~ Bernoulli(logits = decoder(z))   or   N(decoder(z), sigma^2 I)
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.compat import ModelTraits
from pyrovae.models.decoded import Decoded, Likelihood

__all__ = ["VAE"]


class VAE(Decoded):
    """A Gaussian latent vector and a neural decoder.

    Args:
        decoder: module from `[..., D]` to the likelihood's parameters `[..., *event]` (logits, or means).
        latent_dim: D.
        likelihood: "bernoulli" (binary data), "gaussian" or "laplace", with one noise scale for all pixels.
        noise: the noise scale; learned by default.
        noise_floor: smallest learned noise scale: without one, constant pixels drive the density up without bound.

    Call `vae(x)` as the Pyro program, `vae(None, size=n)` to generate; sites "z" and "x", plate "data".

    Example:
        >>> import torch
        >>> vae = VAE(torch.nn.Linear(2, 5), latent_dim=2)
        >>> vae(None, size=3).shape
        torch.Size([3, 5])
    """

    traits = ModelTraits()

    def __init__(
        self,
        decoder: nn.Module,
        latent_dim: int,
        likelihood: Likelihood = "bernoulli",
        *,
        noise: float | None = None,
        noise_floor: float = 1e-2,
    ) -> None:
        like = next(decoder.parameters(), torch.zeros(()))
        super().__init__(likelihood, noise, noise_floor, like)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.decoder, self.latent_dim = decoder, latent_dim
        self.register_buffer("origin", torch.zeros(latent_dim, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        rows = len(x) if x is not None else size
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1))
            # The particle plate of Pyro adds dims on the left; nets take one batch dim.
            flat = z.reshape(-1, self.latent_dim)
            parameters = self.decoder(flat)
            parameters = parameters.reshape(*z.shape[:-1], *parameters.shape[1:])
            return self.observe(parameters, z.dim() - 1, x)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z], `[..., D] -> [..., *event]` (pixels in [0, 1] for Bernoulli)."""
        parameters = self.decoder(z.reshape(-1, self.latent_dim))
        parameters = parameters.reshape(*z.shape[:-1], *parameters.shape[1:])
        return self.expected(parameters)

    def linear_head(self, site: str) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """(trunk, last weight) of the site's parameters, for decoders that have `trunk` and `head`."""
        trunk, head = getattr(self.decoder, "trunk", None), getattr(self.decoder, "head", None)
        if site != "x" or trunk is None or not isinstance(head, nn.Linear):
            return None
        return trunk, head.weight
