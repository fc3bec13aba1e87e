"""Certification from end to end: sound guides pass, broken ones do not, and the command says so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from pyrovae import certification, flows, guides
from pyrovae.certification import problems, recipes
from pyrovae.certification.best import Best
from pyrovae.certification.builders import Lookup, NotCertified
from pyrovae.certification.checks import Error, certify, iwae, measure
from pyrovae.certification.outcome import PAGE
from pyrovae.certification.page import cells
from pyrovae.certification.recipes import RECIPES
from pyrovae.cli import app
from pyrovae.families import FAMILIES

SAMPLES = 20_000


@pytest.fixture(scope="module")
def pca():
    return Best(problems.Pca())


def call(*arguments):
    threads = torch.get_num_threads()
    found = CliRunner().invoke(app, ["certify", *arguments])
    torch.set_num_threads(threads)
    return found


def closed_form(best, shift=0.0, stretch=1.0, kind=guides.Amortized):
    """The best diagonal Gaussian of pPCA as a guide, or one that is `shift` deviations and a factor off."""
    problem = best.problem
    variance = 1 / problem.curvature(problem.start).diagonal(dim1=-2, dim2=-1)
    lam = torch.cat([problem.truth.mean + shift * variance.sqrt(), (stretch**2 * variance).log()], dim=-1)
    return kind(problem.model, Lookup(problem.x, lam))


def held(best, guide, name="amortized"):
    recipe = RECIPES[name]
    return measure(name, recipe, recipe.standard(best), guide, best, seed=0, num_samples=SAMPLES)


def test_every_guide_and_family_has_a_recipe(pca):
    """Built, not named: what the recipes make covers the registries."""
    made = [recipe.build(pca) for recipe in RECIPES.values()]
    assert set(guides.REGISTRY.values()) <= {type(guide) for guide in made}
    families = {type(guide.family(pca.problem.x)) for guide in made if isinstance(guide, guides.FamilyGuide)}
    assert set(FAMILIES.values()) <= families
    flow_classes = {getattr(flows, name) for name in flows.__all__ if isinstance(getattr(flows, name), type)}
    concrete = {kind for kind in flow_classes if issubclass(kind, flows.Flow) and kind is not flows.Flow}
    assert concrete
    assert concrete <= families


def test_the_best_member_itself_passes(pca):
    check = held(pca, closed_form(pca))
    assert check.verdict == "pass", check.reasons
    for error in (check.mean, check.covariance, check.elbo):
        assert abs(error.z) < 4
    assert check.elbo.mark == ""


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"shift": 0.15}, {"mean"}),
        ({"shift": -0.15}, {"mean"}),
        ({"stretch": 1.15}, {"covariance", "elbo"}),
        ({"stretch": 0.85}, {"covariance", "elbo"}),
    ],
)
def test_perturbed_parameters_fail(pca, changes, wrong):
    """0.15 standard deviations, or 15 % of one."""
    check = held(pca, closed_form(pca, **changes))
    assert check.verdict == "FAIL"
    assert wrong <= {reason.split(" ")[0] for reason in check.reasons}
    assert "FAIL" in cells(check)


class Overconfident(guides.Amortized):
    """Reports a density 0.2 nats too low: every bound of the evidence comes out too high."""

    def _sampler(self, *args, **kwargs):
        sampler = super()._sampler(*args, **kwargs)

        def draw(number):
            u, log_q = sampler.draw(number)
            return u, log_q - 0.2

        return sampler._replace(draw=draw)


def test_a_wrong_density_fails_though_its_draws_are_right(pca):
    check = held(pca, closed_form(pca, kind=Overconfident))
    assert check.mean.ok
    assert check.covariance.ok
    assert not check.elbo.ok
    assert check.elbo.value == pytest.approx(0.2, abs=4 * check.elbo.se)
    assert not check.evidence.ok
    assert check.verdict == "FAIL"
    assert held(pca, closed_form(pca)).evidence.ok
    # The same fault in a flow's row, where a higher ELBO is welcome up to log p(x): the evidence gives it away.
    assert held(pca, closed_form(pca, kind=Overconfident), "amortized-iaf").verdict == "FAIL"


class WrongSign(guides.SemiAmortized):
    """Steps down the ELBO instead of up."""

    def _refine(self, *args, **kwargs):
        found, start = super()._refine(*args, **kwargs), self.base.lam(*args, **kwargs)
        return found._replace(lam=start - 0.05 * (found.lam - start))


def test_refinement_in_the_wrong_direction_fails(pca):
    recipe = RECIPES["semi-amortized-untrained"]
    sound = recipe.build(pca)
    broken = WrongSign(sound.base, sound.num_steps, sound.step_size, num_samples=4, antithetic=True, max_norm=None)
    assert held(pca, broken, "semi-amortized-untrained").verdict == "FAIL"


def test_a_chain_of_another_length_or_step_fails(pca):
    for steps, step in ((recipes.CHAIN - 2, pca.step), (recipes.CHAIN, 1.3 * pca.step)):
        guide = guides.ShortRun(pca.problem.model, steps, step)
        assert held(pca, guide, "short-run").verdict == "FAIL"
    sound = guides.ShortRun(pca.problem.model, recipes.CHAIN, pca.step)
    check = held(pca, sound, "short-run")
    assert check.verdict == "pass", check.reasons
    assert check.elbo is None
    assert check.khat is None


def test_draws_that_are_not_finite_fail(pca):
    guide = guides.ShortRun(pca.problem.model, 30, 1e6)  # far beyond the stable step
    check = held(pca, guide, "short-run")
    assert check.verdict == "FAIL"
    assert check.reasons == ("draws that are not finite",)


def test_a_mode_missed_is_part_of_the_standard_and_not_of_the_verdict():
    """On the bimodal a Gaussian reaches log p - log 2 at most: so does its standard, and the page says it."""
    best = Best(problems.Bimodal())
    check = certify("laplace", RECIPES["laplace"], best, seed=0, num_samples=SAMPLES)
    assert check.verdict == "pass", check.reasons
    assert abs(check.evidence.value) < 4 * check.evidence.se + 1e-4
    own = best.laplace.members.pick(best.laplace.elbo.argmax(0)).log_weights(best.problem.log_joint, 5000, 0)[:, 0]
    short = best.problem.truth.log_evidence - iwae(own, 2500).mean(0)
    assert torch.allclose(short[:2], torch.full((2,), math.log(2)).double(), atol=0.03)


def test_what_cannot_be_certified_is_no_pass():
    best = Best(problems.Bimodal())
    for name, words in (("short-run-hmc", "leapfrog"), ("amortized-coupling", "two dimensions")):
        check = certify(name, RECIPES[name], best, seed=0, num_samples=100)
        assert check.verdict == "not certified"
        assert words in check.reasons[0]
    with pytest.raises(NotCertified, match="tails of the start"):
        RECIPES["short-run"].standard(Best(problems.GammaScale()))


def test_lookup_serves_rows_in_any_order_and_no_stranger():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    table = Lookup(x, torch.arange(6.0).reshape(3, 2))
    assert torch.equal(table(x[[2, 0, 0]]), torch.tensor([[4.0, 5.0], [0.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="another datum"):
        table(x + 1)


def test_errors_in_standard_errors():
    assert Error(0.3, 0.1, True).z == pytest.approx(3)
    assert Error(-1e-12, 0.0, True).z == -math.inf
    assert Error(0.0, 0.0, True).z == 0


def test_command_passes_sound_guides_and_writes_the_page(tmp_path):
    state = torch.get_rng_state()
    page = tmp_path / "deep" / "page.md"
    found = call("--problems", "bimodal", "--guides", "amortized,laplace", "--out", str(page))
    assert found.exit_code == 0, found.output
    assert torch.equal(state, torch.get_rng_state())
    assert "2 pass, 0 fail, 0 not certified" in found.output
    text = page.read_text()
    for words in ("| `amortized` | the best diagonal Gaussian |", "## bimodal", "| diagonal Gaussian | 0.226",
                  "pyrovae certify --guides amortized,laplace --problems bimodal --seed 0", "sha256"):  # fmt: skip
        assert words in text, words
    assert "FAIL" not in text


def test_command_exits_with_1_when_a_guide_fails(tmp_path, monkeypatch):
    """A guide that is never trained, under its own name: the table goes out all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "amortized", replace(RECIPES["amortized"], loss=None))
    found = call("--problems", "bimodal", "--guides", "amortized,laplace")
    assert found.exit_code == 1
    assert isinstance(found.exception, SystemExit)
    assert "1 pass, 1 fail" in found.output
    assert "FAIL amortized on bimodal: mean off its standard by" in " ".join(found.output.split())
    assert not (tmp_path / PAGE).exists()  # a part of the table does not replace the page


def test_a_run_without_a_single_check_is_not_a_pass():
    outcome = certification.Outcome(certification.Settings(), None, {})
    assert not outcome.passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guides", "amortised"], r"unknown guides ['amortised']: choose from amortized"),
        (["--problems", "banana,moon"], r"unknown problems ['moon']: choose from ppca"),
    ],
)
def test_mistakes_give_one_sentence_and_exit_code_2(arguments, message):
    found = call(*arguments)
    assert found.exit_code == 2
    assert message in found.output
    assert len(found.output.strip().splitlines()) == 1
