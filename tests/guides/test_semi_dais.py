"""SemiDAIS: weights whose mean is the evidence, an ELBO that no subsampling moves, NumPyro's own regression."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from torch import nn

from pyrovae import evidence, guides, losses
from pyrovae.errors import LatentError, NoDensityError, ScaleError
from pyrovae.optim import Adam

N = 18


def table(rows=N, params=2):
    """Every datum's own start, at a standard normal."""
    net = nn.Embedding(rows, params)
    nn.init.zeros_(net.weight)
    return net


def index_of(*args):
    return args[-1]


def conjugate(x, index):
    """mu ~ N(0, 1), z_b ~ N(mu, 1), x_b ~ N(z_b, 0.5^2): log p(x) is that of a Gaussian."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample=index):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


X4 = torch.tensor([0.5, -0.2, 1.3, 0.9])
ALL4 = torch.arange(4)


def conjugate_guide(**options):
    torch.manual_seed(0)
    about, starts = AutoNormal(poutine.block(conjugate, expose=["mu"]), init_scale=0.6), table(4)
    starts.weight.data = torch.stack([0.8 * X4, torch.full((4,), -1.2)], 1)  # near the posterior: lighter weights
    return guides.SemiDAIS(conjugate, about, starts, 3, encoder_input=index_of, **options)


@pytest.mark.parametrize("step_size", [0.05, 0.3])
def test_weights_have_the_evidence_for_their_mean(step_size):
    """At step sizes that no one has tuned; and Pyro's ELBO is the mean of the weights."""
    guide = conjugate_guide(step_size=step_size)
    covariance = 1.25 * torch.eye(4) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(X4)
    torch.manual_seed(1)
    weights = guide.log_weights(900, X4, ALL4)
    assert weights.shape == (900, 1)
    value = torch.logsumexp(weights, 0) - math.log(900)
    se = (weights - value).exp().std() / 30
    assert se < 0.08
    assert abs(value - exact) < 4 * se + 0.02
    assert weights.mean() < exact
    with torch.no_grad():
        elbo = torch.tensor([-Trace_ELBO().loss(conjugate, guide, X4, ALL4) for _ in range(400)])
    assert abs(elbo.mean() - weights.mean()) < 3 * (elbo.var() / 400 + weights.var() / 900).sqrt()


def test_draws_are_the_model_s_latents():
    guide = conjugate_guide()
    found = guide.sample(5, X4, ALL4)
    assert found["mu"].shape == (5,)
    assert found["z"].shape == (5, 4)
    predicted = Predictive(conjugate, guide=guide, num_samples=3, return_sites=["mu", "z"])(X4, ALL4)
    assert predicted["z"].shape[-1] == 4
    estimate = evidence.iwae(conjugate, guide, X4, ALL4, num_samples=50, seed=1)
    assert torch.equal(estimate.values, evidence.iwae(conjugate, guide, X4, ALL4, num_samples=50, seed=1).values)


def test_gradients_reach_globals_chains_and_starts():
    guide = conjugate_guide()
    guide(X4, ALL4)
    for loss in (Trace_ELBO(), losses.ELBO()):
        for parameter in guide.parameters():
            parameter.grad = None
        loss.loss_and_grads(conjugate, guide, X4[[1, 3]], ALL4[[1, 3]])
        assert all(p.grad is not None and p.grad.any() for p in guide.parameters())
        rows = guide.local.base.encoder.weight.grad.any(1)
        assert rows.tolist() == [False, True, False, True]  # the rows of the mini-batch alone


