"""diagnose.gaps against the closed forms of pPCA."""

from __future__ import annotations

import dataclasses

import pyro
import pytest
import torch
from bench import problems
from torch.distributions import MultivariateNormal, kl_divergence

from pyrovae import diagnose, evidence, guides, handlers, reference
from pyrovae.errors import IncompatibleError, NoDensityError, ScaleError
from pyrovae.models import PPCA, VAE
from pyrovae.nets import MLP, LinearHeadDecoder

QUICK = {"reductions": 1, "check": 30}
SHORT = 0.03  # what local inference may leave, nats: see tests/guides/test_local_svi.py


def best_encoder(model, shift=0.0, stretch=0.0):
    """The linear encoder of the KL-optimal factorised posterior; `shift` and `stretch` make it wrong."""
    precision, weight = model.precision(), model.weight
    net = MLP([len(weight), 2 * model.latent_dim]).to(weight.dtype)
    moment = torch.linalg.solve(precision, weight.T) / model.log_noise.exp() ** 2
    net[-1].weight.data = torch.cat([moment, torch.zeros_like(moment)]).detach()
    log_var = stretch - precision.diagonal().log()
    net[-1].bias.data = torch.cat([torch.full_like(log_var, shift), log_var]).detach()
    return net


def exact_kl(model, x, lam):
    """KL(q || p(z|x)) of a diagonal q, closed form."""
    loc, log_var = lam.chunk(2, -1)
    return kl_divergence(MultivariateNormal(loc, torch.diag_embed(log_var.exp())), model.posterior(x)).detach()


def close(estimate, expected, slack=SHORT):
    """Each datum and the mean within 4 standard errors, and what local inference may leave."""
    away = estimate.values - expected
    assert (away.abs() < 4 * estimate.se + slack).all()
    assert abs(float(away.mean())) < 4 * float(estimate.se.square().mean().sqrt()) / len(away) ** 0.5 + slack


def test_the_best_linear_encoder_has_no_amortization_gap():
    model, x = problems.ppca()
    guide = guides.Amortized(model, best_encoder(model))
    found = diagnose.gaps(model, guide, x)
    gap = model.factorised_gap().detach()
    close(found.approximation, gap)
    close(found.amortization, 0.0)
    close(found.inference, gap, slack=0.0)
    # Paired: the difference is known far better than either ELBO.
    assert (found.amortization.se < 0.1 * found.elbo.se).all()
    assert (found.amortization.values.abs() < SHORT).all()
    assert found.log_evidence.kind == found.approximation.kind == "exact"
    assert torch.allclose(found.log_evidence.values, model.log_evidence(x).detach(), rtol=0, atol=1e-9)
    assert set(found.status) <= {"ok", "reference not converged"}
    assert found.flagged.sum() <= 1  # at 3 standard errors one in 740
    assert found.converged.all()


def test_a_wrong_encoder_s_amortization_gap_is_the_difference_of_divergences():
    model, x = problems.ppca()
    guide = guides.Amortized(model, best_encoder(model, shift=0.05, stretch=0.5))
    found = diagnose.gaps(model, guide, x, num_samples=2000)
    kl, best = exact_kl(model, x, guide.lam(x)), model.factorised_gap().detach()
    assert (kl - best > 1).all()
    close(found.amortization, kl - best)
    close(found.approximation, best)
    close(found.inference, kl, slack=0.0)
    total = found.approximation.values + found.amortization.values
    assert torch.allclose(total, found.inference.values, rtol=0, atol=1e-9)
    assert not found.flagged.any()


def test_the_full_covariance_has_no_approximation_gap():
    model, x = problems.ppca(rows=12, latent=4, pixels=12)
    torch.manual_seed(0)
    guide = guides.Amortized(model, MLP([12, 14]).double(), "full-rank")
    found = diagnose.gaps(model, guide, x)
    close(found.approximation, 0.0)
    assert (found.amortization.values > 10).all()  # untrained
    assert "FullRankNormal" in found.family
    assert not found.flagged.any()


