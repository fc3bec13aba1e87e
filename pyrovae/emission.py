"""How a guide writes its draws into Pyro's trace.

(a) A posterior that factorises over sites (independent normals), or a single real vector site: every site is
    emitted with its own distribution, so analytic KLs and losses that need Gaussians see it.
(b) Otherwise: one auxiliary site `_u` with the joint posterior, one factor `_log_det` with minus the log-Jacobian,
    and every site as a `Delta` without log-density. (A `Delta` that carries the Jacobian is dropped by
    `TraceMeanField_ELBO`.)
(c) Draws without a density (chains): `Delta`s only.
(d) Draws with a log-density that no distribution has (chains on an augmented space): `Delta`s and one factor.

Pyro builds a score-function term from *model* sites only. For a packed mixture, whose weights need a score, the
missing part -(log q - log|det|) * score is added to the factor as a term that is zero in value.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.families import marginal
from pyrovae.joint import Structure
from pyrovae.mixture import MixtureOfNormals
from pyrovae.precision_normal import PrecisionNormal
from pyrovae.sites import LatentSite, bijection, to_constrained

__all__ = ["emit", "emit_draws", "emit_weighted", "site_posteriors"]

AUXILIARY = "_u"


def emit(structure: Structure, q: Any) -> None:
    """Emit sample sites for a posterior `q`, batch `[B]`, event `[D]`; the data plate must be open (local mode)."""
    normal = _independent_normal(q)
    if normal is not None:
        for site in structure.sites:
            _emit_normal(structure, site, normal)
    elif len(structure.sites) == 1 and _is_plain_vector(structure, structure.sites[0]):
        pyro.sample(structure.sites[0].name, q)
    else:
        _emit_packed(structure, q)


def emit_draws(structure: Structure, u: Tensor) -> None:
    """Emit given draws `u: [..., B, D]` as `Delta`s without log-density."""
    for site in structure.sites:
        _emit_delta(site, to_constrained(site, structure.block(site, u, padded=True)))


def emit_weighted(structure: Structure, u: Tensor, log_q: Tensor) -> None:
    """Emit draws `u: [..., B, D]` with log q `[..., B]` at them; the data plate must be open (local mode)."""
    total = log_q.squeeze(-1) if structure.joint else log_q
    values, log_det = _constrained(structure, u, torch.zeros_like(total))
    pyro.factor("_log_q", total - log_det, has_rsample=True)
    for site in structure.sites:
        _emit_delta(site, values[site.name])


def site_posteriors(structure: Structure, guide_trace: Any) -> dict[str, Any]:
    """Site -> its variational distribution in unconstrained coordinates (flat event), or None."""
    found: dict[str, Any] = {}
    packed = guide_trace.nodes.get(AUXILIARY)
    for site in structure.sites:
        fn = guide_trace.nodes[site.name]["fn"]
        if packed is not None:
            whole = packed["fn"]
            if isinstance(whole, torch.distributions.Independent):  # joint mode
                whole = whole.base_dist
            found[site.name] = marginal(whole, site.slice)
        elif isinstance(fn, dist.Delta | PrecisionNormal):  # the latter's covariance has no gradient to give
            found[site.name] = None
        else:
            if isinstance(fn, torch.distributions.TransformedDistribution):
                fn = None if site.is_real else fn.base_dist  # a flow, or a Gaussian on a constrained site
            found[site.name] = fn
    return found


def _independent_normal(q: Any) -> Any | None:
    if isinstance(q, torch.distributions.Independent) and isinstance(q.base_dist, torch.distributions.Normal):
        return q.base_dist
    return None


def _is_plain_vector(structure: Structure, site: LatentSite) -> bool:
    return not structure.joint and site.is_real and not site.inner and len(site.unconstrained_shape) == 1


def _emit_normal(structure: Structure, site: LatentSite, normal: Any) -> None:
    loc, scale = structure.block(site, normal.loc), structure.block(site, normal.scale)
    fn: Any = dist.Normal(loc, scale).to_event(len(site.unconstrained_shape))
    if not site.is_real:
        fn = dist.TransformedDistribution(fn, [bijection(site)])
    with _inner_plates(site):
        pyro.sample(site.name, fn)


def _emit_packed(structure: Structure, q: Any) -> None:
    joint = structure.joint
    if joint:  # no plate is open: the row of the batch becomes part of the event
        q = MixtureOfNormals(q.logits[0], q.locs[0], q.scales[0]) if isinstance(q, MixtureOfNormals) else q.to_event(1)
    value = pyro.sample(AUXILIARY, q, infer={"is_auxiliary": True})
    u = value.unsqueeze(-2) if joint and isinstance(q, MixtureOfNormals) else value
    start = torch.zeros(value.shape[: value.dim() - len(q.event_shape)], dtype=u.dtype, device=u.device)
    values, log_det = _constrained(structure, u, start)
    factor = -log_det
    if isinstance(q, MixtureOfNormals):
        score = q.score(value)
        missing = (log_det - q.log_prob(value)).detach() * score
        factor = factor - (missing - missing.detach())
    pyro.factor("_log_det", factor, has_rsample=True)
    for site in structure.sites:
        _emit_delta(site, values[site.name])


def _constrained(structure: Structure, u: Tensor, log_det: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every site's value in the model's space, and `log_det` with log |det dz/du| added."""
    values = {}
    for site in structure.sites:
        block = structure.block(site, u, padded=True)
        values[site.name] = to_constrained(site, block)
        if not site.is_real:
            term = bijection(site).log_abs_det_jacobian(block, values[site.name])
            log_det = log_det + _per_row(structure, site, term, log_det.shape)
    return values, log_det


def _per_row(structure: Structure, site: LatentSite, term: Tensor, shape: torch.Size) -> Tensor:
    """A site's log-Jacobian `[*particles, *inner, B]` summed to the shape of the auxiliary site's batch."""
    inner = len(site.inner)
    if structure.joint:
        return term.sum(tuple(range(-inner, 0))).reshape(shape) if inner else term.reshape(shape)
    return term.sum(tuple(range(-1 - inner, -1))).reshape(shape) if inner else term.reshape(shape)


def _emit_delta(site: LatentSite, value: Tensor) -> None:
    with _inner_plates(site):
        pyro.sample(site.name, dist.Delta(value, event_dim=site.event_dim))


def _inner_plates(site: LatentSite) -> ExitStack:
    stack = ExitStack()
    for name, size, dim in site.frames:
        stack.enter_context(pyro.plate(name, size, dim=dim))
    return stack
