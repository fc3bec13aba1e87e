"""Training that takes blocks of parameters one after another, each with an objective of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyrovae.compat import require_compatible
from pyrovae.errors import IncompatibleError
from pyrovae.losses.recursive import RecursiveELBO

__all__ = ["Block", "RecursiveSchedule"]


@dataclass(frozen=True)
class Block:
    """One update within a training step.

    Attributes:
        loss: a Pyro loss; its gradient for other parameters is dropped.
        parameters: ids of those that move; with `others`, of those that do not.
        others: everything but `parameters` moves.
    """

    loss: Any
    parameters: frozenset[int]
    others: bool = False

    def owns(self, parameter: Tensor) -> bool:
        return (id(parameter) in self.parameters) != self.others


@dataclass(frozen=True)
class RecursiveSchedule:
    """Kim & Pavlovic 2020: on every batch component 0, component 1, ..., the mixing weights, the model.

    Every block sees what the blocks before it have just become. For `fit(..., schedule=RecursiveSchedule())` with a
    `RecursiveMixture` and `losses.RecursiveELBO`.

    Args:
        head_start: steps during which the mixing weights stay where they are, so that new components are not written
            off before they have learnt anything.
    """

    head_start: int = 0

    def __post_init__(self) -> None:
        if self.head_start < 0:
            raise ValueError(f"head_start must not be negative, got {self.head_start}")

    def require(self, guide: Any, loss: Any) -> None:
        """Raise when guide and loss are not made of stages."""
        if not isinstance(loss, RecursiveELBO):
            raise IncompatibleError("RecursiveSchedule goes with losses.RecursiveELBO: pass it, or leave loss out")
        require_compatible(None, guide, loss)

    def blocks(self, guide: Any, loss: RecursiveELBO, step: int) -> Iterator[Block]:
        """The updates of one training step; the last one's loss is the mixture's."""
        *components, weights = [frozenset(map(id, block)) for block in guide.blocks()]
        for number, parameters in enumerate(components):
            yield Block(loss.for_block(number), parameters)
        if weights and step >= self.head_start:
            yield Block(loss.for_block("weights"), weights)
        yield Block(loss.for_block("model"), frozenset(map(id, guide.parameters())), others=True)
