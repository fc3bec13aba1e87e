"""Monotone rational-quadratic splines (Gregory & Delbourgo 1982; Durkan, Bekasov, Murray & Papamakarios 2019).

On each of K pieces, with theta in [0, 1] across it, chord slope s and knot slopes d_0, d_1,

    y = y_0 + h (s theta^2 + d_0 theta (1 - theta)) / (s + (d_0 + d_1 - 2 s) theta (1 - theta))

which is increasing and can be inverted by a quadratic equation. Outside [-bound, bound] the spline is the identity;
it meets it with slope 1.

Pyro has such splines as well; in float32 its inverse meets steep pieces with a bare assertion or with errors of whole
nats (its pieces may be a thousand times steeper than the identity). Here the narrowest piece is a hundredth of the
box, the equation is solved by whichever of its two forms does not cancel, and points outside cannot give NaN gradients.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.nn import functional

__all__ = ["AutoregressiveSpline", "rational_quadratic"]

_LEAST = 1e-2  # least width and height of a piece, as a part of the box, and least slope at a knot


def rational_quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The spline (or its inverse) at `x`, and the log of its own derivative there; elementwise.

    Args:
        x: `[...]`.
        widths, heights: logits of the pieces' sizes, `[..., K]`; equal ones give equal pieces.
        slopes: `[..., K - 1]`, unconstrained slopes at the inner knots; 0 is slope 1.
        bound: half-width of the box.
    """
    width, left = _pieces(widths, bound)
    height, bottom = _pieces(heights, bound)
    inner = _LEAST + functional.softplus(slopes + math.log(math.expm1(1 - _LEAST)))
    slope = functional.pad(inner, (1, 1), value=1.0)

    inside = x.abs() < bound
    z = torch.where(inside, x, torch.zeros_like(x))  # so that no point outside reaches the formulas
    piece = (z.unsqueeze(-1) >= (bottom if inverse else left)[..., 1:]).sum(-1, keepdim=True)

    def pick(values: Tensor) -> Tensor:
        return values.gather(-1, piece).squeeze(-1)

    w, h, x_0, y_0 = pick(width), pick(height), pick(left), pick(bottom)
    d_0, d_1 = pick(slope[..., :-1]), pick(slope[..., 1:])
    s = h / w
    bend = d_0 + d_1 - 2 * s
    theta = _solve((z - y_0) / h, s, d_0, bend) if inverse else (z - x_0) / w
    product = theta * (1 - theta)
    below = s + bend * product
    value = x_0 + w * theta if inverse else y_0 + h * (s * theta.square() + d_0 * product) / below
    rise = d_1 * theta.square() + 2 * s * product + d_0 * (1 - theta).square()
    log_slope = 2 * s.log() + rise.log() - 2 * below.log()
    log_slope = torch.where(inside, -log_slope if inverse else log_slope, torch.zeros_like(x))
    return torch.where(inside, value, x), log_slope


def _pieces(logits: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Sizes of the pieces and where each begins, both `[..., K]`."""
    size = _LEAST + (1 - _LEAST * logits.shape[-1]) * logits.softmax(-1)
    start = functional.pad(size[..., :-1].cumsum(-1), (1, 0))
    return 2 * bound * size, 2 * bound * start - bound


def _solve(part: Tensor, s: Tensor, d_0: Tensor, bend: Tensor) -> Tensor:
    """theta at which the spline has risen by `part` of its piece: a theta^2 + b theta + c = 0."""
    a, b, c = s - d_0 + part * bend, d_0 - part * bend, -s * part
    # The root is s * rise / below, with the bounds on sizes and slopes never under 1e-3: smaller is rounding.
    root = (b.square() - 4 * a * c).clamp_min(1e-8).sqrt()
    forward = b >= 0
    one = torch.ones_like(b)
    theta = torch.where(
        forward, -2 * c / torch.where(forward, b + root, one), (root - b) / torch.where(forward, one, 2 * a)
    )
    return theta.clamp(0.0, 1.0)


class _Conditioned(Transform):
    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, net: Any, bound: float) -> None:
        super().__init__(cache_size=1)
        self.net, self.bound = net, bound
        self._log_slope: Tensor

    def _spline(self, x: Tensor, at: Tensor, inverse: bool) -> Tensor:
        widths, heights, slopes = (logits.mT for logits in self.net(x))
        value, log_slope = rational_quadratic(at, widths, heights, slopes, self.bound, inverse=inverse)
        self._log_slope = -log_slope if inverse else log_slope
        return value

    def _call(self, x: Tensor) -> Tensor:
        return self._spline(x, x, inverse=False)

    def _inverse(self, y: Tensor) -> Tensor:
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):  # every pass finds one more coordinate
            x = self._spline(x, y, inverse=True)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        x_old, y_old = self._cached_x_y
        if x is not x_old or y is not y_old:
            self(x)
        return self._log_slope.sum(-1)


class AutoregressiveSpline(ConditionalTransformModule):
    """Splines whose knots come from an autoregressive net of the input and a context; a Pyro conditional transform.

    Args:
        net: Pyro's `ConditionalAutoRegressiveNN` with `param_dims=[K, K, K - 1]`.
        bound: half-width of the box.
    """

    def __init__(self, net: nn.Module, bound: float) -> None:
        super().__init__()
        self.nn, self.bound = net, bound

    def condition(self, context: Tensor) -> Transform:
        return _Conditioned(partial(self.nn, context=context), self.bound)
