"""`pyrovae fit`: every model runs to its page, what does not go together says what would, a resumed run is unbroken."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pyro
import pytest
import torch
from typer.testing import CliRunner

from pyrovae import diagnose, evidence, fitting, losses, training
from pyrovae.cli import app
from pyrovae.compat import compatible
from pyrovae.data import load_text
from pyrovae.diagnose import clustering
from pyrovae.errors import IncompatibleError
from pyrovae.evidence import normaliser
from pyrovae.fitting import Settings, run, tilted
from pyrovae.fitting.guides import GUIDES, KINDS, NO_GUIDE, build_guide
from pyrovae.fitting.material import TEXTS, gather
from pyrovae.fitting.objectives import LOSSES, build_loss, candidates
from pyrovae.fitting.pairing import require
from pyrovae.fitting.recipes import (
    CHARTS,
    DIFFUSION,
    GREY_MODELS,
    MODELS,
    PIECEWISE,
    TEXT_MODELS,
    TILTED,
    Form,
    build_model,
)
from pyrovae.models import REGISTRY, no_latents
from pyrovae.runtime import evaluating

# Each model with one guide, and between them every guide and every loss.
RUNS = {
    "vae": ("short-run", "", "small"),
    "ppca": ("amortized-full-rank", "iwae", "small"),
    "piecewise-affine": ("exact", "", "small"),
    "energy-prior": ("laplace", "iwae", "small"),
    "ladder": ("amortized", "infovae", "small"),
    "joint-energy": ("short-run", "expected-log-joint", "small"),
    "hierarchical": ("semi-amortized", "", "small"),
    "hierarchical-energy": ("amortized", "", "small"),
    "vlac": ("amortized", "free-bits", "small"),
    "pixelcnn": ("amortized-iaf", "mae", "small"),
    "lossy": ("mixture", "elbo", "small"),
    "charts": ("", "chart-loss", "small"),
    "diffusion": ("", "simple-diffusion", "small"),
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


@pytest.fixture(scope="module", autouse=True)
def short_annealing():
    """So few temperatures find log Z of energies that hardly tilt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tilted, "_TEMPERATURES", 20)
        yield


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
    if model in (DIFFUSION, PIECEWISE):
        values["latent_dim"] = None if model == DIFFUSION else 1  # whose posterior takes no polygons
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
    assert origin["binarization"] == "" if model in TEXT_MODELS else "none" if model in GREY_MODELS else "static"
    for name, number in content["numbers"].items():
        assert "reason" in number or math.isfinite(number["value"]), name
    scored = [name for name, number in content["numbers"].items()
              if name.startswith(("ELBO", "IWAE", "log p(x), exact")) and "value" in number]  # fmt: skip
    assert all(content["numbers"][name]["se"] > 0 for name in scored)
    assert bool(scored) == (RUNS[model][0] != "short-run")  # which has no density
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
        missing = {CHARTS: ("Traversals", "Interpolations"), DIFFUSION: ("Reconstructions", "Traversals")}
        left_out = missing.get(model, ())
        for title in ("Reconstructions", "Samples", "Traversals", "Interpolations"):
            assert (f"<h2>{title}" in page) == (title not in left_out)
        drawn = model in ("pixelcnn", "lossy")
        assert ("<h2>Imputations" in page) == (not drawn and not left_out)
        assert ("are left out" in page) == bool(left_out)
        assert ("raster order" in page) == drawn
        assert ("<h2>Samples before the tilt" in page) == (model in TILTED)
        assert page.count('src="data:image/png;base64,') >= (3 if left_out else 5)


def test_a_guide_without_density_says_that_there_is_no_bound(outcomes):
    outcome, out = outcomes("vae")
    assert outcome.objective == "E_q log p(x,z)"
    content = json.loads((out / "results.json").read_text())
    assert "no density" in content["numbers"]["ELBO"]["reason"]
    page = (out / "report.html").read_text()
    assert "no bound of log p(x)" in page
    assert "at least" not in page


