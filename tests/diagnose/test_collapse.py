"""KL, mutual information and active units against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from bench import problems
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyrovae import guides, models
from pyrovae.diagnose.collapse import active_units, information, mutual_information
from pyrovae.errors import IncompatibleError, NoDensityError

MODEL, X = problems.ppca(rows=40, latent=3, pixels=8, noise=1.0)


class Exact(guides.Amortized):
    def lam(self, x):
        q = self.model.posterior(x)
        return self.family(x).pack(q.mean, q.scale_tril)


def exact():
    return Exact(MODEL, nn.Identity(), family="full-rank")


def test_closed_forms():
    """KL of Gaussians, variance of their means; the mutual information of well separated data is log N."""
    with torch.no_grad():
        q = MODEL.posterior(X)
        prior = MultivariateNormal(torch.zeros(3, dtype=torch.double), torch.eye(3, dtype=torch.double))
        kl = kl_divergence(MultivariateNormal(q.mean, scale_tril=q.scale_tril), prior)
    found = information(MODEL, exact(), X, num_samples=2000)
    assert ((found.kl - kl).abs() < 4 * found.kl_se).all()
    torch.testing.assert_close(found.mean_variance, q.mean.var(0), rtol=0.05, atol=0)
    assert found.active.all()
    assert found.cap == math.log(40)
    assert 0 < found.mutual_information <= found.cap
    assert "3 of 3 latents active" in repr(found)
    far = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 300
    capped = information(MODEL, exact(), far)
    assert abs(capped.mutual_information - math.log(5)) < 1e-6
    assert "caps it" in repr(capped)


def test_equal_data_say_nothing_and_move_nothing():
    found = information(MODEL, exact(), X[:1].expand(6, -1).clone())
    assert abs(found.mutual_information) < 1e-9
    assert not found.active.any()
    assert information(MODEL, exact(), X[:1]).mutual_information == 0


def test_mutual_information_by_hand():
    """The average over draws of log q(u | x_n) - log mean_m q(u | x_m), from independent draws."""
    few = X[:4]
    with torch.no_grad():
        q = MODEL.posterior(few)
        one = MultivariateNormal(q.mean, scale_tril=q.scale_tril)
        u = one.sample((20_000,))
        every = one.log_prob(u.unsqueeze(2))  # [S, n, m]
        own = every.diagonal(dim1=1, dim2=2)
        each = own - torch.logsumexp(every, -1) + math.log(4)
    expected, se = float(each.mean()), float(each.std()) / 200  # 40 draws in `information`
    found = information(MODEL, exact(), few)
    assert abs(found.mutual_information - expected) < 4 * se * 200 / 40**0.5


def test_chains_have_a_kl_but_no_mutual_information():
    model, x = problems.ppca(rows=3, latent=2, pixels=4)
    guide = guides.DAIS(guides.Amortized(model, nn.Linear(4, 4).double()), num_steps=2)
    found = information(model, guide, x)
    assert found.mutual_information is None
    assert found.kl.isfinite().all()
    assert found.augmented
    assert "KL at most" in repr(found)
    assert "unknown" in repr(found)


def test_the_kl_of_a_chain_is_an_upper_bound_and_says_so():
    """A chain that starts at the exact posterior, and stays there: its density knows more than z."""
    model, x = problems.ppca(rows=3, latent=2, pixels=4)
    exact_one = Exact(model, nn.Identity(), family="full-rank")
    chain = guides.DensityShortRun(model, 20, 0.2, init=exact_one)
    known, found = information(model, exact_one, x), information(model, chain, x)
    assert not known.augmented
    assert "KL at most" not in repr(known)
    assert (found.kl > known.kl + 0.5).all()
    assert "KL at most" in repr(found)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        information(MODEL, exact(), X, num_samples=1)
    chain = guides.ShortRun(MODEL, num_steps=2)
    with pytest.raises(NoDensityError):
        information(MODEL, chain, X)
    other, _ = problems.ppca(rows=3, latent=3, pixels=8)
    with pytest.raises(IncompatibleError):
        information(other, exact(), X)


def test_dropout_is_off_and_batch_norm_stays():
    """Mutual information of an encoder in training mode is that of evaluation mode, and nothing moves."""
    torch.manual_seed(0)
    model, x = problems.ppca(rows=40)
    encoder = nn.Sequential(nn.BatchNorm1d(30), nn.Dropout(0.5), nn.Linear(30, 20)).double()
    guide = guides.Amortized(model, encoder)
    guide.train()
    before, state = encoder[0].running_mean.clone(), torch.get_rng_state()
    first = information(model, guide, x)
    assert torch.equal(encoder[0].running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert guide.training
    guide.eval()
    assert information(model, guide, x).mutual_information == first.mutual_information


def test_few_runs_of_the_model_for_the_kl_and_many_draws_for_the_means():
    """The KL of the scored draws alone, moments of all; a collapsed posterior has no active latent with 200 draws."""
    many = information(MODEL, exact(), X, num_samples=200)
    few = information(MODEL, exact(), X, num_samples=200, num_scored=10, mixture=False)
    torch.testing.assert_close(many.mean_variance, few.mean_variance)
    error = float((few.kl_se.square() + many.kl_se.square()).sum().sqrt()) / len(X)
    assert abs(float(many.kl.mean() - few.kl.mean())) < 4.5 * error
    assert few.mutual_information is None
    assert "unknown" in repr(few)
    with pytest.raises(ValueError, match="num_scored"):
        information(MODEL, exact(), X, num_samples=20, num_scored=30)
    torch.manual_seed(0)
    prior = guides.Amortized(MODEL, nn.Linear(8, 6).double())
    for p in prior.encoder.parameters():
        p.data.zero_()
    dead = information(MODEL, prior, X.repeat(8, 1), num_samples=200, num_scored=10)
    assert not dead.active.any()


def langevin_moments(num_steps, s):
    """Of K Langevin steps from the prior on pPCA's Gaussian posterior: means `[N, 3]`, one covariance for all data."""
    with torch.no_grad():
        q = MODEL.posterior(X)
        precision = torch.cholesky_inverse(q.scale_tril[0])
        eye = torch.eye(3, dtype=torch.double)
        shrink = eye - 0.5 * s**2 * precision
        left = torch.linalg.matrix_power(shrink, num_steps)
        covariance = left @ left.T + s**2 * sum(torch.linalg.matrix_power(shrink, 2 * k) for k in range(num_steps))
        return q.mean - q.mean @ left.T, covariance


