"""Every reproduction runs from end to end on a tiny data set, goes on where it was, and says what its numbers say."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

NAMES = [
    "vlae-mnist", "laplace-quality", "vlae-mnist-bernoulli", "savae-mnist", "savae-omniglot", "gaps-mnist",
    "rme-omniglot", "hvae-mnist", "lossy-mnist", "lossy-omniglot", "mae-omniglot", "savae-omniglot-pixelcnn",
    "ladder-mnist", "vlac-mnist", "infovae-mnist", "collapse-text", "collapse-text-ptb",
    "short-run-ptb", "short-run-snli", "short-run-ladder", "energy-mnist",
]  # fmt: skip
OTHERS = [  # with data of their own: test_exact_em.py, test_topology_experiment.py
    "exact-em", "exact-uses", "topology-circle", "topology-torus", "topology-sphere",
]  # fmt: skip
TEXTS = ("collapse-text", "collapse-text-ptb", "short-run-ptb", "short-run-snli")
LABELLED = ("ladder-mnist", "vlac-mnist", "infovae-mnist", "mae-omniglot", "short-run-ladder", "energy-mnist")


def test_every_experiment_is_tested(bench):
    assert list(bench.EXPERIMENTS) == [*NAMES, *OTHERS]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data set of 8x8 grey images: a bright square on a dark ground, on the left (class 0) or on the right."""
    rng = np.random.default_rng(0)
    grey, labels = rng.integers(0, 40, (80, 8, 8)), rng.integers(0, 2, 80)
    for image, label in zip(grey, labels, strict=True):
        row = rng.integers(0, 6)
        image[row : row + 3, 4 * label : 4 * label + 3] += 180
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(path, train=grey[:50].astype(np.uint8), test=grey[50:].astype(np.uint8), train_labels=labels[:50],
             test_labels=labels[50:])  # fmt: skip
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of texts: a few words in any order."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("texts")
    for file, number in (("ptb/ptb.train.txt", 50), ("ptb/ptb.valid.txt", 10), ("ptb/ptb.test.txt", 10),
                         ("yahoo/val.txt", 1050), ("yahoo/test.txt", 10),
                         ("snli/train.txt", 50), ("snli/valid.txt", 10), ("snli/test.txt", 10)):  # fmt: skip
        path = root / file
        path.parent.mkdir(exist_ok=True)
        lines = [" ".join(rng.choice(list("abcdefg"), rng.integers(1, 9))) for _ in range(number)]
        path.write_text("\n".join(lines))
    return str(root)


def options(bench, name, images, out, *, epochs=1, preset="quick", **changes):
    """The preset, made small."""
    runner = sys.modules["reproduction.runner"]
    full = bench.EXPERIMENTS[name].presets[preset]
    small = replace(
        full, epochs=epochs, train_rows=40, test_rows=7, validation_rows=min(full.validation_rows, 8), num_samples=30,
        batch_size=20, hidden=(12, 12), latent_dim=4, kl_epochs=min(full.kl_epochs, 1),
        extra_rows=24 if name in LABELLED else 3, extra_steps=40 if name == "gaps-mnist" else 2,
    )  # fmt: skip
    return runner.Options(preset, small, out, threads=1, data=images, progress=False, **changes)


