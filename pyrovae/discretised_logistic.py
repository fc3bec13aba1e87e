r"""Discretised logistic mixtures over 8-bit colours (Salimans, Karpathy, Chen & Kingma 2017).

With pixels scaled to [-1, 1] and h = 1/255, a component with mean m and scale s gives the level x

.. math::
    P(x) = \sigma\big((x - m + h)/s\big) - \sigma\big((x - m - h)/s\big)

and the levels at both ends the whole tail. Green's mean moves with red, blue's with both:
m_G + c_0 R and m_B + c_1 R + c_2 G.
"""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from pyrovae.errors import DataError

__all__ = ["LEVELS", "DiscretisedLogisticMixture", "check_levels"]

_HALF = 1 / 255
_SMALLEST = -7.0  # of log s
_ONE = torch.Size()  # a single draw


class _Levels(constraints.Constraint):
    """The values k / 127.5 - 1 for k = 0 .. 255: of anything between them the probabilities do not sum to one."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        level = (value + 1) * 127.5
        return (value.abs() <= 1) & ((level - level.round()).abs() < 1e-3)

    def explain(self, value: Tensor) -> str:
        """What is wrong with values, and what to do."""
        wrong = 1 - float(self.check(value).double().mean())
        return (
            f"{wrong:.0%} of the pixels are none of the 256 values k / 127.5 - 1 from -1 to 1 that discretised "
            "logistics take: of 8-bit images in [0, 1] pass 2 * x - 1"
        )


LEVELS = _Levels()


def check_levels(x: Tensor) -> None:
    """Raise `DataError` for images that are no 8-bit values in [-1, 1]."""
    if not LEVELS.check(x).all():
        raise DataError(LEVELS.explain(x))


class DiscretisedLogisticMixture(TorchDistribution):
    """Images `[3, H, W]` (or `[1, H, W]`), values k / 127.5 - 1 for k = 0 .. 255.

    Args:
        parameters: `[*batch, P, H, W]`; of M components 10 M channels for three colours (M weights' logits, 3 M means,
            3 M log-scales, 3 M coefficients before tanh), 3 M for one (logits, means, log-scales).
        channels: 3 or 1.
    """

    arg_constraints = {"parameters": constraints.independent(constraints.real, 3)}
    support = constraints.independent(LEVELS, 3)
    has_rsample = False

    def __init__(self, parameters: Tensor, channels: int = 3, validate_args: bool | None = None) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        per = 10 if channels == 3 else 3
        if parameters.shape[-3] % per or not parameters.shape[-3]:
            raise ValueError(f"the parameters need a multiple of {per} channels, got {parameters.shape[-3]}")
        self.parameters, self.channels = parameters, channels
        self.num_components = parameters.shape[-3] // per
        shape = parameters.shape
        super().__init__(shape[:-3], torch.Size([channels, *shape[-2:]]), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> DiscretisedLogisticMixture:
        parameters = self.parameters.expand(*batch_shape, *self.parameters.shape[-3:])
        return DiscretisedLogisticMixture(parameters, self.channels, validate_args=False)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(log weights `[*, M, H, W]`; means, log-scales and coefficients `[*, channels, M, H, W]`)."""
        m, c = self.num_components, self.channels
        sizes = [m, c * m, c * m, *([3 * m] if c == 3 else [])]
        logits, *others = self.parameters.split(sizes, dim=-3)
        others = [part.unflatten(-3, (-1, m)) for part in others]
        coefficients = others[2].tanh() if c == 3 else None
        return torch.log_softmax(logits, -3), others[0], others[1].clamp_min(_SMALLEST), coefficients

    @staticmethod
    def _moved(means: Tensor, coefficients: Tensor | None, x: Tensor) -> Tensor:
        """Means given the colours before, `x: [*, channels, 1, H, W]`."""
        if coefficients is None:
            return means
        red, green = x.narrow(-4, 0, 1), x.narrow(-4, 1, 1)
        c0, c1, c2 = (coefficients.narrow(-4, k, 1) for k in range(3))
        first, second, third = (means.narrow(-4, k, 1) for k in range(3))
        return torch.cat(torch.broadcast_tensors(first, second + c0 * red, third + c1 * red + c2 * green), -4)

    def log_prob(self, value: Tensor) -> Tensor:
        """`[*batch]`, nats."""
        if self._validate_args:
            self._validate_sample(value)
        log_weights, means, log_scales, coefficients = self._parts()
        x = value.unsqueeze(-3)  # a dim for components
        means = self._moved(means, coefficients, x)
        inverse = (-log_scales).exp()
        upper, lower = (x - means + _HALF) * inverse, (x - means - _HALF) * inverse
        # log of a difference of sigmoids, without cancellation: upper - lower = 2 h / s is a positive number.
        width = upper - lower
        middle = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-width))
        each = torch.where(x < -1 + _HALF, logsigmoid(upper), torch.where(x > 1 - _HALF, -softplus(lower), middle))
        return torch.logsumexp(log_weights + each.sum(-4), -3).sum((-1, -2))

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """`[*sample_shape, *batch, channels, H, W]`, on the grid of levels."""
        with torch.no_grad():
            log_weights, means, log_scales, coefficients = self._parts()
            shape = (*sample_shape, *log_weights.shape)
            gumbel = -torch.log(torch.empty(shape, dtype=means.dtype, device=means.device).exponential_())
            index = (log_weights + gumbel).argmax(-3, keepdim=True).unsqueeze(-4)

            def chosen(part: Tensor) -> Tensor:
                whole = part.expand(*sample_shape, *part.shape)
                return whole.gather(-3, index.expand(*whole.shape[:-3], 1, *whole.shape[-2:])).squeeze(-3)

            mean, scale = chosen(means), chosen(log_scales).exp()
            uniform = torch.rand_like(mean).clamp(1e-6, 1 - 1e-6)
            noise = scale * (uniform.log() - torch.log1p(-uniform))
            if coefficients is None:
                return _level(mean + noise)
            c0, c1, c2 = chosen(coefficients).unbind(-3)
            red = _level(mean.select(-3, 0) + noise.select(-3, 0))
            green = _level(mean.select(-3, 1) + noise.select(-3, 1) + c0 * red)
            blue = _level(mean.select(-3, 2) + noise.select(-3, 2) + c1 * red + c2 * green)
            return torch.stack([red, green, blue], -3)


def _level(x: Tensor) -> Tensor:
    """The nearest of 256 levels in [-1, 1]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
