"""Where chains start: in different places, so that a missed mode shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrovae.latents import LatentSpace
from pyrovae.runtime import evaluating

__all__ = ["starts"]


def starts(
    space: LatentSpace, init: Any, chains: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, mixed: bool = False
) -> Tensor:
    """Starting points `[C, B, D]`, unconstrained, from torch's random state.

    Args:
        init: None draws from the prior, a guide draws from it, a tensor `[C, B, D]` is taken as it is.
        mixed: with a guide, start every other chain from the prior.
    """
    if init is None:
        return space.prior(chains, *args, **kwargs)
    if isinstance(init, Tensor):
        if init.dim() != 3 or len(init) != chains or init.shape[-1] != space.dim:
            raise ValueError(f"init must have shape [{chains}, B, {space.dim}], got {tuple(init.shape)}")
        return init
    with torch.no_grad(), evaluating(init):
        drawn = init.draws(chains, *args, **kwargs)
    if mixed:
        drawn = drawn.clone()
        drawn[1::2] = space.prior(chains, *args, **kwargs)[1::2]
    return drawn