def go(bench, name, *args, say=lambda text: None, **kwargs):
    return sys.modules["reproduction.runner"].run(bench.EXPERIMENTS[name], options(bench, name, *args, **kwargs), say)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_runs_to_the_page(bench, images, texts, tmp_path, name):
    experiment = bench.EXPERIMENTS[name]
    out = tmp_path / name
    # Arms with and without a warm-up, or with warm-ups of different lengths, are only comparable once it has ended.
    epochs = 1 if all(arm.kl_epochs is None and arm.cut is None for arm in experiment.arms) else 2
    results = go(bench, name, texts if name in TEXTS else images, out, preset="paper", epochs=epochs)
    assert results == json.loads((out / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == [arm.name for arm in experiment.arms]

    values = {}
    for arm, record in zip(experiment.arms, results["arms"], strict=True):
        assert record["failed"] is None
        assert arm.as_long_as is not None or record["epochs"] == epochs
        stored = json.loads((out / arm.slug / "arm.json").read_text())["values"]
        elbo, iwae = (torch.tensor(stored[key], dtype=torch.float64) for key in ("ELBO", "IWAE"))
        assert elbo.shape == iwae.shape == (7,)
        assert (elbo <= iwae + 1e-9).all()  # Jensen, draw by draw
        assert math.isclose(record["numbers"]["IWAE-30"]["mean"], float(iwae.mean()), rel_tol=1e-9)
        values[arm.name] = iwae
    base = values[experiment.baseline]
    for other, gain in results["differences"].items():
        paired = values[other] - base
        assert math.isclose(gain["IWAE"]["mean"], float(paired.mean()), rel_tol=1e-6, abs_tol=1e-9)
        assert math.isclose(gain["IWAE"]["se"], float(paired.std()) / math.sqrt(7), rel_tol=1e-6)
    assert set(results["differences"]) == set(values) - {experiment.baseline}

    bench.show(experiment, [results])
    text = sys.modules["reproduction.page"].page([results])
    assert text.count("Not run yet.") == len(bench.EXPERIMENTS) - 1
    for record in results["arms"]:
        number = record["numbers"]["IWAE-30"]
        assert f"{number['mean']:.2f} ± {number['se']:.2f}" in text
        if name in LABELLED and "alone" not in record["name"]:
            assert record["extra"]
        if name == "short-run-ladder":
            probes, measured = record["extra"]
            assert set(probes) == {"table", "z1", "z2", "z3"}
            assert measured["1000 MSE"]["mean"] > 0
            paths = np.array(list(record["drawn"].values()))
            assert paths.shape[:2] == (3, 9)
            assert 0 <= paths.min() <= paths.max() <= 255
        if name in TEXTS:
            lengths = _test_lengths(texts, experiment.data)
            stored = json.loads((out / experiment_slug(experiment, record) / "arm.json").read_text())["values"]["IWAE"]
            assert math.isclose(record["numbers"]["PPL"]["mean"], math.exp(-sum(stored) / sum(lengths)), rel_tol=1e-9)


def experiment_slug(experiment, record):
    return next(arm.slug for arm in experiment.arms if arm.name == record["name"])


def _test_lengths(root, name):
    lines = (Path(root) / name / ("ptb.test.txt" if name == "ptb" else "test.txt")).read_text().splitlines()[:7]
    return [len(line.split()) + 1 for line in lines]


@pytest.mark.slow
def test_gaps_add_up(bench, images, tmp_path):
    results = go(bench, "gaps-mnist", images, tmp_path, arms=("VAE", "SA-VAE, K = 20, step 0.03"))
    rows = [row for arm in results["arms"] for row in arm["extra"]]
    assert len(rows) == 2 * (3 + 2)  # training and test, posteriors of each arm
    for row in rows:
        mean = {key: row[key]["mean"] for key in ("approximation", "amortization", "inference", "log p(x)", "ELBO")}
        # float32 sums of bounds of some 30 nats
        assert math.isclose(mean["approximation"] + mean["amortization"], mean["inference"], abs_tol=1e-4)
        assert math.isclose(mean["log p(x)"] - mean["ELBO"], mean["inference"], abs_tol=1e-4)


def test_arms_share_data_and_first_decoder(bench, images, tmp_path):
    experiment, small = bench.EXPERIMENTS["vlae-mnist"], options(bench, "vlae-mnist", images, tmp_path).preset
    module = sys.modules["reproduction.experiment"]
    split = module.load(experiment, small, "cpu", images)
    first, second = (module.setup(experiment, small, split, 3) for _ in range(2))
    for a, b in zip(first.model.decoder.parameters(), second.model.decoder.parameters(), strict=True):
        assert torch.equal(a, b)
    # Centred by the mean of all training images kept, the noise starts at the spread around it.
    assert split.source.train.mean(0).allclose(split.source.train[:40].mean(0) - split.train.mean(0), atol=1e-5)
    spread = float(split.train.square().mean().sqrt())
    assert math.isclose(float(first.model.noise_scale.detach()), spread, rel_tol=1e-5)


def test_more_epochs_take_an_arm_further(bench, images, tmp_path):
    """Two epochs in two runs are two epochs in one; a finished arm is left alone."""
    arms = {"arms": ("VAE",)}
    go(bench, "savae-mnist", images, tmp_path / "two", epochs=1, **arms)
    stopped = go(bench, "savae-mnist", images, tmp_path / "two", epochs=2, **arms)["arms"][0]
    whole = go(bench, "savae-mnist", images, tmp_path / "one", epochs=2, **arms)["arms"][0]
    assert stopped["curve"] == whole["curve"]
    assert stopped["numbers"] == whole["numbers"]
    assert stopped["seconds"] > 0

    said = []
    again = go(bench, "savae-mnist", images, tmp_path / "two", epochs=2, say=said.append, **arms)["arms"][0]
    assert "VAE: finished before" in said
    assert again == stopped
    with pytest.raises(ValueError, match="trained for 2 epochs already"):
        go(bench, "savae-mnist", images, tmp_path / "two", epochs=1, **arms)
    with pytest.raises(ValueError, match="other settings .*seed"):
        go(bench, "savae-mnist", images, tmp_path / "two", epochs=2, seed=1, **arms)


def test_arms_by_name(bench, images, tmp_path):
    with pytest.raises(ValueError, match="no arm SVAE"):
        go(bench, "savae-mnist", images, tmp_path, arms=("SVAE",))
    with pytest.raises(ValueError, match="name that arm as well"):
        go(bench, "savae-mnist", images, tmp_path, arms=("VAE, same time",))


def test_clock(bench):
    """Training by time stops at the nearest whole epoch, and a killed run's epochs are counted."""
    training = sys.modules["reproduction.training"]
    clock = training.Clock()
    assert training._next(clock, 100, 21.0, 0) == 1
    clock.add(1, 0, 2.0, 1.0)
    assert training._next(clock, 10**6, 20.5, 0) == 10  # 18.5 s left at 2 s an epoch: nine more
    assert training._next(clock, 10**6, 21.5, 0) == 11
    assert training._next(clock, 4, None, 0) == 4
    assert training._next(clock, 10**6, None, 0) == 31  # a minute at a time
    assert training._next(clock, 10**6, 2.0, 0) == 1  # no time left
    assert training._next(clock, 50, 2.0, 8) == 8  # but not inside a KL schedule
    clock.add(5, 3, 4.0, 2.0)  # the checkpoint was two epochs ahead: four epochs, two of them timed
    assert (clock.epochs, clock.seconds, clock.cpu_seconds) == (5, 10.0, 5.0)
    clock.add(6, 6, 0.1, 0.1)  # nothing left to train: the lost epoch at the pace so far
    assert clock.seconds == 12.0


@pytest.mark.slow
def test_same_time_arms_train_for_that_time(bench, images, tmp_path):
    results = go(bench, "savae-mnist", images, tmp_path, epochs=3)
    seconds = {arm["name"]: (arm["seconds"], arm["epochs"]) for arm in results["arms"]}
    budget = seconds["SA-VAE, K = 20, step 0.03"][0]
    spent, epochs = seconds["VAE, same time"]
    assert spent > budget - 0.5 * spent / epochs  # to the nearest whole epoch


def record(name, published, gain, **changes):
    """An arm as `results.json` has it."""
    return {
        "name": name, "published": published, "failed": None, "epochs": 5, "best_epoch": 4, "seconds": 10.0,
        "cpu_seconds": 15.0, "validation": [[1, -3.0]], "out_of_time": False, "extra": [],
        "numbers": {
            "ELBO": {"mean": -2.0, "se": 0.1}, "IWAE-10": {"mean": -1.5, "se": 0.1},
            "IWAE-100": {"mean": -1.0 + gain, "se": 0.1}, "KL": {"mean": 3.0, "se": 0.1},
            "k-hat above 0.7": {"mean": 0.25, "se": 0.1},
        },
        "provenance": {"versions": {"torch": "2"}, "fingerprint": "0123456789abcdef"}, **changes,
    }  # fmt: skip


def test_page_says_what_did_not_come_out(bench):
    arms = [
        record("VAE", -400.0, 0.0),
        record("up", -390.0, 8.0),
        record("down", -390.0, -3.0),
        record("nothing", -390.0, 0.05),
        record("late", None, 1.0, best_epoch=5),
        record("slow", None, 1.0, out_of_time=True),
        {"name": "wild", "published": -390.0, "failed": "step 3: nan"},
    ]
    results = {
        "experiment": "vlae-mnist", "preset": "quick", "seed": 0, "settings": {
            "epochs": 5, "validation_rows": 8, "num_samples": 100,
        },
        "train_rows": 40, "test_rows": 7, "data": "squares", "split": "as it is", "baseline": "VAE", "machine": "CPU",
        "differences": {
            name: {"ELBO": {"mean": 0.0, "se": 0.1}, "IWAE": {"mean": gain, "se": 0.1}}
            for name, gain in {"up": 8.0, "down": -3.0, "nothing": 0.05, "late": 1.0, "slow": 1.0}.items()
        },
        "arms": arms,
    }  # fmt: skip
    facts = sys.modules["reproduction.page"]._shortfalls(bench.EXPERIMENTS["vlae-mnist"], results)
    assert facts == [
        "down against VAE: published +10 nats, here -3.00 ± 0.10: the other sign.",
        "nothing against VAE: published +10 nats, here +0.05 ± 0.10: not told apart from zero.",
        "late was still rising on the validation data when training ended.",
        "slow was stopped by its time limit after 5 of 5 epochs: its differences are not at equal epochs.",
        "wild: step 3: nan",
    ]
    text = sys.modules["reproduction.page"].page([results])
    row = "| up | 5 (4) | 10 (15) | -2.00 ± 0.10 | -1.50 ± 0.10 | 7.00 ± 0.10 | +0.00 ± 0.10 | +8.00 ± 0.10 |"
    assert f"{row} 3.0 | 25 % | -390 | +10 |" in text
    assert "| wild | failed |" in text


@pytest.mark.slow
def test_seeds_together(bench, images, tmp_path):
    """Means over seeds, in how many seeds an arm is ahead, and the pairs that the experiment is for."""
    arms = ("VAE", "ME(2)", "RME(2)")
    runs = [go(bench, "rme-omniglot", images, tmp_path / str(seed), arms=arms, seed=seed) for seed in (0, 1, 2)]
    found = {name: [next(a for a in run["arms"] if a["name"] == name) for run in runs] for name in arms}
    iwae = {name: torch.tensor([a["numbers"]["IWAE-30"]["mean"] for a in some]) for name, some in found.items()}
    header, rows = sys.modules["reproduction.seeds"].over_seeds(runs)
    assert header == ["arm", "ELBO", "IWAE-30", "Δ IWAE-30", "above", "ms per batch", "train s"]
    assert rows[0][:5] == ["VAE", rows[0][1], f"{iwae['VAE'].mean():.2f} ± {iwae['VAE'].std() / 3**0.5:.2f}", "", ""]
    gain = iwae["RME(2)"] - iwae["VAE"]
    assert rows[2][3] == f"{gain.mean():+.2f} ± {gain.std() / 3**0.5:.2f}"
    assert rows[2][4] == f"{int((gain > 0).sum())} of 3"
    assert float(rows[0][5].split(" ±")[0]) > 0
    ahead = iwae["RME(2)"] - iwae["ME(2)"]
    text = sys.modules["reproduction.page"].page(runs)
    assert f"RME(2) less ME(2), IWAE-30: {ahead.mean():+.2f} ± {ahead.std() / 3**0.5:.2f}; above in" in text
    assert "quick, seeds 0, 1, 2 together" in text
    bench.show(bench.EXPERIMENTS["rme-omniglot"], runs)


def test_the_page_keeps_what_has_no_results_here(bench, images, tmp_path):
    page = sys.modules["reproduction.page"].page
    old, new = (go(bench, name, images, tmp_path / name, arms=("VAE",)) for name in ("savae-mnist", "hvae-mnist"))
    before = page([old])
    after = page([new], before)
    section = before.split("## savae-mnist: ")[1].split("\n## ")[0]
    assert section in after
    assert after.count("Not run yet.") == len(bench.EXPERIMENTS) - 2
    assert page([old, new]) == after


def test_command_line(bench, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.main(["savae-mnist", "--arms", "VAE", "--epochs", "1", "--train-rows", "20", "--test-rows", "2", "--threads",
                "1", "--seed", "4", "--no-progress", "--data", images])  # fmt: skip
    found = json.loads(Path("runs/reproduce/savae-mnist/quick-seed4/results.json").read_text())
    assert found["seed"] == 4
    assert found["settings"]["epochs"] == 1
    bench.main(["--page"])
    assert "### quick, seed 4" in Path("docs/reproduction.md").read_text()
    with pytest.raises(SystemExit):
        bench.main([])
    assert "name an experiment" in capsys.readouterr().err


@pytest.mark.slow
def test_tables_of_several_rows_over_seeds(bench, images, tmp_path):
    """Groups stay apart, arms without a group have no row of it."""
    arms = ("B, one group", "B, two groups")
    runs = [go(bench, "vlac-mnist", images, tmp_path / str(seed), arms=arms, seed=seed) for seed in (0, 1)]
    (title, header, rows), = sys.modules["reproduction.seeds"].measured(runs)
    assert header[:4] == ["arm", "group", "of", "Hungarian %"]
    assert [row[:3] for row in rows] == [
        ["B, one group", "z1", "10"], ["B, two groups", "z1", "10"], ["B, two groups", "z2", "10"]
    ]  # fmt: skip
    values = [next(a for a in run["arms"] if a["name"] == arms[1])["extra"][1]["Hungarian %"]["mean"] for run in runs]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    assert rows[2][3] == f"{mean:.2f} ± {spread:.2f}"
    assert f"{title}; means ± standard deviation over seeds" in sys.modules["reproduction.page"].page(runs)


def test_what_a_decoder_does_alone_is_exact(bench, images, tmp_path):
    """The decoder without a code: log p(x) to the last digit, no KL, no information."""
    numbers = go(bench, "lossy-mnist", images, tmp_path, arms=("PixelCNN alone",))["arms"][0]["numbers"]
    assert numbers["ELBO"] == numbers["IWAE-30"]
    assert numbers["KL"]["mean"] == numbers["MI"]["mean"] == numbers["AU"]["mean"] == 0