def test_laplace_is_exact_here_and_nothing_is_lost():
    model, x = problems.ppca(rows=12, latent=4, pixels=12)
    found = diagnose.gaps(model, guides.Laplace(model, MLP([12, 4]).double()), x)
    close(found.inference, 0.0, slack=1e-9)
    close(found.approximation, 0.0)
    close(found.amortization, 0.0)
    assert "FullRankNormal" in found.family
    assert not found.flagged.any()


def test_without_an_exact_value_the_better_importance_weighted_bound_is_used_and_said_to_be_one():
    model, x = problems.ppca()
    torch.manual_seed(0)
    guide = guides.Amortized(model, MLP([30, 20]).double())  # untrained: its own weights are useless

    def plain(x):
        return model(x)

    again = guides.Amortized(plain, guide.encoder)
    found = diagnose.gaps(plain, again, x, num_samples=2000)
    assert found.log_evidence.kind == found.approximation.kind == found.inference.kind == "lower bound"
    assert "only a lower bound: so are the approximation gap and the inference gap" in repr(found)
    own = evidence.iwae(plain, again, x, num_samples=2000)
    assert (found.log_evidence.values > own.values + 10).all()  # q*'s proposals
    # A bound, and a good one: IWAE with 2000 draws of the best factorised q is about 0.03 nats short on average.
    short = model.log_evidence(x).detach() - found.log_evidence.values
    se = float(found.log_evidence.se.square().mean().sqrt()) / 40**0.5
    assert -4 * se < float(short.mean()) < 0.1 + 4 * se
    # Standard errors of the differences are those of paired draws: against the truth they must hold.
    gap = model.factorised_gap().detach()
    z = (found.approximation.values + short - gap) / found.best.se
    assert z.abs().max() < 4 + SHORT / float(found.best.se.min())
    assert (found.approximation.se < found.log_evidence.se.hypot(found.best.se) * 1.5).all()


def test_standard_errors_are_the_spread_of_repeated_runs():
    model, x = problems.ppca(rows=6, latent=3, pixels=8)

    def plain(x):
        return model(x)

    guide = guides.Amortized(plain, best_encoder(model, shift=0.05, stretch=0.3))
    runs = [diagnose.gaps(plain, guide, x, num_samples=300, seed=seed, local=QUICK) for seed in range(25)]
    for name in ("approximation", "amortization", "inference", "elbo", "best", "log_evidence"):
        values = torch.stack([getattr(run, name).values for run in runs])
        claimed = torch.stack([getattr(run, name).se for run in runs]).square().mean(0)
        ratio = values.var(0) / claimed  # chi-squared with 24 degrees of freedom, over 6 data
        assert 1 - 4 * (2 / 24 / 6) ** 0.5 < float(ratio.mean()) < 1 + 4 * (2 / 24 / 6) ** 0.5 + 0.1, name


@pytest.mark.parametrize("steps", [3, 40])
def test_a_search_that_was_stopped_is_flagged(steps):
    model, x = problems.ppca(rows=6)
    guide = guides.Amortized(model, best_encoder(model))
    found = diagnose.gaps(model, guide, x, num_samples=100, local={"max_steps": steps})
    assert found.flagged.all()
    assert not found.converged.any()
    assert found.status == ("reference not converged",) * 6
    assert "6 of 6 data flagged, reference not converged: local inference was stopped for 6" in repr(found)


def test_a_negative_gap_is_reported_as_it_is_and_flagged():
    """log p(x) understated by 3 nats for two data: their approximation gap is -2.2."""
    model, x = problems.ppca(rows=6)
    guide = guides.Amortized(model, best_encoder(model))
    wrong = model.log_evidence(x).detach() - torch.tensor([0, 3.0, 0, 0, 3.0, 0]).double()
    found = diagnose.gaps(model, guide, x, log_evidence=wrong)
    gap = float(model.factorised_gap().detach())
    close(found.approximation, torch.tensor([gap, gap - 3, gap, gap, gap - 3, gap]))
    assert found.flagged.tolist() == [False, True, False, False, True, False]
    assert found.converged.all()
    assert "2 have a gap more than 3 standard errors below zero" in repr(found)


