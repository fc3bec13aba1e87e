"""The variational autoencoder's generative model (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

    z ~ N(0, I_D),   x | z ~ Bernoulli(logits = decoder(z))   or   N(decoder(z), sigma^2 I)

On a closed manifold (a rotating object has a circle's) no continuous decoder of R^D is one-to-one, so a latent space
may have the manifold's topology instead. The decoder then reads directions alone, v = z / |z|, which are uniform on

    the sphere S^{D-1},   or, of z split into pairs, the torus of D / 2 circles, v = (cos a_1, sin a_1, cos a_2, ...)

(D = 2: the circle). A direction of a Gaussian vector is projected-normal, so an encoder's N(m, s^2 I) is a projected
normal posterior on the manifold, concentrated where |m| / s is large. Latents stay unconstrained vectors: every guide,
loss and diagnostic applies as it is, and so does log p(x). The radius |z| is a nuisance: the data say nothing of it and
the true posterior leaves it at its prior. A normal cannot both do that and tell an angle sharply;
`directional.Directional`, the family with a free direction and the prior's radius, can (its page tells how to train).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

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
        manifold: of what the decoder sees: "plane" (z itself), "torus" (D / 2 circles) or "sphere" (S^{D-1}).

    Call `vae(x)` as the Pyro program, `vae(None, size=n)` to generate; sites "z" and "x", plate "data".

    Example:
        >>> import torch
        >>> vae = VAE(torch.nn.Linear(2, 5), latent_dim=2)
        >>> vae(None, size=3).shape
        torch.Size([3, 5])
        >>> VAE(torch.nn.Linear(4, 5), latent_dim=4, manifold="torus").directions(torch.tensor([3.0, 4.0, 0.0, 2.0]))
        tensor([0.6000, 0.8000, 0.0000, 1.0000])
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
        manifold: Literal["plane", "torus", "sphere"] = "plane",
    ) -> None:
        like = next(decoder.parameters(), torch.zeros(()))
        super().__init__(likelihood, noise, noise_floor, like)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        if manifold not in ("plane", "torus", "sphere"):
            raise ValueError(f"manifold must be 'plane', 'torus' or 'sphere', got {manifold!r}")
        if (manifold == "torus" and latent_dim % 2) or (manifold == "sphere" and latent_dim < 2):
            raise ValueError(f"a torus has two latents for each circle, a sphere at least two: got {latent_dim}")
        self.decoder, self.latent_dim, self.manifold = decoder, latent_dim, manifold
        self.register_buffer("origin", torch.zeros(latent_dim, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        rows = len(x) if x is not None else size
        with pyro.plate("data", rows):
            z = self.latents()
            return self.observe(self._decode(z), z.dim() - 1, x)

    def latents(self) -> Tensor:
        """The site of the latents, `[*lead, D]`."""
        z: Tensor = pyro.sample("z", dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1))
        return z

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z], `[..., D] -> [..., *event]` (pixels in [0, 1] for Bernoulli)."""
        return self.expected(self._decode(z))

    def _decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameters, `[..., D] -> [..., *event]`."""
        # The particle plate of Pyro adds dims on the left; nets take one batch dim.
        parameters: Tensor = self.decoder(self.directions(z).reshape(-1, self.latent_dim))
        return parameters.reshape(*z.shape[:-1], *parameters.shape[1:])

    def directions(self, z: Tensor) -> Tensor:
        """What the decoder sees of z, `[..., D]`: unit vectors of a manifold, on the plane z itself."""
        if self.manifold == "plane":
            return z
        size = 2 if self.manifold == "torus" else self.latent_dim
        return normalize(z.unflatten(-1, (-1, size)), dim=-1).flatten(-2)

    def linear_head(self, site: str) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """(trunk, last weight) of the site's parameters, for decoders that have `trunk` and `head`."""
        trunk, head = getattr(self.decoder, "trunk", None), getattr(self.decoder, "head", None)
        if site != "x" or trunk is None or not isinstance(head, nn.Linear):
            return None
        return lambda z: trunk(self.directions(z)), head.weight
