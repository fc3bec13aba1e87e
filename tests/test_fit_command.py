"""`pyrovae fit`: every model runs to its page, what does not go together says what would, a resumed run is unbroken."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyrovae import diagnose, evidence, fitting, training
from pyrovae.cli import app
from pyrovae.compat import compatible
from pyrovae.data import load_text
from pyrovae.diagnose import clustering
from pyrovae.errors import IncompatibleError
from pyrovae.fitting import Settings, run
from pyrovae.fitting.guides import GUIDES, NO_GUIDE, build_guide
from pyrovae.fitting.material import TEXTS, gather
from pyrovae.fitting.objectives import LOSSES, build_loss, candidates
from pyrovae.fitting.pairing import require
from pyrovae.fitting.recipes import MODELS, TEXT_MODELS, Form, build_model
from pyrovae.models import REGISTRY, no_latents

# Each model with one guide, and between them every guide and every loss.
RUNS = {
    "vae": ("short-run", "", "small"),
    "ppca": ("amortized-full-rank", "iwae", "small"),
    "ladder": ("amortized", "infovae", "small"),
    "vlac": ("amortized", "free-bits", "small"),
    "pixelcnn": ("amortized-iaf", "mae", "small"),
    "lossy": ("mixture", "elbo", "small"),
    "text": ("amortized", "elbo", "snli"),
    "language-model": ("", "", "snli"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small pictures with two classes, and small texts, where the data lie."""
    out = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 100)
    images = ((rng.random((100, 5, 5)) < np.where(y, 0.8, 0.2)[:, None, None]) * 255).astype(np.uint8)
    images[:, :2] = rng.integers(0, 2, (100, 1, 1)) * 255
    np.savez(out / "small.npz", train=images[:60], test=images[60:], train_labels=y[:60], test_labels=y[60:])
    words = ["a", "dog", "runs", "fast", "in", "the", "park", "today", "while", "cats", "sleep"]
    (out / "snli").mkdir()
    for part, number in (("train", 60), ("valid", 20), ("test", 30)):
        lines = [" ".join(rng.choice(words, rng.integers(2, 8))) for _ in range(number)]
        (out / "snli" / f"{part}.txt").write_text("\n".join(lines))
    return out


@pytest.fixture(autouse=True)
def data_there(folder, monkeypatch):
    monkeypatch.setenv("PYROVAE_DATA", str(folder))


def asked(folder, model, out, **options):
    guide, loss, data = RUNS[model]
    if data == "small":
        data = str(folder / "small.npz")
    values = {"latent_dim": 2, "epochs": 2, "batch_size": 20, "num_samples": 50, "num_data": 40, "threads": 1,
              "kl_warmup": 0}  # fmt: skip
    values |= {"model": model, "guide": guide, "loss": loss, "data": data, "out": str(out)}
    return Settings(**{**values, **options})


def quiet(item):
    pass


@pytest.fixture(scope="module")
def outcomes(folder, tmp_path_factory):
    """One run of every model; made when first asked for."""
    done = {}

    def get(model):
        if model not in done:
            out = tmp_path_factory.mktemp(model)
            done[model] = (run(asked(folder, model, out / "run"), say=quiet), out / "run")
        return done[model]

    return get


def call(*arguments):
    threads = torch.get_num_threads()
    found = CliRunner().invoke(app, ["fit", *(str(a) for a in arguments)])
    torch.set_num_threads(threads)
    return found


def test_every_model_is_here():
    assert set(RUNS) == set(MODELS) == {*REGISTRY, "language-model"}