def test_a_given_estimate_keeps_its_kind_and_error():
    model, x = problems.ppca(rows=4)
    guide = guides.Amortized(model, best_encoder(model))
    given = evidence.iwae(model, guide, x, num_samples=200)
    found = diagnose.gaps(model, guide, x, log_evidence=given, local=QUICK)
    assert found.log_evidence is given
    assert found.approximation.kind == "lower bound"
    assert (found.approximation.se >= given.se).all()
    upper = dataclasses.replace(given, kind="upper bound")
    assert "only an upper bound" in repr(diagnose.gaps(model, guide, x, log_evidence=upper, local=QUICK))
    with pytest.raises(ValueError, match="for other data"):
        diagnose.gaps(model, guide, x + 1, log_evidence=given, local={"max_steps": 1})
    with pytest.raises(ValueError, match="one value for each"):
        diagnose.gaps(model, guide, x, log_evidence=torch.zeros(3), local={"max_steps": 1})


def test_two_modes_are_the_family_s_loss_and_the_guide_s_start_is_worth_having():
    """A Gaussian on one mode: log 2 is the family's. The search from zero ends between the modes, far below."""
    x = torch.tensor([2.25], dtype=torch.double)
    truth = reference.exact(problems.bimodal, x)
    net = torch.nn.Linear(1, 2).double()
    net.weight.data.zero_()
    net.bias.data = torch.tensor([1.4, -3.0], dtype=torch.double)
    guide = guides.Amortized(problems.bimodal, net, encoder_input=lambda x: x.unsqueeze(-1))
    found = diagnose.gaps(problems.bimodal, guide, x, num_samples=4000, log_evidence=truth.log_evidence)
    low, high = found.approximation.values - 4 * found.approximation.se, found.approximation.values
    assert float(low) < 0.6932 + 0.05
    assert float(high) > 0.65
    assert float(found.amortization.values) > -4 * float(found.amortization.se)


def test_weights_buffers_and_random_state_stay():
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(LinearHeadDecoder(3, [8], (6,)), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.2))
    vae = VAE(decoder, 3, "gaussian")
    guide = guides.SemiAmortized(guides.Amortized(vae, MLP([6, 8, 6])), 2, 0.05)
    x = torch.randn(5, 6)
    guide.space(x)
    state = {k: v.clone() for part in (vae, guide) for k, v in part.state_dict().items()}
    rng, names = torch.get_rng_state(), set(pyro.get_param_store().keys())
    first = diagnose.gaps(vae, guide, x, num_samples=50, local=QUICK)
    torch.rand(7)
    second = diagnose.gaps(vae, guide, x, num_samples=50, local=QUICK)
    torch.set_rng_state(rng)
    assert torch.equal(first.inference.values, second.inference.values)
    third = diagnose.gaps(vae, guide, x, num_samples=50, local=QUICK, seed=1)
    assert not torch.equal(first.inference.values, third.inference.values)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for part in (vae, guide) for k, v in part.state_dict().items())
    assert all(p.grad is None for p in (*vae.parameters(), *guide.parameters()))
    assert set(pyro.get_param_store().keys()) == names
    assert vae.training
    assert guide.training


def test_chunks_and_their_order_change_nothing():
    model, x = problems.ppca(rows=5, latent=3, pixels=8)
    guide = guides.Amortized(model, best_encoder(model, stretch=0.2))
    options = {"num_samples": 50, "local": QUICK}
    whole = diagnose.gaps(model, guide, x, **options)
    ragged = diagnose.gaps(model, guide, x, chunk=2, **options)
    alone = diagnose.gaps(model, guide, x[4:], indices=[4], **options)
    for name in ("approximation", "amortization", "inference", "best", "elbo"):
        ours, parts, last = (getattr(found, name) for found in (whole, ragged, alone))
        # Adam blows rounding up where a gradient vanishes: q* agrees within the tolerance of either search.
        limit = 1e-9 if name in ("elbo", "inference") else 2e-3
        assert torch.allclose(ours.values, parts.values, rtol=0, atol=limit)
        assert torch.allclose(ours.se, parts.se, rtol=0, atol=limit)
        assert torch.allclose(ours.values[4:], last.values, rtol=0, atol=limit)
    other = diagnose.gaps(model, guide, x, seed=1, **options)
    assert (other.best.values - whole.best.values).abs().max() > 0.02  # other noise is seen


