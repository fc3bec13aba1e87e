r"""A chain of Gaussian layers (Rezende, Mohamed & Wierstra 2014; Sonderby et al. 2016), the decoder on the last one.

.. math::
    z_L \sim N(0, I), \qquad z_l | z_{l+1} \sim N(\mu_l(z_{l+1}), \mathrm{diag}(s_l(z_{l+1})^2)), \qquad
    x | z \sim p(x; \mathrm{decoder}(z_1))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.decoded import Likelihood
from pyrovae.models.ladder_vae import LadderVAE

__all__ = ["HierarchicalVAE"]


class HierarchicalVAE(LadderVAE):
    """Sites "z1" (next to the data) to "zL", drawn deepest first, and "x"; plate "data".

    Args:
        decoder: module from z_1 `[R, d_1]` to the likelihood's parameters `[R, *event]`.
        sizes: d_l of each layer, shallowest first.
        conditionals: L - 1 modules, shallowest first, from z_{l+1} `[R, d_{l+1}]` to (mu_l, log s_l), `[R, 2 d_l]`.
        likelihood, noise, noise_floor: as in `VAE`.
        scale_floor: added to exp of the learned log s_l.

    Example:
        >>> import torch
        >>> model = HierarchicalVAE(torch.nn.Linear(2, 5), [2, 3], [torch.nn.Linear(3, 4)])
        >>> model(None, size=4).shape
        torch.Size([4, 5])
    """

    def __init__(
        self,
        decoder: nn.Module,
        sizes: Sequence[int],
        conditionals: Sequence[nn.Module],
        likelihood: Likelihood = "bernoulli",
        *,
        scale_floor: float = 1e-2,
        noise: float | None = None,
        noise_floor: float = 1e-2,
    ) -> None:
        super().__init__(decoder, sizes, likelihood, noise=noise, noise_floor=noise_floor)
        if len(conditionals) != len(sizes) - 1:
            raise ValueError(f"{len(sizes)} layers need {len(sizes) - 1} conditionals, got {len(conditionals)}")
        if not scale_floor >= 0:
            raise ValueError(f"scale_floor must not be negative, got {scale_floor}")
        self.conditionals, self.scale_floor = nn.ModuleList(conditionals), scale_floor
        del self.fade  # layers reach the decoder through one another: none of them can come in later

    def prior(self, level: int, above: Tensor | None = None) -> Any:
        """p(z_l | z_{l+1}) of the layer at `level` (0 is the shallowest), given `above: [*lead, d_{l+1}]`; of the
        deepest one, p(z_L)."""
        return dist.Normal(*self.moments(level, above)).to_event(1)

    def moments(self, level: int, above: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mu_l and s_l of `prior`, `[*lead, d_l]`; of the deepest layer zeros and ones, `[d_L]`."""
        if level == len(self.sizes) - 1:
            zero = self.origin[: self.sizes[level]]
            return zero, torch.ones_like(zero)
        if above is None:
            raise ValueError(f"layer {level} depends on the one above it: pass above=..., draws of z{level + 2}")
        found = self.conditionals[level](above.reshape(-1, above.shape[-1]))
        if found.shape[-1] != 2 * self.sizes[level]:
            raise ValueError(
                f"conditional {level} must give mean and log scale of {self.sizes[level]} latents, "
                f"{2 * self.sizes[level]} numbers, but gives {found.shape[-1]}"
            )
        loc, log_scale = found.reshape(*above.shape[:-1], -1).chunk(2, -1)
        return loc, self.scale_floor + log_scale.exp()

    def latents(self) -> Tensor:
        z: list[Tensor] = []
        for level in reversed(range(len(self.sizes))):
            z.append(pyro.sample(f"z{level + 1}", self.prior(level, z[-1] if z else None)))
        return self._joined(z)

    def log_base(self, z: Tensor) -> Tensor:
        """log p(z_1, ..., z_L), `[R, D] -> [R]`, nats, deepest layer first in z."""
        total, above = z.new_zeros(len(z)), None
        for level in reversed(range(len(self.sizes))):
            here = z[..., self.groups[f"z{level + 1}"]]
            # Unchecked, here and below: of chains that ran away `losses.EnergyELBO` tells by their energy.
            normal = torch.distributions.Normal(*self.moments(level, above), validate_args=False)
            total, above = total + normal.log_prob(here).sum(-1), here
        return total

    def unwhiten(self, eps: Tensor) -> Tensor:
        """z = T(e), `[R, D]`: what draws of standard normals e, deepest layer first, become."""
        z: list[Tensor] = []
        for level in reversed(range(len(self.sizes))):
            loc, scale = self.moments(level, z[-1] if z else None)
            z.append(loc + scale * eps[..., self.groups[f"z{level + 1}"]])
        return torch.cat(z, -1)

    def _decode(self, z: Tensor) -> Tensor:
        flat = z[..., self.groups["z1"]].reshape(-1, self.sizes[0])
        parameters = self.decoder(flat)
        return parameters.reshape(*z.shape[:-1], *parameters.shape[1:])
