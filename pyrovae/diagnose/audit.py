"""The exact divergence of a guide from the posterior, beside the gap that Monte Carlo sees.

    KL(q || p(u|x)) = int q(u) [log q(u) - log p(u|x)] du = log p(x) - ELBO[q]

The left side by quadrature in one or two latents per datum, on a grid around q's mass; the right side from draws of the
guide. Both are computed apart, so their agreement checks density, draws and evidence at once. KL(p(u|x) || q), which
no draw of the guide can see, comes from a grid around the posterior's mass: it is large where the guide misses a mode.

p(u|x) is the model's own where it has `posterior` and `log_evidence`, else log p(x, u) less its integral on the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.chunks import per_chunk
from pyrovae.errors import QuadratureError
from pyrovae.evidence import Estimate, log_weights, summarize
from pyrovae.evidence.estimate import EXACT, kind_of
from pyrovae.losses.base import require_pair
from pyrovae.provenance import Provenance
from pyrovae.reference.grid import POINTS, Grid, enclose

__all__ = ["Audit", "audit"]

_DROP = 40.0  # nats below a density's mode beyond which its mass is neglected
_UNIT = 1e-3  # nats by which the integral of a density may differ from one


@dataclass(frozen=True)
class Audit:
    """Exact divergences of every datum, nats.

    Attributes:
        guide: its name.
        kl: KL(q || p(u|x)) by quadrature; `se` is what half of the grid's points change.
        gap: log p(x) - ELBO, Monte Carlo.
        reverse: KL(p(u|x) || q) by quadrature.
        log_evidence: log p(x).
        elbo: of the guide.
        provenance: of the numbers.
    """

    guide: str
    kl: Estimate
    gap: Estimate
    reverse: Estimate
    log_evidence: Estimate
    elbo: Estimate
    provenance: Provenance

    @property
    def errors(self) -> Tensor:
        """KL less gap in standard errors, `[B]`; beyond rounding no datum should be many away."""
        away = self.kl.values - self.gap.values
        # Where q is the posterior the weights are constant, and rounding is all there is.
        rounding = 1e-6 * (1 + self.log_evidence.values.abs())
        return away / (self.kl.se + self.gap.se + rounding)

    def _rows(self) -> list[tuple[str, Estimate]]:
        return [
            ("KL(q || p(z|x)), quadrature", self.kl), ("log p(x) - ELBO, Monte Carlo", self.gap),
            ("KL(p(z|x) || q), quadrature", self.reverse), ("log p(x)", self.log_evidence), ("ELBO", self.elbo),
        ]  # fmt: skip

    @property
    def _title(self) -> str:
        return f"Audit of {self.guide}, {len(self.kl.values)} data, nats per datum"

    @property
    def _note(self) -> str:
        return f"the first two differ by at most {float(self.errors.abs().max()):.1f} standard errors"

    def __repr__(self) -> str:
        lines = [f"  {name:<32} {value.mean:10.4f} +- {value.mean_se:.4f}" for name, value in self._rows()]
        return "\n".join([self._title, *lines, f"  {self._note}"])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{value.mean:.4f} &plusmn; {value.mean_se:.4f}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table><caption>{self._title}</caption>{rows}</table><p>{self._note}</p>"


def audit(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 1000,
    seed: int = 0,
    chunk: int = 16,
    indices: Sequence[int] | None = None,
    progress: str | None = None,
    **kwargs: Any,
) -> Audit:
    """Every datum's exact KL(q || p(u|x)) and KL(p(u|x) || q), beside log p(x) - ELBO.

    Args:
        num_samples: draws for the ELBO.
        seed, chunk, indices, progress: as in `evidence.log_weights`.

    Raises:
        NoDensityError: the guide has no density of the latents alone.
        ValueError: more than two latents per datum.
        QuadratureError: a density that does not integrate to one, or that a grid cannot resolve.
        IncompatibleError: the guide was built for another model.
    """
    require_pair(model, guide, None)
    if num_samples < 2:
        raise ValueError(f"an audit needs num_samples of at least 2 for its standard errors, got {num_samples}")
    options: dict[str, Any] = {"seed": seed, "indices": indices, "progress": progress}

    def measure(*some: Any, **named: Any) -> Tensor:
        return _measure(model, guide, some, named)

    found = per_chunk(
        measure, (model, guide), args, kwargs, plate=guide.plate, batched=guide.batched, chunk=chunk, **options
    )
    weights = log_weights(model, guide, *args, num_samples=num_samples, **options, **kwargs)
    provenance = Provenance.of_call(args, kwargs, num_data=found.shape[1], seed=seed, num_samples=num_samples)
    elbo, _ = summarize(weights, provenance, model=model)

    def estimate(name: str, kind: str, values: Tensor, se: Tensor, draws: int = 0) -> Estimate:
        return Estimate(name, kind, values, se, draws, provenance)

    kl, kl_error, reverse, reverse_error, log_evidence = found.to(weights)
    return Audit(
        guide=guide.traits.name,
        kl=estimate("KL(q || p)", EXACT, kl, kl_error),
        gap=estimate("log p(x) - ELBO", EXACT, log_evidence - elbo.values, elbo.se, num_samples),
        reverse=estimate("KL(p || q)", EXACT, reverse, reverse_error),
        log_evidence=estimate("log p(x)", kind_of(model, EXACT), log_evidence, torch.zeros_like(kl)),
        elbo=elbo,
        provenance=provenance,
    )


def _measure(model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Both divergences with their errors, and log p(x): `[5, b]`, float64."""
    space = guide.space(*args, **kwargs)
    if space.dim not in POINTS:
        raise ValueError(f"an audit integrates over 1 or 2 latents per datum, this model has {space.dim}: use gaps")
    q = guide.posterior(*args, **kwargs)
    log_joint = space.bind(*args, **kwargs)
    shape = {"rows": log_joint.rows.size, "dim": space.dim}
    place = {"drop": _DROP, "dtype": space.dtype, "device": space.device}
    if hasattr(model, "posterior") and hasattr(model, "log_evidence"):
        p: Callable[[Tensor], Tensor] = model.posterior(*args, **kwargs).log_prob
        log_evidence = model.log_evidence(*args, **kwargs).double().cpu()
        around_p = enclose(p, **shape, **place)
    else:
        p = log_joint
        around_p = enclose(p, **shape, **place)
        log_evidence = around_p.log_integral()
        around_p = around_p._replace(values=around_p.values - log_evidence)
        p = _less(log_joint, log_evidence)
    around_q = enclose(q.log_prob, **shape, **place)
    for name, grid in (("guide", around_q), ("posterior", around_p)):
        total = grid.log_integral()
        if not (total.abs() < _UNIT).all():
            raise QuadratureError(
                f"the {name}'s density integrates to {float(total.exp()[total.abs().argmax()]):.4g} for a datum: "
                "not to one, so it is wrong, or too heavy in its tails for a grid"
            )
    return torch.stack([*_divergence(around_q, p, place), *_divergence(around_p, q.log_prob, place), log_evidence])


def _less(log_joint: Callable[[Tensor], Tensor], log_evidence: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda u: log_joint(u).double().cpu() - log_evidence


def _divergence(grid: Grid, other: Callable[[Tensor], Tensor], place: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """KL of the grid's density from another, `[B]`, and what half of the points change."""
    block = max(1, 200_000 // grid.u.shape[1])
    parts = [other(u.to(place["dtype"]).to(place["device"])).double().cpu() for u in grid.u.split(block)]
    away = grid.values - torch.cat(parts)
    away = torch.where(grid.values > -torch.inf, away, 0.0)  # no mass, no matter
    weights = grid.values.softmax(0)
    value = (weights * away).sum(0)
    half = grid.coarse()
    return value, (value - (grid.values[half].softmax(0) * away[half]).sum(0)).abs()
