r"""How much do the latents know? KL to the prior, mutual information, active units.

With :math:`q(u) = \frac1N \sum_n q(u \mid x_n)` over the N data given,

.. math::
    \mathrm{KL}_n = \mathbb{E}_{q(u|x_n)} \log \frac{q(u \mid x_n)}{p(u)}, \qquad
    I = \frac1N \sum_n \mathbb{E}_{q(u|x_n)} \log \frac{q(u \mid x_n)}{q(u)} \le \log N.

I is the information that q carries about *which of these N data* it was given: it cannot exceed :math:`\log N`, so a
value near that says that N is too small, not how much the latents know. A latent is *active* where the variance over
data of its posterior mean passes 0.01 (Burda, Grosse & Salakhutdinov 2016); the Monte Carlo part of that variance is
taken out. Active latents and the reconstruction :math:`\mathbb{E}_{q(u|x_n)} \log p(x_n \mid u)` take draws alone, so
`active_units` has them for guides without a density, too.

All of it is of the posteriors as they were found. Where the search for them is noisy (`SemiAmortized` and `LocalSVI`
follow sampled gradients), its noise moves them apart as well: KL, I and active latents count it, and what the latents
know of the data may be less.

Sources: Hoffman & Johnson, ELBO surgery (2016), for the decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.chunks import per_chunk
from pyrovae.errors import IncompatibleError, NoDensityError
from pyrovae.losses.base import require_pair
from pyrovae.runtime import evaluating, preserve_rng
from pyrovae.store import isolated

__all__ = ["ActiveUnits", "Information", "active_units", "information", "mutual_information"]

ACTIVE = 0.01
_BLOCK = 2_000_000  # densities evaluated at once


@dataclass(frozen=True)
class Information:
    """What a guide's posteriors know of the data.

    Attributes:
        kl: `[N]`, KL(q(u | x_n) || p(u)), nats; of a tilted prior (`models.tilted`), KL to its base.
        kl_se: `[N]`, Monte Carlo standard errors.
        mutual_information: I in nats, or None where it was left out or the posterior has no density in closed form.
        cap: log N, which I cannot exceed.
        mean_variance: `[D]`, variance over data of the posterior mean.
        tilted: the prior is tilted.
        augmented: the guide's density is of more than z (chains, `DAIS`, `HVAE`, ...), and `kl` that of all of it: an
            upper bound of the KL of z, which can be several times as large.
    """

    kl: Tensor
    kl_se: Tensor
    mutual_information: float | None
    cap: float
    mean_variance: Tensor
    tilted: bool = False
    augmented: bool = False

    @property
    def active(self) -> Tensor:
        """`[D]`: latents whose posterior mean moves with the data; of one datum, none."""
        return self.mean_variance > ACTIVE

    def __repr__(self) -> str:
        n, dim = len(self.kl), len(self.mean_variance)
        name = ("KL to the prior's base" if self.tilted else "KL") + (" at most" if self.augmented else "")
        if n == 1:
            return f"Information in one datum: {name} {float(self.kl):.2f} nats; what latents tell apart takes two data"
        known = "unknown"
        if self.mutual_information is not None:
            near = ", which caps it: give more data" if self.mutual_information > self.cap - 0.5 else ""
            known = f"{self.mutual_information:.2f} nats of at most log {n} = {self.cap:.2f}{near}"
        return (
            f"Information in {n} data: {name} {float(self.kl.mean()):.2f} nats per datum; mutual information {known}; "
            f"{int(self.active.sum())} of {dim} latents active"
        )


@dataclass(frozen=True)
class ActiveUnits:
    """What draws alone say of a guide's posteriors.

    Attributes:
        mean: `[N, D]`, posterior means in unconstrained coordinates, the average over draws.
        mean_variance: `[D]`, their variance over data, its Monte Carlo part taken out.
        reconstruction: `[N]`, E_q log p(x | z) in nats (a model's `pyro.factor`s counted); not a bound of log p(x).
        num_samples: draws per datum.
    """

    mean: Tensor
    mean_variance: Tensor
    reconstruction: Tensor
    num_samples: int

    @property
    def active(self) -> Tensor:
        """`[D]`: latents whose posterior mean moves with the data; of one datum, none."""
        return self.mean_variance > ACTIVE

    def __repr__(self) -> str:
        n, dim = self.mean.shape
        units = f"{int(self.active.sum())} of {dim}" if n > 1 else "unknown from one datum"
        return (
            f"ActiveUnits: {units}; E log p(x | z) {float(self.reconstruction.mean()):.2f} nats per datum ({n} data, "
            f"{self.num_samples} draws of each)"
        )


def active_units(
    model: Callable[..., Any], guide: Any, *args: Any, num_samples: int = 50, seed: int = 0, chunk: int = 256,
    **kwargs: Any,
) -> ActiveUnits:  # fmt: skip
    """Active units, posterior means and reconstruction of any guide, one without a density included.

    Args:
        num_samples: S draws (chains) per datum, at least 10. They leave noise of about `Var[u | x] / S sqrt(2 / N)` in
            a variance that is held against 0.01.
        seed, chunk: as in `evidence.log_weights`.

    Raises:
        IncompatibleError: no guide of this package, or one of another model.
    """
    require_pair(model, guide, None)
    if not hasattr(guide, "draws"):
        raise IncompatibleError(f"active_units takes draws of one of pyrovae.guides, got {type(guide).__name__}")
    if num_samples < 10:
        raise ValueError(f"a posterior mean is the average of at least 10 draws, got num_samples={num_samples}")

    def measure(*some: Any, **named: Any) -> Tensor:
        """Draws and, as one more latent, log p(x | z) there, `[S, b, D + 1]`."""
        with guide._aside():
            u = guide._draws(num_samples, *some, **named)
            told = guide.space(*some, **named).bind(*some, **named).terms(u)[1]
            return torch.cat([u, told.unsqueeze(-1)], dim=-1).double()

    found = per_chunk(
        measure, (model, guide), args, kwargs, plate=guide.plate, batched=guide.batched, seed=seed, chunk=chunk
    )
    u, told = found[..., :-1], found[..., -1]
    return ActiveUnits(u.mean(0), mean_variance(u), told.mean(0), num_samples)


def mean_variance(u: Tensor) -> Tensor:
    """Variance over data of the mean of draws `[S, N, D]`, its Monte Carlo part taken out, `[D]`; 0 for one datum."""
    between = u.mean(0).var(0) if u.shape[1] > 1 else torch.zeros_like(u[0, 0])
    return (between - u.var(0).mean(0) / len(u)).clamp_min(0)


def information(
    model: Callable[..., Any], guide: Any, *args: Any, num_samples: int = 100, num_scored: int | None = None,
    mixture: bool = True, seed: int = 0, chunk: int = 256, **kwargs: Any,
) -> Information:  # fmt: skip
    """KL, mutual information and active units of a guide with a density.

    Args:
        num_samples: draws per datum; 10 of them for the mutual information, which takes N densities at each. Fewer than
            about 100 leave noise in the variance of means that is as large as the 0.01 of an active latent.
        num_scored: of them, for the KL, each of which takes a run of the model; all by default.
        mixture: whether to take the densities of the mutual information; where one costs many passes of a net (IAF
            of many latents), it can be left out and is then None.
        seed, chunk: as in `evidence.log_weights`.

    Raises:
        NoDensityError: the guide has draws but no density.
    """
    require_pair(model, guide, None)
    if num_samples < 2:
        raise ValueError(f"information needs num_samples of at least 2, got {num_samples}")
    scored = num_samples if num_scored is None else num_scored
    if not 2 <= scored <= num_samples:
        raise ValueError(f"num_scored must lie between 2 and num_samples = {num_samples}, got {scored}")
    if not hasattr(guide, "_sampler"):
        raise NoDensityError(
            f"{guide!r} has no density, so its KL to the prior is unknown: use diagnose.active_units, or "
            "reference.compare"
        )

    posteriors: list[_Found] = []

    def measure(*some: Any, **named: Any) -> Tensor:
        """Draws and, as one more latent, log q - log p at the scored ones, `[S, b, D + 1]`."""
        with guide._aside():
            log_joint = guide.space(*some, **named).bind(*some, **named)
            q = guide._sampler(*some, **named)
            u, log_q = q.draw(num_samples)
            posteriors.append(_Found(q, u.shape[1]))
            excess = torch.full_like(log_q, torch.nan)
            excess[:scored] = log_q[:scored] - log_joint.terms(u[:scored])[0]
            return torch.cat([u, excess.unsqueeze(-1)], dim=-1).double()

    found = per_chunk(
        measure, (model, guide), args, kwargs, plate=guide.plate, batched=guide.batched, seed=seed, chunk=chunk
    )
    u, excess = found[..., :-1], found[:scored, :, -1]
    points = u[:10].to(guide.space(*args, **kwargs).dtype)
    mutual = _mutual_information(guide, posteriors, points) if mixture else None
    return Information(
        kl=excess.mean(0), kl_se=excess.std(0) / math.sqrt(scored),
        mutual_information=mutual, cap=math.log(u.shape[1]),
        mean_variance=mean_variance(u), tilted=bool(getattr(getattr(model, "traits", None), "tilted", False)),
        augmented=not guide.traits.marginal,
    )  # fmt: skip


def mutual_information(
    model: Callable[..., Any], guide: Any, *args: Any, num_samples: int = 10, seed: int = 0, chunk: int = 256,
    **kwargs: Any,
) -> float:  # fmt: skip
    """I alone, in nats, without a run of the model's likelihood; at most log N of the N data given.

    Args:
        num_samples: draws per datum, N densities at each.
        seed, chunk: as in `evidence.log_weights`.

    Raises:
        NoDensityError: the guide's posterior has no density in closed form.
    """
    require_pair(model, guide, None)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not hasattr(guide, "_sampler"):
        raise NoDensityError(f"{guide!r} has no density, so its mutual information is unknown")
    posteriors: list[_Found] = []

    def draw(*some: Any, **named: Any) -> Tensor:
        with guide._aside():
            q = guide._sampler(*some, **named)
            drawn: Tensor = q.draw(num_samples)[0]
            posteriors.append(_Found(q, drawn.shape[1]))
            return drawn

    u = per_chunk(
        draw, (model, guide), args, kwargs, plate=guide.plate, batched=guide.batched, seed=seed, chunk=chunk
    )
    found = _mutual_information(guide, posteriors, u)
    if found is None:
        raise NoDensityError(f"{guide!r} has no posterior density in closed form, so its mutual information is unknown")
    return found


class _Found(NamedTuple):
    """Posteriors of some of the data, kept because finding them may be dear."""

    q: Any  # guides.base.Sampler
    number: int


def _mutual_information(guide: Any, posteriors: list[_Found], u: Tensor) -> float | None:
    """From draws `[S, N, D]`, all N posteriors at each; None of chains, whose density lives on a larger space."""
    if guide.plate is None:
        return 0.0
    number = u.shape[1]
    own = torch.arange(number, device=u.device).repeat(len(u))  # which posterior each point is a draw of
    total, block = 0.0, max(1, _BLOCK // number)
    with torch.no_grad(), preserve_rng(), evaluating(guide.model, guide), isolated():
        for points, its in zip(u.flatten(0, 1).unsqueeze(1).split(block), own.split(block), strict=True):
            try:
                parts = [q.frozen_log_prob(points.expand(-1, some, -1)) for q, some in posteriors]
            except NoDensityError:
                return None
            densities = torch.cat(parts, dim=-1).double()
            mine = densities.gather(1, its.unsqueeze(1))[:, 0]
            total += float((mine - torch.logsumexp(densities, -1)).sum())
    return total / len(own) + math.log(number)
