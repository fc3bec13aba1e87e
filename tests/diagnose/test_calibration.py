"""Calibration: exact guides pass, shifted and scaled ones fail, a guide that ignores the data fails TARP alone."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from torch import nn

from pyrovae import guides, models
from pyrovae.diagnose import calibrate
from pyrovae.errors import DataError, IncompatibleError

MODEL, X = problems.ppca(rows=30, latent=3, pixels=8, noise=1.0)


class Given(guides.Amortized):
    """The exact posterior of pPCA, moved and scaled in its own standard deviations, or the prior."""

    shift, scale, prior = 0.0, 1.0, False

    def lam(self, x):
        q = self.model.posterior(x)
        family = self.family(x)
        if self.prior:
            loc, tril = torch.zeros_like(q.mean), torch.eye(3, dtype=x.dtype).expand(len(x), 3, 3)
        else:
            loc, tril = q.mean + self.shift * q.variance.sqrt(), self.scale * q.scale_tril
        return family.pack(loc, tril)


def given(**changes):
    guide = Given(MODEL, nn.Identity(), family="full-rank")
    for name, value in changes.items():
        setattr(guide, name, value)
    return guide


@pytest.fixture(scope="module")
def exact():
    return calibrate(MODEL, given(), X)


def test_the_exact_posterior_passes(exact):
    assert exact.passed()
    assert exact.sbc_pvalue > 0.01
    assert exact.tarp_pvalue > 0.01
    assert exact.ranks.shape == (1000, 3)
    assert exact.ranks.min() == 0
    assert exact.ranks.max() == 99
    assert exact.shapes() == [""] * 3
    for level, found in zip(exact.levels, exact.coverage, strict=True):
        assert ((found - level).abs() < 4 * math.sqrt(level * (1 - level) / 1000)).all()
    assert "REJECTED" not in repr(exact)
    assert "cover" in exact._repr_html_()


def test_pvalues_are_uniform_over_seeds():
    """Twenty runs of the exact guide: neither test rejects at 0.01 more than twice."""
    found = [calibrate(MODEL, given(), X, num_data=300, seed=seed) for seed in range(20)]
    assert sum(f.sbc_pvalue < 0.01 for f in found) <= 2
    assert sum(f.tarp_pvalue < 0.01 for f in found) <= 2
    assert 0.25 < sum(f.tarp_pvalue for f in found) / 20 < 0.75


def test_a_shifted_mean_fails():
    found = calibrate(MODEL, given(shift=0.3), X)
    assert found.sbc_pvalue < 1e-4
    assert found.tarp_pvalue < 1e-4
    assert calibrate(MODEL, given(shift=-0.3), X).tarp_pvalue < 1e-4
    assert not found.passed()
    assert found.shapes() == ["too high"] * 3
    assert "too high in 3 of 3" in repr(found)


def test_narrow_and_wide_guides_fail():
    narrow, wide = (calibrate(MODEL, given(scale=scale), X) for scale in (0.7, 1.5))
    assert narrow.sbc_pvalue < 1e-4
    assert wide.sbc_pvalue < 1e-4
    assert narrow.tarp_pvalue < 1e-3
    assert narrow.shapes() == ["too narrow"] * 3
    assert wide.shapes() == ["too wide"] * 3
    # A normal of 0.7 sd covers 2 Phi(0.7 * 1.2816) - 1 = 63 % at 80 %.
    expected = 2 * float(torch.special.ndtr(torch.tensor(0.7 * 1.2816))) - 1
    assert (narrow.coverage[1] - expected).abs().max() < 0.06


def test_the_prior_passes_ranks_and_fails_tarp():
    found = calibrate(MODEL, given(prior=True), X)
    assert found.sbc_pvalue > 0.01
    assert found.tarp_pvalue < 1e-6
    assert not found.passed()
    assert "does not follow the data" in repr(found)


def test_seeds_chunks_rows_and_nothing_else_moves(exact):
    state, stored = torch.get_rng_state(), dict(pyro.get_param_store())
    again = calibrate(MODEL, given(), X, chunk=77)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(pyro.get_param_store()) == stored
    assert torch.equal(again.ranks, exact.ranks)
    torch.testing.assert_close(again.credibility, exact.credibility)
    assert not torch.equal(calibrate(MODEL, given(), X, num_data=100, seed=1).ranks, exact.ranks[:100])
    one = calibrate(MODEL, given(), X[:1], num_data=150)
    assert one.ranks.shape == (150, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vae_with_an_untrained_encoder(dtype):
    """Binary data, either precision; an encoder that has learned nothing is told from the posterior."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 30)).to(dtype)
    with torch.no_grad():
        decoder[0].weight.mul_(3)
        decoder[2].weight.mul_(5)
    vae = models.VAE(decoder, 2)
    guide = guides.Amortized(vae, nn.Linear(30, 4).to(dtype))
    found = calibrate(vae, guide, torch.zeros(7, 30, dtype=dtype), num_data=200)
    assert found.ranks.shape == (200, 2)
    assert not found.passed()


def test_covariates_stay():
    """x ~ Poisson(rate * exposure): the exposures are repeated, the counts simulated."""

    def model(counts, exposure):
        with pyro.plate("data", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0, dtype=torch.double), 2.0))
            pyro.sample("counts", dist.Poisson(rate * exposure), obs=counts)

    class Exact(guides.Amortized):
        def draws(self, num_samples, counts, exposure):
            return dist.Gamma(3 + counts, 2 + exposure).sample((num_samples,)).log().unsqueeze(-1)

    exposure = torch.tensor([0.5, 4.0, 30.0], dtype=torch.double)
    guide = Exact(model, nn.Linear(1, 2).double())
    with pyro.poutine.block():
        found = calibrate(model, guide, torch.ones(3, dtype=torch.double), exposure)
    assert found.passed()


def test_bad_input_is_refused():
    for options, words in (({"num_data": 10}, "at least 100"), ({"num_draws": 50}, "multiple of 20"),
                           ({"levels": (0.5, 1.5)}, "between 0 and 1"), ({"levels": ()}, "levels")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            calibrate(MODEL, given(), X, **options)
    joint = guides.Amortized(problems.eight_schools(), None, plate=None)
    with pytest.raises(IncompatibleError, match="plate=None"):
        calibrate(joint.model, joint)

    def doubled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    guide = guides.Amortized(doubled, nn.Linear(1, 2), encoder_input=lambda x: x.unsqueeze(-1))
    with pytest.raises(DataError, match="observes"):
        calibrate(doubled, guide, torch.ones(4))
    assert calibrate(doubled, guide, torch.ones(4), observes={"x": 0}, num_data=100).ranks.shape == (100, 1)