@pytest.mark.parametrize("model", RUNS)
def test_every_model_runs_to_its_page(outcomes, model):
    outcome, out = outcomes(model)
    content = json.loads((out / "results.json").read_text())
    assert content["settings"]["model"] == model
    assert content["training"]["curve"] == outcome.curve
    assert len(outcome.curve) == content["training"]["epochs"] == 2
    assert all(map(math.isfinite, outcome.curve))
    origin = content["provenance"]
    assert origin["num_data"] == (30 if model in TEXT_MODELS else 40)
    assert origin["kl_weight"] == 1.0
    assert re.fullmatch("[0-9a-f]{64}", origin["fingerprint"])
    assert origin["binarization"] == {"ppca": "none", "text": "", "language-model": ""}.get(model, "static")
    for name, number in content["numbers"].items():
        assert "reason" in number or math.isfinite(number["value"]), name
    scored = [name for name, number in content["numbers"].items()
              if name.startswith(("ELBO", "IWAE", "log p(x)")) and "value" in number]  # fmt: skip
    assert all(content["numbers"][name]["se"] > 0 for name in scored)
    assert bool(scored) == (model != "vae")  # a short run has no density
    page = (out / "report.html").read_text()
    assert not re.search(r"""(https?:|src\s*=\s*["'](?!data:)|<link|<script|@import|url\()""", page)
    assert "Where the numbers come from" in page
    if model in TEXT_MODELS:
        assert "Sample sentences" in page
        assert ("Reconstructed sentences" in page) == (model == "text")
        name = "perplexity" if model == "language-model" else "perplexity, at most"
        assert content["numbers"][name]["value"] > 1
        assert content["numbers"][name]["se"] > 0
    else:
        for title in ("Reconstructions", "Samples", "Traversals", "Interpolations"):
            assert f"<h2>{title}" in page
        drawn = model in ("pixelcnn", "lossy")
        assert ("<h2>Imputations" in page) == (not drawn)
        assert ("raster order" in page) == drawn
        assert page.count('src="data:image/png;base64,') >= 5


def test_a_guide_without_density_says_that_there_is_no_bound(outcomes):
    outcome, out = outcomes("vae")
    assert outcome.objective == "E_q log p(x,z)"
    content = json.loads((out / "results.json").read_text())
    assert "no density" in content["numbers"]["ELBO"]["reason"]
    page = (out / "report.html").read_text()
    assert "no bound of log p(x)" in page
    assert "at least" not in page


