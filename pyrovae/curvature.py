"""Curvature of a log-joint: the precision matrix of Laplace's approximation.

    Lambda(u) = sum over observed sites of J' F J  +  H,

J the Jacobian of a site's parameters with respect to u, F the Fisher information of its distribution in those
parameters (registry `fisher`), H the negative Hessian of everything else: latent sites, log-Jacobians, factors and
observed sites without a registered Fisher information. For a piecewise-linear decoder with canonical parameters
J' F J *is* the Hessian almost everywhere; otherwise it is Gauss-Newton, and positive semi-definite always.
(Park, Kim & Kim 2019; the generalised Gauss-Newton matrix is Schraudolph 2002.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from pyrovae.joint import AtLatents, Structure, hidden_samples
from pyrovae.latents import LatentSpace, LogJoint

__all__ = ["Curvature", "Expansion", "FisherBlock", "fisher", "floor_eigenvalues"]


class FisherBlock(NamedTuple):
    """One parameter of a distribution and the product of its Fisher information with a tangent of its shape."""

    parameter: Tensor
    product: Callable[[Tensor], Tensor]


@singledispatch
def fisher(fn: Any) -> dict[str, FisherBlock] | None:
    """Fisher information of a distribution in each of its parameters, or None when none is registered.

    Register one for a new distribution with `@fisher.register(MyDistribution)`. Parameters must be orthogonal (no
    cross terms), and elements independent unless the product says otherwise.
    """
    return None


@fisher.register(td.Independent)
@fisher.register(MaskedDistribution)
def _(fn: Any) -> dict[str, FisherBlock] | None:
    return fisher(fn.base_dist)


@fisher.register(td.Normal)
def _(fn: Any) -> dict[str, FisherBlock] | None:
    precision = fn.scale**-2
    return {
        "loc": FisherBlock(fn.loc, lambda tangent: precision * tangent),
        "scale": FisherBlock(fn.scale, lambda tangent: 2 * precision * tangent),
    }


@fisher.register(td.Laplace)
def _(fn: Any) -> dict[str, FisherBlock] | None:
    precision = fn.scale**-2
    return {
        "loc": FisherBlock(fn.loc, lambda tangent: precision * tangent),
        "scale": FisherBlock(fn.scale, lambda tangent: precision * tangent),
    }


@fisher.register(td.Bernoulli)
def _(fn: Any) -> dict[str, FisherBlock] | None:
    p = torch.sigmoid(fn.logits)
    return {"logits": FisherBlock(fn.logits, lambda tangent: p * (1 - p) * tangent)}


@fisher.register(td.Categorical)
def _(fn: Any) -> dict[str, FisherBlock] | None:
    p = torch.softmax(fn.logits, -1)
    return {
        "logits": FisherBlock(fn.logits, lambda tangent: p * (tangent - (p * tangent).sum(-1, keepdim=True)))
    }


@fisher.register(td.Poisson)
def _(fn: Any) -> dict[str, FisherBlock] | None:
    return {"rate": FisherBlock(fn.rate, lambda tangent: tangent / fn.rate)}


@fisher.register(td.NegativeBinomial)
def _(fn: Any) -> dict[str, FisherBlock] | None:
    p = torch.sigmoid(fn.logits)
    return {"logits": FisherBlock(fn.logits, lambda tangent: fn.total_count * p * tangent)}


class Expansion(NamedTuple):
    """Second-order expansion of the log-joint at `u`.

    Attributes:
        log_joint: `[B]`.
        gradient: `[B, D]`.
        precision: `[B, D, D]`, positive definite.
        floored: `[B]`, where eigenvalues had to be lifted.
    """

    log_joint: Tensor
    gradient: Tensor
    precision: Tensor
    floored: Tensor


@dataclass(frozen=True)
class _Treatment:
    """Which sites are treated how. Found once per latent space: it depends on the program, not on values."""

    moving: dict[str, tuple[str, ...]]  # observed site -> its parameters that depend on u
    closed: tuple[str, ...]  # latent real Normals whose parameters do not depend on u
    hessian: tuple[str, ...]  # everything else


class Curvature:
    """Expansions of one batch's log-joint.

    Uses the model's `linear_head(site) -> (trunk, weight)` where it defines one: the site's parameter is then
    `trunk(u) @ weight.T + bias`, so only the trunk is differentiated (checked against the traced site once per
    parameter version).
    """

    def __init__(self, log_joint: LogJoint, *, beta: float = 1.0, floor: float = 1e-2) -> None:
        self.log_joint, self.space, self.beta, self.floor = log_joint, log_joint.space, beta, floor

    def at(self, u: Tensor, *, create_graph: bool = False) -> Expansion:
        """The expansion at `u: [B, D]`; with `create_graph` everything in it can be differentiated."""
        with torch.enable_grad():
            point = u if create_graph and u.requires_grad else u.detach().requires_grad_()
            if self.space.enumerated:  # sites are mixed by the sum over discrete latents: the whole Hessian
                value = self.log_joint(point, self.beta)
                precision = -_hessian(lambda at: self.log_joint(at, self.beta).sum(), point)
            else:
                run = self._run(point)
                treatment = _treatment(self.space, run, point)
                zero = u.new_zeros(())
                value = self.beta * sum(run.latent, zero) + sum(run.observed, zero)
                precision = self._closed(treatment, run, point)
                for name, parameters in treatment.moving.items():
                    precision = precision + self._gauss_newton(run.sites_seen[name], parameters, point)
                if treatment.hessian:
                    precision = precision - self._site_hessian(treatment.hessian, point)
            (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=create_graph, retain_graph=True)
        if not create_graph:
            value, gradient, precision = value.detach(), gradient.detach(), precision.detach()
        precision, floored = floor_eigenvalues(precision, self.floor)
        return Expansion(value, gradient, precision, floored)

    def _run(self, u: Tensor, only: tuple[str, ...] = ()) -> _Recorder:
        recorder = _Recorder(self.space.structure, u, only)
        rows = self.log_joint.rows
        with pyro.validation_enabled(False), hidden_samples(), recorder:
            self.space.model(*rows.args, **rows.kwargs)
        return recorder

    def _closed(self, treatment: _Treatment, run: _Recorder, u: Tensor) -> Tensor:
        """Prior precision of latent Normals: a diagonal."""
        diagonal = u.new_zeros(u.shape)
        for site in self.space.sites:
            if site.name in treatment.closed:
                seen = run.sites_seen[site.name]
                scale = _base(seen.fn).scale.expand(seen.value.shape)
                block = site.flatten(seen.weigh(scale**-2), joint=self.space.plate is None)
                diagonal = torch.cat([diagonal[:, : site.slice.start], self.beta * block,
                                      diagonal[:, site.slice.stop :]], dim=-1)  # fmt: skip
        return torch.diag_embed(diagonal)

    def _gauss_newton(self, seen: _Site, parameters: tuple[str, ...], u: Tensor) -> Tensor:
        blocks = fisher(seen.fn)
        assert blocks is not None
        jacobians = self._head_jacobian(seen, parameters, blocks, u)
        if jacobians is None:
            jacobians = self._traced_jacobian(seen.name, parameters, u)
        total = u.new_zeros(*u.shape, u.shape[-1])
        for name in parameters:
            jacobian = jacobians[name]
            product = seen.weigh(blocks[name].product(jacobian), lead=1)
            total = total + torch.einsum("dbk,ebk->bde", self._by_row(seen, jacobian), self._by_row(seen, product))
        return total

    def _by_row(self, seen: _Site, jacobian: Tensor) -> Tensor:
        """`[D, *batch, *event]` to `[D, B, K]`."""
        if self.space.plate is None:
            return jacobian.reshape(len(jacobian), 1, -1)
        rows = len(seen.fn.batch_shape)  # dim 0 counts tangents, so the data plate's dim has this index
        return jacobian.movedim(rows, 1).flatten(2) if jacobian.dim() > 2 else jacobian.unsqueeze(-1)

    def _traced_jacobian(self, name: str, parameters: tuple[str, ...], u: Tensor) -> dict[str, Tensor]:
        def site_parameters(point: Tensor) -> tuple[Tensor, ...]:
            blocks = fisher(self._run(point, only=(name,)).sites_seen[name].fn)
            assert blocks is not None
            return tuple(blocks[parameter].parameter for parameter in parameters)

        return dict(zip(parameters, _jacobian(site_parameters, u), strict=True))

    def _head_jacobian(
        self, seen: _Site, parameters: tuple[str, ...], blocks: dict[str, FisherBlock], u: Tensor
    ) -> dict[str, Tensor] | None:
        protocol = getattr(self.space.model, "linear_head", None)
        head = protocol(seen.name) if protocol is not None and len(parameters) == 1 else None
        if head is None:
            return None
        trunk, weight = head
        self._verify_head(seen.name, parameters[0], trunk, weight, u)
        (hidden,) = _jacobian(lambda point: (trunk(point),), u)
        shape = (len(hidden), *blocks[parameters[0]].parameter.shape)
        return {parameters[0]: (hidden @ weight.T).reshape(shape)}

    def _verify_head(self, name: str, parameter: str, trunk: Any, weight: Tensor, u: Tensor) -> None:
        model = self.space.model
        tensors = [weight, *(model.parameters() if isinstance(model, torch.nn.Module) else ())]
        version = tuple((id(tensor), tensor._version) for tensor in tensors)
        verified = self.space.__dict__.setdefault("_verified_heads", {})
        if verified.get(name) == version:
            return
        with torch.no_grad():
            rest = []
            for point in (u.detach(), u.detach() + 0.5):
                blocks = fisher(self._run(point, only=(name,)).sites_seen[name].fn)
                assert blocks is not None
                rest.append(blocks[parameter].parameter.flatten(1) - trunk(point) @ weight.T)
            bias = torch.cat(rest)
            size = 1 + bias.abs().max()
        if not (bias - bias[:1]).abs().max() <= 1e-5 * size * (1 + weight.abs().max()):
            raise ValueError(
                f"{type(model).__name__}.linear_head({name!r}) does not reproduce the site's {parameter}: "
                "trunk(u) @ weight.T + bias must equal it, so correct the method or return None"
            )
        verified[name] = version

    def _site_hessian(self, names: tuple[str, ...], u: Tensor) -> Tensor:
        """Hessian of the named sites' log-density (log-Jacobians included), `[B, D, D]`."""
        latent = {site.name for site in self.space.sites}

        def total(point: Tensor) -> Tensor:
            run = self._run(point)
            value = point.new_zeros(())
            for name in names:
                value = value + (self.beta if name in latent else 1.0) * run.log_probs[name].sum()
            return value

        return _hessian(total, u)


