r"""A VAE whose decoder is a leaky-ReLU net of one or two latents: posterior and evidence are known exactly.

    z ~ N(0, I_D),   x | z ~ N(g(z), s^2 I_X),   g continuous and affine on every cell of latent space

On a cell the model is linear-Gaussian, so evidence, posterior and moments are sums over cells of Gaussian integrals
over intervals (D = 1, closed form) or convex polygons (D = 2, quadrature in one dimension to 1e-12): see
`pyrovae.piecewise`. Beyond two latents the integrals over polytopes are out of reach.

Balestriero, Paris & Baraniuk (2020), "Analytical Probability Distributions and Exact Expectation-Maximization for Deep
Generative Networks".
"""

from __future__ import annotations

import copy
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.batching import check_finite
from pyrovae.compat import ModelTraits
from pyrovae.errors import DataError
from pyrovae.piecewise.cells import Intervals, Layer, Polygons, augmented, intervals, polygons
from pyrovae.piecewise.evidence import differentiable_evidence
from pyrovae.piecewise.gaussians import gaussians
from pyrovae.piecewise.polygons import PolygonNormals
from pyrovae.piecewise.posterior import CellPosterior
from pyrovae.piecewise.truncated import TruncatedNormals

__all__ = ["PiecewiseAffineVAE"]

_BOX, _LARGEST = 20.0, 1e4  # half the width of the square of two latents: the first tried, and the last
_LEAK = 40.0  # nats below p(x) that mass outside the square must stay


