"""KL annealing on both sides of every ELBO, schedules, and per-datum noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyrovae import guides, noise
from pyrovae.handlers import LinearSchedule, anneal, kl_weight
from pyrovae.losses import ELBO
from pyrovae.runtime import preserve_rng

X = torch.tensor([0.3, 1.2, -0.7, 0.9])


def model(x: Tensor) -> None:
    """A positive and a real site, both Gaussian in u: prior u ~ N((0.5, -0.5), (1, 2)), x ~ N(log a + z, 1)."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.5, 1.0))
        z = pyro.sample("z", dist.Normal(-0.5, 2.0))
        pyro.sample("x", dist.Normal(a.log() + z, 1.0), obs=x)


class Constant(nn.Module):
    """An encoder that ignores the data."""

    def __init__(self, lam: Tensor) -> None:
        super().__init__()
        self.lam = nn.Parameter(lam)

    def forward(self, x: Tensor) -> Tensor:
        return self.lam.expand(len(x), -1)


LOC, PRIOR_LOC = torch.tensor([0.2, 0.1]), torch.tensor([0.5, -0.5])
ROOTS = {
    "diagonal": torch.tensor([[0.5, 0.0], [0.0, 0.8]]),
    "full-rank": torch.tensor([[0.5, 0.0], [0.6, 0.8]]),
}


def guide_of(family: str) -> guides.Amortized:
    root = ROOTS[family]
    if family == "diagonal":
        lam = torch.cat([LOC, 2 * root.diagonal().log()])
    else:
        lam = torch.cat([LOC, root.diagonal().log(), root[1, :1]])
    return guides.Amortized(model, Constant(lam), family)


def annealed(family: str, beta: float) -> float:
    """E_q[log p(x | z)] - beta KL(q || prior), summed over the data, in closed form."""
    q = dist.MultivariateNormal(LOC, scale_tril=ROOTS[family])
    prior = dist.MultivariateNormal(PRIOR_LOC, scale_tril=torch.diag(torch.tensor([1.0, 2.0])))
    spread = q.covariance_matrix.sum()  # variance of log a + z
    likelihood = dist.Normal(LOC.sum(), 1.0).log_prob(X) - 0.5 * spread
    return float(likelihood.sum() - beta * len(X) * torch.distributions.kl_divergence(q, prior))


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, ELBO], ids=["trace", "mean field", "ours"])
@pytest.mark.parametrize("family", ROOTS)
def test_annealed_value_is_the_closed_form(family: str, loss: Callable[..., Trace_ELBO], beta: float) -> None:
    guide = guide_of(family)
    sites = poutine.trace(guide).get_trace(X).nodes
    assert ("_u" in sites) == (family == "full-rank")  # packed, or one by one
    values = []
    with torch.no_grad(), anneal(beta):
        for _ in range(400):
            values.append(-loss(num_particles=1).loss(model, guide, X))
    found = torch.tensor(values, dtype=torch.float64)
    se = found.std() / math.sqrt(len(found))
    assert 0 < se < 0.3
    assert abs(found.mean() - annealed(family, beta)) < 3.5 * se


@pytest.mark.parametrize("family", ROOTS)
def test_every_site_of_the_guide_and_every_latent_of_the_model_is_scaled(family: str) -> None:
    guide = guide_of(family)
    with anneal(0.25):
        guide_nodes = poutine.trace(guide).get_trace(X).nodes
        model_nodes = poutine.trace(model).get_trace(X).nodes

    def scales(nodes: dict) -> dict[str, float]:
        return {name: node["scale"] for name, node in nodes.items() if node["type"] == "sample" and name != "data"}

    assert set(scales(guide_nodes).values()) == {0.25}
    assert scales(model_nodes) == {"a": 0.25, "z": 0.25, "x": 1.0}


def test_a_models_factor_counts_as_likelihood() -> None:
    def tilted() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("tilt", z)

    with anneal(0.25):
        nodes = poutine.trace(tilted).get_trace().nodes
    assert nodes["tilt"]["scale"] == 1.0
    assert nodes["z"]["scale"] == 0.25


