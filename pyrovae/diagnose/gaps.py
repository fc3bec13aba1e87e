"""Where a guide loses evidence: to its family, or to its encoder (Cremer, Li & Duvenaud 2018).

For each datum, with the model held fixed and q* the best member of the guide's family, found by local inference,

    approximation gap = log p(x)   - ELBO[q*]  = KL(q* || p(z|x))
    amortization gap  = ELBO[q*]   - ELBO[q]   = KL(q || p(z|x)) - KL(q* || p(z|x))
    inference gap     = log p(x)   - ELBO[q]   = approximation + amortization

log p(x) is the model's own where it is known, else the better of two importance-weighted bounds, with proposals q and
q*. That is a lower bound, and so are then the approximation gap and the sum.

q* is sought from the guide's own parameters and from the family's start. Which of the two is kept, and which proposal
log p(x) takes, is decided on one set of draws; every number is from another. q and q* are drawn from the same noise, so
that the error of their difference is small where they are alike.

No gap is negative. One that comes out below zero by more than its error says that the reference was not reached: q* is
not the best member of its family (amortization), or log p(x) is underestimated (approximation). It is reported as it
is, and flagged, as are data whose local inference did not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae import handlers, noise
from pyrovae.ascent import Ascent
from pyrovae.chunks import per_chunk
from pyrovae.errors import NoDensityError, ScaleError
from pyrovae.evidence import Estimate
from pyrovae.evidence.estimate import LOWER, NO_BOUND, UNNORMALISED, kind_of
from pyrovae.families import Family, FullRankNormal
from pyrovae.losses.base import require_pair
from pyrovae.provenance import Provenance

__all__ = ["Gaps", "gaps"]

OK, UNREACHED = "ok", "reference not converged"
_BLOCK = 1000  # draws scored at once: fixed, so that chunks of data change no number
_ERRORS = 3.0  # standard errors below zero at which a gap is flagged


@dataclass(frozen=True)
class Gaps:
    """The inference gap of every datum and its two parts, nats.

    Attributes:
        guide: its name.
        family: of q*.
        log_evidence: log p(x), with its kind.
        best: the ELBO of q*.
        elbo: the ELBO of the guide.
        approximation, amortization, inference: the gaps; each an `Estimate` with `values` and `se`, `[B]`.
        converged: `[B]`: local inference ended by its stopping rule.
        status: per datum "ok" or "reference not converged".
        provenance: of the numbers.
    """

    guide: str
    family: str
    log_evidence: Estimate
    best: Estimate
    elbo: Estimate
    approximation: Estimate
    amortization: Estimate
    inference: Estimate
    converged: Tensor
    status: tuple[str, ...]
    provenance: Provenance

    @property
    def flagged(self) -> Tensor:
        """`[B]`: data whose reference was not reached."""
        return torch.tensor([status != OK for status in self.status], device=self.converged.device)

    def _rows(self) -> list[tuple[str, Estimate]]:
        return [
            (f"log p(x) ({self.log_evidence.name}, {self.log_evidence.kind})", self.log_evidence),
            ("ELBO of q*", self.best), ("ELBO of the guide", self.elbo), ("approximation gap", self.approximation),
            ("amortization gap", self.amortization), ("inference gap", self.inference),
        ]  # fmt: skip

    def _notes(self) -> list[str]:
        found: list[str] = []
        if self.approximation.kind != "exact":
            article = "an" if self.approximation.kind[0] in "aeiou" else "a"
            found.append(
                f"log p(x) is only {article} {self.approximation.kind}: so are the approximation gap and the inference "
                "gap"
            )
        if self.flagged.any():
            stopped, below = int((~self.converged).sum()), int((self.flagged & self.converged).sum())
            reasons = [f"local inference was stopped for {stopped}"] if stopped else []
            reasons += [f"{below} have a gap more than {_ERRORS:g} standard errors below zero"] if below else []
            found.append(f"{stopped + below} of {len(self.status)} data flagged, {UNREACHED}: {', '.join(reasons)}")
        return found

    def __repr__(self) -> str:
        lines = [f"Gaps of {self.guide}, {len(self.status)} data, nats per datum; q* in {self.family}"]
        lines += [f"  {name:<36} {value.mean:10.3f} +- {value.mean_se:.3f}" for name, value in self._rows()]
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{value.mean:.3f} &plusmn; {value.mean_se:.3f}</td></tr>"
            for name, value in self._rows()
        )
        notes = "".join(f"<p>{note}</p>" for note in self._notes())
        title = f"Gaps of {self.guide}, {len(self.status)} data, nats per datum; q* in {self.family}"
        return f"<table><caption>{title}</caption>{rows}</table>{notes}"


def gaps(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 1000,
    local: Mapping[str, Any] | None = None,
    log_evidence: Tensor | Estimate | None = None,
    seed: int = 0,
    chunk: int | None = None,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
    **kwargs: Any,
) -> Gaps:
    """Split every datum's inference gap into what the family and what the encoder loses.

    A guide without a family (Laplace) is held against full-rank normals; a flow against the flow at its own weights.

    Args:
        num_samples: draws per estimate (as many again for the choices).
        local: options of the local inference, as in `pyrovae.ascent.Ascent` (`{"max_steps": 20_000}`).
        log_evidence: log p(x) where it is known better than here: exact `[B]`, or an `Estimate` that says its kind; by
            default `model.log_evidence` where the model has it, else importance weighting.
        seed, chunk, indices, progress: as in `evidence.log_weights`. A search amplifies rounding: between chunkings q*
            may differ within its tolerance (0.001 nats).

    Raises:
        NoDensityError: the guide has no density.
        IncompatibleError: the guide was built for another model.
        ScaleError: a KL weight or scale is in force.
    """
    require_pair(model, guide, None)
    if num_samples < 2:
        raise ValueError(f"gaps need num_samples of at least 2 for their standard errors, got {num_samples}")
    if not hasattr(guide, "_sampler"):
        raise NoDensityError(f"{guide!r} has no density, so it has no ELBO and no gaps: use reference.compare")
    if handlers.kl_weight() != 1.0:
        raise ScaleError(f"gaps under a KL weight of {handlers.kl_weight():g}: evaluate with 1")
    rule = Ascent(**(local or {}))
    options: dict[str, Any] = {
        "plate": guide.plate, "batched": guide.batched, "seed": seed, "indices": indices,
        "chunk": 64 if chunk is None else chunk,
    }  # fmt: skip

    def measure(*some: Any, **named: Any) -> Tensor:
        with guide._aside():
            guide.space(*some, **named).require_unit_scale(*some, **named)
            return _measure(guide, rule, num_samples, some, named)

    found = per_chunk(measure, (model, guide), args, kwargs, progress=progress, **options)
    number = found.shape[1]
    provenance = Provenance.of_call(args, kwargs, num_data=number, seed=seed, num_samples=num_samples)

    def estimate(name: str, kind: str, values: Tensor, se: Tensor) -> Estimate:
        return Estimate(name, kind, values, se, num_samples, provenance)

    stats = dict(zip(_STATS, found, strict=True))
    elbo, best = stats["elbo"], stats["best"]
    if log_evidence is None and hasattr(model, "log_evidence"):
        exact = per_chunk(lambda *a, **k: model.log_evidence(*a, **k).unsqueeze(0), (model,), args, kwargs, **options)
        log_evidence = exact[0]
    if log_evidence is None:
        evidence = estimate(f"IWAE-{num_samples}", kind_of(model, LOWER), stats["evidence"], stats["evidence_se"])
        lost, lost_se, all_se = evidence.values - best, stats["approximation_se"], stats["inference_se"]
    else:
        evidence = _given(log_evidence, elbo, provenance)
        lost = evidence.values - best
        lost_se, all_se = evidence.se.hypot(stats["best_se"]), evidence.se.hypot(stats["elbo_se"])
    ours = kind_of(model, LOWER)
    if (evidence.kind == UNNORMALISED) != (ours == UNNORMALISED):
        raise ValueError(
            "log_evidence and the guide's bounds must both have the prior's log Z, or both lack it: measure it first "
            "(evidence.log_normaliser and model.normalise)"
        )
    # Where log Z is missing it cancels; what is left of an estimate's kind is unknown.
    kind = LOWER if log_evidence is None else NO_BOUND if evidence.kind == UNNORMALISED else evidence.kind
    # Where q is the posterior nothing but rounding is left, of sums of some hundred terms.
    slack = 256 * torch.finfo(guide.space(*args, **kwargs).dtype).eps * (1 + evidence.values.abs())
    negative = (lost < -_ERRORS * lost_se - slack) | (best - elbo < -_ERRORS * stats["amortization_se"] - slack)
    negative |= evidence.values - elbo < -_ERRORS * all_se - slack
    converged = stats["converged"] > 0
    return Gaps(
        guide=guide.traits.name,
        family=_name_of(guide, args, kwargs),
        log_evidence=evidence,
        best=estimate("ELBO of q*", ours, best, stats["best_se"]),
        elbo=estimate("ELBO", ours, elbo, stats["elbo_se"]),
        approximation=estimate("approximation gap", kind, lost, lost_se),
        amortization=estimate("amortization gap", "exact", best - elbo, stats["amortization_se"]),
        inference=estimate("inference gap", kind, evidence.values - elbo, all_se),
        converged=converged,
        status=tuple(UNREACHED if bad else OK for bad in (negative | ~converged).tolist()),
        provenance=provenance,
    )


_STATS = ("elbo", "elbo_se", "best", "best_se", "evidence", "evidence_se", "approximation_se", "amortization_se",
          "inference_se", "converged")  # fmt: skip


def _measure(guide: Any, rule: Ascent, num_samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The numbers of `_STATS` for some rows, `[len(_STATS), b]`, under per-datum noise."""
    space = guide.space(*args, **kwargs)
    log_joint = space.bind(*args, **kwargs)
    family, start, draw = _posterior(guide, args, kwargs)
    zero = family.init(len(start), dtype=start.dtype, device=start.device)
    fits = [rule.run(family, log_joint, point) for point in (start, zero)]

    seeds = noise.row_seeds()

    def log_weights(draw: Callable[[int], tuple[Tensor, Tensor]], stream: int) -> Tensor:
        parts = []
        with noise.per_datum(stream, seeds):  # the same noise for every q
            for first in range(0, num_samples, _BLOCK):
                u, log_q = draw(min(_BLOCK, num_samples - first))
                parts.append((log_joint(u) - log_q).double())
        return torch.cat(parts)

    trial = torch.stack([log_weights(_drawing(family, fit.lam), 0).mean(0) for fit in fits])
    chosen = trial[1] > trial[0]
    lam = torch.where(chosen.unsqueeze(-1), fits[1].lam, fits[0].lam)
    converged = torch.where(chosen, fits[1].converged, fits[0].converged)

    bounds = [_log_mean(log_weights(d, 0)) for d in (draw, _drawing(family, lam))]
    ours, best = log_weights(draw, 1), log_weights(_drawing(family, lam), 1)
    proposal = torch.where(bounds[1] > bounds[0], best, ours)
    evidence = _log_mean(proposal)
    weight = (proposal - evidence).exp()  # by the delta method, the mean of these is what moves the bound
    return torch.stack([
        ours.mean(0), _se(ours), best.mean(0), _se(best), evidence, _se(weight), _se(weight - best), _se(best - ours),
        _se(weight - ours), converged.double(),
    ])  # fmt: skip


