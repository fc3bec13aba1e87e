"""The experiments with exact posteriors, made small: curves and ends are exact, every use has its numbers."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch


def go(bench, name, out, seed=0, arms=(), say=lambda text: None, **changes):
    runner, experiment = sys.modules["reproduction.runner"], bench.EXPERIMENTS[name]
    small = replace(
        experiment.presets["quick"], epochs=1, train_rows=40, test_rows=12, num_samples=30, batch_size=20,
        **({"extra_rows": 2, "extra_steps": 20} if name == "exact-uses" else {}),
    )  # fmt: skip
    options = runner.Options("quick", small, out, seed=seed, threads=1, arms=arms, progress=False, **changes)
    return runner.run(experiment, options, say)


def test_em_and_vae_are_held_against_each_other_exactly(bench, tmp_path):
    module, experiment = sys.modules["reproduction.exact_em"], bench.EXPERIMENTS["exact-em"]
    arms = tuple(arm.name for arm in experiment.arms if arm.name.startswith("circle"))
    runs = [go(bench, "exact-em", tmp_path / str(seed), seed, arms) for seed in (0, 1)]
    for results in runs:
        records = {arm["name"].partition(": ")[2]: arm for arm in results["arms"]}
        assert len({round(arm["curve"][0], 9) for arm in records.values()}) == 1  # one start
        for method, arm in records.items():
            assert arm["failed"] is None
            assert arm["epochs"] == (10 if method == module.LONG else 1)
            assert len(arm["curve"]) == arm["epochs"] + 1
            (row,) = arm["extra"]
            assert row["training data"]["mean"] == pytest.approx(arm["curve"][-1], abs=1e-9)
            assert ("KL(q || p)" in row) == ("VAE" in method)
            if "EM" in method:  # the ELBO is the evidence
                assert arm["numbers"]["ELBO"]["mean"] == pytest.approx(row["test data"]["mean"], abs=1e-8)
            else:
                kl = row["KL(q || p)"]["mean"]
                assert kl > 0
                error = 4 * math.sqrt(2 * kl / (12 * 30))  # where q is near p, log(p / q) has the variance 2 KL
                assert row["test data"]["mean"] - arm["numbers"]["ELBO"]["mean"] == pytest.approx(kl, abs=error)
        output = records[module.OUTPUT]["curve"]
        assert all(later > earlier for earlier, later in itertools.pairwise(output))
        assert set(results["differences"]) == set(arms) - {f"circle: {module.vae(rate)}" for rate in module.RATES}
        ours, theirs = (records[name(0.001)]["numbers"]["ELBO"]["mean"] for name in (module.by_steps, module.vae))
        found = results["differences"]["circle: EM, steps of 0.001"]["ELBO"]["mean"]
        assert found == pytest.approx(ours - theirs, abs=1e-9)

    facts = module.facts(runs)
    assert len(facts) == 4
    ends = [[next(a for a in run["arms"] if a["name"] == f"circle: {method}")["curve"][-1] for run in runs]
            for method in (module.OUTPUT, module.vae(0.005))]  # fmt: skip
    gains = [ours - theirs for ours, theirs in zip(*ends, strict=True)]
    mean, spread, above = sum(gains) / 2, abs(gains[0] - gains[1]) / math.sqrt(2), sum(gain > 0 for gain in gains)
    assert f"{module.OUTPUT} {mean:+.2f} ± {spread:.2f} (above in {above} of 2)" in facts[0]
    bench.show(experiment, runs)
    text = sys.modules["reproduction.page"].page(runs)
    assert "](images/exact-em-quick.png)" in text
    assert facts[0] in text
    lines = module.picture(runs).axes[0].get_lines()
    assert len(lines) == 4 * 3 + 1  # of four methods two seeds and their mean; where the long VAE ends
    (steps,) = (arm["curve"] for arm in runs[0]["arms"] if arm["name"] == "circle: EM, steps of 0.005")
    assert list(lines[0].get_ydata()) == pytest.approx(steps)

    said: list[str] = []
    assert go(bench, "exact-em", tmp_path / "0", 0, arms, said.append) == runs[0]
    assert sum("finished before" in line for line in said) == len(arms)


def test_every_use_of_the_exact_posterior_has_its_numbers(bench, tmp_path, monkeypatch):
    module, experiment = sys.modules["reproduction.exact_uses"], bench.EXPERIMENTS["exact-uses"]
    monkeypatch.setattr(module, "EM_ITERATIONS", 5)
    monkeypatch.setattr(module, "DRAWS", 50)
    small, wide = module.WIDTHS
    names = [(small, "exact"), (small, "amortized"), *((wide, guide) for guide in module.GUIDES)]
    arms = tuple(f"wave, {width} units: {guide}" for width, guide in names)
    results = go(bench, "exact-uses", tmp_path, arms=arms)
    records = {arm["name"]: arm for arm in results["arms"]}
    assert list(records) == list(arms)
    for width, guide in names:
        arm, exact = (records[f"wave, {width} units: {some}"] for some in (guide, "exact"))
        assert arm["failed"] is None
        assert len(arm["extra"]) == (4 if width == wide else 0)
        # One net for all of them: no bound lies above its log p(x), but for the error of 12 x 30 draws.
        assert arm["numbers"]["ELBO"]["mean"] <= exact["numbers"]["ELBO"]["mean"] + 0.05
    audit, strange, first, second = records[f"wave, {wide} units: exact"]["extra"]
    assert abs(audit["KL(q || p)"]["mean"]) < 1e-6
    assert abs(audit["log p - ELBO"]["mean"]) < 1e-9
    assert audit["within 3 se, %"]["mean"] == 100
    assert "approximation gap" not in audit
    assert strange["ELBO"] == strange["IWAE-30"]
    assert [first["hidden"], second["hidden"]] == ["first", "second"]
    assert first["k-hat > 0.7, %"]["mean"] == 0
    audit, strange, *_ = records[f"wave, {wide} units: amortized"]["extra"]
    assert audit["KL(q || p)"]["mean"] > 0
    assert audit["approximation gap"]["mean"] + audit["amortization gap"]["mean"] == pytest.approx(
        audit["inference gap"]["mean"], abs=1e-9
    )
    assert 0 <= strange["ELBO"]["mean"] <= 100
    facts = module.facts([results])
    elbo = [records[f"wave, {width} units: {guide}"]["numbers"]["ELBO"]["mean"]
            for guide in ("exact", "amortized") for width in (small, wide)]  # fmt: skip
    right = int((elbo[0] > elbo[1]) == (elbo[2] > elbo[3]))
    assert len(facts) == 2
    # Of the guides that nets of all widths have.
    assert facts[0].endswith(f"the ELBO of test data orders them as the exact log p(x) does: amortized {right} of 1.")
    bench.show(experiment, [results])


def test_data_are_made_and_not_read(bench, tmp_path):
    with pytest.raises(ValueError, match="exact-em makes its own data"):
        go(bench, "exact-em", tmp_path, data="some.npz")
    experiment, module = bench.EXPERIMENTS["exact-em"], sys.modules["reproduction.toys"]
    split = experiment.split(experiment.presets["quick"])
    assert split.train.shape == (500, 3, 2)
    wave = module.only(split, name="wave")
    assert torch.equal(wave.train, split.train[:, 1])
    assert torch.equal(wave.test, split.test[:, 1])
    assert wave.fingerprint not in (split.fingerprint, module.only(split, name="circle").fingerprint)
    load = sys.modules["reproduction.experiment"].load
    with pytest.raises(ValueError, match="makes its own data, on the CPU: leave --device out"):
        load(bench.EXPERIMENTS["exact-em"], bench.EXPERIMENTS["exact-em"].presets["quick"], "cuda")
