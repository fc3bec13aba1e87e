"""Points of the plane for nets of one latent: what the experiments with exact posteriors share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyrovae.data import toy
from pyrovae.models import PiecewiseAffineVAE
from pyrovae.provenance import fingerprint
from reproduction.experiment import Preset, Split

__all__ = ["LEAK", "NOISE", "START", "Toys", "net", "only", "toys"]

NOISE = 0.1  # of the data
LEAK, START = 0.1, 0.55  # of the net: slope below zero, and where its noise scale begins


@dataclass(frozen=True)
class Toys:
    """One toy set, or several side by side: `train` is `[N, 2]` or `[N, sets, 2]`."""

    names: tuple[str, ...]
    train: Tensor
    test: Tensor

    split = "training data of seed 0, test data of seed 1"

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint((self.train, self.test))

    def __repr__(self) -> str:
        return f"Toys({self.name}; noise {NOISE:g})"


def toys(preset: Preset, *, names: tuple[str, ...]) -> Split:
    """The same number of points of every set."""
    train, test = (
        torch.stack([toy(name, rows or 1000, noise=NOISE, seed=seed) for name in names], 1)
        for seed, rows in enumerate((preset.train_rows, preset.test_rows))
    )
    return Split(Toys(names, train, test), train, None, test)


def only(split: Split, *, name: str) -> Split:
    """One of several sets."""
    which = split.source.names.index(name)
    train, test = split.source.train[:, which], split.source.test[:, which]
    return replace(split, source=Toys((name,), train, test), train=train, test=test)


def net(preset: Preset, split: Split) -> PiecewiseAffineVAE:
    """Weights and biases N(0, 1), those of the output layer a tenth of that; float64."""
    model = PiecewiseAffineVAE([preset.latent_dim, *preset.hidden, 2], leak=LEAK, noise=START).double()
    with torch.no_grad():
        for part in model.layers.parameters():
            part.normal_()
        for part in model.layers[-1].parameters():
            part.mul_(0.1)
    return model
