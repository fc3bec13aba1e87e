"""ShortRun: closed-form moments after K steps on a Gaussian posterior, and learning of a linear model."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyrovae import guides, losses
from pyrovae.guides.short_run import text_steps
from pyrovae.models import PPCA

CHAINS = 400_000


def gaussian(x):
    """Posterior N(1, 1/10) for every datum with x = 10/9: prior N(0, 1), likelihood precision 9."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1 / 3).to_event(1), obs=x)


X = torch.full((1, 1), 10 / 9, dtype=torch.double)


def moments(guide):
    torch.manual_seed(0)
    draws = guide.draws(CHAINS, X).flatten()
    return float(draws.mean()), float(draws.var())


@pytest.mark.parametrize(("s", "mean", "var"), [(0.1, 0.6415, 0.2179), (0.2, 0.9885, 0.1112), (0.3, 1.0000, 0.1290)])
def test_langevin_has_the_closed_form_moments(s, mean, var):
    a = 1 - s**2 * 10 / 2
    exact_mean, exact_var = 1 - a**20, a**40 + s**2 * (1 - a**40) / (1 - a**2)
    assert exact_mean == pytest.approx(mean, abs=6e-5)  # the published table
    assert exact_var == pytest.approx(var, abs=6e-5)
    got_mean, got_var = moments(guides.ShortRun(gaussian, 20, s))
    assert got_mean == pytest.approx(exact_mean, rel=0.01)
    assert got_var == pytest.approx(exact_var, rel=0.01)


@pytest.mark.parametrize(("step_size", "leapfrog", "steps"), [(0.1, 3, 4), (0.2, 5, 2), (0.3, 2, 10)])
def test_hmc_has_the_closed_form_moments(step_size, leapfrog, steps):
    """Leapfrog on a Gaussian is linear: (u, v) -> M (u, v); moments follow by iterating the map."""
    e, lam = step_size, 10.0
    kick = torch.tensor([[1.0, 0.0], [-0.5 * e * lam, 1.0]], dtype=torch.double)
    drift = torch.tensor([[1.0, e], [0.0, 1.0]], dtype=torch.double)
    m = torch.linalg.matrix_power(kick @ drift @ kick, leapfrog)
    mean, var = -1.0, 1.0  # of u - 1 at the start, u ~ prior
    for _ in range(steps):
        mean, var = float(m[0, 0]) * mean, float(m[0, 0]) ** 2 * var + float(m[0, 1]) ** 2
    got_mean, got_var = moments(guides.ShortRun(gaussian, steps, step_size, kernel="hmc", num_leapfrog=leapfrog))
    se = (var / CHAINS) ** 0.5
    assert got_mean == pytest.approx(1 + mean, abs=0.01 * abs(1 + mean) + 3 * se)
    assert got_var == pytest.approx(var, rel=0.01)


def test_schedule_temperature_and_initial_guide():
    cold = guides.ShortRun(gaussian, 3, [0.3, 0.2, 0.1], temperature=0.0)
    mean, var = moments(cold)
    factor = (1 - 0.45) * (1 - 0.2) * (1 - 0.05)
    assert mean == pytest.approx(1 - factor, rel=0.01)
    assert var == pytest.approx(factor**2, rel=0.01)
    base = guides.Amortized(gaussian, torch.nn.Linear(1, 2).double())
    base.encoder.weight.data.zero_()
    base.encoder.bias.data.copy_(torch.tensor([1.0, -2.302585]))  # the exact posterior N(1, 0.1)
    started = guides.ShortRun(gaussian, 1, 1e-6, init=base)
    mean, var = moments(started)
    assert mean == pytest.approx(1.0, rel=0.01)
    assert var == pytest.approx(0.1, rel=0.01)


def test_sites_are_deltas_without_density_and_chains_differ_per_particle():
    guide = guides.ShortRun(gaussian, 2, 0.1)
    site = poutine.trace(guide).get_trace(X).nodes["z"]
    assert isinstance(site["fn"], dist.Delta)
    assert float(site["fn"].log_prob(site["value"])) == 0.0
    with pyro.plate("particles", 6, dim=-2):
        value = poutine.trace(guide).get_trace(X).nodes["z"]["value"]
    assert value.shape == (6, 1, 1)
    assert len(value.unique()) == 6


