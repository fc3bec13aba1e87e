"""Train one arm: resumable, within a number of seconds where one is given."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyrovae import checkpoint, fit, handlers
from pyrovae.optim import Adam
from pyrovae.schedules import Schedule
from pyrovae.training import FitResult
from reproduction.experiment import Preset, Split

__all__ = ["Clock", "train"]

_STRETCH = 60.0  # seconds of one call of `fit`, about: how often the clock is written and looked at
_FOREVER = 10**6


@dataclass
class Clock:
    """Epochs trained so far and what they took; kept in a file, so that a resumed arm goes on counting."""

    epochs: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Clock:
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @property
    def pace(self) -> float:
        """Seconds per epoch."""
        return self.seconds / max(self.epochs, 1)

    def add(self, epochs: int, here: int, seconds: float, cpu_seconds: float) -> None:
        """Count a call of `fit` that went from epoch `here` to `epochs`.

        A run that was killed may have left a checkpoint ahead of the clock: those epochs count at this call's pace.
        """
        share = (epochs - self.epochs) / (epochs - here) if epochs > here else 0.0
        late = 0.0 if epochs > here else (epochs - self.epochs) * self.pace
        self.seconds += share * seconds + late
        self.cpu_seconds += share * cpu_seconds + late
        self.epochs = epochs


def train(
    model: Any, guide: Any, loss: Any, split: Split, preset: Preset, folder: Path, *, seed: int, seconds: float | None,
    by_time: bool, name: str, progress: bool, schedule: Schedule | None = None,
) -> tuple[FitResult, Clock]:  # fmt: skip
    """Train until the preset's epochs are done or the seconds have passed; whole epochs, at least one.

    Args:
        folder: of the checkpoint and the clock; what is there already is continued.
        seconds: training time at most, whatever the epochs; not inside a KL schedule.
        by_time: let `seconds` alone say when to stop.
        name: label of the progress bar.
        schedule: of `fit`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, clock_path = folder / "checkpoint.pt", folder / "clock.json"
    clock = Clock.read(clock_path)
    epochs = _FOREVER if by_time else preset.epochs
    while True:
        target = _next(clock, epochs, seconds, preset.kl_epochs)
        here = int(checkpoint.load(path)["at"]["epoch"]) if path.exists() else 0
        began, cpu = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():
            if target < epochs:  # this call is not the last one
                warnings.filterwarnings("ignore", message=".* takes .* steps but training stops")
            label = f"{name}, to epoch {target}"
            result = _fit(model, guide, loss, schedule, split, preset, target, path, seed, label, progress)
        if result.epochs > clock.epochs:
            clock.add(result.epochs, here, time.perf_counter() - began, time.process_time() - cpu)
            clock.write(clock_path)
        if _next(clock, epochs, seconds, preset.kl_epochs) <= clock.epochs:
            return result, clock


def _next(clock: Clock, epochs: int, seconds: float | None, kl_epochs: int) -> int:
    """The epoch to train to in the next call."""
    if clock.epochs == 0:
        return min(1, epochs)
    pace = max(clock.pace, 1e-9)
    target = clock.epochs + max(1, round(_STRETCH / pace))
    if seconds is not None:
        affordable = clock.epochs + math.floor((seconds - clock.seconds) / pace + 0.5)
        target = min(target, max(affordable, kl_epochs))
    return max(clock.epochs, min(target, epochs))


def _fit(
    model: Any, guide: Any, loss: Any, schedule: Schedule | None, split: Split, preset: Preset, epochs: int, path: Path,
    seed: int, label: str, progress: bool,
) -> FitResult:  # fmt: skip
    per_epoch = -(-len(split.train) // preset.batch_size)
    kl_weight: Any = 1.0
    if preset.kl_epochs:
        kl_weight = handlers.LinearSchedule(steps=preset.kl_epochs * per_epoch, start=0.1)
    validation = split.validation
    return fit(
        model, guide, split.train, loss=loss, schedule=schedule, epochs=epochs, batch_size=preset.batch_size,
        optimizer=_optimizer(preset),
        transform=getattr(split.source, "transform", None), kl_weight=kl_weight, validation=validation,
        patience=None if validation is None else _FOREVER, max_norm=preset.max_norm, seed=seed, checkpoint=path,
        checkpoint_every=500, description=label, progress=progress,
    )  # fmt: skip


def _optimizer(preset: Preset) -> Adam:
    def slower(name: str) -> dict[str, float]:
        if preset.energy_rate is None or "energy" not in name.split("."):
            return {}
        return {"lr": preset.learning_rate * preset.energy_rate}

    return Adam(lr=preset.learning_rate, eps=preset.adam_eps, per_parameter=slower)
