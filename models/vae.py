"""The variational autoencoder's generative model (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

    z ~ N(0, I_D),   x | z ~ Bernoulli(logits = decoder(z))   or   N(decoder(z), sigma^2 I)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.compat import ModelTraits
from pyrovae.errors import DataError

__all__ = ["VAE"]


class VAE(PyroModule):
    """A Gaussian latent vector and a neural decoder.

    Args:
        decoder: module from `[..., D]` to the likelihood's parameters `[..., *event]` (logits, or means).
        latent_dim: D.
        likelihood: "bernoulli" (binary data), or "gaussian" with one learned noise scale for all pixels.
        noise_floor: smallest noise scale of the Gaussian likelihood: without one, constant pixels drive the density
            up without bound.

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
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        *,
        noise_floor: float = 1e-2,
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be 'bernoulli' or 'gaussian', got {likelihood!r}")
        if likelihood == "gaussian" and not noise_floor > 0:
            raise ValueError("a Gaussian likelihood needs a positive noise_floor")
        self.decoder, self.latent_dim = decoder, latent_dim
        self.likelihood, self.noise_floor = likelihood, noise_floor
        like = next(decoder.parameters(), torch.zeros(()))
        self.register_buffer("origin", torch.zeros(latent_dim, dtype=like.dtype, device=like.device))
        if likelihood == "gaussian":
            # In a plain module: Pyro would unfreeze a parameter of the PyroModule itself.
            self.noise = nn.ParameterDict({"log": torch.tensor(-1.0, dtype=like.dtype, device=like.device)})

    @property
    def noise_scale(self) -> Tensor:
        """sigma of the Gaussian likelihood: the floor plus a learned positive number."""
        return self.noise_floor + self.noise["log"].exp()

    def observation(self, parameters: Tensor, event_dim: int) -> Any:
        """The likelihood at the decoder's output `[..., *event]`."""
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=parameters).to_event(event_dim)
        return dist.Normal(parameters, self.noise_scale).to_event(event_dim)

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
            if x is not None and x.shape[1:] != parameters.shape[z.dim() - 1 :]:
                event = tuple(parameters.shape[z.dim() - 1 :])
                raise DataError(
                    f"the data have shape {tuple(x.shape)}, but the decoder makes {event} per datum: reshape either"
                )
            if x is not None and self.likelihood == "bernoulli" and pyro.settings.get("validate_distributions_pyro"):
                check_binary(x)
            return pyro.sample("x", self.observation(parameters, parameters.dim() - z.dim() + 1), obs=x)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z], `[..., D] -> [..., *event]` (pixels in [0, 1] for Bernoulli)."""
        parameters = self.decoder(z.reshape(-1, self.latent_dim))
        parameters = parameters.reshape(*z.shape[:-1], *parameters.shape[1:])
        return parameters.sigmoid() if self.likelihood == "bernoulli" else parameters

    def linear_head(self, site: str) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """(trunk, last weight) of the site's parameters, for decoders that have `trunk` and `head`."""
        trunk, head = getattr(self.decoder, "trunk", None), getattr(self.decoder, "head", None)
        if site != "x" or trunk is None or not isinstance(head, nn.Linear):
            return None
        return trunk, head.weight


def check_binary(x: Tensor) -> None:
    """Raise `DataError` for grey values under a Bernoulli likelihood."""
    if not ((x == 0) | (x == 1)).all():
        raise DataError(
            "grey values under a Bernoulli likelihood: binarise the data (pyrovae.data.load(..., "
            "binarization='static')), or use likelihood='gaussian'"
        )
