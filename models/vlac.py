r"""Variational ladder autoencoder with clusters (Willetts, Roberts & Holmes 2019): a mixture prior on every group.

.. math::
    y_l \sim \mathrm{Cat}(\pi_l), \qquad z_l | y_l = k \sim N(\mu_{lk}, \mathrm{diag}(s_{lk}^2)), \qquad
    x | z \text{ by the ladder decoder}

so each depth has a clustering of its own. With q(y, z | x) = q(z | x) p(y | z), which is optimal given q(z | x), the
classes are summed out of the ELBO in closed form,

.. math::
    \mathrm{ELBO} = E_q \Big[ \log p(x|z) + \sum_l \log \sum_k \pi_{lk} N(z_l; \mu_{lk}, s_{lk}) - \log q(z|x) \Big]

and a datum's clusters are the responsibilities at its latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.compat import ModelTraits
from pyrovae.mixture import MixtureOfNormals
from pyrovae.models.decoded import Likelihood
from pyrovae.models.ladder_vae import LadderVAE

__all__ = ["VLAC"]


class VLAC(LadderVAE):
    """A ladder with K_l classes on group l: sites as in `LadderVAE`, and "y1" .. "yL" where classes are enumerated.

    Args:
        decoder, sizes, likelihood, noise, noise_floor: as in `LadderVAE`; a single group makes the mixture VAE.
        num_clusters: K_l of each group, shallowest first.
        classes: "collapsed", a mixture density on each z_l, or "enumerated", sites y_l that Pyro sums out (for
            `TraceEnum_ELBO`, or a guide that has them). Values are the same.
        learn_weights: whether pi is learned; by default it stays uniform, which keeps clusters from dying out.
        scale_floor: smallest s.

    Example:
        >>> from pyrovae.nets import LadderDecoder
        >>> model = VLAC(LadderDecoder([2, 3], (1, 8, 8), width=16), [2, 3], num_clusters=[4, 5])
        >>> model.responsibilities(torch.zeros(7, 5), level=1).shape
        torch.Size([7, 5])
    """

    def __init__(
        self,
        decoder: nn.Module,
        sizes: Sequence[int],
        num_clusters: Sequence[int],
        likelihood: Likelihood = "bernoulli",
        *,
        classes: Literal["collapsed", "enumerated"] = "collapsed",
        learn_weights: bool = False,
        scale_floor: float = 0.05,
        noise: float | None = None,
        noise_floor: float = 1e-2,
    ) -> None:
        super().__init__(decoder, sizes, likelihood, noise=noise, noise_floor=noise_floor)
        if len(num_clusters) != len(sizes) or min(num_clusters) < 1:
            raise ValueError(f"num_clusters needs a number of at least 1 for each of {len(sizes)} groups")
        if classes not in ("collapsed", "enumerated"):
            raise ValueError(f"classes must be 'collapsed' or 'enumerated', got {classes!r}")
        if not scale_floor > 0:
            raise ValueError(f"scale_floor must be positive, got {scale_floor}")
        self.classes, self.scale_floor, self.num_clusters = classes, scale_floor, tuple(num_clusters)
        self.traits = ModelTraits(enumerated=classes == "enumerated")
        like = self.origin
        self.mixtures = nn.ModuleList(
            _Mixture(number, size, learn_weights).to(like.device, like.dtype)
            for number, size in zip(num_clusters, sizes, strict=True)
        )

    def components(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """(log pi `[K]`, mu `[K, d]`, s `[K, d]`) of a group; 0 is the shallowest."""
        mixture = cast(_Mixture, self.mixtures[level])
        return torch.log_softmax(mixture.logits, 0), mixture.locs, self.scale_floor + softplus(mixture.raw_scales)

    def prior(self, level: int) -> Any:
        log_weights, locs, scales = self.components(level)
        return MixtureOfNormals(log_weights, locs, scales)

    def draw(self, level: int) -> Tensor:
        if self.classes == "collapsed":
            return super().draw(level)
        log_weights, locs, scales = self.components(level)
        y = pyro.sample(f"y{level + 1}", dist.Categorical(logits=log_weights), infer={"enumerate": "parallel"})
        found: Tensor = pyro.sample(
            f"z{level + 1}", dist.Normal(Vindex(locs)[y], Vindex(scales)[y]).to_event(1)
        )  # fmt: skip
        return found

    def responsibilities(self, z: Tensor, level: int) -> Tensor:
        """p(y_l | z), `[..., D] -> [..., K]`, from all latents of the data, deepest group first."""
        group = z[..., self.groups[f"z{level + 1}"]].unsqueeze(-2)
        log_weights, locs, scales = self.components(level)
        each = torch.distributions.Normal(locs, scales).log_prob(group).sum(-1)
        return torch.softmax(log_weights + each, -1)

    def generate(self, level: int, cluster: int, size: int) -> Tensor:
        """E[x | z] for draws of one class of one group, the others from their priors, `[n, *event]`."""
        if not 0 <= cluster < self.num_clusters[level]:
            raise ValueError(f"group {level} has clusters 0 to {self.num_clusters[level] - 1}, got {cluster}")
        with torch.no_grad():
            z = [self.prior(k).sample((size,)) for k in range(len(self.sizes))]
            _, locs, scales = self.components(level)
            z[level] = locs[cluster] + scales[cluster] * torch.randn_like(z[level])
            return self.mean(torch.cat(z[::-1], -1))

    def start_clusters(self, z: Tensor, *, seed: int = 0) -> None:
        """Place every group's components by fitting a Gaussian mixture to codes `[N, D]`, after a first training.

        Responsibilities of one component alone are the usual failure of mixtures that start blind.
        """
        from sklearn.mixture import GaussianMixture

        for level in range(len(self.sizes)):
            mixture = cast(_Mixture, self.mixtures[level])
            codes = z[..., self.groups[f"z{level + 1}"]].detach().cpu().double().numpy()
            found = GaussianMixture(self.num_clusters[level], covariance_type="diag", random_state=seed).fit(codes)
            scales = torch.from_numpy(found.covariances_).sqrt()
            with torch.no_grad():
                mixture.locs.copy_(torch.from_numpy(found.means_))
                # softplus backwards; what is below the floor starts just above it
                mixture.raw_scales.copy_(torch.expm1((scales - self.scale_floor).clamp_min(1e-3)).log())
                if mixture.logits.requires_grad:
                    mixture.logits.copy_(torch.from_numpy(found.weights_).log())


class _Mixture(nn.Module):
    logits: Tensor

    def __init__(self, number: int, size: int, learn_weights: bool) -> None:
        super().__init__()
        logits = torch.zeros(number)
        self.locs = nn.Parameter(torch.randn(number, size))
        self.raw_scales = nn.Parameter(torch.full((number, size), 0.5))
        if learn_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
