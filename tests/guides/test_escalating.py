"""Escalating: who serves whom, and why; weights that are each datum's own guide's; chains that see a missed mode."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyrovae import diagnose, evidence, fit, guides, noise
from pyrovae.errors import IncompatibleError
from pyrovae.guides.escalating import _bound, _choose, _coverage, _khat
from pyrovae.models import PPCA
from pyrovae.samplers import adaptive


def gaussian_at(model, loc, log_var, dtype=torch.float64):
    """The same Gaussian for every datum."""
    net = nn.Linear(1, 2 * len(loc)).to(dtype)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([*loc, *log_var]))
    return guides.Amortized(model, net, encoder_input=lambda x: x.reshape(len(x), -1)[:, :1])


def scalar(x):
    """Posterior N(0.8 x, 1/5)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.squeeze(-1))


NEAR, FAR = 0.1, 4.0
X = torch.tensor([[NEAR], [FAR], [-NEAR], [-FAR], [0.0]], dtype=torch.double)


def two_stages(**options):
    """A prior-like Gaussian, good near zero alone, and the exact posterior by search."""
    return guides.Escalating([gaussian_at(scalar, [0.0], [-1.0]), guides.LocalSVI(scalar)], **options)


def test_each_datum_goes_on_until_its_weights_can_be_trusted():
    guide = two_stages()
    found = guide.served(X)
    assert found.stage.tolist() == [0, 1, 0, 1, 0]
    assert found.satisfied.all()
    assert (found.khat[0, [1, 3]] > 0.7).all()
    assert (found.khat[0, [0, 2, 4]] <= 0.7).all()
    assert found.khat[1].isnan().tolist() == [True, False, True, False, True]  # not asked where not needed
    assert found.coverage is None
    assert "5 of 5 data satisfied: k-hat <= 0.7" in repr(found)
    assert [line.split()[-3:] for line in repr(found).splitlines()[2:]] == [["5", "3", "3"], ["2", "2", "2"]]
    assert "<td>LocalSVI</td><td>2</td>" in found._repr_html_()


def test_weights_and_draws_are_those_of_the_guide_that_serves():
    guide = two_stages()
    exact = dist.Normal(torch.zeros((), dtype=torch.double), math.sqrt(1.25)).log_prob(X[:, 0])
    weights = evidence.log_weights(scalar, guide, X, num_samples=4000)
    elbo, iwae = evidence.summarize(weights)
    assert ((iwae.values - exact).abs() < 4 * iwae.se + 1e-3).all()
    far = torch.tensor([1, 3])
    assert ((exact - elbo.values)[far].abs() < 0.01).all()  # the search finds the posterior
    first = evidence.log_weights(scalar, guide.guides[0], X, num_samples=4000).mean(0)
    se = weights.std(0) / 4000**0.5
    assert ((elbo.values - first)[[0, 2, 4]].abs() < 6 * se[[0, 2, 4]]).all()
    assert (elbo.values - first)[far].min() > 5
    draws = guide.draws(4000, X)[..., 0]
    assert ((draws.mean(0) - 0.8 * X[:, 0])[far].abs() < 0.06).all()
    assert ((draws.mean(0))[[0, 2, 4]].abs() < 0.06).all()


