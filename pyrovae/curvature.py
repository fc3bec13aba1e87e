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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as td

from pyrovae.fisher import FisherBlock, fisher, innermost
from pyrovae.latents import LogJoint
from pyrovae.products import hessian, jacobian, negative_hessian, sandwich
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

    Uses the model's `linear_head(site) -> (trunk, weight)` where it defines one: the site's parameter is then
    `trunk(u) @ weight.T + bias`, so only the trunk is differentiated, and where all rows share one diagonal F the Gram
    matrix weight' F weight `[H, H]` takes the place of Jacobians with one row per pixel.

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
        self._grams: dict[str, Tensor] = {}  # without gradient, for products: the parameters stand still meanwhile

    def at(self, u: Tensor, *, create_graph: bool = False) -> Expansion:
        """The expansion at `u: [B, D]`; with `create_graph` everything in it can be differentiated."""
        with torch.enable_grad():
            point = u if create_graph and u.requires_grad else u.detach().requires_grad_()
            value, run = self._value(point)
            (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=create_graph, retain_graph=True)
        precision, floored = self._precision(run, point, create_graph)
        if not create_graph:
            value, gradient = value.detach(), gradient.detach()
        return Expansion(value, gradient, precision, floored)

    def precision(self, u: Tensor, *, create_graph: bool = False, num_probes: int = 0) -> tuple[Tensor, Tensor]:
        """Lambda(u), `[B, D, D]`, and where it was floored, `[B]`.

        Args:
            create_graph: the result can be differentiated (with respect to `u` too where `u` requires it).
            num_probes: 0 differentiates exactly. P > 0 makes the gradient an unbiased estimate from P random probes:
                with Lambda = L L' held constant, dLambda = E[L (L^{-1} dLambda L^{-T} r) r' L'], r random signs. The
                value stays exact.
        """
        with torch.enable_grad():
            point = u if create_graph and u.requires_grad else u.detach().requires_grad_()
            run = None if self.space.enumerated else run_at(self.log_joint, point)
        if not create_graph or not num_probes or run is None:
            return self._precision(run, point, create_graph)
        value, floored = self._precision(run, point, create_graph=False)
        with torch.enable_grad():
            return value + self._probed(run, point, value, num_probes), floored

    def operator(self, u: Tensor) -> Operator:
        """Value, gradient and products with Lambda at `u: [B, D]`, for iterative solvers: no matrix is formed."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value, run = self._value(leaf)
            parts: list[Callable[[Tensor], Tensor]] = []
            if run is None:
                parts.append(negative_hessian(value.sum(), leaf))
            else:
                sorted_sites = self._treatment(run, leaf)
                diagonal = self._closed(sorted_sites, run, leaf).detach()
                parts.append(lambda p: diagonal * p)
                for name, parameters in sorted_sites.moving.items():
                    parts.append(self._gauss_newton_product(run.sites_seen[name], parameters, leaf))
                if sorted_sites.hessian:
                    parts.append(negative_hessian(self._total(run, sorted_sites.hessian), leaf))
            (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        return Operator(value.detach(), gradient, lambda p: torch.stack([part(p) for part in parts]).sum(0))

    def _value(self, u: Tensor) -> tuple[Tensor, Run | None]:
        if self.space.enumerated:  # sites are mixed by the sum over discrete latents: the whole Hessian
            return self.log_joint(u, self.beta), None
        run = run_at(self.log_joint, u)
        zero = u.new_zeros(())
        return self.beta * sum(run.latent, zero) + sum(run.observed, zero), run

    def _treatment(self, run: Run, u: Tensor) -> Treatment:
        found = treatment(self.space, run, u)
        return Treatment({}, found.closed, found.hessian + tuple(found.moving)) if self.hessian else found

    def _precision(self, run: Run | None, u: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        sorted_sites = None if run is None else self._treatment(run, u)
        with torch.set_grad_enabled(create_graph):
            if run is None or sorted_sites is None:
                precision = -hessian(lambda at: self.log_joint(at, self.beta).sum(), u)
            else:
                precision = torch.diag_embed(self._closed(sorted_sites, run, u))
                for name, parameters in sorted_sites.moving.items():
                    precision = precision + self._gauss_newton(run.sites_seen[name], parameters, u)
                if sorted_sites.hessian:
                    names = sorted_sites.hessian
                    precision = precision - hessian(lambda at: self._total(run_at(self.log_joint, at), names), u)
            if not create_graph:
                precision = precision.detach()
            return floor_eigenvalues(precision, self.floor)

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

    def _gauss_newton(self, seen: Site, parameters: tuple[str, ...], u: Tensor) -> Tensor:
        blocks = _blocks(seen)
        head = self._head(seen, parameters, blocks, u)
        if head is not None:
            trunk, weight = head
            (hidden,) = jacobian(lambda point: (trunk(point),), u)
            gram = self._gram(seen, parameters, weight)
            if gram is not None:
                return _contract(hidden @ gram, hidden)
            columns = {parameters[0]: (hidden @ weight.T).reshape(-1, *blocks[parameters[0]].parameter.shape)}
        else:
            columns = self._traced_jacobian(seen.name, parameters, u)
        total = u.new_zeros(*u.shape, u.shape[-1])
        for name in parameters:
            product = seen.weigh(blocks[name].product(columns[name]), lead=1)
            total = total + _contract(self._by_row(seen, columns[name]), self._by_row(seen, product))
        return total

    def _by_row(self, seen: Site, columns: Tensor) -> Tensor:
        """`[D, *batch, *event]` to `[D, B, K]`."""
        if self.space.plate is None:
            return columns.reshape(len(columns), 1, -1)
        rows = len(seen.fn.batch_shape)  # dim 0 counts tangents, so the data plate's dim has this index
        return columns.movedim(rows, 1).flatten(2) if columns.dim() > 2 else columns.unsqueeze(-1)

    def _traced_jacobian(
        self, name: str, parameters: tuple[str, ...], u: Tensor, tangents: Tensor | None = None
    ) -> dict[str, Tensor]:
        def site_parameters(point: Tensor) -> tuple[Tensor, ...]:
            blocks = _blocks(run_at(self.log_joint, point, only=(name,)).sites_seen[name])
            return tuple(blocks[parameter].parameter for parameter in parameters)

        return dict(zip(parameters, jacobian(site_parameters, u, tangents), strict=True))

    # J' F J as a product

    def _gauss_newton_product(
        self, seen: Site, parameters: tuple[str, ...], leaf: Tensor
    ) -> Callable[[Tensor], Tensor]:
        blocks = _blocks(seen)
        head = self._head(seen, parameters, blocks, leaf)
        if head is not None and seen.name not in self._grams:
            gram = self._gram(seen, parameters, head[1])
            if gram is not None:
                self._grams[seen.name] = gram.detach()
        if head is not None and seen.name in self._grams:
            fixed = self._grams[seen.name]
            return sandwich(head[0](leaf), leaf, lambda tangent: tangent @ fixed)

        def weighed(name: str) -> Callable[[Tensor], Tensor]:
            return lambda tangent: seen.weigh(blocks[name].product(tangent)).detach()

        products = [sandwich(blocks[name].parameter, leaf, weighed(name)) for name in parameters]
        return lambda p: torch.stack([product(p) for product in products]).sum(0)

    def _probed(self, run: Run, u: Tensor, value: Tensor, num_probes: int) -> Tensor:
        """Zero `[B, D, D]` whose gradient is that of Lambda in expectation over random signs."""
        sorted_sites = self._treatment(run, u)
        factor = torch.linalg.cholesky(value)
        signs = torch.randint(0, 2, (num_probes, *u.shape), device=u.device).to(u.dtype) * 2 - 1
        probes = torch.linalg.solve_triangular(factor.mT, signs.unsqueeze(-1), upper=True).squeeze(-1)
        product = self._closed(sorted_sites, run, u) * probes
        for name, parameters in sorted_sites.moving.items():
            seen = run.sites_seen[name]
            blocks = _blocks(seen)
            tangents = self._traced_jacobian(name, parameters, u, probes)
            for parameter in parameters:
                weighed = seen.weigh(blocks[parameter].product(tangents[parameter]), lead=1)
                product = product + torch.stack([
                    torch.autograd.grad(blocks[parameter].parameter, u, one, create_graph=True)[0] for one in weighed
                ])  # fmt: skip
        if sorted_sites.hessian:
            (slope,) = torch.autograd.grad(self._total(run, sorted_sites.hessian), u, create_graph=True)
            product = product - torch.stack([
                torch.autograd.grad(slope, u, probe, create_graph=True)[0] for probe in probes
            ])  # fmt: skip
        moved = torch.linalg.solve_triangular(factor, (product - product.detach()).unsqueeze(-1), upper=False)
        inner = (moved * signs.unsqueeze(-2)).mean(0)
        return 0.5 * factor @ (inner + inner.mT) @ factor.mT

    # the linear head of a decoder

    def _gram(self, seen: Site, parameters: tuple[str, ...], weight: Tensor) -> Tensor | None:
        """weight' F weight, where every row has the same diagonal F by construction: a normal site's location whose
        scale is expanded along the rows, without mask."""
        fn = innermost(seen.fn)
        plain = seen.mask is None and not isinstance(seen.weight, Tensor) and not seen.inner_masks()
        if not plain or not isinstance(fn, td.Normal) or parameters != ("loc",) or self.space.plate is None:
            return None
        scale = fn.scale
        if len(seen.fn.batch_shape) != 1 or (scale.shape[0] > 1 and scale.stride(0) != 0):
            return None
        root = weight / scale[0].reshape(-1, 1)
        return seen.weight * (root.T @ root)

    def _head(
        self, seen: Site, parameters: tuple[str, ...], blocks: dict[str, FisherBlock], u: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        protocol = getattr(self.space.model, "linear_head", None)
        head = protocol(seen.name) if protocol is not None and len(parameters) == 1 else None
        if head is not None:
            trunk, weight = head
            self._verify_head(seen.name, parameters[0], trunk, weight, blocks, u)
        return head

    def _verify_head(
        self, name: str, parameter: str, trunk: Any, weight: Tensor, blocks: dict[str, FisherBlock], u: Tensor
    ) -> None:
        """Once per parameter version: trunk(u) @ weight.T must differ from the site's parameter by a constant."""
        model = self.space.model
        tensors = [weight, *(model.parameters() if isinstance(model, torch.nn.Module) else ())]
        version = tuple((id(tensor), tensor._version) for tensor in tensors)
        verified = self.space.__dict__.setdefault("_verified_heads", {})
        if verified.get(name) == version:
            return
        with torch.no_grad():
            rest = [blocks[parameter].parameter.flatten(1) - trunk(u) @ weight.T]
            if (u - u[:1]).abs().max() < 0.1:  # a constant shows in different rows only
                other = _blocks(run_at(self.log_joint, u + 0.5, only=(name,)).sites_seen[name])
                rest.append(other[parameter].parameter.flatten(1) - trunk(u + 0.5) @ weight.T)
            bias = torch.cat(rest)
            size = 1 + bias.abs().max()
        if not (bias - bias[:1]).abs().max() <= 1e-5 * size * (1 + weight.abs().max()):
            raise ValueError(
                f"{type(model).__name__}.linear_head({name!r}) does not reproduce the site's {parameter}: "
                "trunk(u) @ weight.T + bias must equal it, so correct the method or return None"
            )
        verified[name] = version


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


def _contract(first: Tensor, second: Tensor) -> Tensor:
    """sum_k first[d, b, k] second[e, b, k], `[B, D, D]`."""
    return first.movedim(0, 1) @ second.movedim(0, 1).mT


def _blocks(seen: Site) -> dict[str, FisherBlock]:
    blocks = fisher(seen.fn)
    assert blocks is not None
    return blocks
