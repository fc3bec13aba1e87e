"""What models with a neural decoder share: the likelihood of its output, and the checks on the data.

    x | z ~ Bernoulli(logits = decoder(z)),   N(decoder(z), s^2 I)   or   Laplace(decoder(z), s)
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import DataError

__all__ = ["Decoded", "Likelihood"]

Likelihood = Literal["bernoulli", "gaussian", "laplace"]


class Decoded(PyroModule):
    """A model whose decoder gives the likelihood's parameters of each datum.

    Args:
        likelihood: "bernoulli" (binary data), "gaussian" or "laplace", with one noise scale for all pixels.
        noise: the noise scale; learned by default.
        noise_floor: smallest learned noise scale: without one, constant pixels drive the density up without bound.
        like: a tensor of the decoder's dtype and device.
    """

    def __init__(self, likelihood: Likelihood, noise: float | None, noise_floor: float, like: Tensor) -> None:
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian", "laplace"):
            raise ValueError(f"likelihood must be 'bernoulli', 'gaussian' or 'laplace', got {likelihood!r}")
        if likelihood != "bernoulli" and not noise_floor > 0:
            raise ValueError(f"a {likelihood.capitalize()} likelihood needs a positive noise_floor")
        if noise is not None and not noise > 0:
            raise ValueError(f"noise must be positive, got {noise}")
        self.likelihood, self.noise_floor, self.fixed_noise = likelihood, noise_floor, noise
        if likelihood != "bernoulli" and noise is None:
            # In a plain module: Pyro would unfreeze a parameter of the PyroModule itself.
            self.noise = nn.ParameterDict({"log": torch.tensor(-1.0, dtype=like.dtype, device=like.device)})

    @property
    def noise_scale(self) -> Tensor | float:
        """s: as given, or the floor plus a learned positive number."""
        return self.fixed_noise if self.fixed_noise is not None else self.noise_floor + self.noise["log"].exp()

    def observation(self, parameters: Tensor, event_dim: int) -> Any:
        """The likelihood at the decoder's output `[..., *event]`."""
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=parameters).to_event(event_dim)
        kind = dist.Normal if self.likelihood == "gaussian" else dist.Laplace
        return kind(parameters, self.noise_scale).to_event(event_dim)

    def observe(self, parameters: Tensor, batch_dim: int, x: Tensor | None) -> Tensor:
        """The site "x" at the decoder's output `[*batch, *event]`, inside the data plate."""
        event = tuple(parameters.shape[batch_dim:])
        if x is not None and x.shape[1:] != event:
            raise DataError(
                f"the data have shape {tuple(x.shape)}, but the decoder makes {event} per datum: reshape either"
            )
        if x is not None and self.likelihood == "bernoulli" and pyro.settings.get("validate_distributions_pyro"):
            _check_binary(x)
        found: Tensor = pyro.sample("x", self.observation(parameters, len(event)), obs=x)
        return found

    def expected(self, parameters: Tensor) -> Tensor:
        """E[x | z] at the decoder's output (pixels in [0, 1] for Bernoulli)."""
        return parameters.sigmoid() if self.likelihood == "bernoulli" else parameters


def _check_binary(x: Tensor) -> None:
    """Raise `DataError` for grey values under a Bernoulli likelihood."""
    if not ((x == 0) | (x == 1)).all():
        raise DataError(
            "grey values under a Bernoulli likelihood: binarise the data (pyrovae.data.load(..., "
            "binarization='static')), or use likelihood='gaussian'"
        )
