"""Sites whose parameter is linear in the last features of a net: eta = trunk(u) W' + bias.

A model says so with `linear_head(site) -> (trunk, W)`. Only the trunk has to be differentiated then, and where all rows
share one diagonal Fisher information F the Gram matrix W' F W `[H, H]` takes the place of Jacobians with a row for
every pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributions as td

from pyrovae.fisher import fisher, innermost
from pyrovae.latents import LogJoint
from pyrovae.products import Form, jacobian
from pyrovae.sitewise import Site, run_at

__all__ = ["Head", "Trunks", "contract", "gram", "linear_head"]

_PIECE = 32  # data whose Jacobians are formed at once: larger pieces leave the cache


class Head(NamedTuple):
    """A net from `u: [B, D]` to features `[B, H]`, and the weight `[K, H]` of the layer after it."""

    trunk: Callable[[Tensor], Tensor]
    weight: Tensor


class Trunks(NamedTuple):
    """A curvature in which nothing but the Jacobians J of trunks depends on u: Lambda = diag(d) + sum of J' G J.

    Attributes:
        diagonal: d, `[B, D]`.
        parts: pairs of trunk and G `[H, H]`.
    """

    diagonal: Tensor
    parts: tuple[tuple[Callable[[Tensor], Tensor], Tensor], ...]

    def terms(self, u: Tensor, form: Form) -> list[Callable[[Tensor], Tensor]]:
        """Terms of p -> Lambda p at `u`, which requires a gradient; d and G have one where `form` has."""
        terms: list[Callable[[Tensor], Tensor]] = [lambda p: self.diagonal * p]
        for trunk, middle in self.parts:
            terms.append(form(trunk(u), u, partial(_times, middle)))
        return terms

    def detach(self) -> Trunks:
        return Trunks(self.diagonal.detach(), tuple((trunk, middle.detach()) for trunk, middle in self.parts))

    def matrix(self, u: Tensor) -> Tensor:
        """Lambda, `[B, D, D]`."""
        pieces = []
        for some in u.detach().split(_PIECE):
            total = u.new_zeros(())
            for trunk, middle in self.parts:
                with torch.enable_grad():
                    leaf = some.clone().requires_grad_()
                    features = trunk(leaf)
                hidden = jacobian(features, leaf)
                with torch.no_grad():
                    total = total + contract(hidden @ middle, hidden)
            pieces.append(total)
        return torch.diag_embed(self.diagonal) + torch.cat(pieces)


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    return vectors @ matrix


def contract(first: Tensor, second: Tensor) -> Tensor:
    """sum_k first[d, b, k] second[e, b, k], `[B, D, D]`."""
    return first.movedim(0, 1) @ second.movedim(0, 1).mT


def linear_head(bound: LogJoint, seen: Site, parameters: tuple[str, ...], u: Tensor) -> Head | None:
    """The head of a site, verified; None where the model names none.

    Raises:
        ValueError: trunk and weight do not reproduce the site's parameter.
    """
    protocol = getattr(bound.space.model, "linear_head", None)
    found = protocol(seen.name) if protocol is not None and len(parameters) == 1 else None
    if found is None or seen.plate is None:  # in joint mode the rows of the batch are not those of a net
        return None
    head = Head(*found)
    _verify(bound, seen, parameters[0], head, u)
    return head


def gram(seen: Site, parameters: tuple[str, ...], weight: Tensor) -> Tensor | None:
    """W' F W, where every row has the same diagonal F by construction: a normal site's location whose scale is expanded
    along the rows, without mask."""
    fn = innermost(seen.fn)
    plain = seen.mask is None and not isinstance(seen.weight, Tensor) and not seen.inner_masks()
    if not plain or not isinstance(fn, td.Normal) or parameters != ("loc",) or seen.plate is None:
        return None
    scale = fn.scale
    if len(seen.fn.batch_shape) != 1 or (scale.shape[0] > 1 and scale.stride(0) != 0):
        return None
    root = weight / scale[0].reshape(-1, 1)
    return seen.weight * (root.T @ root)


def _verify(bound: LogJoint, seen: Site, parameter: str, head: Head, u: Tensor) -> None:
    """Once per parameter version: trunk(u) @ weight.T must differ from the site's parameter by a constant."""
    model = bound.space.model
    tensors = [head.weight, *(model.parameters() if isinstance(model, torch.nn.Module) else ())]
    version = tuple((id(tensor), tensor._version) for tensor in tensors)
    verified = bound.space.__dict__.setdefault("_verified_heads", {})
    if verified.get(seen.name) == version:
        return

    def rest(site: Site, at: Tensor) -> Tensor:
        blocks = fisher(site.fn)
        assert blocks is not None
        eta = blocks[parameter].parameter.flatten(1)
        reach.append(eta[eta.isfinite()].abs().max() if eta.isfinite().any() else eta.new_zeros(()))
        return eta - head.trunk(at) @ head.weight.T

    reach: list[Tensor] = []
    with torch.no_grad():
        found = [rest(seen, u)]
        if (u - u[:1]).abs().max() < 0.1:  # a constant shows in different rows only
            found.append(rest(run_at(bound, u + 0.5, only=(seen.name,)).sites_seen[seen.name], u + 0.5))
        bias = torch.cat(found)
        bias = bias[bias.isfinite().all(-1)]  # where numbers have run away there is nothing to compare
        if not len(bias):
            return
        rounding = 10 * torch.finfo(bias.dtype).eps * head.weight.shape[1] ** 0.5 * max(reach)
        tolerance = 1e-5 * (1 + bias.abs().max()) * (1 + head.weight.abs().max()) + rounding
    if (bias - bias[:1]).abs().max() > tolerance:
        raise ValueError(
            f"{type(model).__name__}.linear_head({seen.name!r}) does not reproduce the site's {parameter}: "
            "trunk(u) @ weight.T + bias must equal it, so correct the method or return None"
        )
    verified[seen.name] = version