@pytest.mark.parametrize("model", ["ppca", "ladder", "vlac", "text"])
def test_numbers_are_those_of_the_saved_weights(outcomes, model):
    """Read back from disk and measured again by the library's own functions; evaluation changed no weight."""
    outcome, out = outcomes(model)
    saved = fitting.load(out)
    for ours, theirs in ((outcome.model, saved.model), (outcome.guide, saved.guide)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    x, numbers = saved.material.rows, saved.results["numbers"]
    weights = evidence.log_weights(saved.model, saved.guide, x, num_samples=50, seed=0)
    for name, estimate in zip(("ELBO", "IWAE-50"), evidence.summarize(weights), strict=True):
        assert numbers[name]["value"] == pytest.approx(estimate.mean, rel=1e-5)
        assert numbers[name]["se"] == pytest.approx(estimate.mean_se, rel=1e-4)
    known = diagnose.information(saved.model, saved.guide, x, num_samples=100, num_scored=40, seed=0)
    assert numbers["KL"]["value"] == pytest.approx(float(known.kl.mean()), rel=1e-4, abs=1e-6)
    assert numbers["mutual information"]["value"] == pytest.approx(known.mutual_information, rel=1e-4, abs=1e-5)
    assert numbers["log N, the most it can be"]["value"] == pytest.approx(math.log(len(x)))
    assert numbers["active latents"]["value"] == int(known.active.sum())
    if model == "ppca":
        exact = float(saved.model.log_evidence(x).mean().detach())
        assert numbers["log p(x), exact"]["value"] == pytest.approx(exact, rel=1e-5)
    if model == "text":
        iwae = evidence.summarize(weights)[1].values
        expected = math.exp(-float(iwae.sum() / saved.material.test.lengths.sum()))
        assert numbers["perplexity, at most"]["value"] == pytest.approx(expected, rel=1e-5)
    if model in ("ladder", "vlac"):
        groups = diagnose.group_information(saved.model, saved.guide, x, num_samples=40, seed=0)
        found = {group["site"]: group["KL"]["value"] for group in saved.results["groups"]}
        assert list(found) == ["z1", "z2"]
        for name, kl in zip(groups.groups, groups.kl, strict=True):
            assert found[name] == pytest.approx(float(kl), rel=1e-4, abs=1e-6)
        assert sum(found.values()) == pytest.approx(numbers["KL"]["value"], rel=0.1)  # of other draws


def test_language_model_is_scored_exactly(outcomes):
    outcome, out = outcomes("language-model")
    saved = fitting.load(out)
    assert outcome.objective == "log p(x)"
    assert saved.guide is no_latents
    with torch.no_grad():
        exact = saved.model.eval().log_prob(saved.material.rows).double()
    assert saved.results["numbers"]["log p(x), exact"]["value"] == pytest.approx(float(exact.mean()), rel=1e-5)
    expected = math.exp(-float(exact.sum() / saved.material.test.lengths.sum()))
    assert saved.results["numbers"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-5)


def test_clusters_are_measured_against_labels_of_test_data(outcomes):
    outcome, out = outcomes("vlac")
    saved = fitting.load(out)
    for level, group in enumerate(outcome.findings.groups):
        again = clustering(group.clusters, saved.material.labels, num_clusters=10)
        told = saved.results["groups"][level]
        assert told["Hungarian accuracy"] == again.hungarian
        assert told["many-to-one accuracy"] == again.many_to_one
        assert (told["NMI"], told["ARI"], told["clusters used"]) == (again.nmi, again.ari, again.used)
    page = (out / "report.html").read_text()
    for words in ("Clusters of group z1", "Hungarian accuracy", "many-to-one", "NMI", "ARI", "clusters used"):
        assert words in page
    assert list(outcome.fits) == ["before the clusters", "with clusters"]


class Stopped(KeyboardInterrupt):
    """As if someone had pressed Ctrl-C."""


@pytest.mark.parametrize(("model", "epochs"), [("ladder", 4), ("vlac", 5), ("text", 3)])
def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path, monkeypatch, model, epochs):
    """Stopped while the last stage was going on; then the same command with --resume."""
    whole = run(asked(folder, model, tmp_path / "whole", epochs=epochs), say=quiet)
    save, calls = training._Run.save, []

    def stop(self, path, identity):
        save(self, path, identity)
        calls.append(path.name)
        if calls.count("checkpoint.pt") == 2:
            raise Stopped

    monkeypatch.setattr(training._Run, "save", stop)
    with pytest.raises(Stopped):
        run(asked(folder, model, tmp_path / "parts", epochs=epochs), say=quiet)
    monkeypatch.undo()
    monkeypatch.setenv("PYROVAE_DATA", str(folder))
    assert not (tmp_path / "parts" / "results.json").exists()
    resumed = run(asked(folder, model, tmp_path / "parts", epochs=epochs, resume=True), say=quiet)
    assert resumed.curve == whole.curve
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    assert all(torch.equal(v, resumed.guide.state_dict()[k]) for k, v in whole.guide.state_dict().items())
    assert resumed.findings.numbers == whole.findings.numbers


def test_more_epochs_go_on_and_nothing_is_overwritten(folder, tmp_path):
    out = tmp_path / "run"
    run(asked(folder, "ladder", out, epochs=2), say=quiet)
    before = (out / "weights.pt").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run already: pass --resume to go on with it, or another --out"):
        run(asked(folder, "ladder", out), say=quiet)
    with pytest.raises(ValueError, match=r"holds a run with loss 'infovae', not 'elbo': go on with the same"):
        run(asked(folder, "ladder", out, loss="elbo", resume=True), say=quiet)
    assert (out / "weights.pt").read_bytes() == before
    longer = run(asked(folder, "ladder", out, epochs=4, resume=True), say=quiet)
    assert longer.curve == run(asked(folder, "ladder", tmp_path / "whole", epochs=4), say=quiet).curve
    run(asked(folder, "vlac", tmp_path / "vlac"), say=quiet)
    with pytest.raises(ValueError, match="holds a run of 2 epochs, whose stages are shares of them"):
        run(asked(folder, "vlac", tmp_path / "vlac", epochs=4, resume=True), say=quiet)