def test_a_datum_is_judged_alike_whatever_its_batch():
    guide = two_stages(chains=2, chain_steps=20)
    whole = guide.served(X, seed=3)
    for index in ([1], [4, 1], [3, 2, 0]):
        some = guide.served(X[index], seed=3, indices=index)
        assert torch.equal(some.stage, whole.stage[index])
        torch.testing.assert_close(some.khat, whole.khat[:, index], equal_nan=True, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(some.coverage, whole.coverage[:, index], equal_nan=True, atol=0.02, rtol=0)
    assert not torch.allclose(guide.served(X, seed=4).khat[0], whole.khat[0])


def test_judging_leaves_weights_and_random_state_alone():
    guide, state = two_stages(chains=2, chain_steps=8), torch.get_rng_state()
    before = {key: value.clone() for key, value in guide.state_dict().items()}
    guide.served(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in guide.state_dict().items())
    assert guide.training


MODES = torch.full((6,), 2.25, dtype=torch.double)  # of z^2 near 2.25: at -1.5 and 1.5


def one_and_both():
    at = [gaussian_at(problems.bimodal, [loc], [-4.6]) for loc in (1.5, -1.5)]
    return at[0], guides.Mixture([gaussian_at(problems.bimodal, [1.5], [-4.6]), at[1]])


def test_chains_see_a_missed_mode_that_khat_cannot():
    one, both = one_and_both()
    fit(problems.bimodal, both, MODES, epochs=300, optimizer=pyro.optim.Adam({"lr": 1e-2}), progress=False)
    fit(problems.bimodal, one, MODES, epochs=300, optimizer=pyro.optim.Adam({"lr": 1e-2}), progress=False)
    assert (guides.Escalating([one, both]).served(MODES).stage == 0).all()  # k-hat is content with one mode
    found = guides.Escalating([one, both], chains=8).served(MODES)
    assert (found.stage == 1).all()
    assert (found.coverage[0] < 0.01).all()
    assert (found.coverage[1] > 0.2).all()
    assert torch.equal(found.satisfied, found.khat[1] <= 0.7)
    assert "and chains from the prior covered" in repr(found)


def test_two_chains_miss_a_mode_as_often_as_they_should():
    """Both in the mode that the guide has: a quarter of the time."""
    one, _ = one_and_both()
    x = MODES[:1].expand(200).contiguous()
    found = guides.Escalating([one], chains=2).served(x)
    missed = float((found.coverage[0] >= 0.05).double().mean())
    assert abs(missed - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 200)


def test_nobody_is_left_unserved():
    """The largest bound serves, and is not called satisfied."""
    bad = [gaussian_at(scalar, [0.0], [-1.0]), gaussian_at(scalar, [1.0], [-1.0]), gaussian_at(scalar, [-9.0], [-1.0])]
    found = guides.Escalating(bad).served(X[1:2])
    assert found.stage.tolist() == [1]
    assert not found.satisfied.any()
    assert "0 of 1 data satisfied" in repr(found)
    assert torch.isfinite(evidence.log_weights(scalar, guides.Escalating(bad), X[1:2], num_samples=10)).all()


def test_choice_by_hand():
    nan, inf = math.nan, math.inf
    bound = torch.tensor([[-2.0, -3.0, -2.0, -inf], [-inf, -1.0, -1.0, -inf]]).double()
    covers = torch.tensor([[True, True, True, False], [False, True, False, True]])
    good = torch.tensor([[True, False, False, False], [False, True, False, False]])
    stage, satisfied = _choose(bound, covers, good)
    assert stage.tolist() == [0, 1, 0, 0]  # the third by coverage before the bound
    assert satisfied.tolist() == [True, True, False, False]
    stage, _ = _choose(bound, torch.zeros_like(covers), torch.zeros_like(good))
    assert stage.tolist() == [0, 1, 1, 0]
    weights = torch.zeros(50, 4).double()
    weights[3, 0], weights[:, 1], weights[2, 2] = nan, -inf, inf
    assert _khat(weights).tolist() == [inf, inf, inf, -inf]
    assert _bound(weights).tolist() == [-inf, -inf, -inf, 0.0]


def test_coverage_by_hand():
    torch.manual_seed(0)
    paths = torch.randn(5000, 1, 3, 2, dtype=torch.double)
    u = torch.randn(5000, 3, 2, dtype=torch.double)
    u[:, 1, 0] += 8
    u[:2500, 2, 1] += 8
    found = _coverage(u, paths)
    assert found[0] == pytest.approx(0.954, abs=0.02)
    assert found[1] == 0
    assert found[2] == pytest.approx(0.477, abs=0.02)


def test_chains_have_the_posterior_for_their_law():
    """pPCA: means and standard deviations of chains that began at the prior, against the exact posterior."""
    model, x = problems.ppca(rows=5, latent=2, pixels=6)
    space = guides.Amortized(model, nn.Linear(6, 4).double()).space(x)
    torch.manual_seed(0)
    draws = adaptive.run(space.bind(x), space.prior(64, x), 200)
    assert draws.shape == (100, 64, 5, 2)
    exact = model.posterior(x)
    by_chain = draws.mean(0)
    se = by_chain.std(0) / 64**0.5
    assert ((by_chain.mean(0) - exact.mean).abs() < 4.5 * se).all()
    ratio = draws.flatten(0, 1).std(0) / exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((ratio - 1).abs() < 0.1).all()


def test_joint_mode():
    """One datum, all or nothing."""
    model = problems.eight_schools()
    first = guides.Amortized(model, None, plate=None)
    guide = guides.Escalating([first, guides.LocalSVI(model, plate=None, max_steps=300)], num_samples=500, chains=2)
    found = guide.served()
    assert found.khat.shape == (2, 1)
    assert guide.sample(3)["eta"].shape == (3, 8)
    assert diagnose.khat(model, guide, num_samples=500).shape == (1,)


def test_a_plate_of_fixed_size_takes_all_rows():
    x = X.clone()

    def fixed(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x.squeeze(-1))

    guide = guides.Escalating([gaussian_at(fixed, [0.0], [-1.0]), guides.LocalSVI(fixed)])
    assert guide.served(x).stage.tolist() == [0, 1, 0, 1, 0]


def test_chains_with_densities_are_stages_too():
    model = PPCA(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double(), noise=0.5)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    base = guides.Amortized(model, nn.Linear(4, 4).double())
    guide = guides.Escalating([base, guides.DAIS(base, 2), guides.Laplace(model, nn.Linear(4, 2).double())],
                              khat=-1.0)  # fmt: skip
    assert guide.served(x).stage.tolist() == [2, 2, 2]  # Laplace is exact here
    exact = model.log_evidence(x)
    assert torch.allclose(evidence.log_weights(model, guide, x, num_samples=20), exact.expand(20, 3), atol=1e-8)


def test_it_is_evaluated_and_not_trained():
    guide = two_stages(num_samples=50)
    with pytest.raises(IncompatibleError, match="is for evaluation: train the guides it is made of"):
        fit(scalar, guide, X, epochs=1, progress=False)
    svi = SVI(scalar, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with pytest.raises(IncompatibleError, match="is for evaluation"):
        svi.step(X)
    assert math.isfinite(svi.evaluate_loss(X))
    assert Predictive(scalar, guide=guide, num_samples=3, return_sites=["z"])(X)["z"].shape == (3, 5)
    with torch.no_grad(), noise.per_datum(0, range(5)):
        assert poutine.trace(guide).get_trace(X).nodes["z"]["value"].shape == (5,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: guides.Escalating([]), TypeError, "at least one guide"),
        (lambda: guides.Escalating([guides.ShortRun(scalar)]), TypeError, "DensityShortRun or DAIS"),
        (lambda: guides.Escalating([guides.LocalSVI(scalar), guides.LocalSVI(problems.bimodal)]), ValueError,
         "one model"),
        (lambda: two_stages(num_samples=20), ValueError, "at least 25"),
        (lambda: two_stages(chains=2, chain_steps=2), ValueError, "chain_steps >= 4"),
        (lambda: two_stages(coverage=0.0), ValueError, "between 0 and 1"),
        (lambda: two_stages().served(X, indices=[1]), ValueError, "each of the 5 data"),
        (lambda: adaptive.run(lambda u: -u.sum(-1), torch.zeros(1, 1, 1), 1), ValueError, "num_steps >= 2"),
    ],
)  # fmt: skip
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
