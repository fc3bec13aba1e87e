"""The audit: closed forms, agreement with the ELBO, missed modes, and what it refuses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from bench.piecewise_nets import circle, random_net
from pyro.infer import SVI
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyrovae import guides, losses
from pyrovae.diagnose.audit import audit
from pyrovae.errors import IncompatibleError, NoDensityError, QuadratureError
from pyrovae.guides.exact import Exact
from pyrovae.models import PPCA, VAE
from pyrovae.nets import MLP
from pyrovae.piecewise import fit_em


@pytest.mark.parametrize("latents", [1, 2])
def test_against_closed_divergences_of_gaussians(latents):
    torch.manual_seed(0)
    model, x = PPCA(torch.randn(4, latents).double(), noise=0.6), torch.randn(3, 4).double()
    guide = guides.Amortized(model, MLP([4, 2 * latents]).double())
    found = audit(model, guide, x, num_samples=200)
    loc, log_var = guide.lam(x).detach().chunk(2, -1)
    q, p = MultivariateNormal(loc, torch.diag_embed(log_var.exp())), model.posterior(x)
    assert torch.allclose(found.kl.values, kl_divergence(q, p).detach(), rtol=1e-6, atol=1e-8)
    assert torch.allclose(found.reverse.values, kl_divergence(p, q).detach(), rtol=1e-6, atol=1e-8)
    assert (found.errors.abs() < 4).all()
    again = audit(model, guide, x, num_samples=200, chunk=1)
    assert torch.allclose(again.kl.values, found.kl.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "outputs"), [("diagonal", 2), ("mixture", 6)])
def test_the_gap_of_an_amortized_guide_on_a_trained_net(family, outputs):
    """Quadrature and Monte Carlo agree for every datum; the divergence is there to be seen."""
    model, x = random_net([1, 8, 2], noise=0.55, output=0.1), circle(60)
    fit_em(model, x, 10)
    torch.manual_seed(0)
    guide = guides.Amortized(model, MLP([2, 16, outputs]).double(), family)
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), losses.ELBO("stratified"))
        for _ in range(200):
            svi.step(x)
    found = audit(model, guide, x, num_samples=4000)
    assert (found.errors.abs() < 4).all()
    assert found.errors.abs().max() > 0.5  # the two are independent
    assert found.kl.mean > 0.02
    assert (found.kl.values > -1e-6).all()
    assert (found.reverse.values > -1e-6).all()
    assert (found.kl.se < 0.01).all()
    assert torch.allclose(found.log_evidence.values, model.log_evidence(x))
    assert "differ by at most" in repr(found)
    assert "KL(q || p(z|x))" in found._repr_html_()


def test_exact_has_no_divergence_either_way():
    for model, x in ((random_net([1, 8, 2]), circle(4)), (random_net([2, 3, 2], noise=0.6), circle(1))):
        found = audit(model, Exact(model), x, num_samples=10)
        assert (found.kl.values.abs() < 1e-9).all()
        assert (found.reverse.values.abs() < 1e-9).all()
        assert (found.gap.values.abs() < 1e-9).all()


def test_a_missed_mode_shows_in_the_reverse_divergence():
    """A model without posterior of its own: one of two modes is missed, KL(q || p) = log 2 and KL(p || q) is large."""
    x = torch.tensor([2.25]).double()
    guide = guides.Laplace(problems.bimodal, MLP([1, 1]).double(), encoder_input=lambda x: x.unsqueeze(-1))
    found = audit(problems.bimodal, guide, x, num_samples=2000)
    assert float(found.kl.values) == pytest.approx(math.log(2), abs=0.05)
    assert float(found.reverse.values) > 50
    assert (found.errors.abs() < 4).all()


class Overconfident(guides.Amortized):
    """Its density is wrong by a factor."""

    def _posterior(self, *args, **kwargs):
        q = super()._posterior(*args, **kwargs)
        log_prob = q.log_prob
        q.log_prob = lambda u: log_prob(u) + 0.2
        return q


def test_what_cannot_be_audited_is_refused():
    model, x = random_net([1, 4, 2]), circle(2)
    with pytest.raises(ValueError, match=r"the guide's density integrates to 1\.221"):
        audit(model, Overconfident(model, MLP([2, 2]).double()), x)
    with pytest.raises(NoDensityError, match=r"use guide\.sample"):
        audit(model, guides.ShortRun(model), x)
    with pytest.raises(IncompatibleError, match="built for another model"):
        audit(random_net([1, 4, 2]), Exact(model), x)
    vae = VAE(MLP([3, 4]), 3, "gaussian")
    with pytest.raises(ValueError, match="1 or 2 latents per datum, this model has 3"):
        audit(vae, guides.Amortized(vae, MLP([4, 6])), torch.randn(2, 4))
    with pytest.raises(ValueError, match="at least 2"):
        audit(model, Exact(model), x, num_samples=1)


def test_a_narrow_mode_far_from_the_guide_is_refused_not_overlooked():
    """x = (z_1 - 0.05)^2 at noise 0.004: two modes of sd 0.002, which a grid around both cannot resolve."""
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            mean = torch.stack([(z[..., 0] - 0.05).square(), z[..., 1]], -1)
            pyro.sample("x", dist.Normal(mean, 0.004).to_event(1), obs=x)

    x = torch.tensor([[1.1025, 0.0]], dtype=torch.double)
    encoder = nn.Linear(2, 4).double()
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.bias.copy_(torch.tensor([-1.0, 0.0, 2 * math.log(0.0019), 2 * math.log(0.004)]))
    with pytest.raises(QuadratureError, match="cannot resolve"):
        audit(model, guides.Amortized(model, encoder), x, num_samples=100)