def test_one_datum_in_single_precision():
    torch.manual_seed(0)
    model = PPCA(torch.randn(8, 3), noise=0.5)
    x = torch.randn(1, 8)
    found = diagnose.gaps(model, guides.Amortized(model, best_encoder(model)), x)
    gap = model.factorised_gap().detach()
    close(found.approximation, gap)
    close(found.amortization, 0.0)
    exact = diagnose.gaps(model, guides.Laplace(model, MLP([8, 3])), x)
    # Rounding alone separates the ELBO of the exact posterior from log p(x): it flags nothing.
    close(exact.inference, 0.0, slack=1e-4)
    assert not exact.flagged.any()


@pytest.mark.parametrize("kind", ["mixture", "low-rank", "local-svi"])
def test_other_guides(kind):
    model, x = problems.ppca(rows=4, latent=2, pixels=6)
    torch.manual_seed(0)
    if kind == "local-svi":
        guide = guides.LocalSVI(model)
    else:
        outputs = {"mixture": 10, "low-rank": 6}[kind]
        guide = guides.Amortized(model, MLP([6, outputs]).double(), kind)
    found = diagnose.gaps(model, guide, x)
    best = {"mixture": model.factorised_gap().detach(), "low-rank": 0.0, "local-svi": model.factorised_gap().detach()}
    assert (found.approximation.values < best[kind] + 4 * found.approximation.se + SHORT).all()
    assert (found.approximation.values > -4 * found.approximation.se - 1e-9).all()
    if kind == "local-svi":
        close(found.amortization, 0.0)


def test_joint_mode():
    model = problems.eight_schools()
    guide = guides.Amortized(model, None, plate=None)
    found = diagnose.gaps(model, guide, num_samples=400)
    assert found.inference.values.shape == (1,)
    assert float(found.amortization.values) > 4 * float(found.amortization.se)  # it was never trained
    # The posterior of the non-centred parameters is near a diagonal normal: less is lost to the family than to it.
    assert float(found.approximation.values) < 1.0


def test_what_has_no_gaps_is_told():
    model, x = problems.ppca(rows=2)
    other, _ = problems.ppca(rows=2)
    guide = guides.Amortized(model, best_encoder(model))
    with pytest.raises(NoDensityError, match="no density"):
        diagnose.gaps(model, guides.ShortRun(model), x)
    with pytest.raises(IncompatibleError, match="another model"):
        diagnose.gaps(other, guide, x)
    with pytest.raises(ValueError, match="at least 2"):
        diagnose.gaps(model, guide, x, num_samples=1)
    with handlers.anneal(0.5), pytest.raises(ScaleError, match="evaluate with 1"):
        diagnose.gaps(model, guide, x)
    with pytest.raises(TypeError, match="steps"):
        diagnose.gaps(model, guide, x, local={"steps": 3})


def test_repr_and_html_and_provenance():
    model, x = problems.ppca(rows=6)
    guide = guides.Amortized(model, best_encoder(model))
    found = diagnose.gaps(model, guide, x, num_samples=100, local=QUICK, seed=3)
    text, page = repr(found), found._repr_html_()
    for words in ("approximation gap", "amortization gap", "inference gap", "6 data", "nats per datum", "exact"):
        assert words in text
        assert words in page
    assert f"{found.inference.mean:.3f}" in text
    assert (found.provenance.num_data, found.provenance.seed, found.provenance.num_samples) == (6, 3, 100)
    assert found.provenance.fingerprint == found.elbo.provenance.fingerprint
