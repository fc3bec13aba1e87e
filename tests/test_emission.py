"""How guides write their draws: particles, inner plates and the Gaussian of each site."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyrovae import guides

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, SIGMA), obs=y)


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("features", 2, dim=-2):
            b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x.T)


def guide_of(mode: str, family: str) -> tuple[guides.Amortized, Tensor]:
    if mode == "joint":
        guide = guides.Amortized(eight_schools, None, family, plate=None, example=(Y,))
        with torch.no_grad():
            guide.constant.add_(0.3 * torch.randn(guide.constant.shape))
        return guide, Y
    width = guides.Amortized(local, nn.Identity(), family).family(torch.zeros(4, 2)).num_params
    torch.manual_seed(1)
    encoder = nn.Linear(2, width)
    with torch.no_grad():
        encoder.weight.mul_(0.2)
    return guides.Amortized(local, encoder, family), torch.randn(4, 2)


@pytest.mark.parametrize("family", ["diagonal", "full-rank", "low-rank", "mixture"])
@pytest.mark.parametrize("mode", ["joint", "local"])
def test_vectorised_sequential_and_importance_weights_agree(mode: str, family: str) -> None:
    """Inner plates beside Pyro's particle plate: doubled dims once gave 1,988 for 37."""
    guide, data = guide_of(mode, family)
    model = guide.model
    nesting = 1 if mode == "joint" else 2
    with torch.no_grad():
        weights = guide.log_weights(3000, data).sum(-1)
        expected, se = weights.mean(), weights.std() / math.sqrt(len(weights))
        losses = [Trace_ELBO] if family == "mixture" else [Trace_ELBO, TraceMeanField_ELBO]
        for loss in losses:
            for particles, repeats in ((100, 20), (1, 300)):
                elbo = loss(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=nesting)
                values = torch.tensor([-elbo.loss(model, guide, data) for _ in range(repeats)])
                both = math.hypot(se, values.std() / math.sqrt(repeats))
                assert abs(values.mean() - expected) < 3.5 * both, (loss.__name__, particles)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("family", ["diagonal", "full-rank"])
def test_draws_have_the_shape_of_the_models_own(family: str, number: int) -> None:
    """One draw is no special case."""
    for mode in ("joint", "local"):
        guide, data = guide_of(mode, family)
        draws = guide.sample(number, data)
        nodes = poutine.trace(guide.model).get_trace(data).nodes
        for name, value in draws.items():
            assert value.shape == (number, *nodes[name]["value"].shape)
        stock = Predictive(guide.model, guide=guide, num_samples=number)(data)
        for name, value in draws.items():
            assert stock[name].numel() == value.numel()  # Predictive pads scalars for the plate: [S, 1]
        pyro.clear_param_store()


@pytest.mark.parametrize("family", ["diagonal", "full-rank", "low-rank", "mixture"])
def test_site_posteriors_are_the_marginals_whichever_way_they_were_emitted(family: str) -> None:
    guide, x = guide_of("local", family)
    space, q = guide.space(x), guide.posterior(x)
    found = space.site_posteriors(poutine.trace(guide).get_trace(x))
    assert set(found) == {"a", "b"}
    for site in space.sites:
        fn = found[site.name]
        mean, variance = fn.mean, fn.variance
        if family == "diagonal":  # emitted in the model's plates
            mean, variance = site.flatten(mean, joint=False), site.flatten(variance, joint=False)
        torch.testing.assert_close(mean, q.mean[:, site.slice])
        torch.testing.assert_close(variance, q.variance[:, site.slice])