def regression():
    """NumPyro's test of AutoSemiDAIS: theta in R^3, tau_i ~ Gamma(5, 5), y_i ~ N(x_i' theta, 0.1 / sqrt(tau_i))."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator)
    tau = torch._standard_gamma(torch.full((N,), 5.0), generator=generator) / 5.0
    y = x @ torch.tensor([0.5, -1.0, 1.2]) + 0.1 / tau.sqrt() * torch.randn(N, generator=generator)

    def model(x, y, index):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", N, subsample=index):
            tau = pyro.sample("tau", dist.Gamma(5.0, 5.0))
            pyro.sample("y", dist.Normal(x @ theta, 0.1 / tau.sqrt()), obs=y)

    def rows(index):
        return x[index], y[index], index

    return model, rows


def log_evidence(x, y, _):
    """tau_i integrates out to a Student t of 10 degrees; theta by importance sampling at least squares."""
    covariance = 0.01 * torch.linalg.inv(x.T @ x)
    proposal = dist.MultivariateNormal(torch.linalg.lstsq(x, y).solution, 1.6 * covariance)
    torch.manual_seed(0)
    theta = proposal.sample((100_000,))
    joint = dist.Normal(0.0, 1.0).log_prob(theta).sum(-1)
    joint = joint + dist.StudentT(10.0, theta @ x.T, 0.1).log_prob(y).sum(-1)
    return torch.logsumexp(joint - proposal.log_prob(theta), 0) - math.log(100_000)


def test_the_elbo_does_not_depend_on_the_size_of_the_subsample():
    model, rows = regression()
    about = AutoNormal(poutine.block(model, expose=["theta"]), init_scale=0.03)
    guide = guides.SemiDAIS(model, about, table(), 4, encoder_input=index_of)
    torch.manual_seed(0)
    pyro.clear_param_store()
    svi = SVI(model, guide, Adam(lr=0.02), Trace_ELBO())
    for _ in range(300):
        svi.step(*rows(torch.randperm(N)[:12].sort().values))

    def elbo(size, turns):
        """Every turn takes each datum equally often, so that the choice of rows adds no noise."""
        values, shift = [], N - size
        with torch.no_grad():
            for _ in range(turns):
                order, found = torch.randperm(N), []
                for start in range(0, N, shift or N):
                    index = order.roll(start)[:size].sort().values
                    found.append(-Trace_ELBO().loss(model, guide, *rows(index)))
                values.append(sum(found) / len(found))
        values = torch.tensor(values)
        return values.mean(), values.std() / turns**0.5

    found = {size: elbo(size, turns) for size, turns in ((12, 100), (16, 35), (18, 300))}
    for size in (12, 16):
        assert abs(found[size][0] - found[18][0]) < 3 * (found[size][1] ** 2 + found[18][1] ** 2).sqrt()


@pytest.mark.slow
def test_chains_gain_over_mean_field():
    """Trained alike, on all data: from 0.8 nats below log p(y) to less than 0.3."""
    model, rows = regression()
    everything, steps, bounds = rows(torch.arange(N)), 800, []
    start = {"init_loc_fn": init_to_value(values={"theta": torch.linalg.lstsq(*everything[:2]).solution})}
    about = AutoMultivariateNormal(poutine.block(model, expose=["theta"]), init_scale=0.03, **start)
    chains = guides.SemiDAIS(model, about, table(), 8, encoder_input=index_of)
    for guide in (AutoNormal(poutine.block(model, hide=["y"]), init_scale=0.03, **start), chains):
        torch.manual_seed(0)
        pyro.clear_param_store()
        schedule = pyro.optim.CosineAnnealingLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "T_max": steps}
        )
        svi = SVI(model, guide, schedule, Trace_ELBO())
        for _ in range(steps):
            svi.step(*everything)
            schedule.step()
        with torch.no_grad():
            bounds.append(torch.tensor([-Trace_ELBO().loss(model, guide, *everything) for _ in range(400)]))
    plain, bound, truth = bounds[0], bounds[1], log_evidence(*everything)
    assert bound.mean() - plain.mean() - 3 * (plain.var() / 400 + bound.var() / 400).sqrt() > 0.3
    assert -0.3 < bound.mean() - truth < 3 * bound.std() / 20


def other_sites():
    pyro.sample("nu", dist.Normal(0.0, 1.0))


def local_only(x, index):
    with pyro.plate("data", 4, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_refusals():
    guide = conjugate_guide()
    with pytest.raises(ScaleError, match="2 of 4 rows: pass all data"):
        guide.log_weights(3, X4[:2], ALL4[:2])
    with pytest.raises(NotImplementedError, match="without vectorize_particles"):
        Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1).loss(conjugate, guide, X4, ALL4)
    with pytest.raises(ValueError, match="needs an encoder"):
        guides.SemiDAIS(conjugate, other_sites, None)
    with pytest.raises(ValueError, match="at least 1"):
        guide.log_weights(0, X4, ALL4)
    wrong = guides.SemiDAIS(conjugate, lambda *args: other_sites(), table(4), encoder_input=index_of)
    with pytest.raises(LatentError, match=r"draws \['nu'\], but the model's latents outside the plate 'data' are"):
        wrong(X4, ALL4)
    nothing = guides.SemiDAIS(local_only, lambda *args: other_sites(), table(4), encoder_input=index_of)
    with pytest.raises(LatentError, match="use guides.DAIS"):
        nothing(X4, ALL4)


def test_a_point_has_no_weights_but_can_be_trained():
    guide = guides.SemiDAIS(
        conjugate, AutoDelta(poutine.block(conjugate, expose=["mu"])), table(4), 2, encoder_input=index_of
    )
    assert math.isfinite(Trace_ELBO().loss(conjugate, guide, X4, ALL4))
    with pytest.raises(NoDensityError, match=r"fixes some of \['mu'\] at a point"):
        guide.log_weights(3, X4, ALL4)
    with pytest.raises(NoDensityError, match=r"guide.log_weights"):
        guide.posterior(X4, ALL4)


def around(x, index):
    """A masked global, a constrained one, an observation outside the plate and a latent that looks back at it."""
    with poutine.mask(mask=False):
        free = pyro.sample("free", dist.Normal(0.0, 0.1))
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.3))
    pyro.sample("y", dist.Normal(free, 1.0), obs=torch.tensor(0.4))
    with pyro.plate("data", 4, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)
    pyro.sample("after", dist.Normal(z.sum(), 2.0))


def test_weights_are_those_of_the_program_whatever_lies_outside_the_plate():
    names = ["free", "scale", "after"]
    about, starts = AutoNormal(poutine.block(around, expose=names), init_scale=0.3), table(4)
    starts.weight.data = torch.stack([0.9 * X4, torch.full((4,), -2.0)], 1)
    guide = guides.SemiDAIS(around, about, starts, 2, encoder_input=index_of)
    guide(X4, ALL4)
    about.locs.after.data.fill_(2.5)
    weights = guide.log_weights(600, X4, ALL4)
    for loss in (Trace_ELBO(), losses.ELBO()):
        with torch.no_grad():
            elbo = torch.tensor([-loss.loss(around, guide, X4, ALL4) for _ in range(600)])
        assert abs(elbo.mean() - weights.mean()) < 3.5 * (elbo.var() / 600 + weights.var() / 600).sqrt()


def test_as_many_rows_as_a_call_brings():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x.squeeze(-1))

    guide = guides.SemiDAIS(model, AutoNormal(poutine.block(model, expose=["mu"])), nn.Linear(1, 2), 2)
    for rows in (4, 2, 1, 6):
        x = torch.randn(rows, 1)
        assert guide.sample(3, x)["z"].shape == (3, rows)
        assert guide.log_weights(3, x).shape == (3, 1)


def test_iwae_trains_it_too():
    guide = conjugate_guide()
    loss = losses.IWAE(5, estimator="reparam")
    with torch.no_grad():
        values = torch.tensor([-loss.loss(conjugate, guide, X4, ALL4) for _ in range(40)])
        single = torch.tensor([-Trace_ELBO().loss(conjugate, guide, X4, ALL4) for _ in range(200)])
    assert values.mean() > single.mean()
    loss.loss_and_grads(conjugate, guide, X4, ALL4)
    assert all(p.grad is not None and p.grad.any() for p in guide.parameters())


def test_evaluation_leaves_the_buffers_of_a_plain_global_guide_alone():
    norm = nn.BatchNorm1d(1)

    def about(*args):
        pyro.module("norm", norm)
        pyro.sample("mu", dist.Normal(norm(X4.unsqueeze(-1)).mean(), 0.6))

    guide = guides.SemiDAIS(conjugate, about, table(4), 2, encoder_input=index_of)
    evidence.elbo(conjugate, guide, X4, ALL4, num_samples=3)
    assert norm.num_batches_tracked == 0
    assert norm.training


def test_one_row_and_global_of_as_many_entries():
    """B = 1, and a global vector with as many entries as there are rows: it is no row argument."""

    def model(x, index):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 2, subsample=index):
            z = pyro.sample("z", dist.Normal(theta.sum(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    about = AutoNormal(poutine.block(model, expose=["theta"]))
    guide = guides.SemiDAIS(model, about, table(2), 2, encoder_input=index_of)
    x, index = torch.tensor([0.3, 1.0]), torch.arange(2)
    for pick in ([0, 1], [1]):
        assert math.isfinite(Trace_ELBO().loss(model, guide, x[pick], index[pick]))
    assert torch.isfinite(guide.log_weights(3, x, index)).all()
