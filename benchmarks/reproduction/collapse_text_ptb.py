"""Posterior collapse on the Penn treebank; arms as in collapse_text."""

from __future__ import annotations

from reproduction.collapse_text import REMARKS, SETTINGS, arms, preset
from reproduction.experiment import Experiment

__all__ = ["EXPERIMENT"]

EXPERIMENT = Experiment(
    name="collapse-text-ptb",
    title="Posterior collapse on the Penn treebank",
    paper="Bowman et al. (2016); He et al. (2019)",
    data="ptb",
    likelihood="categorical",
    baseline="VAE",
    arms=arms({}),
    pairs=(("SA-VAE, warm-up", "VAE+SVI, warm-up"), ("aggressive, warm-up", "warm-up")),
    presets=preset(5000),
    settings=SETTINGS,
    remarks=REMARKS,
)