def test_active_units_of_a_short_run_have_the_law_of_its_chain():
    """Means, their variance over data and E log p(x | z) of K steps, in closed form, from draws without a density."""
    num_steps, s, number = 6, 0.15, 1000
    mean, covariance = langevin_moments(num_steps, s)
    found = active_units(MODEL, guides.ShortRun(MODEL, num_steps, s), X, num_samples=number)
    se = (covariance.diagonal() / number).sqrt()
    assert ((found.mean - mean).abs() < 4.5 * se).all()
    # The estimate of a variance of means: each mean is off by se.
    off = 2 * mean.sub(mean.mean(0)).square().mean(0).sqrt() * se * len(X) ** -0.5
    assert ((found.mean_variance - mean.var(0)).abs() < 4.5 * off + 5 * se**2).all()
    with torch.no_grad():
        weight, noise = MODEL.weight, MODEL.log_noise.exp()
        rest = (X - MODEL.bias - mean @ weight.T).square().sum(1) + (weight @ covariance @ weight.T).trace()
        exact = -0.5 * rest / noise**2 - 8 * (noise * math.sqrt(2 * math.pi)).log()
    spread = float((found.reconstruction - exact).std())
    assert spread < 0.3
    assert abs(float((found.reconstruction - exact).mean())) < 4 * spread / len(X) ** 0.5
    assert found.active.all()
    assert "3 of 3" in repr(found)


def test_the_noise_of_few_chains_is_taken_out():
    """Equal data have equal means: ten chains of each leave a variance of se^2, which is not an active latent."""
    num_steps, s = 6, 0.15
    same = X[:1].expand(400, -1).clone()
    found = active_units(MODEL, guides.ShortRun(MODEL, num_steps, s), same, num_samples=10)
    raw = found.mean.var(0)
    covariance = langevin_moments(num_steps, s)[1].diagonal()
    assert ((raw / (covariance / 10) - 1).abs() < 5 * (2 / 400) ** 0.5).all()
    assert (raw > 0.01).any()
    assert (found.mean_variance < 5 * raw * (2 / 400) ** 0.5).all()
    one = active_units(MODEL, guides.ShortRun(MODEL, num_steps, s), X[:1], num_samples=10)
    assert not one.active.any()
    assert "unknown from one datum" in repr(one)


def test_active_units_agree_with_information_where_there_is_a_density():
    ours, theirs = (f(MODEL, exact(), X, num_samples=200) for f in (active_units, information))
    torch.testing.assert_close(ours.mean_variance, theirs.mean_variance, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="at least 10 draws"):
        active_units(MODEL, exact(), X, num_samples=9)
    with pytest.raises(IncompatibleError, match="pyrovae.guides"):
        active_units(MODEL, lambda x: None, X)


@pytest.mark.parametrize("measure", [information, mutual_information])
def test_posteriors_are_found_once(measure, monkeypatch):
    """A search for every datum is dear: mutual information takes the densities of the posteriors already found."""
    torch.manual_seed(0)
    model = models.PPCA(torch.randn(4, 2), noise=0.5)
    guide, x = guides.LocalSVI(model, num_samples=4, max_steps=5), torch.randn(7, 4)
    searched, refine = [], type(guide)._refine

    def counted(self, x):
        searched.append(len(x))
        return refine(self, x)

    monkeypatch.setattr(type(guide), "_refine", counted)
    measure(model, guide, x, chunk=3)
    assert searched == [3, 3, 1]
