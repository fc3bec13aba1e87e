"""Fisher information of the distributions an observed site can have, in their own parameters.

For a site x ~ p(x | eta) with eta a function of the latents, J' F J (J = d eta / d u) is the site's expected
curvature, the generalised Gauss-Newton matrix (Schraudolph 2002). F is given as a product with a tangent of eta.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch import distributions as td

__all__ = ["FisherBlock", "fisher", "innermost", "unregistered"]


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


def innermost(fn: Any) -> Any:
    """The distribution below `to_event` and masks."""
    while isinstance(fn, td.Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn


def unregistered(fn: Any, blocks: dict[str, FisherBlock]) -> list[Tensor]:
    """A distribution's parameters without Fisher information (a negative binomial's `total_count`)."""
    fn = innermost(fn)
    known = {*blocks, "probs", "logits"} if "logits" in blocks else {*blocks}
    values = [vars(fn).get(name) for name in fn.arg_constraints if name not in known]
    return [value for value in values if isinstance(value, Tensor)]
