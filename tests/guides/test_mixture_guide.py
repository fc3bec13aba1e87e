"""Mixture: the composition, its estimators, and what it refuses."""

from __future__ import annotations

import pyro
import pytest
import torch
from bench import problems
from pyro.infer import SVI, Trace_ELBO

from pyrovae import guides, losses
from pyrovae.nets import MLP


def build(count=2, weights=None, dtype=torch.double):
    torch.manual_seed(0)
    model, x = problems.ppca(rows=6, latent=3, pixels=5)
    parts = [guides.Amortized(model, MLP([5, 6]).to(dtype)) for _ in range(count)]
    return model, x, guides.Mixture(parts, weights)


def test_one_component_is_that_guide():
    _, x, guide = build(1)
    alone, mixed = guide.parts[0].posterior(x), guide.posterior(x)
    u = alone.sample((4,))
    assert torch.allclose(alone.log_prob(u), mixed.log_prob(u), atol=1e-12)


def test_density_is_the_weighted_sum_of_components():
    _, x, guide = build(3)
    guide.logits.data = torch.tensor([0.3, -1.0, 2.0]).double()
    u = torch.randn(4, 6, 3).double()
    weights = guide.logits.softmax(-1)
    expected = sum(w * part.posterior(x).log_prob(u).exp() for w, part in zip(weights, guide.parts, strict=True))
    assert torch.allclose(guide.posterior(x).log_prob(u), expected.log(), atol=1e-10)


def test_weights_may_depend_on_the_data():
    net = MLP([5, 2]).double()
    _, x, guide = build(2, net)
    assert torch.allclose(guide.posterior(x).log_weights, net(x).log_softmax(-1))
    assert not hasattr(guide, "logits")


def test_identical_components_have_the_elbo_of_one():
    model, x, guide = build(2)
    guide.parts[1].load_state_dict(guide.parts[0].state_dict())
    loss = losses.ELBO("stratified", num_particles=4000)
    with torch.no_grad():
        both = loss.per_datum(model, guide, x)
        weights = guide.parts[0].log_weights(8000, x)
    se = weights.std(0) / 8000**0.5
    assert ((both - weights.mean(0)).abs() < 4.5 * 2**0.5 * se).all()


def test_stratified_bound_never_exceeds_the_evidence():
    model, x, guide = build(3)
    with torch.no_grad():
        bound = losses.ELBO("stratified", num_particles=3000).per_datum(model, guide, x)
    assert (bound < model.log_evidence(x)).all()


def test_trace_elbo_and_stratified_have_the_same_gradient_of_the_weights():
    model, x, guide = build(2)
    guide.logits.data = torch.tensor([0.5, -0.5]).double()
    runs = {"trace": [], "stratified": []}
    for seed in range(400):
        for name, loss in (("trace", Trace_ELBO()), ("stratified", losses.ELBO("stratified"))):
            guide.zero_grad()
            with pyro.get_param_store().scope():
                torch.manual_seed(seed)
                loss.loss_and_grads(model, guide, x)
            runs[name].append(float(guide.logits.grad[0]))
    trace, stratified = torch.tensor(runs["trace"]), torch.tensor(runs["stratified"])
    se = (trace.var() / 400 + stratified.var() / 400).sqrt()
    assert abs(trace.mean() - stratified.mean()) < 3 * se
    assert stratified.std() < trace.std()


def test_refusals():
    model, x, guide = build(2)
    with pytest.raises(ValueError, match="at least one component"):
        guides.Mixture([])
    other = guides.Amortized(problems.ppca(rows=2, latent=3, pixels=5)[0], MLP([5, 6]).double())
    with pytest.raises(ValueError, match="one model"):
        guides.Mixture([guide.parts[0], other])
    full = guides.Amortized(model, MLP([5, 9]).double(), "full-rank")
    with pytest.raises(ValueError, match="family='diagonal'"):
        guides.Mixture([full, full]).lam(x)


def test_stock_svi_moves_the_weights():
    model, x, guide = build(2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    before = guide.logits.detach().clone()
    for _ in range(20):
        svi.step(x)
    assert (guide.logits - before).abs().max() > 0.05