def read_back(outcomes, model):
    """A run's numbers, and the run read from disk: evaluation changed no weight."""
    outcome, out = outcomes(model)
    saved = fitting.load(out)
    for ours, theirs in ((outcome.model, saved.model), (outcome.guide, saved.guide)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    return saved, saved.results["numbers"]


@pytest.mark.parametrize("model", ["ppca", "ladder", "vlac", "text", "energy-prior", "hierarchical-energy", "charts"])
def test_numbers_are_those_of_the_saved_weights(outcomes, model):
    """Read back from disk and measured again by the library's own functions."""
    saved, numbers = read_back(outcomes, model)
    x = saved.material.rows
    weights = evidence.log_weights(saved.model, saved.guide, x, num_samples=50, seed=0)
    kind = " (estimate)" if model in TILTED else ""
    for name, estimate in zip(("ELBO", "IWAE-50"), evidence.summarize(weights), strict=True):
        assert numbers[name + kind]["value"] == pytest.approx(estimate.mean, rel=1e-5)
        assert numbers[name + kind]["se"] == pytest.approx(estimate.mean_se, rel=1e-4)
    known = diagnose.information(saved.model, saved.guide, x, num_samples=100, num_scored=40, seed=0)
    kl = "KL to the prior's base" if model in TILTED else "KL"
    assert numbers[kl]["value"] == pytest.approx(float(known.kl.mean()), rel=1e-4, abs=1e-6)
    assert numbers["mutual information"]["value"] == pytest.approx(known.mutual_information, rel=1e-4, abs=1e-5)
    assert numbers["log N, the most it can be"]["value"] == pytest.approx(math.log(len(x)))
    assert "reason" in numbers["active latents"] if model == CHARTS else (
        numbers["active latents"]["value"] == int(known.active.sum())
    )  # fmt: skip
    if model == "ppca":
        exact = float(saved.model.log_evidence(x).mean().detach())
        assert numbers["log p(x), exact"]["value"] == pytest.approx(exact, rel=1e-5)
    if model == "text":
        iwae = evidence.summarize(weights)[1].values
        expected = math.exp(-float(iwae.sum() / saved.material.test.lengths.sum()))
        assert numbers["perplexity, at most"]["value"] == pytest.approx(expected, rel=1e-5)
    if model in ("ladder", "vlac", "hierarchical-energy"):
        groups = diagnose.group_information(saved.model, saved.guide, x, num_samples=40, seed=0)
        found = {group["site"]: group["KL"]["value"] for group in saved.results["groups"]}
        assert list(found) == ["z1", "z2"]
        for name, own in zip(groups.groups, groups.kl, strict=True):
            assert found[name] == pytest.approx(float(own), rel=1e-4, abs=1e-6)
        assert sum(found.values()) == pytest.approx(numbers[kl]["value"], rel=0.1)  # of other draws


@pytest.mark.parametrize("model", TILTED)
def test_numbers_of_tilted_priors_are_estimates_with_the_log_z_of_the_weights(outcomes, model):
    saved, numbers = read_back(outcomes, model)
    assert saved.model.normalised
    assert float(saved.model.log_z) == pytest.approx(numbers["log Z"]["value"], rel=1e-5)
    again = evidence.log_normaliser(saved.model, num_temperatures=20, seed=0)
    assert numbers["log Z"]["value"] == pytest.approx(again.mean, rel=1e-5)
    assert numbers["log Z"]["se"] == pytest.approx(float(again.se[0]), rel=1e-4)
    assert saved.results["kind"] == "estimate"
    page = (saved.folder / "report.html").read_text()
    for words in ("at least", "lower bounds"):
        assert words not in page
    assert "estimates of log p(x), not bounds" in page
    assert "which moves with training" in page
    assert saved.results["training"]["objective"].startswith("unnormalised")
    if RUNS[model][0] != "short-run":
        assert "log p(x) of about" in page
        assert "KL to the base" in page or model == "energy-prior"


def test_a_log_z_that_annealing_does_not_find_is_left_out(folder, tmp_path, monkeypatch):
    """Numbers then lack it, and every place says so."""
    monkeypatch.setattr(normaliser, "_LARGEST", 0.0)
    outcome = run(asked(folder, "energy-prior", tmp_path / "run"), say=quiet)
    content, page = (tmp_path / "run" / "results.json").read_text(), (tmp_path / "run" / "report.html").read_text()
    assert not outcome.model.normalised
    assert outcome.findings.kind == json.loads(content)["kind"] == "unnormalised"
    assert "annealing did not find log Z" in json.loads(content)["numbers"]["log Z"]["reason"]
    assert "log p(x) + log Z of at least" in page
    assert "IWAE-50 + log Z" in json.loads(content)["numbers"]
    assert any("could not be measured" in words and "--energy-rate (0.2 here)" in words for words in outcome.told)


def test_energies_take_steps_of_their_own(folder, tmp_path):
    """Nearly none here: the tilt stays what it was, while the decoder moves."""
    moved = {}
    for rate in (0.2, 1e-9):
        settings = asked(folder, "energy-prior", tmp_path / f"run{rate:g}", energy_rate=rate)
        model = run(settings, say=quiet).model
        moved[rate] = next(iter(model.energy.parameters())).detach().clone()
    assert 1e-5 < float((moved[0.2] - moved[1e-9]).abs().max()) < 0.1
    with pytest.raises(ValueError, match="vae has no energy: leave --energy-rate out"):
        asked(folder, "vae", tmp_path / "other", energy_rate=0.1)
    with pytest.raises(ValueError, match="energy_rate is -1"):
        asked(folder, "energy-prior", tmp_path / "other", energy_rate=-1.0)


def test_a_piecewise_affine_run_has_the_exact_evidence_and_divergences(folder, outcomes, tmp_path):
    """With the exact guide the ELBO is log p(x); with an encoder the gap is the divergence."""
    _, numbers = read_back(outcomes, "piecewise-affine")
    exact = numbers["log p(x), exact"]["value"]
    assert numbers["ELBO"]["value"] == pytest.approx(exact, abs=1e-3)
    assert numbers["IWAE-50"]["value"] == pytest.approx(exact, abs=1e-3)
    assert numbers["KL(q || p(z|x)) of 20 data, exact"]["value"] == pytest.approx(0, abs=1e-3)
    run(asked(folder, "piecewise-affine", tmp_path / "run", guide="amortized", latent_dim=2), say=quiet)
    saved = fitting.load(tmp_path / "run")
    numbers, x = saved.results["numbers"], saved.material.rows
    with torch.no_grad():
        assert numbers["log p(x), exact"]["value"] == pytest.approx(float(saved.model.log_evidence(x).mean()), rel=1e-5)
    audit = diagnose.audit(saved.model, saved.guide, x[:20], num_samples=50)
    kl, gap = numbers["KL(q || p(z|x)) of 20 data, exact"], numbers["log p(x) - ELBO of these, Monte Carlo"]
    assert kl["value"] == pytest.approx(audit.kl.mean, rel=1e-4)
    assert gap["value"] == pytest.approx(audit.gap.mean, rel=1e-3, abs=1e-4)
    assert kl["value"] > 0.01
    assert abs(kl["value"] - gap["value"]) < 4 * float(audit.gap.se.square().sum().sqrt() / 20)
    assert "integrals over a grid" in (tmp_path / "run" / "report.html").read_text()


def test_a_chart_run_has_the_facts_of_its_atlas(outcomes):
    saved, numbers = read_back(outcomes, "charts")
    guide, x, train = saved.guide, saved.material.rows, saved.material.train
    torch.testing.assert_close(saved.model.log_weights.exp(), guide.frequencies(train))
    made = guide.generate(len(x), seed=0).x
    assert numbers["charts in use"]["value"] == len(guide.predict(x).argmax(-1).unique())
    assert numbers["charts"]["value"] == saved.model.num_charts
    for name, some in (("", made), (" of test data", x)):
        far = diagnose.unfaithfulness(some, train)
        assert numbers[f"unfaithfulness{name}"]["value"] == pytest.approx(float(far.mean()), rel=1e-5)
        assert numbers[f"coverage{name}"]["value"] == diagnose.coverage(some, train)
    residuals = diagnose.cycle_residuals(guide, x).values
    assert numbers["cycle residual"]["value"] == pytest.approx(float(residuals.mean()), rel=1e-4)
    page = (saved.folder / "report.html").read_text()
    for words in ("<h2>Charts", "charts are in use", "A cycle residual is", "no line leads from one datum"):
        assert words in page


def test_a_diffusion_run_has_its_elbo(outcomes):
    saved, numbers = read_back(outcomes, "diffusion")
    x, model = saved.material.rows, saved.model
    assert saved.material.signed
    assert float(x.min()) == -1
    loss = losses.DiffusionELBO(None)
    with torch.no_grad(), evaluating(model):
        draws = torch.stack([loss.per_datum(model, saved.guide, x).mean() for _ in range(20)])
    assert abs(numbers["ELBO"]["value"] - float(draws.mean())) < 5 * float(draws.std())
    gain = numbers["ELBO of values in [0, 1]"]["value"] - numbers["ELBO"]["value"]
    assert gain == pytest.approx(25 * math.log(2))
    page = (saved.folder / "report.html").read_text()
    assert "log p(x) of at least" in page
    assert "DDIM" in page
    assert saved.results["training"]["objective"] == "-E|eps - eps_theta|^2"
    assert "no bound: models are compared" in page


@pytest.mark.parametrize("manifold", ["torus", "sphere"])
def test_latents_on_a_manifold(folder, tmp_path, manifold):
    options = {"guide": "amortized", "manifold": manifold, "latent_dim": 4}
    run(asked(folder, "vae", tmp_path / "run", **options), say=quiet)
    saved = fitting.load(tmp_path / "run")
    assert saved.model.manifold == manifold
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"its latents on a {manifold}" in page
    assert ("<h2>Round the circles" in page) == (manifold == "torus")
    assert ("<h2>Traversals" in page) == (manifold == "sphere")
    with pytest.raises(ValueError, match="holds a run with manifold"):
        run(asked(folder, "vae", tmp_path / "run", resume=True, guide="amortized", latent_dim=4), say=quiet)


def test_runs_of_before_an_option_go_on(folder, tmp_path):
    """Settings on disk that do not know of it had its default."""
    ours = asked(folder, "vae", tmp_path / "run")
    before = {name: value for name, value in ours.to_dict().items() if name != "manifold"}
    ours.require_same(before)
    with pytest.raises(ValueError, match="holds a run with manifold 'plane', not 'torus'"):
        asked(folder, "vae", tmp_path / "run", manifold="torus").require_same(before)


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


@pytest.mark.parametrize(("model", "epochs"), [("ladder", 4), ("vlac", 5), ("text", 3), ("energy-prior", 3),
                                               ("charts", 3)])
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
    ("--guide exact", "which this model does not define", "with --guide exact go --model ppca or piecewise-affine"),
    ("--model ladder --guide charts", "the model is none", "with --guide charts go --model charts"),
    ("--guide forward-process", "treats diffusion latents", "with --guide forward-process go --model diffusion"),
    ("--model diffusion --guide laplace", "has nothing to infer", "with --model diffusion go --guide forward-process"),
    ("--model diffusion --loss iwae", "no single steps", "go --loss elbo or simple-diffusion"),
    ("--model diffusion --latent-dim 2", "have the shape of the data", "leave --latent-dim out"),
    ("--model diffusion --kl-warmup 2", "not defined for a diffusion", "pass --kl-warmup 0"),
    ("--model diffusion --binarization static", "Gaussian likelihood", "--binarization none, or --model vae"),
    ("--model charts --guide amortized --loss infovae", "cannot sum over", "go --loss elbo or iwae"),
    ("--model charts --loss chart-loss --kl-warmup 2", "has no KL", "pass --kl-warmup 0, or --loss elbo"),
    ("--loss chart-loss", "has no charts", "with --guide amortized go --loss elbo"),
    ("--model energy-prior --loss free-bits", "would leave out that of its log Z", "go --loss elbo or iwae"),
    ("--model joint-energy --patience 3", "lack log Z", "leave --patience out"),
    ("--model hierarchical --schedule deep-first", "the groups of a models.LadderVAE", "go --schedule none or aggr"),
    ("--model piecewise-affine --latent-dim 3", "known for 1 or 2 latents", "--latent-dim 2, or --model vae"),
    ("--model piecewise-affine --guide exact --loss infovae", "nothing that a penalty", "go --loss elbo or iwae"),
    ("--model ladder --manifold torus", "lie on no torus", "leave --manifold out, or pass --model vae"),
    ("--manifold torus --latent-dim 3", "two latents for each circle", "pass --latent-dim 4"),
    ("--manifold sphere --latent-dim 1", "at least two latents", "pass --latent-dim 2"),
    ("--manifold plan", "unknown manifold 'plan'", "choose from plane, torus, sphere"),
])  # fmt: skip
def test_what_does_not_go_together_exits_with_one_sentence(tmp_path, arguments, reason, works):
    found = call(*arguments.split(), "--out", tmp_path / "never")
    assert found.exit_code == 2, found.output
    assert reason in found.output
    assert works in found.output
    assert len(found.output.strip().splitlines()) == 1
    assert "Traceback" not in found.output
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("name", ["vae", "piecewise-affine", "energy-prior", "charts", "diffusion"])
def test_what_messages_recommend_is_what_compatible_allows(name):
    """Every guide with every loss: allowed exactly where `compatible` allows one of the loss's estimators."""
    form = Form(image=(1, 4, 4))
    model = build_model(name, form, latent_dim=2)
    for guide in GUIDES:
        if guide == NO_GUIDE or compatible(model, KINDS[guide]) is not None:
            with pytest.raises(IncompatibleError, match=f"with --model {name} go --guide "):
                require(Settings(model=name, guide=guide))
            continue
        require(Settings(model=name, guide=guide))
        built = build_guide(guide, model, form)
        assert compatible(model, built, build_loss("", model, built)) is None
        for loss in LOSSES:
            fine = any(compatible(model, built, one) is None for one in candidates(loss, model, built))
            if fine:
                require(Settings(model=name, guide=guide, loss=loss))
                assert compatible(model, built, build_loss(loss, model, built)) is None
            else:
                with pytest.raises(IncompatibleError) as error:
                    require(Settings(model=name, guide=guide, loss=loss))
                own = re.search(rf"with --guide {guide} go --loss ([^;]*?)(, with --loss|$)", str(error.value))[1]
                for other in re.split(r", | or ", own):
                    require(Settings(model=name, guide=guide, loss=other))


def test_texts_are_those_of_the_library():
    with pytest.raises(ValueError, match=f"choose one of {', '.join(TEXTS)}$"):
        load_text("nothing")


def test_the_command_ends_with_a_short_table_and_the_page(folder, tmp_path):
    state, names = torch.get_rng_state(), set(pyro.get_param_store().keys())
    data = folder / "small.npz"
    found = call("--quick", "--data", data, "--latent-dim", "2", "--epochs", "1", "--out", tmp_path / "x")
    assert found.exit_code == 0, found.output
    assert torch.equal(state, torch.get_rng_state())
    assert set(pyro.get_param_store().keys()) == names
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
