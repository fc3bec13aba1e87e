"""Boosting: both modes of a posterior, exact scores, weights that are worth having, and a rule that stops."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems

from pyrovae import evidence, guides
from pyrovae.bounded import logarithmic
from pyrovae.models import PPCA


def squares(x):
    """z ~ N(0, 5), x | z ~ N(z^2, 0.1): at x = 4 the posterior has modes at -2 and 2."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 5.0))
        pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)


X = torch.tensor([4.0, 1.0, 0.3], dtype=torch.double)


def exact_evidence():
    z = torch.linspace(-20, 20, 400_001, dtype=torch.double)
    log_joint = dist.Normal(torch.zeros((), dtype=torch.double), 5.0).log_prob(z)
    log_joint = log_joint + dist.Normal(z**2, 0.1).log_prob(X.unsqueeze(-1))
    return torch.logsumexp(log_joint, -1) + math.log(float(z[1] - z[0]))


def fit(number=4, model=squares, args=(X,), seed=0, plate="data", **options):
    torch.manual_seed(seed)
    guide = guides.BoostedVI(model, number, plate=plate, **options)
    return guide, guide.fit(*args)


@pytest.mark.parametrize("weights", ["corrective", "line-search"])
def test_both_modes_are_found(weights):
    guide, found = fit(2, weights=weights)
    q = guide.family(X)(found.lam)
    locs, order = q.locs[0, :, 0].sort()
    assert torch.allclose(locs, torch.tensor([-2.0, 2.0], dtype=torch.double), atol=0.02)
    assert torch.allclose(q.log_weights[0, order].exp(), torch.full((2,), 0.5, dtype=torch.double), atol=0.1)
    gain = found.elbo[-1] - found.elbo[0]
    assert gain[0] == pytest.approx(math.log(2), abs=0.06)
    assert (found.elbo[-1] < exact_evidence() + 0.02).all()


def test_components_are_added_while_they_are_worth_it():
    _, found = fit(6)
    gap = exact_evidence() - found.elbo[-1]
    assert gap.max() < 0.15
    assert found.components.min() >= 2
    assert found.components[0] <= 3  # two modes, each a Gaussian but for a little skewness
    assert found.converged.any()
    assert (found.elbo.diff(dim=0) > -0.02).all()


def test_all_weights_at_once_are_no_worse_than_one_at_a_time():
    ends = {weights: fit(4, weights=weights)[1].elbo[-1].mean() for weights in ("fixed", "line-search", "corrective")}
    assert ends["corrective"] > ends["line-search"] - 0.01
    assert ends["line-search"] > ends["fixed"]


def test_the_reported_elbo_is_that_of_the_mixture():
    guide, found = fit(3)
    family = guide.family(X)
    u = family(found.lam).sample((20_000,))
    weights = guide.space(X).log_joint(u, X) - family(found.lam).log_prob(u)
    se = weights.std(0) / 20_000**0.5
    assert (abs(weights.mean(0) - found.elbo[-1]) < 4 * se + 0.03).all()


def test_a_posterior_that_is_a_gaussian_takes_one():
    """Orthogonal columns: the first component is the posterior, no other promises anything."""
    weight = torch.linalg.qr(torch.randn(5, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0)))[0]
    model, x = PPCA(weight, noise=0.5), torch.randn(4, 5, dtype=torch.double)
    _, found = fit(4, model, (x,))
    assert found.converged.all()
    assert (found.components == 1).all()
    assert torch.allclose(found.elbo[-1], model.log_evidence(x), atol=0.01)


def test_without_a_bound_components_run_away():
    """What the bound is for: documented, not hoped for."""
    guide, found = fit(2, bound=math.inf, weights="fixed")
    assert guide.family(X)(found.lam).locs[0].abs().max() > 3.0


def test_eight_schools_in_joint_mode():
    """Fresh draws of the mixture, against the best single Gaussian; more of tau's upper tail is covered."""
    model = problems.eight_schools()
    guide, found = fit(6, model, (), plate=None, tolerance=0.005)
    family, space, single = guide.family(), guide.space(), guides.LocalSVI(model, plate=None)
    elbos, spreads = [], []
    for q in (single.family()(single.fit().lam), family(found.lam)):
        u = q.sample((40_000,))
        elbos.append((space.log_joint(u) - q.log_prob(u))[:, 0])
        spreads.append(space.constrain(u)["tau"].std())
    gain, se = elbos[1].mean() - elbos[0].mean(), ((elbos[0].var() + elbos[1].var()) / 40_000) ** 0.5
    assert gain > 0.1 + 3 * se
    assert spreads[0] < spreads[1] < 4.0
    guide = guides.BoostedVI(model, 2, plate=None, num_steps=50)
    assert guide.sample(7)["eta"].shape == (7, 8)


def test_evaluation_does_not_depend_on_the_neighbours():
    guide = guides.BoostedVI(squares, 3, num_steps=40)
    whole = evidence.elbo(squares, guide, X, num_samples=50, chunk=3)
    parts = evidence.elbo(squares, guide, X, num_samples=50, chunk=1)
    assert torch.allclose(whole.values, parts.values, atol=1e-5)


def test_a_datum_that_is_done_stays_done_whoever_is_beside_it():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.where(x[:, 1] > 0.5, z**2, z), 0.4), obs=x[:, 0])

    easy, hard = torch.tensor([[0.3, 0.0]]), torch.tensor([[3.0, 1.0]])
    guide = guides.BoostedVI(model, 3, num_steps=60)
    both = guide.fit(torch.cat([easy, hard]))
    assert len(both.gap) > 1
    assert both.converged[0]
    assert both.components[0] == 1
    assert torch.equal(both.gap[0, 0].expand(len(both.gap)), both.gap[:, 0])  # it was not searched again


def test_fit_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    guides.BoostedVI(squares, 1, num_steps=2).fit(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_logarithmic_bound():
    ratio = torch.tensor([-3.0, 0.0, 1e-4, 10.0, 1e6])
    found = logarithmic(ratio, 5.0)
    assert found[0] == -3.0
    assert found[2] == pytest.approx(1e-4, rel=1e-3)
    assert found[3] == pytest.approx(5 * math.log(3))
    assert found[4] < 62
    assert torch.equal(logarithmic(ratio, math.inf), ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "at least 1"),
        ({"weights": "best"}, "weights must be"),
        ({"bound": 0.0}, "must be positive"),
        ({"entropy": -1.0}, "must not be negative"),
        ({"tolerance": -1.0}, "tolerance >= 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        guides.BoostedVI(squares, **options)