def test_the_weight_in_force_is_the_product_and_is_given_back() -> None:
    assert kl_weight() == 1.0
    with anneal(0.5), anneal(0.5):
        assert kl_weight() == 0.25
    with pytest.raises(RuntimeError, match="inside"), anneal(0.5):
        raise RuntimeError("inside")
    assert kl_weight() == 1.0


def test_annealing_weighs_the_latent_part_of_the_bound_log_joint() -> None:
    bound = guide_of("diagonal").space(X).bind(X)
    u = torch.randn(3, 4, 2)
    latent, observed = bound.terms(u)
    torch.testing.assert_close(bound(u, 0.3), 0.3 * latent + observed)
    prior = dist.Normal(PRIOR_LOC, torch.tensor([1.0, 2.0])).log_prob(u).sum(-1)
    torch.testing.assert_close(latent, prior)


def test_linear_schedule() -> None:
    schedule = LinearSchedule(steps=10, start=0.2, end=1.0)
    assert [schedule(step) for step in (0, 5, 10, 1000)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    for options in ({"steps": 0}, {"steps": 5, "start": -0.1}, {"steps": 5, "end": -1.0}):
        with pytest.raises(ValueError, match="steps >= 1 and weights >= 0"):
            LinearSchedule(**options)


# Per-datum noise


def test_noise_is_reproducible_and_independent_of_chunks_and_order() -> None:
    like = torch.zeros((), dtype=torch.float64)
    with noise.per_datum(7, range(6)):
        whole = noise.normal(20, 6, 3, like=like)
        more = noise.normal(20, 6, 3, like=like)
    assert not torch.equal(whole, more)
    for rows in ([0, 1], [5, 2, 3], [4]):
        with noise.per_datum(7, rows):
            assert torch.equal(noise.normal(20, len(rows), 3, like=like), whole[:, rows])
            assert torch.equal(noise.normal(20, len(rows), 3, like=like), more[:, rows])
    with noise.per_datum(8, range(6)):
        other = noise.normal(20, 6, 3, like=like)
    assert (other != whole).all()


def test_noise_is_standard_normal_and_independent_across_data_and_seeds() -> None:
    like = torch.zeros((), dtype=torch.float64)
    blocks = []
    for seed in (0, 1):
        with noise.per_datum(seed, range(5)):
            blocks.append(noise.normal(4000, 5, 1, like=like).squeeze(-1))
    z = torch.cat(blocks, 1)  # 10 streams
    assert (z.mean(0).abs() < 4 / math.sqrt(4000)).all()
    assert ((z.var(0) - 1).abs() < 4 * math.sqrt(2 / 4000)).all()
    correlation = torch.corrcoef(z.T) - torch.eye(10, dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(4000)


def test_noise_nests_and_leaves_the_global_state_alone() -> None:
    like = torch.zeros(())
    state = torch.get_rng_state()
    with noise.per_datum(0, [0]):
        first = noise.normal(1, 1, 2, like=like)
        with noise.per_datum(1, [0, 1]):
            assert noise.normal(1, 2, 2, like=like).shape == (1, 2, 2)
        assert noise.active()
        with pytest.raises(RuntimeError, match="opened for 1 data, but 3 rows"):
            noise.normal(1, 3, 2, like=like)
    assert not noise.active()
    assert torch.equal(torch.get_rng_state(), state)
    with noise.per_datum(0, [0]):
        assert torch.equal(noise.normal(1, 1, 2, like=like), first)
    with preserve_rng():
        free = noise.normal(1, 1, 2, like=like)
    assert torch.equal(free, torch.randn(1, 1, 2))


@pytest.mark.parametrize("family", ["diagonal", "full-rank"])
def test_importance_weights_do_not_depend_on_chunks(family: str) -> None:
    guide = guide_of(family)
    with noise.per_datum(3, range(4)):
        whole = guide.log_weights(50, X)
    for rows in ([0, 1, 2], [3], [2, 0]):
        with noise.per_datum(3, rows):
            part = guide.log_weights(50, X[rows])
        torch.testing.assert_close(part, whole[:, rows], rtol=1e-5, atol=1e-5)
