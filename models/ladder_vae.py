r"""The variational ladder autoencoder (Zhao, Song & Ermon 2017): independent latent groups at different depths.

.. math::
    p(z) = \prod_l N(z_l; 0, I), \qquad x | z \sim p(x; f_0(h_1)), \quad h_L = f_L(z_L), \quad h_l = f_l(h_{l+1}, z_l)

The prior has no hierarchy, the decoder has: what a few layers can paint goes into the shallow groups, what takes many
into the deep ones. (A chain of conditionals p(z_l | z_{l+1}) does not do that: at the optimum of its ELBO the bottom
group alone already generates the data.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.compat import ModelTraits
from pyrovae.models.decoded import Decoded, Likelihood

__all__ = ["LadderVAE"]


class LadderVAE(Decoded):
    """Sites "z1" (shallowest) to "zL", drawn deepest first, and "x"; plate "data".

    Args:
        decoder: module from all latents `[..., D]`, deepest group first, to the likelihood's parameters
            `[..., *event]`: a `nets.LadderDecoder`.
        sizes: latents of each group, shallowest first.
        likelihood, noise, noise_floor: as in `VAE`. The original's weighted absolute error is "laplace" with a noise of
            1/8 on images in [0, 1].

    Attributes:
        fade: `[L]`, share of each group that reaches the decoder, shallowest first: 1, unless groups are trained one
            after another (`schedules.DeepFirst`).

    Example:
        >>> from pyrovae.nets import LadderDecoder
        >>> model = LadderVAE(LadderDecoder([2, 3], (1, 8, 8), width=16), sizes=[2, 3])
        >>> model(None, size=4).shape
        torch.Size([4, 1, 8, 8])
        >>> model.groups
        {'z1': slice(3, 5, None), 'z2': slice(0, 3, None)}
    """

    traits = ModelTraits()

    def __init__(
        self,
        decoder: nn.Module,
        sizes: Sequence[int],
        likelihood: Likelihood = "bernoulli",
        *,
        noise: float | None = None,
        noise_floor: float = 1e-2,
    ) -> None:
        like = next(decoder.parameters(), torch.zeros(()))
        super().__init__(likelihood, noise, noise_floor, like)
        if len(sizes) < 1 or min(sizes) < 1:
            raise ValueError(f"a ladder needs groups of at least one latent, shallowest first, got {list(sizes)}")
        made_for = tuple(getattr(decoder, "sizes", sizes))
        if made_for != tuple(sizes):
            raise ValueError(f"the decoder was made for groups of {list(made_for)}, not of {list(sizes)}")
        self.decoder, self.sizes = decoder, tuple(sizes)
        self.register_buffer("origin", torch.zeros(self.latent_dim, dtype=like.dtype, device=like.device))
        self.register_buffer("fade", torch.ones(len(sizes), dtype=like.dtype, device=like.device))

    @property
    def latent_dim(self) -> int:
        """D, of all groups together."""
        return sum(self.sizes)

    @property
    def groups(self) -> dict[str, slice]:
        """Site -> its place among all latents, shallowest first."""
        starts = [sum(self.sizes[level + 1 :]) for level in range(len(self.sizes))]
        return {f"z{level + 1}": slice(start, start + size)
                for level, (start, size) in enumerate(zip(starts, self.sizes, strict=True))}  # fmt: skip

    def prior(self, level: int) -> Any:
        """p(z_l) of the group at `level` (0 is the shallowest), event `[d]`."""
        zero = self.origin[: self.sizes[level]]
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        with pyro.plate("data", len(x) if x is not None else size):
            z = self.latents()
            return self.observe(self._decode(z), z.dim() - 1, x)

    def latents(self) -> Tensor:
        """The sites of all groups, drawn deepest first, as one tensor `[*lead, D]`."""
        return self._joined([self.draw(level) for level in reversed(range(len(self.sizes)))])

    def draw(self, level: int) -> Tensor:
        """The site of a group."""
        found: Tensor = pyro.sample(f"z{level + 1}", self.prior(level))
        return found

    def mean(self, z: Tensor) -> Tensor:
        """E[x | z], `[..., D] -> [..., *event]`, deepest group first in z."""
        return self.expected(self._decode(z))

    def _joined(self, z: list[Tensor]) -> Tensor:
        # The particle plate of Pyro puts its dim before some groups only when they come from a guide.
        lead = torch.broadcast_shapes(*(group.shape[:-1] for group in z))
        return torch.cat([group.expand(*lead, -1) for group in z], -1)

    def _decode(self, z: Tensor) -> Tensor:
        fade = torch.cat([self.fade[level].expand(self.sizes[level]) for level in reversed(range(len(self.sizes)))])
        flat = (z * fade).reshape(-1, self.latent_dim)  # nets take one batch dim
        parameters = self.decoder(flat)
        return parameters.reshape(*z.shape[:-1], *parameters.shape[1:])
