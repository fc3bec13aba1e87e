r"""The forward process of a diffusion: a guide without parameters (Ho, Jain & Abbeel 2020).

.. math::
    q(x_1 .. x_T | x_0) = \prod_{t=1}^T N(x_t; \sqrt{1 - \beta_t}\, x_{t-1}, \beta_t I)
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal

from pyrovae import handlers, noise
from pyrovae.compat import GuideTraits
from pyrovae.errors import ScaleError
from pyrovae.guides.amortized import first_argument
from pyrovae.guides.base import Guide
from pyrovae.plates import read_plate

__all__ = ["ForwardProcess"]


class ForwardProcess(Guide):
    """Sites "x1" .. "x{T}" for a `models.Diffusion`.

    Train the model with `losses.DiffusionELBO()`, which takes single steps of the chain; stock `Trace_ELBO` takes whole
    chains. `draws` and `log_weights` are of whole chains, too: T runs of the net.

    Args:
        model: a `models.Diffusion`.

    Example:
        >>> from pyrovae.models.diffusion import Diffusion
        >>> from pyrovae.nets.time_mlp import TimeMLP
        >>> guide = ForwardProcess(Diffusion(TimeMLP((2,), hidden=(8,)), (2,), num_steps=4, betas=(0.1, 0.5)))
        >>> guide.log_weights(5, torch.zeros(3, 2)).shape
        torch.Size([5, 3])
    """

    traits = GuideTraits(name="ForwardProcess", latents=("diffusion",))

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "signal"):  # guides know models by what they have
            raise TypeError(f"ForwardProcess is for a models.Diffusion, got {type(model).__name__}")
        super().__init__(model, plate="data")

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model, here = self.model, first_argument(*args, **kwargs)
        with read_plate(model, "data", args, kwargs).open():
            for t, beta in enumerate(model.beta, 1):
                step = dist.Normal((1 - beta).sqrt() * here, beta.sqrt()).to_event(len(model.event_shape))
                here = pyro.sample(f"x{t}", step)

    def _chain(self, num_samples: int, x: Tensor) -> Tensor:
        """x_0 .. x_T, `[T + 1, S, B, *event]`."""
        model = self.model
        model.check(x)
        here = x.expand(num_samples, *x.shape)
        chain = [here]
        for beta in model.beta:
            eps = noise.normal(num_samples, len(x), model.event_shape.numel(), like=x).view(here.shape)
            here = (1 - beta).sqrt() * here + beta.sqrt() * eps
            chain.append(here)
        return torch.stack(chain)

    def _draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        chain = self._chain(num_samples, first_argument(*args, **kwargs))[1:].flip(0)  # in the model's order
        return chain.flatten(3).movedim(0, 2).flatten(2)

    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with self._aside(), torch.no_grad():
            chain = self._chain(num_samples, first_argument(*args, **kwargs))
        return {f"x{t}": chain[t] for t in range(1, len(chain))}

    def log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x, x_1 .. x_T) - log q(x_1 .. x_T | x) at whole chains, `[S, B]`, nats."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if handlers.kl_weight() != 1.0:
            raise ScaleError(f"importance weights under a KL weight of {handlers.kl_weight():g}: evaluate with 1")
        model, dims = self.model, len(self.model.event_shape)
        with self._aside():
            chain = self._chain(num_samples, first_argument(*args, **kwargs))
            total = _log_normal(chain[-1], 0.0, 1.0, dims)
            for t, beta in enumerate(model.beta, 1):
                total = total + _log_normal(chain[t - 1], model.backward_mean(chain[t], t), model.sigma[t - 1], dims)
                total = total - _log_normal(chain[t], (1 - beta).sqrt() * chain[t - 1], beta.sqrt(), dims)
        return total


def _log_normal(x: Tensor, loc: Tensor | float, scale: Tensor | float, dims: int) -> Tensor:
    """Log-density summed over the last `dims`."""
    return Normal(loc, scale).log_prob(x).flatten(x.dim() - dims).sum(-1)
