"""`pyrovae compare` from end to end, and how it fails."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyrovae import table
from pyrovae.cli import app
from pyrovae.comparison import Settings, run
from pyrovae.provenance import Provenance
from pyrovae.table import Number, Row

COMMON = ["compare", "--quick", "--epochs", "1", "--latent-dim", "2"]


def call(*arguments):
    threads = torch.get_num_threads()
    found = CliRunner().invoke(app, [*COMMON, *(str(a) for a in arguments)])
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One small run with a guide of every kind of result: with a density, stratified, without a density."""
    out = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    path = out / "small.npz"
    images = rng.integers(0, 2, size=(80, 3, 3)).astype(np.uint8) * 255
    np.savez(path, train=images[:60], test=images[60:])
    state = torch.get_rng_state()
    found = call("--data", path, "--guides", "amortized,mixture,short-run", "--out", out / "run")
    assert torch.equal(state, torch.get_rng_state())
    assert found.exit_code == 0, found.output
    return path, out / "run", found.output


def test_files(outcome):
    _, out, text = outcome
    for name in ("comparison.json", "report.html", "posterior.nc"):
        assert (out / name).stat().st_size > 0
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"amortized.pt", "mixture.pt", "short-run.pt"}
    assert "not a bound of log p(x)" in " ".join(text.split())
    assert "E_q log p(x,z)" in text


def test_json_has_every_number_with_its_error_and_origin(outcome):
    _, out, _ = outcome
    content = json.loads((out / "comparison.json").read_text())
    for rows in (content["end_to_end"], content["frozen"]):
        assert {"amortized", "mixture", "short-run"} <= {row["guide"] for row in rows}
        for row in rows:
            for column, number in row.items():
                if column in ("guide", "provenance") or "reason" in number:
                    continue
                assert math.isfinite(number["value"]), (row["guide"], column)
                if column != "train s":  # one measured duration, not an estimate
                    assert number["se"] is not None or number["noise_floor"] is not None, (row["guide"], column)
            origin = row["provenance"]
            assert origin["data"] == "small"
            assert origin["binarization"] == "static"
            assert origin["num_data"] == 20
            assert origin["num_samples"] == 200
            assert origin["seed"] == 0
            assert origin["kl_weight"] == 1.0
            assert {"python", "pyrovae", "torch", "pyro-ppl"} <= set(origin["versions"])
            assert re.fullmatch("[0-9a-f]{64}", origin["fingerprint"])
    short_run = next(row for row in content["end_to_end"] if row["guide"] == "short-run")
    assert short_run["ELBO"] == {"reason": "no density"}
    assert content["training"]["short-run"]["objective"] == "E_q log p(x,z)"
    mixed = [row for row in content["frozen"] if row["guide"] == "mixture"]
    assert mixed[0]["Δ IWAE"]["se"] > 0


def test_posterior_opens_in_arviz(outcome):
    import arviz as az

    _, out, _ = outcome
    found = az.from_netcdf(out / "posterior.nc")
    assert found.posterior["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert found.posterior.sizes["data"] == 4
    assert {"posterior_amortized", "posterior_mixture", "posterior_short_run", "observed_data"} <= set(found.groups())


def test_report_is_one_self_contained_page(outcome):
    _, out, _ = outcome
    page = (out / "report.html").read_text()
    assert not re.search(r"""(https?:|src\s*=\s*["'](?!data:)|<link|<script|@import|url\()""", page)
    assert page.count('src="data:image/png;base64,') >= 4
    for words in ("Where the numbers come from", "cannot see a missed mode", "no density", "sliced W2"):
        assert words in page


def test_resume_gives_the_same_numbers_and_trains_nothing(outcome):
    """A finished run continued: no step is taken, every estimate comes out again."""
    path, out, _ = outcome
    before = json.loads((out / "comparison.json").read_text())
    weights = (out / "checkpoints" / "amortized.pt").read_bytes()
    found = call("--data", path, "--guides", "amortized,mixture,short-run", "--out", out, "--resume")
    assert found.exit_code == 0, found.output
    after = json.loads((out / "comparison.json").read_text())
    for first, second in zip(before["frozen"] + before["end_to_end"], after["frozen"] + after["end_to_end"],
                             strict=True):  # fmt: skip
        for column in set(first) - {"ms", "train s"}:
            assert first[column] == second[column], (first["guide"], column)
    old = torch.load(out / "checkpoints" / "amortized.pt", weights_only=True)
    assert old["at"]["step"] == before["training"]["amortized"]["steps"]
    assert len(weights) > 0


@pytest.mark.slow
def test_resume_with_more_epochs_keeps_the_longer_decoder(outcome, tmp_path):
    """Checkpoints of the frozen stage belong to their decoder: after more training they must not bring the old back."""
    path, _, _ = outcome
    options = {"data": str(path), "guides": ("amortized", "mixture"), "latent_dim": 2, "quick": True,
               "num_samples": 100, "out": str(tmp_path), "num_reference": 1}  # fmt: skip
    run(Settings(epochs=1, **options), say=lambda item: None)
    resumed = run(Settings(epochs=6, resume=True, **options), say=lambda item: None)
    trained = torch.load(tmp_path / "checkpoints" / "amortized.pt", weights_only=True)["state"]["modules"]["model"]
    assert all(torch.equal(v, trained[k]) for k, v in resumed.models["amortized"].state_dict().items())


def _grey(path):
    np.savez(path, train=np.full((5, 4), 3.7), test=np.zeros((5, 4)))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guides", "amortised"], r"unknown guides \['amortised'\]: choose from amortized"),
        (["--data", "faces"], "unknown data set 'faces': choose one of digits, mnist"),
        (["--data", "nowhere.npz"], r"no data file at nowhere\.npz"),
        (["--binarization", "soft"], "unknown binarization 'soft'"),
        (["--device", "cuda"], "no GPU that torch can use"),
    ],
)
def test_mistakes_give_one_sentence_and_exit_code_2(arguments, message, tmp_path):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = call(*arguments, "--out", tmp_path / "never")
    assert found.exit_code == 2
    assert re.search(message, found.output)
    assert len(found.output.strip().splitlines()) == 1
    assert "Traceback" not in found.output
    assert not (tmp_path / "never").exists()


