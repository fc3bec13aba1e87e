r"""Chart autoencoder: an atlas of a manifold as a mixture over charts (Schonsheck, Chen & Lai 2019).

.. math::
    c \sim \mathrm{Cat}(p), \qquad z | c \sim U(0, 1)^d, \qquad x | z, c \sim N(D(D_c(z)), s^2 I)

The decoder of one latent vector draws a continuous image of R^d, which no closed manifold (circle, sphere, torus) is;
N charts, each the image of a cube, together can be one. D_c are the small decoders of the charts, D is common to all.

`guides.Charts` has the way back and the chart predictor. Any other guide of continuous latents sees z alone, the chart
summed out, in coordinates u = logit z:

.. math::
    \log p(x, u) = \log \sum_c p_c N(x; D(D_c(\sigma(u))), s^2 I) + \sum_j \log \sigma'(u_j)
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.compat import ModelTraits
from pyrovae.models.decoded import Decoded, Likelihood
from pyrovae.nets.charts import ChartMLP

__all__ = ["ChartAutoencoder"]


class ChartAutoencoder(Decoded):
    """Sites "c" (enumerated), "z" and "x", plate "data".

    Args:
        charts: the D_c, d coordinates to l features; as many charts as it has nets.
        decoder: D, module from `[B, l]` to the likelihood's parameters `[B, *event]`.
        likelihood, noise, noise_floor: as in `VAE`.
        learn_weights: whether p is learned by gradient; else it stays as it is (uniform, or as `set_weights` left it).

    Example:
        >>> model = ChartAutoencoder(ChartMLP(4, [2, 16, 6]), nn.Linear(6, 9))
        >>> model(None, size=3).shape
        torch.Size([3, 9])
    """

    traits = ModelTraits(enumerated=True, charts=True)

    def __init__(
        self,
        charts: ChartMLP,
        decoder: nn.Module,
        likelihood: Likelihood = "gaussian",
        *,
        noise: float | None = None,
        noise_floor: float = 1e-2,
        learn_weights: bool = False,
    ) -> None:
        if not isinstance(charts, ChartMLP):
            raise TypeError(f"the charts' decoders are one nets.ChartMLP, got {type(charts).__name__}")
        like = charts.biases[0]
        super().__init__(likelihood, noise, noise_floor, like)
        self.charts, self.decoder = charts, decoder
        self.latent_dim, self.num_charts = charts.sizes[0], charts.num_charts
        logits = torch.zeros(self.num_charts, dtype=like.dtype, device=like.device)
        # In a plain module: Pyro would unfreeze a parameter of the PyroModule itself.
        self.weights = _Weights(logits, learn_weights)

    @property
    def log_weights(self) -> Tensor:
        """log p, `[N]`."""
        return torch.log_softmax(self.weights.logits, 0)

    def set_weights(self, frequencies: Tensor) -> None:
        """Set p, for training by a loss that leaves it alone (`losses.ChartLoss`): `Charts.frequencies(data)`.

        Those of dead charts may be 0.
        """
        if (
            frequencies.shape != (self.num_charts,) or not torch.isfinite(frequencies).all()
            or (frequencies < 0).any() or not frequencies.any()
        ):  # fmt: skip
            raise ValueError(
                f"the weights of the charts are {self.num_charts} finite numbers, none negative and not all of them 0: "
                f"guide.frequencies(data) gives them; got {frequencies}"
            )
        with torch.no_grad():
            self.weights.logits.copy_(frequencies.clamp_min(torch.finfo(frequencies.dtype).tiny).log())

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        logits = self.log_weights
        with pyro.plate("data", len(x) if x is not None else size):
            c = pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            zero = logits.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Uniform(zero, torch.ones_like(zero)).to_event(1))
            parameters = self.decode(z, c)
            return self.observe(parameters, max(z.dim() - 1, c.dim()), x)

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """D(D_c(z)), the likelihood's parameters, of `z: [*R, d]` and `c: [*C]` that broadcast, `[*(R, C), *event]`."""
        features = self.charts(z, c)
        # Nets take one batch dim.
        parameters: Tensor = self.decoder(features.reshape(-1, features.shape[-1]))
        return parameters.reshape(*features.shape[:-1], *parameters.shape[1:])

    def mean(self, z: Tensor, c: Tensor) -> Tensor:
        """E[x | z, c]; shapes as in `decode`."""
        return self.expected(self.decode(z, c))


class _Weights(nn.Module):
    logits: Tensor

    def __init__(self, logits: Tensor, learned: bool) -> None:
        super().__init__()
        if learned:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
