"""How many data fit into a given memory."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.latents import LogJoint
from pyrovae.runtime import modules_of, preserve_rng

__all__ = ["rows_within"]


def rows_within(gibibytes: float, bound: LogJoint, u: Tensor, copies: int) -> int:
    """Data whose log-joint and gradient at `copies` points each need at most that much, at least 1.

    Counted are the tensors one evaluation at `u: [1, B, D]` keeps for its gradient, parameters aside.
    """
    if not gibibytes > 0:
        raise ValueError(f"memory must be positive, got {gibibytes} GiB")
    owned = {p.untyped_storage().data_ptr() for root in modules_of(bound.space.model) for p in root.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the graph that holds it, for ever

    with torch.enable_grad(), preserve_rng(), torch.autograd.graph.saved_tensors_hooks(count, lambda kept: kept):
        value = bound(u.detach().requires_grad_())
    del value
    per_row = 2 * sum(seen.values()) / bound.rows.size  # as much again on the way back
    return max(1, int(gibibytes * 2**30 / max(1.0, per_row * copies)))