def test_a_malformed_npz(tmp_path):
    found = call("--data", _grey(tmp_path / "grey.npz"), "--out", tmp_path / "never")
    assert found.exit_code == 2
    assert re.search(r"values from 3\.7 to 3\.7 in 'train' in .*grey\.npz: rescale them to \[0, 1\]", found.output)


def test_bad_options_exit_with_2_before_anything_runs(tmp_path):
    for arguments in (["--epochs", "0"], ["--latent-dim", "0"], ["--threads", "0"], ["--no-such-option"]):
        found = CliRunner().invoke(app, ["compare", *arguments, "--out", str(tmp_path / "never")])
        assert found.exit_code == 2
    assert not (tmp_path / "never").exists()


def test_internal_faults_are_not_dressed_as_mistakes(monkeypatch, tmp_path):
    from pyrovae import comparison

    def broken(settings, say):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(comparison, "run", broken)
    found = call("--out", tmp_path)
    assert isinstance(found.exception, RuntimeError)
    assert found.exit_code == 1


def _row(**changes):
    base = {"data": "digits", "fingerprint": "f", "split": "test", "num_data": 10, "binarization": "static",
            "likelihood": "bernoulli", "seed": 0}  # fmt: skip
    return Row("g", {"ELBO": Number(-1.0, 0.1)}, Provenance(**{**base, **changes}))


@pytest.mark.parametrize("changes", [
    {"binarization": "dynamic"}, {"data": "mnist"}, {"fingerprint": "other"}, {"likelihood": "gaussian"},
    {"split": "train"}, {"num_data": 11}, {"kl_weight": 0.5},
])  # fmt: skip
def test_tables_refuse_rows_that_do_not_compare(changes):
    from pyrovae import report

    field = next(iter(changes))
    for show in (lambda rows: table.to_rich("title", rows), report.table):
        with pytest.raises(ValueError, match=f"not comparable: {field}"):
            show([_row(), _row(**changes)])
        show([_row(), _row(seed=1)])  # another seed compares


def test_cells_say_what_a_number_is():
    row = Row("g", {
        "ELBO": Number(-1.234, 0.056), "Δ ELBO": Number(0.5, 0.1), "> 0.7": Number(0.25, 0.1), "IWAE": "no density",
        "mean error": Number(0.3, 0.1, 0.05), "ms": Number(0.01234, 0.001),
    }, _row().provenance)  # fmt: skip
    columns = ["guide", "ELBO", "IWAE", "Δ ELBO", "> 0.7", "mean error", "ms"]
    assert table.columns_of([row]) == columns
    assert table.cells(row, columns) == [
        "g", "-1.23 ± 0.06", "no density", "+0.50 ± 0.10", "25 %", "0.30 (0.05)", "0.012"
    ]  # fmt: skip
    assert Number(math.nan, 0.1).to_dict() == {"value": None, "se": 0.1, "noise_floor": None}
