"""A reference posterior: draws, how far they can be trusted, and exact moments where they are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.diagnose.convergence import ess_bulk, ess_tail, split_rhat
from pyrovae.latents import LatentSpace
from pyrovae.provenance import Provenance

__all__ = ["Reference", "status_of"]

OK, FEW, UNMIXED = "ok", "not enough draws", "did not mix"


@dataclass(frozen=True)
class Reference:
    """Draws from (nearly) the true posterior of every datum.

    Attributes:
        kind: "nuts" or "exact".
        space: the latent space the draws live in.
        draws: `[C, S, B, D]`, unconstrained.
        rhat: `[B]`, largest rank-normalised split R-hat over latents (1 for exact references).
        ess: `[B]`, smallest of bulk and tail effective sample size over latents, all chains together.
        divergences: divergent transitions (the data are sampled jointly: one number).
        status: per datum "ok", "not enough draws" (usable, noisy) or "did not mix" (refused).
        mean, sd: `[B, D]`, exact where known, else from the draws.
        log_evidence: `[B]`, exact log p(x) in nats, or None.
        provenance: of the draws; its fingerprint is that of the arguments they were made for.
        seconds: what it cost.
        initial: `[C, B, D]` starting points of the chains, or None.
        lp: `[C, S, B]`, log-joint at the draws, nats, or None.
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
    seconds: float
    initial: Tensor | None = None
    lp: Tensor | None = None

    @property
    def usable(self) -> Tensor:
        """`[B]`: data whose draws may judge a guide."""
        return torch.tensor([status != UNMIXED for status in self.status])

    @property
    def pooled(self) -> Tensor:
        """All chains as one set of draws, `[C * S, B, D]`."""
        return self.draws.flatten(0, 1)

    def samples(self) -> dict[str, Tensor]:
        """Draws in the model's own space: site -> `[C, S, B, *event]`."""
        return self.space.constrain(self.draws)

    def __repr__(self) -> str:
        chains, draws, rows, _ = self.draws.shape
        counts = ", ".join(f"{self.status.count(name)} {name}" for name in (OK, FEW, UNMIXED) if name in self.status)
        return (
            f"Reference({self.kind}: {chains} x {draws} draws of {rows} data; {counts}; R-hat <= "
            f"{float(self.rhat.max()):.3f}, ESS >= {float(self.ess.min()):.0f}, {self.divergences} divergences, "
            f"{self.seconds:.1f} s)"
        )


def status_of(draws: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """(R-hat `[B]`, ESS `[B]`, status) of chains `[C, S, B, D]`.

    A threshold of 1.01 on R-hat fails half of all perfect references of 400 draws, so poor mixing (R-hat above 1.1)
    and too few draws (ESS below 400) are different verdicts.
    """
    rhat = split_rhat(draws).amax(-1)
    ess = torch.minimum(ess_bulk(draws), ess_tail(draws)).amin(-1)

    def verdict(r: float, n: float) -> str:
        if not r <= 1.1:  # also nan: a stuck chain
            return UNMIXED
        return OK if n >= 400 else FEW

    return rhat, ess, tuple(verdict(float(r), float(n)) for r, n in zip(rhat, ess, strict=True))
