r"""Expectation-maximisation for continuous piecewise-affine decoders (Balestriero, Paris & Baraniuk 2020).

E-step, exact: the moments of z on every cell r, summed over data, with zeta = (1, z):

    M_r = sum_b E[1[z in r] zeta zeta' | x_b]   [R, 1 + D, 1 + D],     T_r = sum_b x_b E[1[z in r] zeta' | x_b]

M-steps, in closed form. With the other layers and all signs held fixed the output on cell r is

    f_r + F_r Theta Y_r zeta,     Theta = (v, W) of one layer,   Y_r zeta = (1, its input),   F_r, f_r the layers above

and the best Theta solves sum_r F_r' F_r Theta Y_r M_r Y_r' = sum_r F_r' (T_r - f_r M_r[0]) Y_r', a linear system of
size n_out (n_in + 1): the paper's, for weight matrix and bias at once. The noise is the mean squared residual.

* The output layer has no signs above it: its M-step, and that of the noise after it, maximise the expected
  log-likelihood exactly, so log p(x) never falls (`layers="output"`).
* A step in an earlier layer moves the cells, which the fixed signs do not see: a generalised EM, damped, whose log p(x)
  usually rises but may fall (`layers="all"`). The curve that is returned is exact and shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from pyrovae.piecewise.cells import Layer, augmented
from pyrovae.piecewise.posterior import CellPosterior

if TYPE_CHECKING:
    from pyrovae.models.piecewise_affine_vae import PiecewiseAffineVAE

__all__ = ["EMResult", "fit_em"]


@dataclass(frozen=True)
class EMResult:
    """The path of an EM fit.

    Attributes:
        log_likelihood: exact mean log p(x) before the first iteration and after each, `[iterations + 1]`, nats per
            datum.
        converged: an iteration changed it by less than the tolerance.
    """

    log_likelihood: Tensor
    converged: bool

    @property
    def iterations(self) -> int:
        return len(self.log_likelihood) - 1

    def __repr__(self) -> str:
        first, last = float(self.log_likelihood[0]), float(self.log_likelihood[-1])
        ended = ", converged" if self.converged else ""
        return f"EM: {first:.4f} -> {last:.4f} nats per datum in {self.iterations} iterations{ended}"


class _Statistics(NamedTuple):
    """What the M-steps need of an E-step: q_l, M_r, T_r, the sum of |x|^2, and N."""

    factors: tuple[Tensor, ...]
    second: Tensor
    cross: Tensor
    square: Tensor
    number: int


def fit_em(
    model: PiecewiseAffineVAE,
    x: Tensor,
    iterations: int = 60,
    *,
    layers: Literal["output", "all"] = "output",
    tolerance: float = 0.0,
    sweeps: int = 20,
    damping: float = 0.05,
    weight_variance: float | None = None,
    noise_from: int = 0,
    seed: int = 0,
) -> EMResult:
    """Fit the model in place by expectation-maximisation on all data at once.

    Args:
        model: the model; its parameters are set, in their own dtype.
        x: data, `[N, X]`.
        iterations: E-steps, each followed by an M-step.
        layers: "output" for the output layer and the noise, exact and monotone; "all" for every layer.
        tolerance: stop once an iteration changes the mean log p(x) by less, nats per datum.
        sweeps: with "all", passes over the layers per E-step, each in random order; the published ones take 20 to 100.
        damping: with "all", the share of the way that a layer moves to its solution: 0.05 as published, 1 for all.
        weight_variance: of a zero-mean Gaussian prior on weights and biases (published: 100): a ridge, which keeps
            layers that the data do not determine in place; the curve is of the likelihood alone. None is maximum
            likelihood, with the smallest solution where there are many.
        noise_from: iterations before the noise is updated (published: a few).
        seed: of the order of the layers.

    Returns:
        `EMResult` with the exact curve.

    Example:
        Gradient M-steps need nothing of their own: `guides.Exact` makes SVI an EM, and the exact log p(x) has a
        gradient.

        >>> import pyro, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyrovae.guides.exact import Exact
        >>> from pyrovae.models.piecewise_affine_vae import PiecewiseAffineVAE
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(50, 2, dtype=torch.double)
        >>> model = PiecewiseAffineVAE([1, 8, 2]).double()
        >>> result = fit_em(model, x, 10)
        >>> bool((result.log_likelihood.diff() > 0).all())
        True
        >>> with pyro.get_param_store().scope():
        ...     svi = SVI(model, Exact(model), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        ...     loss = svi.step(x)
        >>> bool(abs(loss / 50 + result.log_likelihood[-1]) < 1e-9)  # E-step exact: the loss is -log p(x)
        True
        >>> (-model.log_evidence(x).mean()).backward()
    """
    if iterations < 1 or sweeps < 1 or not 0 < damping <= 1 or tolerance < 0 or noise_from < 0:
        raise ValueError(
            "fit_em needs iterations >= 1, sweeps >= 1, 0 < damping <= 1, tolerance >= 0 and noise_from >= 0"
        )
    if layers not in ("output", "all"):
        raise ValueError(f"layers must be 'output' or 'all', got {layers!r}")
    if weight_variance is not None and not weight_variance > 0:
        raise ValueError(f"weight_variance must be positive, got {weight_variance}")
    generator = torch.Generator().manual_seed(seed)
    curve: list[Tensor] = []
    converged = False
    with torch.no_grad():
        posterior = model.posterior(x)
        curve.append(posterior.log_evidence.mean())
        # Residuals are differences of squares: of data far from 0 nothing would be left. A ridge holds the bias to 0.
        centre = x.double().mean(0) if weight_variance is None else torch.zeros_like(x[0]).double()
        while len(curve) <= iterations and not converged:
            statistics = _expect(posterior, x.double() - centre)
            weights, noise = model.layers_and_noise()
            weights[-1] = weights[-1][0], weights[-1][1] - centre
            ridge = 0.0 if weight_variance is None else float(noise**2) / weight_variance
            last = len(weights) - 1
            if layers == "output":
                weights[last] = _solve(weights, statistics, last, ridge, 1.0)
            for _ in range(sweeps if layers == "all" else 0):
                for depth in torch.randperm(last + 1, generator=generator).tolist():
                    weights[depth] = _solve(weights, statistics, depth, ridge, damping)
            if len(curve) > noise_from:
                noise = _residual(weights, statistics).sqrt()
            weights[-1] = weights[-1][0], weights[-1][1] + centre
            model.set_layers_and_noise(weights, noise)
            posterior = model.posterior(x)
            curve.append(posterior.log_evidence.mean())
            converged = bool((curve[-1] - curve[-2]).abs() < tolerance)
    return EMResult(torch.stack(curve), converged)


def _expect(posterior: CellPosterior, x: Tensor) -> _Statistics:
    """The E-step."""
    first = posterior.first
    zeta = torch.cat([posterior.weights.unsqueeze(-1), first], -1).sum(0)  # [R, 1 + D]
    rest = torch.cat([first.sum(0).unsqueeze(-1), posterior.second.sum(0)], -1)
    second = torch.cat([zeta.unsqueeze(-2), rest], -2)
    cross = torch.cat([torch.einsum("bx,br->rx", x, posterior.weights).unsqueeze(-1),
                       torch.einsum("bx,brd->rxd", x, first)], -1)  # fmt: skip
    return _Statistics(posterior.cells.factors, second, cross, x.square().sum(), len(x))


def _solve(weights: Sequence[Layer], given: _Statistics, depth: int, ridge: float, share: float) -> Layer:
    """The layer moved by `share` of the way to the solution of its system, the nearest one where there are many."""
    weight, bias = weights[depth]
    theta = torch.cat([bias.unsqueeze(-1), weight], -1)
    below = _input(weights, given.factors, depth)  # Y_r, [R, 1 + n_in, 1 + D]
    gram = below @ given.second @ below.mT
    if depth == len(weights) - 1:
        target = (given.cross @ below.mT).sum(0)
        gram = gram.sum(0)
        gap = target - theta @ gram - ridge * theta
        change = _least_squares(gram, ridge, gap.mT).mT
    else:
        matrix, offset = _above(weights, given.factors, depth)  # F_r, f_r
        rest = given.cross - offset.unsqueeze(-1) * given.second[:, :1]
        target = (matrix.mT @ rest @ below.mT).sum(0)
        system = torch.einsum("rij,rkl->ikjl", matrix.mT @ matrix, gram).reshape(theta.numel(), -1)
        gap = (target - ridge * theta).flatten() - system @ theta.flatten()
        change = _least_squares(system, ridge, gap.unsqueeze(-1)).view_as(theta)
    theta = theta + share * change
    return theta[:, 1:], theta[:, 0]


def _least_squares(system: Tensor, ridge: float, right: Tensor) -> Tensor:
    eye = torch.eye(len(system), dtype=system.dtype, device=system.device)
    return torch.linalg.pinv(system + ridge * eye, hermitian=True) @ right


def _input(weights: Sequence[Layer], factors: Sequence[Tensor], depth: int) -> Tensor:
    """(1, input) of a layer as a matrix on (1, z), on every cell."""
    number, latent = len(factors[0]), weights[0][0].shape[1]
    eye = torch.eye(1 + latent).to(weights[0][0]).expand(number, -1, -1)
    if depth == 0:
        return eye
    below = augmented(weights[:depth], factors[: depth - 1])[-1]
    return torch.cat([eye[:, :1], factors[depth - 1].unsqueeze(-1) * below], -2)


def _above(weights: Sequence[Layer], factors: Sequence[Tensor], depth: int) -> tuple[Tensor, Tensor]:
    """The output as F_r times a hidden layer's pre-activation, plus f_r: `[R, X, n]` and `[R, X]`."""
    matrix = torch.diag_embed(factors[depth])
    offset = torch.zeros_like(factors[depth])
    for layer, (weight, bias) in enumerate(weights[depth + 1 :], depth + 1):
        matrix, offset = weight @ matrix, offset @ weight.mT + bias
        if layer < len(factors):
            matrix, offset = factors[layer].unsqueeze(-1) * matrix, factors[layer] * offset
    return matrix, offset


def _residual(weights: Sequence[Layer], given: _Statistics) -> Tensor:
    """Mean of the squared residuals of all pixels: the noise variance."""
    maps = augmented(weights, given.factors)[-1]
    total = given.square - 2 * (given.cross * maps).sum() + (maps @ given.second * maps).sum()
    variance = total / (given.number * maps.shape[-2])
    if not variance > 0:
        raise ValueError("the noise has fallen to zero: the decoder fits the data exactly, so give it fewer units")
    return variance
