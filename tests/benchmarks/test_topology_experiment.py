"""The topology experiments, made small: controls that are known, tables and pictures over seeds."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch


@pytest.fixture(autouse=True)
def small_numbers(bench, monkeypatch):
    monkeypatch.setattr(sys.modules["reproduction.topology"], "PAIRS", 6)
    monkeypatch.setattr(sys.modules["reproduction.starts"], "STEPS", 20)
    monkeypatch.setattr(sys.modules["reproduction.starts"], "STARTS", 3)


@pytest.fixture(scope="module")
def small(bench):
    experiment = bench.EXPERIMENTS["topology-circle"]
    return replace(
        experiment.presets["quick"], epochs=2, train_rows=200, test_rows=5, num_samples=30, batch_size=50,
        hidden=(24, 24), kl_epochs=1, extra_rows=80, extra_steps=25,
    )  # fmt: skip


def go(bench, small, out, seed=0, arms=()):
    runner = sys.modules["reproduction.runner"]
    options = runner.Options("quick", small, out / f"quick-seed{seed}", seed=seed, threads=1, arms=arms, progress=False)
    return runner.run(bench.EXPERIMENTS["topology-circle"], options, lambda text: None)


def test_every_method_is_held_against_the_manifold(bench, small, tmp_path):
    experiment = bench.EXPERIMENTS["topology-circle"]
    results = go(bench, small, tmp_path)
    assert [arm["name"] for arm in results["arms"]] == [arm.name for arm in experiment.arms]
    rows = {row.get("arm", arm["name"]): row for arm in results["arms"] for row in arm["extra"]}
    assert list(rows) == ["images without noise", "cross-fading", *(arm.name for arm in experiment.arms)]
    data = rows["images without noise"]
    assert data["Betti numbers"] == data["unfiltered"] == {"outcome": "(1, 1, 0)"}
    assert 0 < data["sliced W2 (1e-3)"]["mean"] < rows["VAE, 1 latent"]["sliced W2 (1e-3)"]["mean"]
    # After 4 steps no decoder knows more than the mean image, but charts were started before.
    assert rows["VAE, 1 latent"]["paths off it, %"]["mean"] == 100
    assert rows["VAE, 1 latent"]["images off it, %"]["mean"] == 100
    assert rows["charts, published loss"]["images off it, %"]["mean"] < 100
    # Results lie in files as they are, finished arms are not run again.
    began = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/*/arm.json"))]
    assert go(bench, small, tmp_path) == results
    assert began == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/*/arm.json"))]
    (row,) = results["arms"][5]["drawn"].values()
    assert (len(row), len(row[0])) == (9, 256)
    assert [arm["epochs"] for arm in results["arms"]] == [2] * 8 + [8]
    assert {value for image in row for value in image} <= set(range(256))


def test_outcomes_are_counted_over_seeds_and_pictures_are_drawn(bench, small, tmp_path):
    experiment = bench.EXPERIMENTS["topology-circle"]
    arms = ("VAE, 1 latent", "VAE, matched latents")
    runs = [go(bench, small, tmp_path, seed, arms) for seed in (0, 1)]
    own = [arm["extra"][-1] for results in runs for arm in results["arms"]]
    outcomes = ["(1, 1, 0)", "(1, 1, 0)", "(1, 0, 0)", "(1, 1, 0)"]
    for row, outcome, share in zip(own, outcomes, (0, 0, 0, 5), strict=True):
        row["Betti numbers"], row["paths off it, %"]["mean"] = {"outcome": outcome}, share
    own[0]["unfiltered"], own[2]["unfiltered"] = {"outcome": "(1, 1, 0)"}, {"outcome": "(1, 1, 0)"}
    own[1]["unfiltered"] = {"outcome": "(1, 2, 0)"}
    filtered, unfiltered = experiment.facts(runs)
    assert filtered.endswith("VAE, 1 latent in 1 of 2; VAE, matched latents in 1 of 2.")
    assert unfiltered.endswith("VAE, 1 latent in 2 of 2; VAE, matched latents in 0 of 2.")
    bench.show(experiment, runs)
    text = sys.modules["reproduction.page"].page(runs)
    assert "| VAE, 1 latent | (1, 1, 0) 1 of 2; (1, 0, 0) 1 of 2 |" in text
    assert "| VAE, matched latents | (1, 1, 0) 2 of 2 |" in text
    assert "| images without noise | (1, 1, 0) 2 of 2 | (1, 1, 0) 2 of 2 |" in text
    assert filtered in text
    assert unfiltered in text
    _, rows = sys.modules["reproduction.seeds"].over_seeds([{**r, "arms": r["arms"][1:]} for r in runs])
    assert "(1, 1, 0)" not in str(rows)  # outcomes have no mean, even where each arm has one row
    picture = experiment.picture(runs)
    names = [label.get_text() for label in picture.axes[0].get_yticklabels()]
    assert names == ["geodesic", *arms]
    picture.savefig(tmp_path / "picture.png")


def test_one_name_runs_all_manifolds(bench, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "_run", lambda experiment, given, folder: seen.append((experiment.name, folder)))
    bench.main(["topology", "--out", str(tmp_path)])
    names = ["topology-circle", "topology-torus", "topology-sphere"]
    assert seen == [(name, tmp_path / name) for name in names]
    bench.main([names[1], "--out", str(tmp_path)])
    assert seen[3:] == [(names[1], tmp_path)]
    experiment, load = bench.EXPERIMENTS[names[0]], sys.modules["reproduction.experiment"].load
    with pytest.raises(ValueError, match="makes its own data"):
        load(experiment, experiment.presets["quick"], "cpu", "some.npz")


@pytest.mark.filterwarnings("ignore:.* takes .* steps but training stops")
def test_the_best_start_is_taken(bench, small):
    from pyrovae import losses
    from pyrovae.runtime import seeded

    topology, starts = (sys.modules[f"reproduction.{name}"] for name in ("topology", "starts"))
    experiment = bench.EXPERIMENTS["topology-circle"]
    split = topology.images("circle", small)
    arm = next(arm for arm in experiment.arms if arm.name == "VAE, matched latents, best start")
    parts = sys.modules["reproduction.experiment"].setup(experiment, small, split, 0, arm)
    guide, tried = arm.build(parts), []

    def build(trial):
        tried.append((trial.model, topology.directional(trial)))
        return tried[-1][1]

    starts.best_start(parts, guide, 5, model=arm.model, build=build)
    elbos = []
    for model, other in tried:
        with torch.no_grad(), seeded(5):
            elbos.append(float(losses.ELBO().per_datum(model, other, split.train).mean()))
    assert len(elbos) == 3
    best = tried[max(range(3), key=elbos.__getitem__)]
    assert min(elbos) < max(elbos) - 1
    for ours, theirs in zip((parts.model, guide), best, strict=True):
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_a_denoiser_that_knows_the_image_knows_the_noise(bench):
    topology = sys.modules["reproduction.topology"]
    split = topology.images("circle", bench.EXPERIMENTS["topology-circle"].presets["quick"])
    model = topology.diffusion(bench.EXPERIMENTS["topology-circle"].presets["quick"], split)
    x, t = split.train[:100], torch.arange(1, 101)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    model.net.net = Known(x)
    torch.testing.assert_close(model.predict_noise(model.diffuse(x, t, eps), t), eps, rtol=1e-4, atol=1e-4)


class Known(torch.nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, x, t):
        return self.x
