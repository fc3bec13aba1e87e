"""Data that a model itself makes, with the latents they were made from: exact draws of a posterior, one a datum.

    u ~ p(u),   x ~ p(x | u)     =>     u is a draw of p(u | x)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor
from torch.utils import _pytree as pytree

from pyrovae.errors import DataError
from pyrovae.joint import counts
from pyrovae.latents import LatentSpace
from pyrovae.runtime import evaluating
from pyrovae.sites import pack
from pyrovae.store import isolated

__all__ = ["Simulated", "simulate"]

Simulated = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


def simulate(
    space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any], observes: Mapping[str, int | str] | None = None
) -> Simulated:
    """One simulated datum for every row of the arguments, from torch's random state.

    Args:
        space: of the model.
        args, kwargs: as the model is called; covariates stay as they are, observations are replaced.
        observes: observed site -> position or name of the argument it observes, for sites that observe something made
            from an argument rather than the argument itself.

    Returns:
        (`u [B, D]`, args, kwargs) with the data the model made in place of the observations.

    Raises:
        DataError: an observed site whose argument cannot be told, or a model that is not generative (`pyro.factor`).
    """
    model = space.model
    with torch.no_grad(), isolated(), evaluating(model), poutine.block():
        given = poutine.trace(model).get_trace(*args, **kwargs)
        made = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    observed = [name for name, site in given.nodes.items() if counts(site) and site["is_observed"]]
    for name in observed:
        site = given.nodes[name]
        if isinstance(site["fn"], Unit):
            raise DataError(f"the model has a factor, {name!r}, which cannot be drawn: it has no data to simulate")
        where = _argument(name, site["value"], leaves, tree, observes)
        value = made.nodes[name]["value"]
        if value.numel() != leaves[where].numel():
            raise DataError(
                f"site {name!r} makes {list(value.shape)}, its argument has shape {list(leaves[where].shape)}: "
                "simulation needs a site that observes its argument whole"
            )
        leaves[where] = value.reshape(leaves[where].shape).to(leaves[where].dtype)
    new_args, new_kwargs = pytree.tree_unflatten(leaves, tree)
    values = {site.name: made.nodes[site.name]["value"] for site in space.sites}
    return pack(space.sites, values, joint=space.plate is None), new_args, new_kwargs


def _argument(
    name: str, value: Tensor, leaves: list[Any], tree: Any, observes: Mapping[str, int | str] | None
) -> int:
    """Which leaf of the arguments a site observes."""
    if observes is not None and name in observes:
        key = observes[name]
        args, kwargs = pytree.tree_unflatten(list(range(len(leaves))), tree)
        try:
            found = args[key] if isinstance(key, int) else kwargs[key]
        except (IndexError, KeyError) as error:
            raise DataError(f"observes names the argument {key!r}, which this call does not have") from error
        if isinstance(found, int) and isinstance(leaves[found], Tensor):
            return found
        raise DataError(f"observes names the argument {key!r}, which is not a tensor")
    tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    same = [index for index in tensors if leaves[index] is value]
    same = same or [index for index in tensors if leaves[index].shape == value.shape
                    and torch.equal(leaves[index].to(value.dtype), value)]  # fmt: skip
    if len(same) != 1:
        why = "more than one argument equals" if same else "no argument is"
        raise DataError(
            f"{why} what site {name!r} observes, so it cannot be simulated: pass observes={{{name!r}: 0}} with the "
            "position or name of its argument"
        )
    return same[0]
