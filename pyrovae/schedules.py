"""Training in stages: parameters that take turns, latent groups that come in one by one, chains that warm up."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.compat import require_compatible
from pyrovae.errors import DataError, IncompatibleError
from pyrovae.losses.recursive import RecursiveELBO

__all__ = ["AggressiveEncoder", "Block", "Blocks", "DeepFirst", "RecursiveSchedule", "RisingTemperature", "Schedule"]


@dataclass(frozen=True)
class Block:
    """One update within a training step.

    Attributes:
        loss: a Pyro loss; its gradient for other parameters is dropped.
        parameters: ids of those that move; with `others`, of those that do not.
        others: everything but `parameters` moves.
        fresh: takes another random batch, not the step's own.
    """

    loss: Any
    parameters: frozenset[int]
    others: bool = False
    fresh: bool = False

    def owns(self, parameter: Tensor) -> bool:
        return (id(parameter) in self.parameters) != self.others


# The updates of one training step; each is answered by its loss, per value of the batch's first tensor.
Blocks = Generator[Block, float, None]


class Schedule:
    """What `fit` asks of one."""

    def require(self, guide: Any, loss: Any) -> None:
        """Raise when guide and loss are not what it is for."""

    def start(self, validation: tuple[Tensor, ...] | None) -> None:
        """Before the first step of a run: forget earlier ones."""

    def blocks(self, guide: Any, loss: Any, step: int) -> Blocks:
        """The updates of one training step, the last one on the step's own batch; they follow from the step and what
        `state_dict` holds, so that a resumed run can go on."""
        raise NotImplementedError

    def end_epoch(self, model: Any, guide: Any) -> None:
        """After every epoch."""

    def settled(self, guide: Any) -> int:
        """The first step at the model it will be judged by: earlier weights are not kept, shorter runs warn."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


@dataclass(frozen=True)
class RecursiveSchedule(Schedule):
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

    def blocks(self, guide: Any, loss: RecursiveELBO, step: int) -> Blocks:
        """The updates of one training step; the last one's loss is the mixture's."""
        *components, weights = [frozenset(map(id, block)) for block in guide.blocks()]
        for number, parameters in enumerate(components):
            yield Block(loss.for_block(number), parameters)
        if weights and step >= self.head_start:
            yield Block(loss.for_block("weights"), weights)
        yield Block(loss.for_block("model"), frozenset(map(id, guide.parameters())), others=True)