def _posterior(
    guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Family, Tensor, Callable[[int], tuple[Tensor, Tensor]]]:
    """The family of q*, where its search starts, and draws from the guide's own posterior with log q."""
    if hasattr(guide, "lam"):
        family, lam = guide.family(*args, **kwargs), guide.lam(*args, **kwargs)
        return family, lam, _drawing(family, lam)
    q = guide._posterior(*args, **kwargs)
    full = FullRankNormal(q.event_shape[0])
    scale_tril = q.scale_tril if hasattr(q, "scale_tril") else torch.diag_embed(q.variance.sqrt())
    return full, full.pack(q.mean, scale_tril), guide._sampler(*args, **kwargs).draw


def _drawing(family: Family, lam: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda number: family.rsample_and_log_prob(lam, noise.normal(number, len(lam), family.noise_dim, like=lam))


def _log_mean(log_weights: Tensor) -> Tensor:
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


def _se(values: Tensor) -> Tensor:
    return values.std(0) / math.sqrt(len(values))


def _given(value: Tensor | Estimate, like: Tensor, provenance: Provenance) -> Estimate:
    """log p(x) from the caller or the model."""
    if not isinstance(value, Estimate):
        exact = torch.as_tensor(value).detach().to(like)
        value = Estimate("log p(x)", "exact", exact, torch.zeros_like(exact), 0, provenance)
    if value.provenance is not None and value.provenance.fingerprint != provenance.fingerprint:
        raise ValueError("log_evidence is an estimate for other data: make it from the arguments given here")
    if value.values.shape != like.shape:
        raise ValueError(
            f"log_evidence has shape {tuple(value.values.shape)} for {len(like)} data: give one value for each"
        )
    return value


def _name_of(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if hasattr(guide, "family"):
        return repr(guide.family(*args, **kwargs))
    return repr(FullRankNormal(guide.space(*args, **kwargs).dim))