class PiecewiseAffineVAE(PyroModule):
    """Leaky-ReLU decoder, Gaussian noise, one or two latents; exact posterior and evidence.

    Args:
        layers: widths `[D, H_1, ..., X]`, or the decoder's `nn.Linear` layers themselves.
        leak: slope of the units below zero; 1 makes the model probabilistic PCA.
        noise: where the learned noise scale s starts.

    Call `model(x)` as the Pyro program, `model(None, size=n)` to generate; sites "z" and "x", plate "data".

    Cells and integrals are computed in float64 whatever the parameters' dtype: float32 weights are float64 numbers, and
    boundaries and far tails need the digits. Results come back in the parameters' dtype.

    Raises:
        ValueError: more than two latents.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = PiecewiseAffineVAE([1, 8, 2], noise=0.3).double()
        >>> x = model(None, size=5).detach()
        >>> model.posterior(x).mean.shape, model.log_evidence(x).shape
        (torch.Size([5, 1]), torch.Size([5]))
    """

    traits = ModelTraits()

    def __init__(self, layers: Sequence[int | nn.Linear], leak: float = 0.1, noise: float = 0.5) -> None:
        super().__init__()
        nets = _linear(layers)
        if nets[0].in_features > 2:
            raise ValueError(
                f"the exact posterior is known for 1 or 2 latents, not for {nets[0].in_features}: use models.VAE"
            )
        if not 0 < leak <= 1:
            raise ValueError(f"leak must lie in (0, 1], got {leak}")
        if not noise > 0:
            raise ValueError(f"noise must be positive, got {noise}")
        self.layers, self.leak = nn.ModuleList(nets), leak
        # In a plain module: Pyro would unfreeze a parameter of the PyroModule itself.
        self.parts = nn.ParameterDict({"log_noise": nets[0].weight.new_tensor(math.log(noise))})

    @property
    def latent_dim(self) -> int:
        """D."""
        return self._linears[0].in_features

    @property
    def _linears(self) -> list[nn.Linear]:
        return cast(list[nn.Linear], list(self.layers))

    @property
    def noise(self) -> Tensor:
        """s, scalar."""
        return self.parts["log_noise"].exp()

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        if x is not None:
            self._check(x)
        like = self.parts["log_noise"]
        with pyro.plate("data", len(x) if x is not None else size):
            zero = like.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            return pyro.sample("x", dist.Normal(self.mean(z), self.noise).to_event(1), obs=x)

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z] = g(z), `[..., D] -> [..., X]`."""
        *hidden, last = self._linears
        for layer in hidden:
            z = nn.functional.leaky_relu(layer(z), self.leak)
        return last(z)

    def cells(self, box: float = _BOX) -> Intervals | Polygons:
        """The cells of latent space, float64.

        Args:
            box: with two latents, half the width of the square around the origin that they are cut out of.
        """
        layers, _ = self.layers_and_noise()
        return intervals(layers, self.leak) if self.latent_dim == 1 else polygons(layers, self.leak, box)

    def posterior(self, x: Tensor) -> CellPosterior:
        """p(z | x), batch `[B]`, event `[D]`; a constant: no gradient reaches the model through it."""
        self._check(x)
        check_finite((x,), {})
        with torch.no_grad():
            if self.latent_dim == 1:
                return self._over(self.cells(), x)
            box = _BOX
            while True:
                posterior = self._over(self.cells(box), x)
                needed = self._needed_box(posterior.log_evidence, x.shape[-1])
                if needed <= box:
                    return posterior
                if needed > _LARGEST:
                    raise DataError(
                        f"the farthest datum has log p(x) = {float(posterior.log_evidence.min()):.3g}: too far out for "
                        "two latents; scale the data, or start from a larger noise"
                    )
                box = needed

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), `[B]`, nats; differentiable, once, in weights, noise and x."""
        posterior = self.posterior(x)
        layers, noise = self.layers_and_noise()
        maps = augmented(layers, posterior.cells.factors)[-1]
        return differentiable_evidence(posterior, maps, noise, x.double()).to(posterior.dtype)

    def marginal(self, seen: Tensor) -> PiecewiseAffineVAE:
        """The model of some outputs alone, a copy: its `posterior` and `log_evidence` are those given these outputs.

        Args:
            seen: which, `[X]` bool.
        """
        *hidden, last = self._linears
        some = nn.Linear(last.in_features, 1)  # torch warns of layers without outputs, and nothing may be seen
        some.weight, some.bias = (nn.Parameter(part.detach()[seen]) for part in (last.weight, last.bias))
        some.out_features = len(some.bias)
        found = PiecewiseAffineVAE([*copy.deepcopy(hidden), some], leak=self.leak)
        found.parts["log_noise"].data.copy_(self.parts["log_noise"])
        return found

    def layers_and_noise(self) -> tuple[list[Layer], Tensor]:
        """(W_l, v_l) of every layer and s, float64, with gradient."""
        log_noise = self.parts["log_noise"].double()
        return [(layer.weight.double(), layer.bias.double()) for layer in self._linears], log_noise.exp()

    def set_layers_and_noise(self, layers: Sequence[Layer], noise: Tensor) -> None:
        """Set the parameters in place."""
        with torch.no_grad():
            for layer, (weight, bias) in zip(self._linears, layers, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            self.parts["log_noise"].copy_(noise.log())

    def _over(self, cells: Intervals | Polygons, x: Tensor) -> CellPosterior:
        layers, noise = self.layers_and_noise()
        found = gaussians(augmented(layers, cells.factors)[-1], noise, x.double())
        dtype = self.parts["log_noise"].dtype
        if isinstance(cells, Intervals):
            return TruncatedNormals(cells, found, dtype)
        return PolygonNormals(cells, found, dtype)

    def _needed_box(self, log_evidence: Tensor, pixels: int) -> float:
        """Half the width of a square outside which every datum has less than exp(-40) of its mass.

        p(x, |z|_inf > L) <= max_z p(x | z) Pr(|z|_inf > L) <= (2 pi s^2)^{-X/2} 4 exp(-L^2 / 2); what is found inside a
        smaller square is a lower bound of p(x).
        """
        highest = -0.5 * pixels * math.log(2 * math.pi) - pixels * float(self.parts["log_noise"])
        nats = highest - float(log_evidence.min()) + math.log(4) + _LEAK
        return math.sqrt(2 * max(nats, 0.0))

    def _check(self, x: Tensor) -> None:
        pixels = self._linears[-1].out_features
        if x.dim() != 2 or x.shape[-1] != pixels:
            raise DataError(f"the data have shape {tuple(x.shape)}, but the model makes [B, {pixels}]: reshape them")


def _linear(layers: Sequence[int | nn.Linear]) -> list[nn.Linear]:
    """Linear layers from widths, or those given, checked."""
    widths = [int(layer) for layer in layers if isinstance(layer, numbers.Integral)]
    nets = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(widths) + len(nets) != len(layers):
        raise ValueError(
            "PiecewiseAffineVAE takes widths or nn.Linear layers alone: it puts leaky ReLUs between them (leak=...)"
        )
    if not nets:
        nets = [nn.Linear(before, after) for before, after in itertools.pairwise(widths)]
    elif widths:
        raise ValueError("PiecewiseAffineVAE takes widths or linear layers, not both")
    if len(nets) < 2 or any(a.out_features != b.in_features for a, b in itertools.pairwise(nets)):
        raise ValueError("PiecewiseAffineVAE needs widths [D, H, ..., X], or at least two linear layers that fit")
    if any(net.bias is None for net in nets):
        raise ValueError("PiecewiseAffineVAE needs linear layers with a bias")
    return nets