@pytest.mark.parametrize(("options", "words"), [
    ({"model": "vae", "schedule": "aggressive", "guide": "amortized"}, "Schedule: aggressive"),
    ({"model": "ladder", "schedule": "deep-first", "kl_warmup": 1}, "Schedule: deep-first"),
    ({"model": "vae", "schedule": "recursive", "guide": "recursive-mixture", "loss": "recursive"}, "recursive"),
    ({"model": "vae", "guide": "semi-amortized", "patience": 1, "binarization": "dynamic"}, "held-out training data"),
    ({"model": "pixelcnn", "binarization": "none", "guide": "amortized", "loss": ""}, "256 levels"),
    ({"model": "vlac", "classes": "enumerated", "guide": "amortized", "loss": ""}, "Clusters of group z2"),
])  # fmt: skip
def test_options(folder, tmp_path, options, words):
    options = dict(options)
    outcome = run(asked(folder, options.pop("model"), tmp_path / "run", epochs=3, **options), say=quiet)
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert words in (tmp_path / "run" / "report.html").read_text()
    assert content["provenance"]["kl_weight"] == 1.0
    if options.get("patience") or options.get("schedule") == "aggressive":
        assert len(content["training"]["validation"]) == len(outcome.curve)
    else:
        assert content["training"]["validation"] == []
    if options.get("schedule") == "deep-first":
        assert outcome.model.fade.tolist() == [1.0, 1.0]