@dataclass(frozen=True)
class DeepFirst(Schedule):
    """Latent groups one after another, the deepest first (Li, Murugesan, Zhang & Chen 2020).

    Group l of a `LadderVAE` reaches the decoder with a share that rises linearly from 0 to 1. Without it the shallow
    groups, which are easier to use, can leave nothing to the deep ones. The KL of a group that is out draws it to the
    prior. For `fit(..., schedule=DeepFirst(...))`; all groups are in after (L - 1) `stage` + `fade` steps.

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

    def settled(self, guide: Any) -> int:
        groups = len(guide.model.fade)
        return (groups - 1) * self.stage + self.fade if groups > 1 else 0

    def blocks(self, guide: Any, loss: Any, step: int) -> Blocks:
        fade = guide.model.fade
        with torch.no_grad():
            fade.copy_(torch.tensor(self.shares(step, len(fade)), dtype=fade.dtype))
        yield Block(loss, frozenset(), others=True)


@dataclass(frozen=True)
class RisingTemperature(Schedule):
    """The noise of a short run's chains rises to the guide's own (Pang, Nijkamp, Han & Wu 2021).

    With T the guide's temperature, epoch e (from 1) trains at

        min(T, first + rise max(0, e - hold))

    while held-out data, and whatever comes after training, always see T: epochs are judged by the same inference. The
    defaults with T = 0.2 are the published ones for text. For `fit(..., schedule=RisingTemperature(...))` with a
    Langevin `ShortRun` or a `DensityShortRun`.

    Args:
        epoch: steps of an epoch, `ceil(N / batch_size)`.
        hold: epochs at `first`.
        first: temperature of the beginning, at most the guide's.
        rise: what every later epoch adds, until the guide's is reached.
    """

    epoch: int
    hold: int = 15
    first: float = 0.05
    rise: float = 0.05

    def __post_init__(self) -> None:
        if self.epoch < 1 or self.hold < 0:
            raise ValueError(f"an epoch has at least 1 step, hold at least 0 epochs, got {self.epoch} and {self.hold}")
        if self.first < 0 or not self.rise > 0:
            raise ValueError(f"first must not be negative and rise be positive, got {self.first:g} and {self.rise:g}")

    def require(self, guide: Any, loss: Any) -> None:
        temperature = getattr(guide, "temperature", None)
        if not isinstance(temperature, float) or getattr(guide, "kernel", "langevin") != "langevin":
            raise IncompatibleError(
                "RisingTemperature raises the noise of Langevin chains: take guides.ShortRun with kernel='langevin', "
                "or guides.DensityShortRun"
            )
        if temperature < self.first:
            raise IncompatibleError(
                f"RisingTemperature starts at {self.first:g}, above the guide's temperature of {temperature:g}: "
                "build the guide with the temperature of the end (published: 0.2), or pass a smaller first"
            )

    def at(self, step: int, last: float) -> float:
        """Temperature of a training step."""
        later = max(0, step // self.epoch + 1 - self.hold)
        return min(last, self.first + self.rise * later)

    def settled(self, guide: Any) -> int:
        rises = math.ceil((guide.temperature - self.first) / self.rise - 1e-9)  # 0.15 / 0.05 is a bit more than 3
        return self.epoch * max(0, self.hold + rises - 1) if rises > 0 else 0

    def blocks(self, guide: Any, loss: Any, step: int) -> Blocks:
        own = guide.temperature
        guide.temperature = self.at(step, own)
        try:
            yield Block(loss, frozenset(), others=True)
        finally:  # an update that fails leaves the guide as it was, too
            guide.temperature = own


@dataclass
class AggressiveEncoder(Schedule):
    """Updates of the guide until it stops to improve, before each one of the model (He, Spokoyny, Neubig &
    Berg-Kirkpatrick 2019).

    A posterior that lags behind the model's is what lets a strong decoder forget the latents in the first epochs. Once
    the mutual information of held-out data and latents no longer rises, both train together. For
    `fit(..., schedule=AggressiveEncoder(), validation=...)`.

    Args:
        max_updates: of the guide, at most, in one step: the first on the step's own batch, the others on fresh ones.
        window: updates whose mean loss is compared with that of as many before.
        patience: epochs whose mutual information is not the best so far, in all, until the guide's lead ends. The
            published choice is 1 for text and 5 for images.
        num_data: held-out data that the mutual information is taken on, at most; it cannot exceed their logarithm.

    Attributes:
        active: whether the guide still leads; after training, whether it did to the end.
        information: mutual information after each epoch that it led, nats.
    """

    max_updates: int = 100
    window: int = 10
    patience: int = 1
    num_data: int = 1000
    active: bool = field(default=True, init=False, repr=False)
    information: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_updates", "window", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_data < 2:
            raise ValueError(f"num_data must be at least 2, got {self.num_data}: one datum tells nothing apart")
        self._held_out: tuple[Tensor, ...] = ()

    def require(self, guide: Any, loss: Any) -> None:
        traits = getattr(guide, "traits", None)
        if traits is None or not traits.marginal or not any(p.requires_grad for p in guide.parameters()):
            raise IncompatibleError(
                "AggressiveEncoder trains the guide ahead of the model and watches the mutual information of its "
                "posterior: take a guide with an encoder and a density, such as guides.Amortized"
            )

    def start(self, validation: tuple[Tensor, ...] | None) -> None:
        if validation is None or len(validation[0]) < 2:
            raise DataError(
                "AggressiveEncoder ends when the mutual information on held-out data no longer rises: pass "
                "validation=, at least two data"
            )
        self._held_out = tuple(tensor[: self.num_data] for tensor in validation)
        self.active, self.information = True, []

    def blocks(self, guide: Any, loss: Any, step: int) -> Blocks:
        if not self.active:
            yield Block(loss, frozenset(), others=True)
            return
        own = frozenset(map(id, guide.parameters()))
        before, recent = float("inf"), []
        for number in range(self.max_updates):
            recent.append((yield Block(loss, own, fresh=number > 0)))
            if len(recent) == self.window:
                mean = sum(recent) / self.window
                if mean > before:
                    break
                before, recent = mean, []
        yield Block(loss, own, others=True)

    def end_epoch(self, model: Any, guide: Any) -> None:
        if not self.active:
            return
        from pyrovae.diagnose.collapse import mutual_information  # the one schedule that looks at a trained guide

        self.information.append(mutual_information(model, guide, *self._held_out))
        best, worse = -float("inf"), 0
        for value in self.information:
            best, worse = max(best, value), worse + (value <= best)
        self.active = worse < self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "information": list(self.information)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active, self.information = state["active"], list(state["information"])