def floor_eigenvalues(precision: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Where a symmetric matrix is not positive definite, replace its eigenvalues by max(|eigenvalue|, floor).

    Args:
        precision: `[B, D, D]`.

    Returns:
        the matrices (unchanged where positive definite) and `[B]`, which were changed. The correction carries no
        gradient.
    """
    symmetric = 0.5 * (precision + precision.mT)
    with torch.no_grad():
        finite = torch.isfinite(symmetric).all(-1).all(-1)
        floored = (torch.linalg.cholesky_ex(symmetric).info != 0) | ~finite
    if not floored.any():
        return symmetric, floored
    symmetric = torch.where(finite[:, None, None], symmetric, torch.zeros_like(symmetric))
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(symmetric)
        size = values.abs()
        # Below rounding error of the largest eigenvalue nothing would be positive definite after the product.
        least = (1e3 * torch.finfo(size.dtype).eps * size.amax(-1, keepdim=True)).clamp_min(floor)
        lift = torch.where(floored[:, None], torch.maximum(size, least) - values, torch.zeros_like(values))
        correction = (vectors * lift.unsqueeze(-2)) @ vectors.mT
    return symmetric + correction, floored


def _jacobian(function: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor) -> tuple[Tensor, ...]:
    """d outputs / d u_d for every d at once, rows being independent: each `[D, *output]`.

    Forward mode, one tangent per latent dimension, the primal computed once.
    """
    tangents = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device).unsqueeze(1).expand(-1, *u.shape)
    columns = torch.func.vmap(lambda tangent: torch.func.jvp(function, (u,), (tangent,))[1])(tangents)
    # Under vmap a Python number's tangent is a batched double and promotes what it meets.
    return tuple(column.to(u.dtype) for column in columns)


def _hessian(total: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Hessian of a sum over independent rows, `[B, D, D]`."""
    (columns,) = _jacobian(lambda point: (torch.func.grad(total)(point),), u)  # [D, B, D]
    return columns.movedim(0, 1)


def _base(fn: Any) -> Any:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return fn


class _Site:
    """One site of a run: its distribution, and the weight with which it counts per datum."""

    def __init__(self, msg: dict[str, Any], plate: str | None) -> None:
        self.name, self.fn, self.value = msg["name"], msg["fn"], msg["value"]
        self.mask = msg["mask"]
        self.weight: Any = msg["scale"]
        for frame in msg["cond_indep_stack"]:
            if frame.name == plate:
                self.weight = self.weight * (frame.size / frame.full_size)

    def weigh(self, value: Tensor, lead: int = 0) -> Tensor:
        """`value: [*lead, *batch, *event]` times the site's scale and masks, also those below `to_event`."""
        fn = self.fn
        weights = [(self.weight, fn.batch_shape), (self.mask, fn.batch_shape)]
        while isinstance(fn, td.Independent | MaskedDistribution):
            if isinstance(fn, MaskedDistribution):
                weights.append((fn._mask, fn.batch_shape))
            fn = fn.base_dist
        for weight, shape in weights:
            if weight is not None:
                weight = torch.as_tensor(weight).to(value).expand(shape)
                value = value * weight.reshape(shape + (1,) * (value.dim() - lead - len(shape)))
        return value


class _Recorder(AtLatents):
    """Adds to the log-densities of a run the distributions of its sites; with `only`, nothing but those sites'."""

    def __init__(self, structure: Structure, u: Tensor, only: tuple[str, ...] = ()) -> None:
        super().__init__(structure, u, check=False)
        self.only = only
        self.sites_seen: dict[str, _Site] = {}
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self.only:
            if msg["name"] in self.only:
                self.sites_seen[msg["name"]] = _Site(msg, self.structure.plate)
            return
        before = len(self.latent), len(self.observed)
        super()._pyro_post_sample(msg)
        added = self.latent[before[0] :] + self.observed[before[1] :]
        if added:
            self.sites_seen[msg["name"]] = _Site(msg, self.structure.plate)
            self.log_probs[msg["name"]] = added[0]


def _treatment(space: LatentSpace, run: Any, u: Tensor) -> _Treatment:
    cached = space.__dict__.get("_curvature")
    if cached is not None:
        return cached

    def moves(value: Tensor) -> bool:
        if not value.requires_grad:
            return False
        return torch.autograd.grad(value.sum(), u, allow_unused=True, retain_graph=True)[0] is not None

    latent = {site.name: site for site in space.sites}
    moving: dict[str, tuple[str, ...]] = {}
    closed, hessian = [], []
    for name, seen in run.sites_seen.items():
        blocks = fisher(seen.fn)
        if name in latent:
            base = _base(seen.fn)
            fixed = isinstance(base, td.Normal) and latent[name].is_real and seen.mask is None
            if fixed and not moves(base.loc) and not moves(base.scale):
                closed.append(name)
            else:
                hessian.append(name)
        elif blocks is not None and not any(moves(value) for value in _unregistered(seen.fn, blocks)):
            parameters = tuple(key for key, block in blocks.items() if moves(block.parameter))
            if parameters:
                moving[name] = parameters
        elif moves(run.log_probs[name]):
            hessian.append(name)
    found = _Treatment(moving, tuple(closed), tuple(hessian))
    space.__dict__["_curvature"] = found
    return found


def _unregistered(fn: Any, blocks: dict[str, FisherBlock]) -> list[Tensor]:
    """A distribution's parameters without Fisher information (a negative binomial's `total_count`)."""
    while isinstance(fn, td.Independent | MaskedDistribution):
        fn = fn.base_dist
    known = {*blocks, "probs", "logits"} if "logits" in blocks else {*blocks}
    values = [vars(fn).get(name) for name in fn.arg_constraints if name not in known]
    return [value for value in values if isinstance(value, Tensor)]
