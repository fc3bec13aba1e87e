r"""Priors that an energy tilts (Pang, Han, Nijkamp, Zhu & Wu 2020): what all models with one share.

.. math::
    p(z) = \exp(f(z)) \, p_0(z) / Z, \qquad \log Z = \log E_{p_0} \exp f(z)

f is a net, higher where z is *more* probable (papers that write exp(-E) have f = -E); the base p0 is Gaussian, or
several conditional Gaussians. The program has p0's sites and the factor exp(f(z)), so its log-joint, its evidence and
its posterior's gradient are those of the model up to log Z, which is the same for all data:

* training needs the gradient of log Z, E_p[grad (f + log p0)]: `losses.EnergyELBO` adds it from draws of the prior;
* numbers need its value: `evidence.log_normaliser` measures it and `normalise` puts it in. Before, and as soon as a
  weight of the prior moves, log p(x) is known up to a constant, and results say "unnormalised".

Draws of the prior are the ends of K steps of Langevin dynamics of noise scale s, in coordinates in which the base is
white (z = T(e), e ~ N(0, I) under p0), always from there:

.. math::
    e_{k+1} = e_k + \tfrac{s^2}{2} \nabla [\log N(e_k; 0, I) + f(T(e_k))] + s \, \epsilon_k

which is exact for p as s goes to 0 and K to infinity: p in e has just this density. K and s belong to the model: it
was trained with the draws of this chain and generates by them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn

from pyrovae import handlers, noise
from pyrovae.compat import ModelTraits
from pyrovae.models.decoded import Decoded
from pyrovae.provenance import fingerprint
from pyrovae.samplers import init, langevin

__all__ = ["DEFAULT_CHAIN", "PriorChain", "Tilted", "values_of"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class PriorChain(NamedTuple):
    """The chain that draws from a tilted prior: K steps of noise scale s (in whitened coordinates).

    Under a linear tilt a^T e, whose p is N(a, I), its draws have mean (1 - m) a with m = (1 - s^2/2)^K. A chain that
    keeps much of its start therefore never reaches codes that have moved with the tilt, the negative phase stays
    behind the positive one, and in training energy, codes and decoder run away together.
    """

    num_steps: int = 60
    step_size: float = 0.4

    @property
    def memory(self) -> float:
        """m, the share of its start that is left at its end."""
        return abs(1 - 0.5 * self.step_size**2) ** self.num_steps


DEFAULT_CHAIN = PriorChain()


class Tilted(Decoded):
    """Mixed into a model with `latents()`, before it: the tilt, the prior's chain, log Z.

    Attributes:
        energy: the module(s) of f.
        chain: the prior's chain.
        log_z: log Z as it was last measured, scalar; it counts while `normalised`.
    """

    traits = ModelTraits(tilted=True)
    energy: nn.Module
    origin: Tensor
    log_z: Tensor
    latent_dim: Any  # an int; a property of some models

    def _tilt_by(self, energy: nn.Module, chain: PriorChain) -> None:
        """To be called at the end of `__init__`."""
        if chain.num_steps < 1 or not chain.step_size > 0:
            raise ValueError(f"the prior's chain needs num_steps >= 1 and a positive step_size, got {tuple(chain)}")
        self.energy, self.chain = energy, PriorChain(*chain)
        self.register_buffer("log_z", self.origin.new_full((), torch.nan))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64, device=self.origin.device))
        self.__dict__["_checked"] = (None, False)
        self.tilt(self.origin.expand(2, -1))  # an energy of another shape is told now

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is not None or size is None:
            found: Tensor = super().forward(x, size)
            return found
        lead = _outer_shape()
        z = self.sample_prior(lead.numel() * size).reshape(*lead, size, -1)
        with _Placed({name: z[..., part] for name, part in self.places().items()}):
            generated: Tensor = super().forward(None, size)
        return generated

    def latents(self) -> Tensor:
        """The base's sites and the tilt, `[*lead, D]`."""
        z: Tensor = super().latents()  # of the model this is mixed into
        f = self.tilt(z)
        handlers.prior_factor("tilt", f - self.log_z if self._subtracts else f)
        return z

    def places(self) -> dict[str, slice]:
        """Site -> its place among the latents."""
        return {"z": slice(None)}

    def tilt(self, z: Tensor) -> Tensor:
        """f(z), `[..., D] -> [...]`, nats, higher where z is more probable; without log Z."""
        return self._f(z.reshape(-1, self.latent_dim)).reshape(z.shape[:-1])

    def _f(self, z: Tensor) -> Tensor:
        return values_of(self.energy, z)

    def unwhiten(self, eps: Tensor) -> Tensor:
        """z = T(e), `[R, D]`: p0's draws of standard normal e."""
        return eps

    def log_base(self, z: Tensor) -> Tensor:
        """log p0(z), `[R, D] -> [R]`, nats."""
        return -(0.5 * z.square() + _HALF_LOG_2PI).sum(-1)

    def sample_prior(self, number: int, *, tilted: bool = True, num_steps: int | None = None) -> Tensor:
        """Draws `[number, D]` of the prior by the model's chain (or another number of its steps), or of the base;
        no gradient.

        Raises:
            ValueError: fewer than one draw.
        """
        if number < 1:
            raise ValueError(f"a sample needs at least one draw, got {number}")
        steps = self.chain.num_steps if num_steps is None else num_steps

        def target(eps: Tensor) -> Tensor:
            return self.tilt(self.unwhiten(eps.flatten(0, 1))) - 0.5 * eps.square().sum(-1)

        def white() -> Tensor:
            return noise.normal(1, number, self.latent_dim, like=self.origin)

        with torch.no_grad():
            eps = white()
            if tilted:
                state = init(target, eps)
                for _ in range(steps):
                    state, _ = langevin.step(state, target, self.chain.step_size, white())
                eps = state.u
            return self.unwhiten(eps[0])

    def negative_phase(self, number: int) -> tuple[Tensor, Tensor]:
        """f and log p0, `[number]` each, at detached draws of the prior: the gradient of log Z is the mean of their
        sum's.
        """
        z = self.sample_prior(number)
        return self.tilt(z), self.log_base(z)

    def normalise(self, log_z: float) -> None:
        """Subtract this log Z from the tilt for as long as the prior's weights stay what they are now."""
        if not torch.isfinite(torch.as_tensor(log_z)):
            raise ValueError(f"log Z must be finite, got {log_z}")
        with torch.no_grad():
            self.log_z.fill_(log_z)
            self.measured.fill_(_mark(self._prior_tensors()))

    def forget_log_z(self) -> None:
        """Before the prior's weights move."""
        if self.normalised:
            with torch.no_grad():
                self.log_z.fill_(torch.nan)
                self.measured.zero_()

    @property
    def normalised(self) -> bool:
        """Whether log Z was measured with the prior's weights as they are, byte by byte."""
        answer = bool(self.measured != 0) and int(self.measured) == _mark(self._prior_tensors())
        self.__dict__["_checked"] = self._versions(), answer
        return answer

    @property
    def _subtracts(self) -> bool:
        """`normalised` as it was last seen, unless a counter has moved since: for inner loops and their recordings.

        What `.data` is written behind these counters is seen at the next look at `normalised`, so before any number is
        called normalised.
        """
        known, answer = self.__dict__["_checked"]
        return answer if known == self._versions() else self.normalised

    def _versions(self) -> tuple[tuple[int, torch.dtype, int], ...]:
        return tuple((id(t), t.dtype, t._version) for t in (*self._prior_tensors(), self.measured))

    def _prior_tensors(self) -> list[Tensor]:
        """All that log Z depends on."""
        return [*self.energy.parameters(), *self.energy.buffers()]


def values_of(energy: nn.Module, z: Tensor) -> Tensor:
    """A net's f, `[R, d] -> [R]`."""
    value = energy(z)
    if value.shape not in ((len(z),), (len(z), 1)):
        raise ValueError(
            f"an energy must give one number per row, [R] or [R, 1], but gave {list(value.shape)} for {len(z)} rows"
        )
    return value.reshape(-1)


def _mark(tensors: list[Tensor]) -> int:
    """A positive number that tells weights from others."""
    return 1 + int(fingerprint([t.detach() for t in tensors])[:15], 16)


def _outer_shape() -> torch.Size:
    """Batch dims that plates around the model ask for (Pyro's particles), without the data's own."""
    sizes = {frame.dim: frame.size for frame in get_plates() if frame.vectorized}
    depth = max((-dim for dim in sizes), default=1)
    return torch.Size([sizes.get(dim, 1) for dim in range(-depth, -1)])


class _Placed(Messenger):
    """Latent sites at given values, as if the program had drawn them."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
