r"""Densities whose parts follow one another: images p(x | z) = prod_i p(x_i | x_{<i}, z), and flows as priors of codes.

Of images `log_prob` is one pass of a masked net; a draw goes pixel by pixel in raster order, one pass each. As these
are one distribution, whatever simulates a model (prior predictions, calibration, bidirectional Monte Carlo) draws whole
images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import binary_cross_entropy_with_logits

from pyrovae.discretised_logistic import LEVELS, DiscretisedLogisticMixture, check_levels
from pyrovae.errors import DataError

__all__ = ["AutoregressiveFlow", "AutoregressiveImages", "FlowPrior"]

_ONE = torch.Size()  # a single draw
_LARGEST = 3.0  # log-scale of a step


class AutoregressiveImages(TorchDistribution):
    """Images `[channels, H, W]` given features.

    Args:
        net: masked net, `(image [R, channels, H, W], features [R, F, H, W]) -> [R, P, H, W]`.
        features: `[*batch, F, H, W]`.
        channels: of the image.
        pixels: "bernoulli", one logit for each channel of a binary image, or "logistic", the parameters of
            `DiscretisedLogisticMixture` for values in [-1, 1].
    """

    arg_constraints = {"features": constraints.independent(constraints.real, 3)}
    has_rsample = False

    def __init__(
        self, net: Callable[[Tensor, Tensor], Tensor], features: Tensor, channels: int = 1,
        pixels: Literal["bernoulli", "logistic"] = "bernoulli", validate_args: bool | None = None,
    ) -> None:  # fmt: skip
        if pixels not in ("bernoulli", "logistic"):
            raise ValueError(f"pixels must be 'bernoulli' or 'logistic', got {pixels!r}")
        self.net, self.features, self.channels, self.pixels = net, features, channels, pixels
        event = torch.Size([channels, *features.shape[-2:]])
        super().__init__(features.shape[:-3], event, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=3)
    def support(self) -> Any:
        inner = constraints.boolean if self.pixels == "bernoulli" else LEVELS
        return constraints.independent(inner, 3)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> AutoregressiveImages:
        features = self.features.expand(*batch_shape, *self.features.shape[-3:])
        return AutoregressiveImages(self.net, features, self.channels, self.pixels, validate_args=False)

    def parameters(self, x: Tensor) -> Tensor:
        """The pixels' parameters given all pixels before each, `[*batch, P, H, W]`."""
        lead = torch.broadcast_shapes(x.shape[:-3], self.features.shape[:-3])
        x, features = (part.expand(*lead, *part.shape[-3:]) for part in (x, self.features))
        found = self.net(x.reshape(-1, *x.shape[-3:]), features.reshape(-1, *features.shape[-3:]))
        return found.view(*lead, *found.shape[-3:])

    def check(self, x: Tensor) -> None:
        """Raise `DataError` for data that are no such images (their values: where Pyro validates)."""
        if x.shape[1:] != self.event_shape:
            raise DataError(
                f"the data have shape {tuple(x.shape)}, but the decoder makes {tuple(self.event_shape)} per datum: "
                "reshape either"
            )
        if self.pixels == "logistic" and pyro.settings.get("validate_distributions_pyro"):
            check_levels(x)

    def log_prob(self, value: Tensor) -> Tensor:
        """`[*batch]`, nats."""
        if self._validate_args:
            self._validate_sample(value)
        parameters = self.parameters(value)
        if self.pixels == "logistic":
            return DiscretisedLogisticMixture(parameters, self.channels, validate_args=False).log_prob(value)
        if parameters.shape[-3] != self.channels:
            raise ValueError(
                f"binary pixels take one logit for each of {self.channels} channels, but the net gives "
                f"{parameters.shape[-3]}: make it with outputs={self.channels}"
            )
        target = value.expand_as(parameters)
        return -binary_cross_entropy_with_logits(parameters, target, reduction="none").sum((-1, -2, -3))

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """`[*sample_shape, *batch, channels, H, W]`; H * W passes of the net."""
        shape = self._extended_shape(sample_shape)
        x = torch.zeros(shape, dtype=self.features.dtype, device=self.features.device)
        with torch.no_grad():
            for row in range(shape[-2]):
                for column in range(shape[-1]):
                    here = self.parameters(x)[..., row : row + 1, column : column + 1]
                    if self.pixels == "bernoulli":
                        drawn = torch.bernoulli(here.sigmoid())
                    else:
                        drawn = DiscretisedLogisticMixture(here, self.channels, validate_args=False).sample()
                    x[..., row, column] = drawn[..., 0, 0]
        return x


class AutoregressiveFlow(nn.Module):
    """A prior p(z) that is scored in one pass: eps = f(z) ~ N(0, I), each step affine in z_i given z_{<i}.

        log p(z) = log N(eps; 0, I) + sum_i log |d eps_i / d z_i|

    Along the encoder's path it is an inverse autoregressive posterior on eps, with a deeper generator for it (Chen et
    al. 2017). A draw takes D passes for each step.

    Args:
        dim: D.
        num_transforms: steps; the order of the latents is turned round between them.
        hidden: widths of each step's masked net.
    """

    origin: Tensor

    def __init__(self, dim: int, num_transforms: int = 4, hidden: tuple[int, ...] = (64,)) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"an autoregressive flow needs at least 2 latents, got {dim}")
        if num_transforms < 1:
            raise ValueError(f"num_transforms must be at least 1, got {num_transforms}")
        self.dim = dim
        order = torch.arange(dim)
        self.steps = nn.ModuleList(
            AutoRegressiveNN(dim, list(hidden), permutation=order) for _ in range(num_transforms)
        )
        self.register_buffer("origin", torch.zeros(dim))

    def distribution(self) -> FlowPrior:
        """p(z), event `[D]`."""
        return FlowPrior(self)

    def to_noise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(eps, log |d eps / d z|) of `[..., D]`, one pass for each step."""
        log_det = torch.zeros_like(z[..., 0])
        for number, step in enumerate(self.steps):
            mean, log_scale = self._moments(step, z.flip(-1) if number else z)
            z = ((z.flip(-1) if number else z) - mean) * (-log_scale).exp()
            log_det = log_det - log_scale.sum(-1)
        return z, log_det

    def from_noise(self, eps: Tensor) -> Tensor:
        """The inverse of `to_noise`, D passes for each step."""
        z = eps
        for number in reversed(range(len(self.steps))):
            known: list[Tensor] = []
            for i in range(self.dim):
                rest = torch.zeros_like(z[..., i:])
                mean, log_scale = self._moments(self.steps[number], torch.cat([torch.stack(known, -1), rest], -1)
                                                if known else rest)  # fmt: skip
                known.append(z[..., i] * log_scale[..., i].exp() + mean[..., i])
            z = torch.stack(known, -1)
            z = z.flip(-1) if number else z
        return z

    @staticmethod
    def _moments(step: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = step(z)
        return mean, _LARGEST * (log_scale / _LARGEST).tanh()  # bounded smoothly: far draws must not overflow


class FlowPrior(TorchDistribution):
    """The distribution of an `AutoregressiveFlow`."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: AutoregressiveFlow, batch_shape: torch.Size = _ONE) -> None:
        self.flow = flow
        super().__init__(batch_shape, torch.Size([flow.dim]), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> FlowPrior:
        return FlowPrior(self.flow, torch.Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        eps, log_det = self.flow.to_noise(value)
        return torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum(-1) + log_det

    def rsample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        origin = self.flow.origin
        eps = torch.randn(self._extended_shape(sample_shape), dtype=origin.dtype, device=origin.device)
        return self.flow.from_noise(eps)
