"""Eight schools: the standards against other ways to find them, and a certification that wrong guides do not pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from pyrovae import evidence, guides
from pyrovae.certification import joint_mode, schools
from pyrovae.certification.joint_mode import ROWS, certify, measure
from pyrovae.certification.outcome import Settings
from pyrovae.certification.problems import SCHOOLS, eight_schools


def test_posterior_of_tau_is_that_of_the_reference_draws():
    """posteriordb, 10,000 draws by NUTS: tau 3.602, sd 3.199. And log p(y) by draws of mu and tau from the prior."""
    truth = schools.posterior()
    assert truth.mean == pytest.approx(3.602, abs=4 * 3.2 / 100)
    assert truth.sd == pytest.approx(3.199, abs=0.1)
    torch.manual_seed(0)
    y, sigma = SCHOOLS
    mu, tau = 5 * torch.randn(400_000, 1), 5 * torch.randn(400_000, 1).abs() / torch.randn(400_000, 1).abs()
    log_likelihood = Normal(mu, (sigma**2 + tau**2).sqrt()).log_prob(y).sum(-1)
    found = torch.logsumexp(log_likelihood, 0) - math.log(400_000)
    se = (log_likelihood - found).exp().std() / 400_000**0.5
    assert abs(found - truth.log_evidence) < 4 * se
    assert se < 0.01


@pytest.mark.parametrize("full_rank", [False, True])
def test_elbo_by_nodes_for_tau_alone_is_the_mean_of_the_log_joint(full_rank):
    """At any Gaussian, against Pyro's model and a guide's draws."""
    model = eight_schools()
    guide = guides.Amortized(model, None, "full-rank" if full_rank else "diagonal", plate=None)
    torch.manual_seed(1)
    guide.draws(1)
    lam = guide.lam()
    with torch.no_grad():
        lam += 0.2 * torch.randn(lam.shape)
    q = guide.family()(lam)
    weights = guide.log_weights(200_000)[:, 0]
    # The guide's latents are in the model's order, mu before tau; ours begin with s = log tau.
    order = torch.tensor([1, 0, *range(2, 10)])
    covariance = q.covariance_matrix if full_rank else q.variance.diag_embed()
    covariance = covariance[0].detach().double()[order][:, order]
    loc = q.mean[0].detach().double()[order]
    value = schools._elbo(loc, torch.linalg.cholesky(covariance))
    assert abs(weights.mean() - value) < 4 * weights.std() / 200_000**0.5
    best = schools.best_gaussian(full_rank)
    assert value < best.elbo < schools.posterior().log_evidence


def test_a_larger_family_has_a_better_best_member():
    diagonal, full = schools.best_gaussian(False), schools.best_gaussian(True)
    assert diagonal.elbo < full.elbo - 0.05
    assert diagonal.sd < full.sd < schools.posterior().sd


@pytest.mark.parametrize("name", ["amortized", "amortized-full-rank", "amortized-mixture"])
def test_sound_guides_pass(name):
    check = certify(name, seed=0, num_samples=10_000)
    assert check.verdict == "pass", check.reasons
    assert check.gap[0] > 0
    assert check.tau_sd[0] > 2.3


def held(name, guide):
    weights = evidence.log_weights(guide.model, guide, num_samples=4000, seed=0)
    return measure(name, guide, weights, seed=0)


def test_wrong_guides_fail(monkeypatch):
    """Untrained; the best diagonal Gaussian where more was promised; and weights that are too large."""
    model = eight_schools()
    untrained = guides.Amortized(model, None, plate=None)
    check = held("amortized", untrained)
    assert check.verdict == "FAIL"
    assert "below the best Gaussian's" in check.reasons[0]
    sound = guides.LocalSVI(model, "full-rank", plate=None)
    check = held("dais", sound)  # as good as the best full-rank Gaussian: it gains on the diagonal one
    assert check.verdict == "pass", check.reasons
    weights = sound.log_weights(4000) + 0.5
    reasons = measure("dais", sound, weights, seed=0).reasons
    assert "which it cannot pass" in reasons[0]
    assert reasons[1].startswith("IWAE")
    monkeypatch.setitem(ROWS, "amortized", replace(ROWS["amortized"], aim="gain"))
    check = certify("amortized", seed=0, num_samples=4000)
    assert check.verdict == "FAIL"
    assert check.reasons[0].startswith("tau's standard deviation 2.4")


def test_what_a_run_covers():
    assert Settings().joint == tuple(ROWS)
    assert Settings(quick=True).joint == ()
    assert Settings(problems=("ppca",)).joint == ()
    only = Settings(problems=(joint_mode.PROBLEM,), guides=("dais", "laplace"))
    assert only.joint == ("dais",)
    assert only.exact == ()
    assert not only.whole
    with pytest.raises(ValueError, match=r"eight-schools has no row for \['laplace'\]: amortized"):
        Settings(problems=(joint_mode.PROBLEM,), guides=("laplace",))