def test_colours_are_put_in_front(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.random((12, 4, 5, 3)).astype(np.float32)
    np.savez(tmp_path / "colour.npz", train=images[:8], test=images[8:])
    for model in ("vae", "pixelcnn"):
        found = gather(Settings(model=model, data=str(tmp_path / "colour.npz"), binarization="none"))
        first = found.train[0].reshape(3, 4, 5).movedim(0, -1)
        levels = torch.as_tensor(images[0])
        if model == "pixelcnn":
            assert found.train.shape == (8, 3, 4, 5)
            first, levels = (first + 1) / 2, (levels * 255).round() / 255
        torch.testing.assert_close(first, levels, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("arguments", "reason", "works"), [
    ("--guide short-run --loss elbo", "draws but no density",
     "with --guide short-run go --loss expected-log-joint, with --loss elbo go --guide amortized"),
    ("--guide mixture --loss iwae", "not fully reparameterised",
     "with --guide mixture go --loss elbo, with --loss iwae go --guide amortized"),
    ("--guide laplace --loss recursive", "not built up in stages",
     "with --loss recursive go --guide recursive-mixture"),
    ("--model text --data digits", "reads sentences", "--data ptb, snli or yahoo"),
    ("--model ladder --data snli", "reads images, but 'snli' is text", "--data digits, mnist"),
    ("--model language-model --guide amortized --data snli", "nothing to infer", "go --guide none"),
    ("--model language-model --loss infovae --data snli", "has no latents", "go --loss elbo"),
    ("--guide none", "need a guide", "go --guide amortized"),
    ("--schedule deep-first", "brings in the groups of a models.LadderVAE", "go --schedule none or aggressive"),
    ("--schedule recursive", "goes with losses.RecursiveELBO", "go --schedule none or aggressive"),
    ("--model language-model --data snli --schedule aggressive", "is for guides", "go --schedule none"),
    ("--model ppca --binarization static", "Gaussian likelihood", "--binarization none, or --model vae"),
    ("--model text --data snli --binarization static", "words are not binarised", "leave --binarization out"),
    ("--loss iwae --kl-warmup 2", "under a KL weight", "--kl-warmup 0, or --loss elbo"),
    ("--classes enumerated", "has no classes", "--model vlac"),
    ("--model vlac --classes enumerated --loss infovae", "trained by the ELBO", "--classes collapsed"),
    ("--epochs 3 --kl-warmup 3", "is not at 1", "--kl-warmup 2 or less"),
    ("--model vea", "unknown model 'vea'", "choose from vae, ppca"),
    ("--data faces", "unknown data 'faces'", "choose from digits, mnist"),
    ("--model lossy --latent-dim 1", "at least two latents", "pass --latent-dim 2"),
    ("--device tpu", "unknown device 'tpu'", "cpu, cuda or cuda:0"),
])  # fmt: skip
def test_what_does_not_go_together_exits_with_one_sentence(tmp_path, arguments, reason, works):
    found = call(*arguments.split(), "--out", tmp_path / "never")
    assert found.exit_code == 2, found.output
    assert reason in found.output
    assert works in found.output
    assert len(found.output.strip().splitlines()) == 1
    assert "Traceback" not in found.output
    assert not (tmp_path / "never").exists()


def test_what_messages_recommend_is_what_compatible_allows():
    """Every guide with every loss: allowed exactly where `compatible` allows one of the loss's estimators."""
    form = Form(image=(1, 4, 4))
    model = build_model("vae", form, latent_dim=2)
    for guide in GUIDES:
        if guide == NO_GUIDE:
            continue
        built = build_guide(guide, model, form)
        for loss in LOSSES:
            fine = any(compatible(model, built, one) is None for one in candidates(loss))
            if fine:
                require(Settings(guide=guide, loss=loss))
                assert compatible(model, built, build_loss(loss, model, built)) is None
            else:
                with pytest.raises(IncompatibleError) as error:
                    require(Settings(guide=guide, loss=loss))
                own = re.search(rf"with --guide {guide} go --loss ([^;]*?)(, with --loss|$)", str(error.value))[1]
                for name in re.split(r", | or ", own):
                    require(Settings(guide=guide, loss=name))


def test_texts_are_those_of_the_library():
    with pytest.raises(ValueError, match=f"choose one of {', '.join(TEXTS)}$"):
        load_text("nothing")


def test_the_command_ends_with_a_short_table_and_the_page(folder, tmp_path):
    state = torch.get_rng_state()
    data = folder / "small.npz"
    found = call("--quick", "--data", data, "--latent-dim", "2", "--epochs", "1", "--out", tmp_path / "x")
    assert found.exit_code == 0, found.output
    assert torch.equal(state, torch.get_rng_state())
    assert found.output.strip().splitlines()[-1] == f"see {tmp_path / 'x' / 'report.html'}"
    assert "ELBO" in found.output
    assert "proves nothing" in " ".join(found.output.split())
    assert "proves nothing" in (tmp_path / "x" / "report.html").read_text()


def test_internal_faults_are_not_dressed_as_mistakes(monkeypatch, tmp_path):
    def broken(settings, say):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(fitting, "run", broken)
    found = call("--out", tmp_path)
    assert isinstance(found.exception, RuntimeError)
    assert found.exit_code == 1


def test_nothing_of_others_is_overwritten(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    found = CliRunner().invoke(app, ["fit", "--quick", "--epochs", "1", "--out", str(tmp_path)])
    assert found.exit_code == 2
    assert "holds report.html of something else" in " ".join(found.output.split())
    assert (tmp_path / "report.html").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("")
    found = CliRunner().invoke(app, ["fit", "--quick", "--epochs", "1", "--out", str(file)])
    assert found.exit_code == 2
    assert "is a file: pass a folder" in " ".join(found.output.split())


def test_training_that_went_wrong_is_said(tmp_path):
    settings = fitting.Settings(
        model="vae", data="digits", out=str(tmp_path / "wild"), epochs=1, learning_rate=300.0, quick=True,
        num_samples=25,
    )  # fmt: skip
    outcome = fitting.run(settings, lambda item: None)
    assert any("not above what independent pixels" in words for words in outcome.told)
