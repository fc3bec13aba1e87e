r"""A ladder with one energy over the latents of all its layers (Cui, Wu & Han 2023, at ICCV).

.. math::
    p(z_1, \ldots, z_L) = \exp(f([z_L, \ldots, z_1])) \prod_l N(z_l; 0, I) / Z, \qquad
    x | z \text{ by the ladder decoder}

The groups are independent under the base and the net couples them. `models.tilted` has the mathematics of the tilt.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pyrovae.models.decoded import Likelihood
from pyrovae.models.ladder_vae import LadderVAE
from pyrovae.models.tilted import DEFAULT_CHAIN, PriorChain, Tilted

__all__ = ["JointEnergyPrior"]


class JointEnergyPrior(Tilted, LadderVAE):
    """A `LadderVAE` whose prior a net tilts: its sites, the factor "tilt", plate "data"; use as `EnergyPriorVAE`.

    In a layer ratio (`diagnose.anomaly`) the groups that the model draws come from the base.

    Args:
        decoder, sizes, likelihood, noise, noise_floor: as in `LadderVAE`.
        energy: f, a module from all latents `[R, D]`, deepest group first, to `[R]` or `[R, 1]`.
        chain: how the prior is drawn from, in training and generation.

    Example:
        >>> from pyrovae.nets import MLP, LadderDecoder
        >>> model = JointEnergyPrior(LadderDecoder([2, 3], (1, 8, 8), width=16), [2, 3], MLP([5, 16, 1]))
        >>> model.sample_prior(4).shape
        torch.Size([4, 5])
    """

    def __init__(
        self,
        decoder: nn.Module,
        sizes: Sequence[int],
        energy: nn.Module,
        likelihood: Likelihood = "bernoulli",
        *,
        chain: PriorChain = DEFAULT_CHAIN,
        noise: float | None = None,
        noise_floor: float = 1e-2,
    ) -> None:
        super().__init__(decoder, sizes, likelihood, noise=noise, noise_floor=noise_floor)
        self._tilt_by(energy, chain)

    def places(self) -> dict[str, slice]:
        return self.groups
