"""A reference posterior: draws, how far they can be trusted, and exact moments where they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyrovae.diagnose.convergence import ess_bulk, ess_tail, split_rhat
from pyrovae.identity import program_identity
from pyrovae.latents import LatentSpace
from pyrovae.provenance import Provenance

__all__ = ["ChainStatistics", "Reference", "status_of"]

OK, FEW, UNMIXED, DIVERGENT = "ok", "not enough draws", "did not mix", "divergent"
DIVERGENT_SHARE = 5e-4  # of transitions: more, and draws are not trusted
SLOW_ENERGY = 0.3  # E-BFMI below which chains explore energies too slowly
_STATUSES = (OK, FEW, UNMIXED, DIVERGENT)


@dataclass(frozen=True)
class ChainStatistics:
    """What the chains of every datum did after warm-up.

    Attributes:
        ess_bulk, ess_tail: `[B]`, smallest over latents, all chains together.
        divergences: `[B]`, transitions whose energy error passed 1000 nats, of all chains.
        accept_prob: `[B]`, mean.
        ebfmi: `[B]`, smallest over chains: sum of squared changes of the energy over its variance; below 0.3 the
            energies are explored too slowly (Betancourt 2016).
        step_size: `[B]`, in whitened coordinates.
        num_leapfrog: `[B]`, mean number of leapfrog steps of a transition.
        thin: `[B]`, transitions per draw kept.
        energy: `[C, S, B]`, nats, of the transitions that gave the draws.
        diverging: `[C, S, B]`.
    """

    ess_bulk: Tensor
    ess_tail: Tensor
    divergences: Tensor
    accept_prob: Tensor
    ebfmi: Tensor
    step_size: Tensor
    num_leapfrog: Tensor
    thin: Tensor
    energy: Tensor
    diverging: Tensor

    @classmethod
    def joined(cls, parts: Sequence[ChainStatistics], order: Tensor) -> ChainStatistics:
        """Several data's statistics as one, rearranged by `order`."""
        return cls(**{
            field.name: torch.cat([getattr(part, field.name) for part in parts], dim=-1)[..., order]
            for field in fields(cls)
        })  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Draws from (nearly) the true posterior of every datum.

    Attributes:
        kind: "hmc", "nuts" or "exact".
        space: the latent space the draws live in.
        draws: `[C, S, B, D]`, unconstrained.
        rhat: `[B]`, largest rank-normalised split R-hat over latents (1 for exact references).
        ess: `[B]`, smallest of bulk and tail effective sample size over latents, all chains together.
        divergences: divergent transitions of all data together.
        status: per datum "ok", "not enough draws", "did not mix" or "divergent".
        mean, sd: `[B, D]`, exact where known, else from the draws.
        log_evidence: `[B]`, exact log p(x) in nats, or None.
        provenance: of the draws; its fingerprint is that of the arguments they were made for.
        program: identity of the model they were made of, weights included.
        seconds: what it cost.
        initial: `[C, B, D]` starting points of the chains, or None.
        lp: `[C, S, B]`, log-joint at the draws, nats, or None.
        chains: what batched HMC reports of every datum, or None.
    """

    kind: str
    space: LatentSpace
    draws: Tensor
    rhat: Tensor
    ess: Tensor
    divergences: int
    status: tuple[str, ...]
    mean: Tensor
    sd: Tensor
    log_evidence: Tensor | None
    provenance: Provenance
    program: str
    seconds: float
    initial: Tensor | None = None
    lp: Tensor | None = None
    chains: ChainStatistics | None = None

    @property
    def usable(self) -> Tensor:
        """`[B]`: data whose draws may judge a guide: those that are "ok"."""
        return torch.tensor([status == OK for status in self.status])

    @property
    def verdicts(self) -> str:
        """How many data have which status, in words."""
        return ", ".join(f"{self.status.count(name)} {name}" for name in _STATUSES if name in self.status)

    @property
    def pooled(self) -> Tensor:
        """All chains as one set of draws, `[C * S, B, D]`."""
        return self.draws.flatten(0, 1)

    def require(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `ValueError` unless these are the model and the data the draws were made for."""
        if program_identity(model) != self.program:
            raise ValueError(
                "the reference was made of another model, or before these weights: make one of the model as it is now"
            )
        if Provenance.of_call(args, kwargs).fingerprint != self.provenance.fingerprint:
            raise ValueError("these are other data than the reference's: pass those it was made for")

    def samples(self) -> dict[str, Tensor]:
        """Draws in the model's own space: site -> `[C, S, B, *event]`."""
        return self.space.constrain(self.draws)

    def __repr__(self) -> str:
        chains, draws, rows, _ = self.draws.shape
        return (
            f"Reference({self.kind}: {chains} x {draws} draws of {rows} data; {self.verdicts}; R-hat <= "
            f"{float(self.rhat.max()):.3f}, ESS >= {float(self.ess.min()):.0f}, {self.divergences} divergences, "
            f"{self.seconds:.1f} s)"
        )


def status_of(
    draws: Tensor, *, divergent: Tensor | None = None, ebfmi: Tensor | None = None, enough: float = 400
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """(R-hat, bulk ESS, tail ESS, each `[B]`; status) of chains `[C, S, B, D]`.

    A threshold of 1.01 on R-hat fails half of all perfect references of 400 draws, so poor mixing (R-hat above 1.1, or
    an E-BFMI below 0.3) and too few draws (R-hat above 1.05, ESS below `enough`) are different verdicts.

    Args:
        divergent: `[B]`, data with too many divergent transitions.
        ebfmi: `[B]`.
        enough: ESS, the smaller of bulk and tail.
    """
    rhat = split_rhat(draws).amax(-1)
    bulk, tail = ess_bulk(draws).amin(-1), ess_tail(draws).amin(-1)

    def verdict(row: int) -> str:
        r, n = float(rhat[row]), float(torch.minimum(bulk[row], tail[row]))
        if not r <= 1.1 or (ebfmi is not None and not ebfmi[row] >= SLOW_ENERGY):  # also nan: a stuck chain
            return UNMIXED
        if divergent is not None and divergent[row]:
            return DIVERGENT
        return OK if n >= enough and r <= 1.05 else FEW

    return rhat, bulk, tail, tuple(verdict(row) for row in range(len(rhat)))
