r"""Energies on every layer of a Gaussian hierarchy (Cui, Wu & Han 2023, at CVPR).

.. math::
    p(z_1, \ldots, z_L) = \exp\Big(\sum_l f_l(z_l)\Big) \, N(z_L; 0, I) \prod_{l<L} N(z_l; \mu_l(z_{l+1}),
    \mathrm{diag}(s_l(z_{l+1})^2)) / Z

Layers are coupled through the base alone, so an energy on one of them moves all. Z depends on the base's nets too:
they have a negative phase as the energies have, which an untilted hierarchy has not. The chain runs in e, where z =
T(e) top-down, and its target is exactly log N(e; 0, I) + sum_l f_l(T_l(e)); adding log p0(T(e)) in its place, as
released code does, leaves out the Jacobian of T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyrovae.models.decoded import Likelihood
from pyrovae.models.hierarchical_vae import HierarchicalVAE
from pyrovae.models.tilted import DEFAULT_CHAIN, PriorChain, Tilted, values_of

__all__ = ["HierarchicalEnergyPrior"]


class HierarchicalEnergyPrior(Tilted, HierarchicalVAE):
    """A `HierarchicalVAE` whose prior nets tilt, layer by layer: its sites, the factor "tilt"; use as `EnergyPriorVAE`.

    Args:
        decoder, sizes, conditionals, likelihood, scale_floor, noise, noise_floor: as in `HierarchicalVAE`.
        energies: f_l of each layer, shallowest first, from `[R, d_l]` to `[R]` or `[R, 1]`.
        chain: how the prior is drawn from, in training and generation.
    """

    def __init__(
        self,
        decoder: nn.Module,
        sizes: Sequence[int],
        conditionals: Sequence[nn.Module],
        energies: Sequence[nn.Module],
        likelihood: Likelihood = "bernoulli",
        *,
        chain: PriorChain = DEFAULT_CHAIN,
        scale_floor: float = 1e-2,
        noise: float | None = None,
        noise_floor: float = 1e-2,
    ) -> None:
        super().__init__(
            decoder, sizes, conditionals, likelihood, scale_floor=scale_floor, noise=noise, noise_floor=noise_floor
        )
        if len(energies) != len(sizes):
            raise ValueError(f"{len(sizes)} layers need an energy each, got {len(energies)}")
        self._tilt_by(nn.ModuleList(energies), chain)

    def places(self) -> dict[str, slice]:
        return self.groups

    def _f(self, z: Tensor) -> Tensor:
        energies = self.energy
        assert isinstance(energies, nn.ModuleList)
        parts = [values_of(f, z[:, self.groups[f"z{level + 1}"]]) for level, f in enumerate(energies)]
        return torch.stack(parts).sum(0)

    def unwhiten(self, eps: Tensor) -> Tensor:
        return HierarchicalVAE.unwhiten(self, eps)

    def log_base(self, z: Tensor) -> Tensor:
        return HierarchicalVAE.log_base(self, z)

    def _prior_tensors(self) -> list[Tensor]:
        return [*super()._prior_tensors(), *self.conditionals.parameters(), *self.conditionals.buffers()]
