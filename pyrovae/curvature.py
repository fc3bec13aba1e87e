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
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.fisher import FisherBlock, fisher, innermost
from pyrovae.heads import Trunks, contract, gram, linear_head
from pyrovae.latents import LogJoint
from pyrovae.products import Form, hessian, jacobian, negative_hessian, negative_hessians, sandwich, sandwiches
from pyrovae.sitewise import Run, Site, Treatment, run_at, treatment

__all__ = ["Curvature", "Expansion", "Operator", "floor_eigenvalues"]


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


class Operator(NamedTuple):
    """The expansion with its precision as a product: `p: [B, D]` to Lambda p, not floored, without gradient."""

    log_joint: Tensor
    gradient: Tensor
    product: Callable[[Tensor], Tensor]


class Curvature:
    """Expansions of one batch's log-joint.

    Uses the model's `linear_head` where it defines one (`pyrovae.heads`).

    Args:
        log_joint: of the batch.
        beta: KL weight.
        hessian: take the Hessian of every site in the place of J' F J.
        floor: smallest eigenvalue where the precision is not positive definite.
    """

    def __init__(
        self, log_joint: LogJoint, *, beta: float = 1.0, hessian: bool = False, floor: float = 1e-2
    ) -> None:
        self.log_joint, self.space, self.beta, self.floor = log_joint, log_joint.space, beta, floor
        self.hessian = hessian
        self._trunks: Trunks | None = None  # found by `operator`: what the parameters are must not change meanwhile

    def at(self, u: Tensor, *, create_graph: bool = False) -> Expansion:
        """The expansion at `u: [B, D]`; with `create_graph` everything in it can be differentiated."""
        with torch.enable_grad():
            point = u if create_graph and u.requires_grad else u.detach().requires_grad_()
            value, run = self._value(point)
            (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=create_graph, retain_graph=True)
        precision, floored = self._precision(value, run, point, create_graph)
        if not create_graph:
            value, gradient = value.detach(), gradient.detach()
        return Expansion(value, gradient, precision, floored)

    def precision(self, u: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Lambda(u), `[B, D, D]`, and where it was floored, `[B]`; with `create_graph` it can be differentiated (with
        respect to `u` too where `u` requires it)."""
        if self._trunks is not None and not create_graph:
            return floor_eigenvalues(self._trunks.detach().matrix(u), self.floor)
        with torch.enable_grad():
            point = u if create_graph and u.requires_grad else u.detach().requires_grad_()
            value, run = self._value(point)
        return self._precision(value, run, point, create_graph)

    def products(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        """p -> Lambda(u) p for every p of `[T, B, D]`, not floored; can be differentiated, as `precision` can."""
        with torch.enable_grad():
            point = u if u.requires_grad else u.detach().requires_grad_()
            if self._trunks is not None:
                terms = self._trunks.terms(point, sandwiches)
            else:
                value, run = self._value(point)
                terms = self._terms(value, run, point, sandwiches, negative_hessians)

        def product(p: Tensor) -> Tensor:
            with torch.enable_grad():
                return torch.stack([term(p) for term in terms]).sum(0)

        return product

    def operator(self, u: Tensor, objective: Callable[..., Tensor] | None = None) -> Operator:
        """Value, gradient and products with Lambda at `u: [B, D]`, for iterative solvers: no matrix is formed.

        Args:
            objective: the log-joint `(u, beta) -> [B]` in a faster form, for where a run of the model has no more to
                give.
        """
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            if self._trunks is not None and objective is not None:
                value, terms = objective(leaf, self.beta), self._trunks.detach().terms(leaf, sandwich)
            else:
                value, run = self._value(leaf)
                self._trunks = None if run is None else self._find_trunks(run, leaf)
                if self._trunks is not None:
                    terms = self._trunks.detach().terms(leaf, sandwich)
                else:
                    terms = self._terms(value, run, leaf, sandwich, negative_hessian)
            (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        return Operator(value.detach(), gradient, lambda p: torch.stack([term(p) for term in terms]).sum(0))

    def _value(self, u: Tensor) -> tuple[Tensor, Run | None]:
        if self.space.enumerated:  # sites are mixed by the sum over discrete latents: the whole Hessian
            return self.log_joint(u, self.beta), None
        run = run_at(self.log_joint, u)
        zero = u.new_zeros(())
        return self.beta * sum(run.latent, zero) + sum(run.observed, zero), run

    def _treatment(self, run: Run, u: Tensor) -> Treatment:
        found = treatment(self.space, run, u)
        return Treatment({}, found.closed, found.hessian + tuple(found.moving)) if self.hessian else found

    def _precision(self, value: Tensor, run: Run | None, u: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            if run is None:
                precision = -hessian(value.sum(), u, create_graph=create_graph)
            else:
                sorted_sites = self._treatment(run, u)
                precision = torch.diag_embed(self._closed(sorted_sites, run, u))
                for name, parameters in sorted_sites.moving.items():
                    seen = run.sites_seen[name]
                    precision = precision + self._gauss_newton(seen, parameters, u, create_graph)
                if sorted_sites.hessian:
                    total = self._total(run, sorted_sites.hessian)
                    precision = precision - hessian(total, u, create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            return floor_eigenvalues(precision if create_graph else precision.detach(), self.floor)

    def _closed(self, sorted_sites: Treatment, run: Run, u: Tensor) -> Tensor:
        """Prior precision of latent Normals, `[B, D]`."""
        diagonal = u.new_zeros(u.shape)
        for site in self.space.sites:
            if site.name in sorted_sites.closed:
                seen = run.sites_seen[site.name]
                scale = innermost(seen.fn).scale.expand(seen.value.shape)
                block = site.flatten(seen.weigh(scale**-2), joint=self.space.plate is None)
                diagonal = torch.cat([diagonal[:, : site.slice.start], self.beta * block,
                                      diagonal[:, site.slice.stop :]], dim=-1)  # fmt: skip
        return diagonal

    def _total(self, run: Run, names: tuple[str, ...]) -> Tensor:
        """Sum of the named sites' log-densities (log-Jacobians included), latent ones times the KL weight."""
        latent = {site.name for site in self.space.sites}
        terms = [(self.beta if name in latent else 1.0) * run.log_probs[name].sum() for name in names]
        return torch.stack(terms).sum()

    # J' F J as a matrix

    def _gauss_newton(self, seen: Site, parameters: tuple[str, ...], u: Tensor, create_graph: bool) -> Tensor:
        blocks = _blocks(seen)
        head = linear_head(self.log_joint, seen, parameters, u)
        with torch.set_grad_enabled(create_graph):
            if head is not None:
                with torch.enable_grad():
                    features = head.trunk(u)
                hidden = jacobian(features, u, create_graph=create_graph)
                middle = gram(seen, parameters, head.weight)
                if middle is not None:
                    return contract(hidden @ middle, hidden)
                whole = hidden @ head.weight.T
                columns = {parameters[0]: whole.reshape(-1, *blocks[parameters[0]].parameter.shape)}
            else:
                columns = {
                    name: jacobian(blocks[name].parameter, u, create_graph=create_graph) for name in parameters
                }
            total = u.new_zeros(*u.shape, u.shape[-1])
            for name in parameters:
                product = seen.weigh(blocks[name].product(columns[name]), lead=1)
                total = total + contract(self._by_row(seen, columns[name]), self._by_row(seen, product))
            return total

    def _by_row(self, seen: Site, columns: Tensor) -> Tensor:
        """`[D, *batch, *event]` to `[D, B, K]`."""
        if self.space.plate is None:
            return columns.reshape(len(columns), 1, -1)
        rows = len(seen.fn.batch_shape)  # dim 0 counts tangents, so the data plate's dim has this index
        return columns.movedim(rows, 1).flatten(2) if columns.dim() > 2 else columns.unsqueeze(-1)

    # J' F J as a product

    def _terms(
        self, value: Tensor, run: Run | None, u: Tensor, gauss_newton: Form, negative_hessian: Form
    ) -> list[Callable[[Tensor], Tensor]]:
        """Terms of p -> Lambda p, in the form (of `pyrovae.products`) that is asked for."""
        if run is None:
            return [negative_hessian(value.sum(), u)]
        sorted_sites = self._treatment(run, u)
        diagonal = self._closed(sorted_sites, run, u)
        terms: list[Callable[[Tensor], Tensor]] = [lambda p: diagonal * p]
        for name, parameters in sorted_sites.moving.items():
            terms += self._sandwiches(run.sites_seen[name], parameters, u, gauss_newton)
        if sorted_sites.hessian:
            terms.append(negative_hessian(self._total(run, sorted_sites.hessian), u))
        return terms

    def _sandwiches(
        self, seen: Site, parameters: tuple[str, ...], u: Tensor, form: Form
    ) -> list[Callable[[Tensor], Tensor]]:
        blocks = _blocks(seen)
        head = linear_head(self.log_joint, seen, parameters, u)
        middle = None if head is None else gram(seen, parameters, head.weight)
        if head is not None and middle is not None:
            return [form(head.trunk(u), u, lambda tangent: tangent @ middle)]

        def weighed(name: str) -> Callable[[Tensor], Tensor]:
            batch = blocks[name].parameter.dim()
            return lambda tangent: seen.weigh(blocks[name].product(tangent), lead=tangent.dim() - batch)

        return [form(blocks[name].parameter, u, weighed(name)) for name in parameters]

    def _find_trunks(self, run: Run, leaf: Tensor) -> Trunks | None:
        """For the case that nothing but trunks depends on u."""
        sorted_sites = self._treatment(run, leaf)
        parts = []
        for name, parameters in sorted_sites.moving.items():
            seen = run.sites_seen[name]
            head = linear_head(self.log_joint, seen, parameters, leaf)
            middle = None if head is None else gram(seen, parameters, head.weight)
            if head is None or middle is None:
                return None
            parts.append((head.trunk, middle))
        if sorted_sites.hessian or not parts:
            return None
        return Trunks(self._closed(sorted_sites, run, leaf), tuple(parts))


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


def _blocks(seen: Site) -> dict[str, FisherBlock]:
    blocks = fisher(seen.fn)
    assert blocks is not None
    return blocks
