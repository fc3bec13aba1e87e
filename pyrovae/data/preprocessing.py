r"""Grey images as continuous data, and the way back.

With grey levels :math:`x \in \{0, 1, \dots, L - 1\} / (L - 1)` (:math:`L = 256` for 8-bit images):

* ``"logit"`` (Papamakarios, Pavlakou & Murray 2017): uniform dequantisation, then a logit that stays finite,

  .. math:: x' = \frac{(L - 1) x + u}{L}, \quad u \sim \mathrm{U}[0, 1), \qquad
            y = \mathrm{logit}(s), \quad s = \lambda + (1 - 2 \lambda) x'.

  A density of :math:`y` is one of :math:`x'` by :math:`\log p(x') = \log p(y) + \sum_i \log |dy_i / dx'_i|` with
  :math:`\log dy / dx' = \log(1 - 2 \lambda) - \log s - \log(1 - s)`, and bounds the probability of the grey levels
  themselves: :math:`\log P(x) \ge \mathrm{E}_u \log p(x') - X \log L` (Jensen).
* ``"centred"``: :math:`y = x - m`, with :math:`m` the mean of each pixel over the training images. A density of
  :math:`y` is one of :math:`x`; but grey levels without noise have no bounded density: a likelihood with a learned
  variance needs a floor on it.

Sums and logarithms are taken in float64 and rounded once, so that the numbers do not depend on the machine's vector
width or number of threads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pyrovae.errors import DataError

__all__ = ["PREPROCESSINGS", "Preprocessing", "from_logit", "logit_log_det", "pixel_mean", "to_logit"]

Preprocessing = Literal["none", "logit", "centred"]
PREPROCESSINGS: tuple[Preprocessing, ...] = ("none", "logit", "centred")


def to_logit(x: Tensor, *, levels: int, logit_lambda: float, seed: int, what: str) -> Tensor:
    """Dequantises once, from a generator of its own, and takes the logit.

    Args:
        x: Grey values ``[N, X]`` in [0, 1].
        levels: Number of grey levels ``L``.
        logit_lambda: ``l`` above, in (0, 1/2).
        seed: Seed of the noise.
        what: Name of the images, for the error.

    Returns:
        ``y`` ``[N, X]``, of the dtype of ``x``.

    Raises:
        DataError: If the values are not multiples of ``1 / (levels - 1)``: noise of one level does not fill the gaps.
    """
    grey = x.double() * (levels - 1)
    whole = grey.round()
    # float32 rounding of k / (L - 1) moves a level by at most 2e-5
    if (grey - whole).abs().max() > 1e-3:
        raise DataError(
            f"grey values in {what} are not multiples of 1/{levels - 1}: save the images as uint8, "
            "or use another preprocessing"
        )
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)
    s = whole.add_(noise).mul_((1 - 2 * logit_lambda) / levels).add_(logit_lambda)
    return s.logit_().to(x.dtype)


def from_logit(y: Tensor, logit_lambda: float) -> Tensor:
    """``x'`` of ``y``: in [0, 1) for data, up to ``l / (1 - 2 l)`` outside for other ``y``."""
    return (y.sigmoid() - logit_lambda) / (1 - 2 * logit_lambda)


def logit_log_det(y: Tensor, logit_lambda: float) -> Tensor:
    """``sum_i log |dy_i / dx'_i|`` over the last dimension, nats: ``[N, X] -> [N]``."""
    wide = y.double()
    softplus = torch.nn.functional.softplus
    each = softplus(wide) + softplus(-wide) + math.log(1 - 2 * logit_lambda)
    return each.sum(-1).to(y.dtype)


def pixel_mean(x: Tensor) -> Tensor:
    """Mean of every pixel over the images: ``[N, X] -> [X]``."""
    return x.mean(0, dtype=torch.float64).to(x.dtype)
