"""Guides from cheap to dear: every datum goes on until its importance weights can be trusted.

Guide g proposes S draws for the data still open; datum b is done when

    k-hat_b <= k          its weights log p(x, u) - log q_g(u | x) have a tail that reweighting can bear
    coverage_b >= c       (if asked) the guide has draws wherever short chains from the prior have gone

and goes on to guide g + 1 otherwise. k-hat cannot see a mode that the guide has missed, chains from the prior can: with
chains i = 1..C, their means m_id and standard deviations s_id,

    coverage_b = min over i, d of the share of the guide's draws with |u_d - m_id| <= 2 s_id

is 0.95 for a guide that agrees with them, about 0.95 w where a chain sits in a mode of mass w, and 0 where the guide
has no draws there. A mode of mass w is missed by all C chains with a probability of about (1 - w)^C.

A datum that no guide satisfies is served by the one with the largest log-mean-exp of weights, of those that cover the
chains where any does: a narrow guide's k-hat may be small because its draws never meet the tail. Draws that decide are
not the draws that are reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyrovae import noise
from pyrovae.compat import GuideTraits
from pyrovae.errors import IncompatibleError
from pyrovae.guides.base import DensityGuide, Sampler, weigh
from pyrovae.guides.chain import ChainGuide
from pyrovae.latents import LatentSpace, LogJoint
from pyrovae.psis import pareto_khat
from pyrovae.recording import recorded
from pyrovae.runtime import evaluating, preserve_rng
from pyrovae.samplers import adaptive

__all__ = ["Escalating", "Served"]

_COVERAGE_DRAWS = 400


@dataclass(frozen=True)
class Served:
    """Which guide serves which datum, and why.

    Attributes:
        names: of the G guides, from cheap to dear.
        stage: `[B]`, number of the guide that serves the datum.
        satisfied: `[B]`, whether that guide passed.
        khat: `[G, B]`, nan where a guide was not asked.
        coverage: `[G, B]`, the same, or None without chains.
        limit: the largest k-hat that passes.
    """

    names: tuple[str, ...]
    stage: Tensor
    satisfied: Tensor
    khat: Tensor
    coverage: Tensor | None
    limit: float

    def _rows(self) -> list[tuple[str, int, int, int]]:
        """Name, data asked, data served, and those of them that are satisfied."""
        return [
            (
                name, int((~self.khat[g].isnan()).sum()), int((self.stage == g).sum()),
                int(((self.stage == g) & self.satisfied).sum()),
            )
            for g, name in enumerate(self.names)
        ]  # fmt: skip

    def _title(self) -> str:
        chains = "" if self.coverage is None else ", and chains from the prior covered"
        return f"{int(self.satisfied.sum())} of {len(self.stage)} data satisfied: k-hat <= {self.limit:g}{chains}"

    def __repr__(self) -> str:
        width = max(map(len, self.names))
        lines = [f"  {name:<{width}} {asked:>8} {served:>8} {good:>10}" for name, asked, served, good in self._rows()]
        return "\n".join([self._title(), f"  {'guide':<{width}} {'asked':>8} {'serves':>8} {'satisfied':>10}", *lines])

    def _repr_html_(self) -> str:
        head = "<tr><th>guide</th><th>asked</th><th>serves</th><th>satisfied</th></tr>"
        rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in self._rows())
        return f"<table><caption>{self._title()}</caption>{head}{rows}</table>"


@dataclass
class _Tried:
    """A guide's posteriors of the data it was asked about: their positions `[b]` in the batch, and draws of them."""

    rows: Tensor
    sampler: Sampler


