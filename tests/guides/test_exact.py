"""Exact: every draw's weight is the evidence, and SVI with it climbs log p(x)."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench.piecewise_nets import circle, random_net
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule

from pyrovae import diagnose, evidence, losses
from pyrovae.compat import compatible
from pyrovae.errors import IncompatibleError
from pyrovae.guides.exact import Exact
from pyrovae.models import PPCA, VAE
from pyrovae.nets import MLP


class GammaPoisson(PyroModule):
    """rate ~ Gamma(3, 2), x ~ Poisson(rate): conjugate; in u = log rate, which is where posteriors of guides live."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0, dtype=x.dtype), 2.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def posterior(self, x):
        gamma = dist.Gamma((3.0 + x).unsqueeze(-1), 3.0).to_event(1)
        return dist.TransformedDistribution(gamma, [dist.transforms.ExpTransform().inv])

    def log_evidence(self, x):
        return dist.GammaPoisson(torch.tensor(3.0, dtype=x.dtype), 2.0).log_prob(x)


def ppca(dtype):
    torch.manual_seed(0)
    return PPCA(torch.randn(3, 2, dtype=dtype), noise=0.7), torch.randn(5, 3, dtype=dtype)


PAIRS = {
    "ppca": lambda: ppca(torch.double),
    "ppca-single": lambda: ppca(torch.float32),
    "one-latent": lambda: (random_net([1, 8, 2]), circle(5)),
    "two-latents": lambda: (random_net([2, 4, 2]), circle(3)),
    "gamma-poisson": lambda: (GammaPoisson(), torch.tensor([0.0, 2.0, 7.0]).double()),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


@every_pair
def test_every_loss_is_the_evidence_at_every_draw(name):
    model, x = PAIRS[name]()
    guide = Exact(model)
    log_evidence = model.log_evidence(x).detach()
    rounding = 1e-9 if x.dtype == torch.double else 1e-3
    vectorised = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    every = (Trace_ELBO(), vectorised, losses.ELBO(), losses.ELBO("stl"), losses.ELBO("stratified"), losses.IWAE(5))
    for loss in every:
        for _ in range(2):
            with pyro.get_param_store().scope():
                assert loss.loss(model, guide, x) == pytest.approx(-float(log_evidence.sum()), abs=rounding)
    weights = guide.log_weights(20, x)
    assert torch.allclose(weights, log_evidence.expand_as(weights), rtol=0, atol=rounding)
    assert not torch.equal(*guide.draws(2, x))
    assert guide.sample(4, x[:1])[next(iter(guide.space(x).sites)).name].shape[:2] == (4, 1)
    assert guide.draws(2, x).dtype == x.dtype
    assert list(guide.parameters()) == []


@every_pair
def test_evaluation_in_chunks_gives_the_same_numbers(name):
    model, x = PAIRS[name]()
    guide = Exact(model)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    whole, parts = (
        evidence.log_weights(model, guide, x, num_samples=10, chunk=chunk) for chunk in (len(x), 2)
    )  # fmt: skip
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)
    torch.set_rng_state(state)
    found = evidence.elbo(model, guide, x, num_samples=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.se < (1e-9 if x.dtype == torch.double else 1e-3)).all()


def test_svi_with_it_is_em():
    """The gradient is unbiased for that of log p(x), and stock steps climb the exact log-likelihood."""
    model, x = random_net([1, 8, 2], noise=0.55, seed=1).requires_grad_(True), circle(100)
    guide = Exact(model)
    (exact,) = torch.autograd.grad(model.log_evidence(x).sum(), model.layers[0].weight)
    slopes = []
    for _ in range(200):
        with pyro.get_param_store().scope():
            loss = Trace_ELBO().differentiable_loss(model, guide, x)
        slopes.append(-torch.autograd.grad(loss, model.layers[0].weight)[0])
    slopes = torch.stack(slopes)
    assert ((slopes.mean(0) - exact).abs() < 4 * slopes.std(0) / 200**0.5).all()
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-2}), Trace_ELBO())
        curve = [-svi.step(x) / 100 for _ in range(100)]
    assert curve[-1] > curve[0] + 0.5
    assert float(model.log_evidence(x).detach().mean()) > curve[0] + 0.5


def test_our_losses_train_with_it_too():
    for loss in (losses.ELBO(), losses.ELBO("stratified")):
        model, x = random_net([1, 6, 2], noise=0.55, output=0.1).requires_grad_(True), circle(50)
        start = float(model.log_evidence(x).detach().mean())
        with pyro.get_param_store().scope():
            svi = SVI(model, Exact(model), pyro.optim.Adam({"lr": 1e-2}), loss)
            for _ in range(60):
                svi.step(x)
        assert float(model.log_evidence(x).detach().mean()) > start + 0.1


def test_khat_and_gaps_see_a_perfect_guide():
    model, x = PAIRS["ppca"]()
    found = diagnose.gaps(model, Exact(model), x, num_samples=50, local={"max_steps": 100})
    assert (found.inference.values.abs() < 1e-9).all()


def test_models_without_a_posterior_are_refused():
    vae = VAE(MLP([2, 4, 3]), 2, "gaussian")
    with pytest.raises(IncompatibleError, match=r"model\.posterior\(x\), which this model does not define"):
        Exact(vae)
    assert "PiecewiseAffineVAE do" in compatible(vae, Exact)
    assert compatible(VAE, Exact) is not None
    assert compatible(PPCA, Exact, losses.ELBO) is None
    assert repr(Exact(PAIRS["ppca"]()[0])) == "Exact(plate='data')"


def test_a_posterior_of_another_shape_is_refused():
    class Wrong(GammaPoisson):
        def posterior(self, x):
            return dist.Normal(x, 1.0)

    with pytest.raises(ValueError, match=r"has batch \(3,\) and event \(\)"):
        Exact(Wrong()).draws(2, torch.ones(3).double())


def test_subsampled_rows():
    """A plate of 100 of which some rows are given: the loss is scaled, the posterior is of those rows."""

    class Conjugate(PyroModule):
        def forward(self, x, index):
            with pyro.plate("data", 100, subsample=index):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def posterior(self, x, index):
            return dist.Normal(x / 2, torch.full_like(x, 0.5).sqrt()).to_event(1)

    model, x, index = Conjugate(), torch.randn(4, 1).double(), torch.tensor([3, 7, 50, 99])
    expected = float(dist.Normal(torch.zeros_like(x), torch.full_like(x, 2.0).sqrt()).log_prob(x).sum()) * 25
    assert -Trace_ELBO().loss(model, Exact(model), x, index) == pytest.approx(expected, abs=1e-9)
    weights = evidence.log_weights(model, Exact(model), x, index, num_samples=3)
    assert torch.allclose(weights.sum(1), torch.full((3,), expected / 25).double(), atol=1e-9)