def test_training_gradient_is_that_of_the_log_joint_at_the_draws():
    torch.manual_seed(0)
    model = PPCA(torch.randn(4, 2, dtype=torch.double), noise=0.5)
    x = torch.randn(3, 4, dtype=torch.double)
    guide = guides.ShortRun(model, 3, 0.1)
    with pyro.get_param_store().scope():
        torch.manual_seed(1)
        Trace_ELBO().loss_and_grads(model, guide, x)
    got = model.weight.grad.clone()
    torch.manual_seed(1)
    u = guide.draws(1, x)
    (expected,) = torch.autograd.grad(-guide.space(x).log_joint(u, x).sum(), model.weight)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def factors():
    """500 data of five pixels and two factors, the largest log-likelihood and the largest posterior precision there."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 2, dtype=torch.double)).Q
    with torch.no_grad():
        x = PPCA(axes * axes.new_tensor([3.0, 1.8]), noise=0.5)(size=500)
    covariance = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    weight = vectors[:, -2:] * (values[-2:] - 0.25).sqrt()
    law = torch.distributions.MultivariateNormal(x.new_zeros(5), weight @ weight.T + 0.25 * torch.eye(5).double())
    return x, float(law.log_prob(x).mean()), float(values[-1]) / 0.25


def learnt_gap(factors, num_steps, step_size, steps):
    x, best, _ = factors
    torch.manual_seed(1)
    model = PPCA(0.5 * torch.randn(5, 2, dtype=torch.double), noise=0.5)
    for name in ("bias", "log_noise"):
        model.parts[name].requires_grad_(False)
    guide = guides.ShortRun(model, num_steps, step_size)
    optimizer = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "T_max": steps}
    )
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, optimizer, losses.ExpectedLogJoint(num_particles=2))
        for _ in range(steps):
            svi.step(x)
            optimizer.step()
    return best - float(model.log_evidence(x).detach().mean())


@pytest.mark.filterwarnings("ignore:.*not registered in the param store")
def test_learning_with_small_steps_reaches_the_maximum_of_the_likelihood(factors):
    gap = learnt_gap(factors, 100, 0.5 / math.sqrt(factors[2]), 200)
    assert 0 < gap < 0.02


@pytest.mark.filterwarnings("ignore:.*not registered in the param store")
def test_learning_with_large_steps_shrinks_the_weight(factors):
    """Unadjusted steps overdisperse z, which W makes up for: a bias of the guide that more training does not remove."""
    assert 0.05 < learnt_gap(factors, 30, 0.25, 100) < 0.15


class Masked(torch.nn.Module):
    """Posterior N(0, 1/10) where the mask of a datum is there (dropout scales it to 2), the prior where it is not."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            mask = self.dropout(torch.ones_like(z))
            pyro.sample("x", dist.Normal(mask * z, 2 / 3).to_event(1), obs=x)


@pytest.mark.parametrize("recorded", [True, False])
def test_masks_that_stay_and_masks_that_change(recorded, monkeypatch):
    """Noiseless steps shrink z by 0.5 under a mask that is there and by 0.95 under one that is not."""
    if not recorded:
        monkeypatch.setattr("pyrovae.guides.short_run.recorded", lambda log_joint, u: log_joint)
    model, x, steps = Masked(), torch.zeros(2000, 1, dtype=torch.double), 4

    def times_there(masks, seed=0):
        guide = guides.ShortRun(model, steps, 0.1**0.5, temperature=0.0, masks=masks)
        torch.manual_seed(seed)
        ends = guide.draws(1, x)
        torch.manual_seed(seed)
        shrunk = (ends / guide.space(x).prior(1, x)).flatten()
        times = (shrunk / 0.95**steps).log() / math.log(0.5 / 0.95)
        assert torch.allclose(times, times.round(), atol=1e-6)
        return times.round().long()

    for masks, shares in (("fixed", [0.5, 0, 0, 0, 0.5]), ("fresh", [math.comb(4, k) / 16 for k in range(5)])):
        counts, expected = torch.bincount(times_there(masks), minlength=5) / 2000, torch.tensor(shares)
        assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / 2000).sqrt()).all()
    assert not torch.equal(times_there("fixed"), times_there("fixed", seed=1))  # each call has its own


def test_masks_cost_no_random_numbers_where_there_are_none():
    """A model that draws nothing has the same chains, and leaves the same random state, under both."""
    found = []
    for masks in ("fixed", "fresh"):
        torch.manual_seed(0)
        found.append((guides.ShortRun(gaussian, 3, 0.2, masks=masks).draws(5, X), torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_in_evaluation_there_are_no_masks():
    model, x = Masked().eval(), torch.zeros(50, 1, dtype=torch.double)
    torch.manual_seed(0)
    ends = guides.ShortRun(model, 2, 0.1**0.5, temperature=0.0).draws(1, x)
    torch.manual_seed(0)
    start = guides.ShortRun(model).space(x).prior(1, x)
    assert torch.allclose(ends, start * (1 - 0.05 * (1 + 9 / 4)) ** 2)


def test_the_published_steps_for_text():
    assert text_steps() == [0.8, 0.7, 0.6, 0.5, 0.2, 0.2, 0.1, 0.1, *[0.05] * 12]
    assert text_steps(3) == [0.8, 0.7, 0.6]
    with pytest.raises(ValueError, match="num_steps >= 1"):
        text_steps(0)


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 0}, {"step_size": -0.1}, {"step_size": [0.1, 0.2]}, {"kernel": "gibbs"}, {"num_leapfrog": 0},
     {"temperature": -0.1}, {"temperature": math.nan}, {"masks": "stale"}],
)  # fmt: skip
def test_bad_options_raise(options):
    with pytest.raises(ValueError, match=r"needs|must be|must not be"):
        guides.ShortRun(gaussian, **options)


def test_initial_guide_of_another_model_raises():
    other = guides.Amortized(lambda x: gaussian(x), torch.nn.Linear(1, 2))
    with pytest.raises(ValueError, match="same model"):
        guides.ShortRun(gaussian, init=other)
