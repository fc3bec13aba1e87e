"""The energy-prior experiment, made small: one digit is held out of training and looked for afterwards."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from pyrovae.evidence import normaliser


@pytest.fixture
def images(tmp_path):
    """8 x 8 squares on the left (digit 0) or the right (digit 1)."""
    rng = np.random.default_rng(0)
    grey, labels = rng.integers(0, 40, (90, 8, 8)), rng.integers(0, 2, 90)
    for image, label in zip(grey, labels, strict=True):
        image[2:5, 4 * label : 4 * label + 3] += 180
    path = tmp_path / "squares.npz"
    np.savez(path, train=grey[:50].astype(np.uint8), test=grey[50:].astype(np.uint8), train_labels=labels[:50],
             test_labels=labels[50:])  # fmt: skip
    return str(path)


def test_a_held_out_digit_is_looked_for(bench, images, tmp_path):
    """A plain and a tilted model: the digit is not trained on, scores and probes are there, log Z was taken off."""
    runner = sys.modules["reproduction.runner"]
    experiment = bench.EXPERIMENTS["energy-mnist"]
    preset = replace(
        experiment.presets["quick"], epochs=1, train_rows=50, test_rows=6, num_samples=30, batch_size=20,
        hidden=(12, 8), kl_epochs=1, extra_rows=40,
    )  # fmt: skip
    names = tuple(f"{model} without 1" for model in ("VAE", "joint energy prior"))
    options = runner.Options("quick", preset, tmp_path / "out", threads=1, arms=names, data=images, progress=False)
    results = runner.run(experiment, options, lambda text: None)
    kept = int((np.load(images)["train_labels"] != 1).sum())
    for name, arm in zip(names, results["arms"], strict=True):
        assert arm["failed"] is None
        assert arm["settings"]["rows"] == kept < 50
        scores = {row["score"] for row in arm["extra"] if "score" in row}
        assert scores >= {"-log p(x)", "-log p(x, z)"}
        assert ("layer ratio" in scores) == ("joint" in name)
        assert all(0 <= row["AUPRC"]["mean"] <= 100 for row in arm["extra"] if "score" in row)
        assert ("unnormalised" in arm["objective"]) == ("energy" in name)
        assert any("before" in row for row in arm["extra"]) == ("energy" in name)
        assert list(arm["drawn"]) == ([f"{name}, before", f"{name}, after"] if "energy" in name else [])
    bench.show(experiment, [results])
    sheet = experiment.picture([results]).axes[0].images[0].get_array()
    assert sheet.shape[0] > 2 * 8


def test_a_prior_that_ran_away_is_a_failed_arm(bench, images, tmp_path, monkeypatch):
    """No number of log p(x) without log Z, and the other arms go on."""
    monkeypatch.setattr(normaliser, "_LARGEST", 0.0)
    runner, experiment = sys.modules["reproduction.runner"], bench.EXPERIMENTS["energy-mnist"]
    preset = replace(experiment.presets["quick"], epochs=1, train_rows=50, test_rows=6, num_samples=30, batch_size=20,
                     hidden=(12, 8), kl_epochs=1, extra_rows=40)  # fmt: skip
    names = ("energy prior without 1", "VAE without 1")
    options = runner.Options("quick", preset, tmp_path / "out", threads=1, arms=names, data=images, progress=False)
    results = runner.run(experiment, options, lambda text: None)
    found = {arm["name"]: arm for arm in results["arms"]}
    assert "annealing did not find log Z" in found["energy prior without 1"]["failed"]
    assert "numbers" not in found["energy prior without 1"]
    assert found["VAE without 1"]["failed"] is None
    bench.show(experiment, [results])
