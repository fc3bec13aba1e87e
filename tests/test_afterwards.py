"""`pyrovae evaluate`, `diagnose` and `reference` on a small finished run; stopped runs that go on; loud refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyrovae import noise
from pyrovae.cli import app
from pyrovae.comparison import afterwards, saved
from pyrovae.evidence import importance


def call(*arguments):
    threads = torch.get_num_threads()
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    images = np.random.default_rng(0).integers(0, 2, size=(80, 3, 3)).astype(np.uint8) * 255
    np.savez(out / "small.npz", train=images[:60], test=images[60:])
    found = call(
        "compare", "--quick", "--epochs", 1, "--latent-dim", 2, "--data", out / "small.npz", "--guides",
        "amortized,short-run", "--out", out / "run",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    return out / "run"


def test_the_trained_weights_come_back(run):
    """The ELBO of the loaded guides is the one the run reported, within its Monte Carlo error."""
    loaded = saved.load(run)
    assert set(loaded.guides) == {"amortized", "short-run"}
    content = json.loads((run / "comparison.json").read_text())
    told = next(row for row in content["end_to_end"] if row["guide"] == "amortized")["ELBO"]["value"]
    weights = importance.log_weights(loaded.models["amortized"], loaded.guides["amortized"], loaded.test,
                                     num_samples=200, seed=0)  # fmt: skip
    assert abs(float(weights.mean()) - told) < 1e-4


def test_evaluate(run):
    found = call("evaluate", run, "--num-samples", 50, "--temperatures", 20, "--num-data", 7)
    assert found.exit_code == 0, found.output
    rows = json.loads((run / "evaluation.json").read_text())
    assert [row["guide"] for row in rows] == ["amortized", "short-run"]
    assert rows[0]["IWAE"]["value"] < 0
    assert rows[0]["AIS"]["se"] > 0
    assert rows[0]["provenance"]["num_data"] == 7
    assert rows[1]["ELBO"]["reason"] == "no density"
    assert "AIS" in found.output


def test_a_killed_evaluation_goes_on(run, tmp_path, monkeypatch):
    """Stopped in the second chunk and run again: the numbers of an unbroken one, from the chunk on."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    options = {"guides": ("amortized",), "num_samples": 20_000, "say": lambda item: None}  # three data a chunk
    unbroken = afterwards.evaluate(run, **options)[0].to_dict()
    inner, calls = noise.per_datum, []

    def dies(seed, indices):
        calls.append(list(indices))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(seed, indices)

    monkeypatch.setattr(noise, "per_datum", dies)
    with pytest.raises(KeyboardInterrupt):
        afterwards.evaluate(copy, **options)
    resumed = afterwards.evaluate(copy, **options)[0].to_dict()
    assert resumed["IWAE"] == unbroken["IWAE"]
    assert resumed["ELBO"] == unbroken["ELBO"]
    assert calls[2] == calls[1]  # the chunk that died is the next to run
    assert calls.count(calls[0]) == 1


def test_a_killed_reference_goes_on(run, tmp_path, monkeypatch):
    from pyrovae.samplers import batched

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    options = {"num_data": 4, "target_ess": 50, "say": lambda item: None}
    unbroken = afterwards.reference(run, **options)
    inner, calls = batched.warm_up, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(batched, "warm_up", dies)
    with pytest.raises(KeyboardInterrupt):
        afterwards.reference(copy, **options)
    resumed = afterwards.reference(copy, **options)
    assert len(calls) == 3  # the first guide's chains were kept
    for name, chains in unbroken.items():
        assert torch.equal(chains.draws, resumed[name].draws)
        assert (copy / f"reference-{name}.nc").stat().st_size > 0


def test_diagnose(run):
    found = call("diagnose", run, "--num-reference", 3, "--num-gaps", 3, "--num-simulated", 100)
    assert found.exit_code == 0, found.output
    assert "k-hat is below" in found.output
    assert "no density" in found.output
    page = (run / "diagnosis.html").read_text()
    assert page.count("<img") >= 5
    assert "http" not in page.replace("http://www.w3.org", "")


def test_refusals(run, tmp_path):
    for command in ("evaluate", "diagnose", "reference"):
        missing = call(command, tmp_path)
        assert missing.exit_code == 2
        assert "no finished run" in " ".join(missing.output.split())
        unknown = call(command, run, "--guides", "nonsense")
        assert unknown.exit_code == 2
        assert "choose from" in unknown.output
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "checkpoints" / "amortized.pt").write_bytes(b"nothing")
    assert call("evaluate", broken).exit_code == 2
    (broken / "checkpoints" / "amortized.pt").unlink()
    assert "missing" in call("evaluate", broken).output
