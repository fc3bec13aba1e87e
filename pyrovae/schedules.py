"""Training that goes through stages: blocks of parameters that take turns, latent groups that come in one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrovae.compat import require_compatible
from pyrovae.errors import IncompatibleError
from pyrovae.losses.recursive import RecursiveELBO

__all__ = ["Block", "DeepFirst", "RecursiveSchedule", "Schedule"]


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


class Schedule(Protocol):
    """What `fit` asks of one."""

    def require(self, guide: Any, loss: Any) -> None:
        """Raise when guide and loss are not what it is for."""

    def blocks(self, guide: Any, loss: Any, step: int) -> Iterator[Block]:
        """The updates of one training step; a function of the step alone, so that a resumed run can go on."""


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


@dataclass(frozen=True)
class DeepFirst:
    """Latent groups one after another, the deepest first (Li, Murugesan, Zhang & Chen 2020).

    Group l of a `LadderVAE` reaches the decoder with a share that rises linearly from 0 to 1. Without it the shallow
    groups, which are easier to use, can leave nothing to the deep ones. The KL of a group that is out draws it to the
    prior. For `fit(..., schedule=DeepFirst(...))`; afterwards all groups are in.

    Args:
        stage: steps from one group's start to the next one's.
        fade: steps over which a group comes in; the deepest is in from the first step.
    """

    stage: int = 5000
    fade: int = 5000

    def __post_init__(self) -> None:
        if self.stage < 1 or self.fade < 1:
            raise ValueError(f"stage and fade must be at least 1, got {self.stage} and {self.fade}")

    def require(self, guide: Any, loss: Any) -> None:
        if not isinstance(getattr(getattr(guide, "model", None), "fade", None), Tensor):
            raise IncompatibleError("DeepFirst brings in the groups of a models.LadderVAE: this guide's model has none")

    def shares(self, step: int, groups: int) -> list[float]:
        """Share of each group, shallowest first."""
        starts = [(groups - 1 - level) * self.stage for level in range(groups)]
        return [1.0 if start == 0 else min(1.0, max(0.0, (step - start) / self.fade)) for start in starts]

    def blocks(self, guide: Any, loss: Any, step: int) -> Iterator[Block]:
        fade = guide.model.fade
        with torch.no_grad():
            fade.copy_(torch.tensor(self.shares(step, len(fade)), dtype=fade.dtype))
        yield Block(loss, frozenset(), others=True)
