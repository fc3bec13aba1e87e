r"""Training a diffusion by single steps of its chain (Ho, Jain & Abbeel 2020).

The ELBO of `models.Diffusion` is a sum over T steps,

.. math::
    -\mathrm{KL}(q(x_T | x_0) \| N(0, I)) - \sum_t k_t - \sum_t w_t E \| \epsilon - \epsilon_\theta(x_t, t) \|^2

of which the first two parts are known; T times one term of the last, at a step drawn uniformly, has it as its mean.
The published weighting leaves the w_t out. It is no bound on log p(x) and is never called one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrovae import noise
from pyrovae.compat import LossTraits
from pyrovae.errors import ScaleError
from pyrovae.handlers import kl_weight
from pyrovae.losses.base import PerDatumLoss
from pyrovae.plates import read_plate

__all__ = ["DiffusionELBO", "SimpleDiffusionLoss"]


class _Steps(PerDatumLoss):
    """Weighted errors of the net at some of a diffusion's steps.

    Args:
        steps: how many are drawn for each datum; None takes all T, with one draw of the noise at each.
    """

    def __init__(self, steps: int | None = 1) -> None:
        super().__init__(1 if steps is None else steps)
        self.steps = steps

    def _errors(self, model: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Unbiased estimate of sum_t weight_t E|eps - eps_theta(x_t, t)|^2, `[B]`, from `weight: [T]`."""
        model.check(x)
        if kl_weight() != 1.0:
            raise ScaleError("a KL weight is not defined for a diffusion: train with kl_weight=1")
        total, number = model.num_steps, self.steps or model.num_steps
        if self.steps is None:
            t = torch.arange(1, total + 1, device=x.device).unsqueeze(1).expand(-1, len(x))
        else:
            uniform = torch.special.ndtr(noise.normal(number, len(x), 1, like=x)[..., 0])
            t = (uniform * total).long().clamp_max(total - 1) + 1
        eps = noise.normal(number, len(x), model.event_shape.numel(), like=x).view(number, *x.shape)
        with model._pyro_context:  # so that SVI sees the net's parameters
            found = model.predict_noise(model.diffuse(x, t, eps), t)
        return total * (weight[t - 1] * (eps - found).square().flatten(2).sum(-1)).mean(0)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._require(model, guide)
        with guide.in_program():
            guide.check_parameters(*args, **kwargs)
            value = self._per_datum(model, guide, *args, **kwargs)
        plate = read_plate(model, "data", args, kwargs)
        return -plate.full_size / plate.size * value.sum()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        self._require(model, guide)
        model.update_average()
        return super().loss_and_grads(model, guide, *args, **kwargs)


class DiffusionELBO(_Steps):
    """The ELBO, estimated without bias from `steps` of the chain for each datum."""

    traits = LossTraits(name="ELBO", diffusion=True)

    def _per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = _data(args, kwargs)
        return -model.prior_kl(x) - model.constant - self._errors(model, x, model.weight)


class SimpleDiffusionLoss(_Steps):
    """-E|eps - eps_theta(x_t, t)|^2 over all steps alike: better pictures than the ELBO gives, and no bound."""

    traits = LossTraits(name="-E|eps - eps_theta|^2", diffusion=True)

    def _per_datum(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = _data(args, kwargs)
        return -self._errors(model, x, torch.full_like(model.weight, 1 / model.num_steps))


def _data(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
