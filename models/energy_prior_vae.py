r"""The VAE with a latent energy-based prior (Pang, Han, Nijkamp, Zhu & Wu 2020).

.. math::
    p(z) = \exp(f(z)) \, N(z; 0, I) / Z, \qquad x | z \sim p(x; \mathrm{decoder}(z))

With f = 0 it is the VAE. `models.tilted` has the mathematics of the tilt.
"""

from __future__ import annotations

from torch import nn

from pyrovae.models.decoded import Likelihood
from pyrovae.models.tilted import DEFAULT_CHAIN, PriorChain, Tilted
from pyrovae.models.vae import VAE

__all__ = ["EnergyPriorVAE"]


class EnergyPriorVAE(Tilted, VAE):
    """A `VAE` whose prior a net tilts: sites "z" and "x", the factor "tilt", plate "data".

    Trained by `losses.EnergyELBO` and no other: by maximum likelihood with `guides.ShortRun`, or variationally with a
    guide that has a density. `model(None, size=n)` generates by the prior's chain. KLs to the prior in
    `diagnose.information` are those to its base.

    Args:
        decoder, latent_dim, likelihood, noise, noise_floor: as in `VAE`.
        energy: f, a module from `[R, D]` to `[R]` or `[R, 1]`, higher where z is more probable.
        chain: how the prior is drawn from, in training and generation.

    Example:
        >>> import torch
        >>> from pyrovae.nets import MLP
        >>> model = EnergyPriorVAE(torch.nn.Linear(2, 5), 2, MLP([2, 16, 1]), chain=PriorChain(40, 0.4))
        >>> model(None, size=3).shape
        torch.Size([3, 5])
        >>> model.normalised
        False
    """

    def __init__(
        self,
        decoder: nn.Module,
        latent_dim: int,
        energy: nn.Module,
        likelihood: Likelihood = "bernoulli",
        *,
        chain: PriorChain = DEFAULT_CHAIN,
        noise: float | None = None,
        noise_floor: float = 1e-2,
    ) -> None:
        super().__init__(decoder, latent_dim, likelihood, noise=noise, noise_floor=noise_floor)
        self._tilt_by(energy, chain)