class Escalating(ChainGuide):
    """The first of several guides that is good enough, datum by datum; for evaluation.

    Args:
        guides: of one model, from cheap to dear; all with importance weights (chains by `DensityShortRun`, `DAIS`).
        khat: the largest k-hat that is good enough.
        num_samples: S >= 25 draws by which a guide is judged.
        chains: C short HMC chains from the prior for each datum; 0 asks for k-hat alone.
        chain_steps: trajectories of a chain, half of which set its step size.
        coverage: the smallest share of draws near a chain that counts as covering it.

    Note:
        `served(*args)` says which guide serves which datum. `log_weights` come from each datum's own guide, so `elbo`
        and `iwae` are lower bounds as ever. Judging costs S draws of every guide that is asked. k-hat of 1,000 draws
        varies by 0.1 to 0.2 from seed to seed: data near the limit go either way. It may also miss a heavy tail that
        has hardly been met: on the logistic posteriors of the certification page a Gaussian read 0.3 to 0.6 by 1,000
        draws and up to 1.4 by 20,000.

    Raises:
        TypeError: a guide without importance weights, or none at all.
        ValueError: guides of several models, or numbers out of range.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyrovae.guides import Amortized, LocalSVI
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x.squeeze(-1))
        >>> x = torch.tensor([[0.2], [-1.0], [4.0]])
        >>> encoder = torch.nn.Linear(1, 2)
        >>> _ = torch.nn.init.zeros_(encoder.weight), torch.nn.init.zeros_(encoder.bias)
        >>> guide = Escalating([Amortized(model, encoder), LocalSVI(model)])
        >>> guide.served(x).stage
        tensor([0, 0, 1])
    """

    traits = GuideTraits(name="Escalating", marginal=False, stratified=True, trainable=False)

    def __init__(
        self,
        guides: Sequence[DensityGuide],
        *,
        khat: float = 0.7,
        num_samples: int = 1000,
        chains: int = 0,
        chain_steps: int = 100,
        coverage: float = 0.05,
    ) -> None:
        if not guides:
            raise TypeError("Escalating needs at least one guide")
        for guide in guides:
            if not isinstance(guide, DensityGuide):
                raise TypeError(
                    f"Escalating judges guides by their importance weights, which {guide!r} does not have: take "
                    "DensityShortRun or DAIS for chains"
                )
            if guide.model is not guides[0].model or guide.plate != guides[0].plate:
                raise ValueError("the guides of Escalating must be guides of one model with one plate")
        if num_samples < 25:
            raise ValueError(f"k-hat needs num_samples of at least 25, got {num_samples}")
        if chains < 0 or (chains and chain_steps < 4):
            raise ValueError(f"Escalating needs chains >= 0 of chain_steps >= 4, got {chains} of {chain_steps}")
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {coverage:g}")
        super().__init__(guides[0].model, plate=guides[0].plate, batched=guides[0].batched)
        self.guides = nn.ModuleList(guides)
        self.khat, self.num_samples, self.coverage = khat, num_samples, coverage
        self.chains, self.chain_steps = chains, chain_steps

    def _describe(self) -> str:
        names = ", ".join(guide.traits.name for guide in self._guides())
        return f"[{names}], khat={self.khat:g}, chains={self.chains}, "

    def _guides(self) -> list[DensityGuide]:
        return [cast(DensityGuide, guide) for guide in self.guides]

    def served(self, *args: Any, seed: int = 0, indices: Sequence[int] | None = None, **kwargs: Any) -> Served:
        """Which guide serves which datum, as `evidence.log_weights` with this seed finds it; weights stay as they are.

        Args:
            seed, indices: as in `evidence.log_weights`.
        """
        with self._aside(), evaluating(self.model, self), preserve_rng(), torch.no_grad():
            plate = self.space(*args, **kwargs).read_plate(*args, **kwargs)
            size = 1 if plate is None else plate.size
            if indices is not None and len(indices) != size:
                raise ValueError(f"indices must name each of the {size} data, got {len(indices)}")
            with noise.per_datum(seed, range(size) if indices is None else indices):
                return self._judge(*args, **kwargs)[0]

    def _program(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            raise IncompatibleError(
                "Escalating is for evaluation: train the guides it is made of, each by itself, and run it under "
                "torch.no_grad()"
            )
        super()._program(space, args, kwargs)

    def _chain(self, *args: Any, **kwargs: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
        with torch.no_grad():
            served, tried = self._judge(*args, **kwargs)
        size = len(served.stage)

        def run(number: int) -> tuple[Tensor, Tensor]:
            # Every guide that was asked draws for all data it was asked about: a datum's noise then does not depend on
            # which other data are in the batch.
            found = []
            for one in tried:
                with noise.rows(one.rows), torch.no_grad():
                    found.append(one.sampler.draw(number))
            u = found[0][0].new_empty(number, size, found[0][0].shape[-1])
            log_q = found[0][1].new_empty(number, size)
            for g, (one, (draws, density)) in enumerate(zip(tried, found, strict=True)):
                mine = served.stage[one.rows] == g
                u[:, one.rows[mine]], log_q[:, one.rows[mine]] = draws[:, mine], density[:, mine]
            return u, log_q

        return run

    def _judge(self, *args: Any, **kwargs: Any) -> tuple[Served, list[_Tried]]:
        """Ask guide after guide about the data that are still open."""
        space = self.space(*args, **kwargs)
        log_joint = space.bind(*args, **kwargs)
        size = log_joint.rows.size
        paths = self._paths(space, log_joint, args, kwargs) if self.chains else None
        shape = (len(self.guides), size)
        khat = torch.full(shape, torch.nan, dtype=torch.double)
        coverage, bound = (torch.full(shape, value, dtype=torch.double) for value in (torch.nan, -torch.inf))
        good = torch.zeros(shape, dtype=torch.bool)
        open_, tried = torch.arange(size), []
        for g, guide in enumerate(self._guides()):
            rows = open_ if log_joint.foldable else torch.arange(size)  # a plate of fixed size takes all its rows
            some, more = (args, kwargs) if len(rows) == size else log_joint.rows.rows(rows)
            with noise.rows(rows):
                sampler = guide._sampler(*some, **more)
                weights = weigh(sampler, space.bind(*some, **more), self.num_samples)
                khat[g, rows], bound[g, rows] = _khat(weights), _bound(weights)
                good[g, rows] = khat[g, rows] <= self.khat
                if paths is not None:
                    u = sampler.draw(_COVERAGE_DRAWS)[0]
                    coverage[g, rows] = _coverage(u, paths[:, :, rows])
                    good[g, rows] &= coverage[g, rows] >= self.coverage
            tried.append(_Tried(rows, sampler))
            open_ = open_[~good[g, open_]]
            if not len(open_):
                break
        stage, satisfied = _choose(bound, coverage >= self.coverage, good)
        names = tuple(guide.traits.name for guide in self._guides())
        return Served(names, stage, satisfied, khat, None if paths is None else coverage, self.khat), tried

    def _paths(
        self, space: LatentSpace, bound: LogJoint, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Chains from the prior, `[T, C, B, D]`."""
        start = space.prior(self.chains, *args, **kwargs)
        return adaptive.run(recorded(bound, start), start, self.chain_steps)


def _khat(weights: Tensor) -> Tensor:
    """k-hat `[b]` of `[S, b]`; the worst where weights are no numbers, or all zero."""
    usable = _bound(weights) > -torch.inf
    found = torch.full(usable.shape, torch.inf, dtype=torch.double)
    if usable.any():
        found[usable] = pareto_khat(weights[:, usable.to(weights.device)]).cpu()
    return found


def _bound(weights: Tensor) -> Tensor:
    """log-mean-exp `[b]` of `[S, b]`; -inf where weights are no numbers."""
    found = torch.logsumexp(weights.double(), 0) - math.log(len(weights))
    return torch.where(found < torch.inf, found, -torch.inf).cpu()


def _coverage(u: Tensor, paths: Tensor) -> Tensor:
    """The smallest share of draws `u: [S, b, D]` within two deviations of a chain, over chains and latents, `[b]`."""
    near = (u - paths.mean(0).unsqueeze(1)).abs() <= 2 * paths.std(0).unsqueeze(1)  # [C, S, b, D]
    return near.double().mean(1).amin((0, -1)).cpu()


def _choose(bound: Tensor, covers: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """The first guide that is good `[B]`, else the one with the largest bound; and whether it is good `[B]`."""
    satisfied = good.any(0)
    first = good.to(torch.uint8).argmax(0)
    among = torch.where(covers | ~covers.any(0), bound, -torch.inf)
    return torch.where(satisfied, first, among.argmax(0)), satisfied
