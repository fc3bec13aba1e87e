"""Several short trainings, of which the best is trained on: for maps that stay folded once they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrovae import fit, losses
from pyrovae.handlers import LinearSchedule
from pyrovae.optim import Adam
from pyrovae.runtime import seeded
from reproduction.experiment import Preset, Setup, Split

__all__ = ["STARTS", "best_start"]

STARTS, STEPS = 6, 300
_SCORED = 1000  # training data


def best_start(
    parts: Setup, guide: Any, seed: int, *, model: Callable[[Preset, Split], Any], build: Callable[[Setup], Any]
) -> None:
    """Take the weights with the best ELBO of training data; an arm's `prepare`, given how its model and guide are made.

    Pixels are noisy at first, which smooths the first steps.
    """
    preset, split, found = parts.preset, parts.split, -math.inf
    assert isinstance(split.train, Tensor)
    for number in range(STARTS * seed, STARTS * (seed + 1)):
        with seeded(number):
            trial = replace(parts, model=model(preset, split))
            trial.model.noise["log"].data.fill_(-1.0)
            other = build(trial)
        fit(trial.model, other, split.train, optimizer=Adam(lr=1e-2), max_steps=STEPS, batch_size=preset.batch_size,
            kl_weight=LinearSchedule(steps=200, start=0.2), seed=number, progress=False)  # fmt: skip
        with torch.no_grad(), seeded(seed):
            elbo = float(losses.ELBO().per_datum(trial.model, other, split.train[:_SCORED]).mean())
        if elbo > found:
            found, states = elbo, (trial.model.state_dict(), other.state_dict())
    parts.model.load_state_dict(states[0])
    guide.load_state_dict(states[1])
