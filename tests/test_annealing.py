"""Annealing and brackets: unbiased weights, bounds on the right side, resumed runs, loud refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from torch import nn

from pyrovae import evidence, guides, models, reference
from pyrovae.certification.schools import posterior
from pyrovae.errors import CheckpointError, DataError, LatentError, ScaleError
from pyrovae.latents import LatentSpace
from pyrovae.runtime import seeded
from pyrovae.simulate import simulate
from pyrovae.slopes import tempered


def normal(x):
    """z ~ N(0, 1), x | z ~ N(z, 0.5^2): p(x) = N(0, 1.25)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


X = torch.tensor([0.3, -2.0, 1.0], dtype=torch.double)
EVIDENCE = dist.Normal(0.0, math.sqrt(1.25)).log_prob(X)
POSTERIOR = dist.Normal(0.8 * X, math.sqrt(0.2))


def small_vae(dtype=torch.float32, rows=7):
    torch.manual_seed(0)
    vae = models.VAE(nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 9)), 2).to(dtype)
    return vae, torch.bernoulli(torch.full((rows, 9), 0.5, dtype=dtype))


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
def test_temperatures(schedule):
    betas = evidence.temperatures(100, schedule)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert len(betas) == 101
    assert (betas.diff() > 0).all()
    torch.testing.assert_close(betas + betas.flip(0), torch.ones(101, dtype=torch.double))
    if schedule == "sigmoid":
        ends = [torch.sigmoid(torch.tensor(4.0 * t, dtype=torch.double)) for t in (-1, -0.5, 1)]
        torch.testing.assert_close(betas[25], (ends[1] - ends[0]) / (ends[2] - ends[0]))


def test_weights_are_unbiased_in_both_directions():
    """Few temperatures, many chains: E[w] = p(x) forwards, E[w] = 1 / p(x) backwards, within 4 standard errors."""
    chains = 4000
    options = {"num_chains": chains, "num_temperatures": 6}
    lower = evidence.ais(normal, X, **options)
    with seeded(1):
        exact = POSTERIOR.sample((chains,)).unsqueeze(-1)
    upper = evidence.reverse_ais(normal, exact, X, **options)
    for found in (lower, upper):
        assert (found.se > 0).all()
        assert (found.se < 0.1).all()
        assert ((found.values - EVIDENCE).abs() < 4 * found.se).all()
    assert lower.kind == "lower bound"
    assert upper.kind == "upper bound"


def test_the_parts_add_up():
    vae, x = small_vae(torch.float64)
    space = LatentSpace(vae, x)
    bound, u = space.bind(x), torch.randn(3, 7, 2, dtype=torch.double)
    target = tempered(bound, u)
    latent, observed = bound.terms(u)
    parts = target.parts(u)
    torch.testing.assert_close(parts.latent, latent)
    torch.testing.assert_close(parts.observed, observed)
    leaf = u.clone().requires_grad_()
    latent, observed = bound.terms(leaf)
    (expected,) = torch.autograd.grad((latent + 0.3 * observed).sum(), leaf)
    torch.testing.assert_close(target.at(0.3).gradient(u), expected)
    state = target.at(0.3).at(u)
    torch.testing.assert_close(state.gradient, expected)
    torch.testing.assert_close(state.log_density, (latent + 0.3 * observed).detach())


def test_the_bracket_of_ppca_closes():
    """It contains the exact value of every datum (within 4 standard errors) and narrows with temperatures."""
    model, x = problems.ppca(rows=9, noise=0.3)
    truth = model.log_evidence(x).detach()
    guide = guides.Amortized(model, nn.Linear(30, 20).double())
    widths = []
    for number in (50, 400, 3000):
        found = evidence.bracket(model, guide, x, num_samples=200, num_temperatures=number)
        assert found.upper.kind == "upper bound"
        # Markov: a bound is wrong by b nats with probability exp(-b) at most, 5 nats once in 150.
        assert (found.lower.values < truth + 5).all()
        assert (found.upper.values > truth - 5).all()
        widths.append(float(found.width.mean()))
    assert all(wide > 2 * narrow for wide, narrow in pairwise(widths))
    assert widths[-1] < 0.5
    assert (found.lower.values - 4 * found.lower.se - 0.1 < truth).all()
    assert (found.upper.values + 4 * found.upper.se + 0.1 > truth).all()
    iwae, ais = found.candidates
    assert (found.lower.values <= torch.maximum(iwae.values, ais.values) + 1e-9).all()
    assert found.lower.mean > ais.mean - 0.2
    assert "width" in repr(found)
    assert "upper bound" in found._repr_html_()


def test_upper_bounds_only_where_they_exist():
    vae, x = small_vae(torch.float64)
    guide = guides.Amortized(vae, nn.Linear(9, 4).double())
    alone = evidence.bracket(vae, guide, x, num_samples=100, num_temperatures=50)
    assert alone.upper is None
    assert "no upper bound" in repr(alone)
    with pytest.raises(ValueError, match="no upper bound"):
        _ = alone.width
    chains = reference.hmc(vae, x, progress=False, target_ess=500)
    found = evidence.bracket(vae, guide, x, num_samples=100, num_temperatures=200, reference=chains)
    assert found.upper.kind == "estimate"
    exact = reference.exact(vae, x)
    bounded = evidence.bracket(vae, None, x, num_temperatures=200, reference=exact)
    assert bounded.upper.kind == "upper bound"
    for estimate in (found.upper, bounded.upper, bounded.lower):
        assert ((estimate.values - exact.log_evidence).abs() < 4 * estimate.se + 0.2).all()
    quick = evidence.bracket(vae, guide, x, num_samples=100, num_temperatures=0)
    assert quick.lower.name == "IWAE-100"
    with pytest.raises(ValueError, match="other data"):
        evidence.bracket(vae, guide, 1 - x, num_samples=100, num_temperatures=10, reference=chains)
    with pytest.raises(ValueError, match="nothing to bound"):
        evidence.bracket(vae, None, x, num_temperatures=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simulated_data_are_bracketed(dtype):
    """Latents and data come from the model; 7 rows, 1 row; the same numbers again; the caller's state stays."""
    vae, x = small_vae(dtype)
    state = torch.get_rng_state()
    first, again = (evidence.bdmc(vae, x, num_temperatures=300) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0
    assert vae.training
    assert torch.equal(first.upper.values, again.upper.values)
    assert first.simulated
    assert first.lower.provenance.fingerprint != evidence.ais(vae, x, num_temperatures=2).provenance.fingerprint
    assert ((first.width + 4 * first.lower.se + 4 * first.upper.se) > 0).all()
    assert float(first.width.mean()) < 0.5
    assert evidence.bdmc(vae, x[:1], num_temperatures=20).lower.values.shape == (1,)


def test_eight_schools_in_joint_mode():
    """Constrained and unconstrained sites, one datum: the exact evidence within 4 standard errors."""
    found = evidence.ais(problems.eight_schools(), plate=None, num_chains=64, num_temperatures=300)
    assert abs(float(found.values[0]) - posterior().log_evidence) < 4 * float(found.se[0]) + 0.05


def test_simulation_draws_from_the_joint():
    """Means and covariance of (u, x) under a Gamma prior, and covariates that stay as they are."""

    def model(x, exposure):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0, dtype=torch.double), 2.0))
            pyro.sample("x", dist.Poisson(rate * exposure), obs=x)

    rows = 20_000
    x, exposure = torch.ones(rows, dtype=torch.double), torch.full((rows,), 4.0, dtype=torch.double)
    space = LatentSpace(model, x, exposure=exposure)
    with seeded(0):
        u, args, kwargs = simulate(space, (x,), {"exposure": exposure})
    rate = u.exp().squeeze(-1)
    assert kwargs["exposure"] is exposure
    assert abs(float(rate.mean()) - 1.5) < 4 * math.sqrt(0.75 / rows)
    assert abs(float(args[0].mean()) - 6) < 4 * math.sqrt((6 + 16 * 0.75) / rows)
    slope = float(torch.cov(torch.stack([rate, args[0]]))[0, 1]) / 0.75
    assert abs(slope - 4) < 0.2


def test_simulation_says_what_it_cannot_do():
    def doubled(x, twin=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    def factored(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))

    x = torch.tensor([0.5, 1.5])
    space = LatentSpace(doubled, x)
    with pytest.raises(DataError, match="no argument is what site 'x' observes"):
        simulate(space, (x,), {})
    with pytest.raises(DataError, match="does not have"):
        simulate(space, (x,), {}, {"x": "y"})
    u, args, _ = simulate(space, (x,), {}, {"x": 0})
    assert u.shape == (2, 1)
    assert not torch.equal(args[0], x)
    with pytest.raises(DataError, match="more than one argument"):
        simulate(space, (x,), {"twin": (2 * x, 2 * x)})
    with pytest.raises(DataError, match="factor"):
        evidence.bdmc(factored, x)


def test_batch_norm_does_not_move():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 9))
    vae = models.VAE(decoder, 2).train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    x = torch.bernoulli(torch.full((5, 9), 0.5))
    evidence.bdmc(vae, x, num_temperatures=5)
    reference.hmc(vae, x, progress=False, target_ess=50, warmup=50)
    assert vae.training
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Killed in the third chunk and resumed: the numbers of an unbroken run; other settings or data are refused."""
    vae, x = small_vae()
    options = {"num_temperatures": 20, "chunk": 2}
    unbroken = evidence.ais(vae, x, **options)
    from pyrovae.evidence import annealing

    whole, calls = annealing._anneal, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(annealing, "_anneal", dies)
    with pytest.raises(KeyboardInterrupt):
        evidence.ais(vae, x, resume=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = evidence.ais(vae, x, resume=tmp_path, **options)
    assert len(calls) == 5  # two chunks before, the one that died, two after
    assert torch.equal(resumed.values, unbroken.values)
    for changed, data in (({"num_temperatures": 21, "chunk": 2}, x), (options, 1 - x), ({**options, "seed": 1}, x)):
        with pytest.raises(CheckpointError, match="other weights, data or settings"):
            evidence.ais(vae, data, resume=tmp_path, **changed)
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(0.1)
    with pytest.raises(CheckpointError):
        evidence.ais(vae, x, resume=tmp_path, **options)


def test_importance_weights_resume_too(tmp_path):
    vae, x = small_vae()
    guide = guides.Amortized(vae, nn.Linear(9, 4))
    first = evidence.iwae(vae, guide, x, num_samples=20, chunk=3)
    kept = evidence.iwae(vae, guide, x, num_samples=20, chunk=3, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    again = evidence.iwae(vae, guide, x, num_samples=20, chunk=3, resume=tmp_path)
    assert torch.equal(first.values, kept.values)
    assert torch.equal(first.values, again.values)


def test_bad_input_is_refused():
    vae, x = small_vae()
    for options, words in (({"num_chains": 1}, "num_chains >= 2"), ({"num_temperatures": 0}, "num_temperatures"),
                           ({"schedule": "cosine"}, "'linear' or 'sigmoid'"), ({"chunk": 0}, "chunk")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            evidence.ais(vae, x, **options)
    with pytest.raises(ValueError, match="posterior draws must have shape"):
        evidence.reverse_ais(vae, torch.zeros(16, 3, 2), x)
    with pytest.raises(ScaleError):
        evidence.ais(pyro.poutine.scale(vae, 0.5), x)

    def enumerated(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    with pytest.raises(LatentError, match="tempers the likelihood"):
        evidence.ais(enumerated, torch.zeros(2))


def test_two_chains_are_unbiased():
    """What is tuned is tuned on other chains: E[w] = p(x) with two chains and four temperatures, over 4,000 equal data.

    Tuned on their own starts they were 3 % too large here, eight standard errors.
    """
    x = torch.full((4000,), 0.3, dtype=torch.double)
    found = evidence.ais(normal, x, num_chains=2, num_temperatures=4)
    ratio = (found.values - EVIDENCE[0]).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 4000**0.5


class Prior(nn.Module):
    """The prior for every datum, as (loc, log-variance)."""

    def forward(self, x):
        return torch.zeros(len(x), 2, dtype=x.dtype)


def test_the_better_of_two_noisy_bounds_is_a_bound():
    """The larger of two is not: the mean over 1,500 equal data of each is below log p(x), of their maximum above."""
    x = torch.full((1500,), 0.3, dtype=torch.double)
    found = evidence.bracket(normal, guides.Amortized(normal, Prior()), x, num_samples=16, num_chains=8,
                             num_temperatures=4)  # fmt: skip
    off = found.lower.values - EVIDENCE[0]
    largest = torch.stack([c.values for c in found.candidates]).amax(0) - EVIDENCE[0]
    assert float(off.mean()) < 3 * float(off.std()) / 1500**0.5
    assert float(largest.mean()) > 5 * float(largest.std()) / 1500**0.5


def test_brackets_resume(tmp_path):
    vae, x = small_vae()
    guide = guides.Amortized(vae, nn.Linear(9, 4))
    options = {"num_samples": 20, "num_chains": 4, "num_temperatures": 8, "reference": None}
    plain = evidence.bracket(vae, guide, x, **options)
    for _ in range(2):
        again = evidence.bracket(vae, guide, x, resume=tmp_path / "b", **options)
        assert torch.equal(again.lower.values, plain.lower.values)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"importance", "forward"}
    first = evidence.bdmc(vae, x, num_chains=4, num_temperatures=8, resume=tmp_path / "s")
    second = evidence.bdmc(vae, x, num_chains=4, num_temperatures=8, resume=tmp_path / "s")
    assert torch.equal(first.upper.values, second.upper.values)
    with pytest.raises(ValueError, match="pass resume to this function"):
        evidence.bdmc(vae, x, annealing={"resume": tmp_path})


def test_the_whole_program_is_kept_too(tmp_path):
    model = problems.eight_schools()
    found = evidence.ais(model, num_chains=4, num_temperatures=8, plate=None, resume=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["program.pt"]
    again = evidence.ais(model, num_chains=4, num_temperatures=8, plate=None, resume=tmp_path)
    assert torch.equal(found.values, again.values)


def scaled(scale):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    return model


def learned(x):
    scale = pyro.param("observation_scale", torch.tensor(0.5, dtype=torch.double))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def test_parts_of_another_program_are_refused(tmp_path):
    """Other numbers in a closure, another bare parameter; the same program written twice goes on."""
    options = {"num_chains": 4, "num_temperatures": 8}
    evidence.ais(scaled(0.5), X, resume=tmp_path / "a", **options)
    evidence.ais(scaled(0.5), X, resume=tmp_path / "a", **options)
    with pytest.raises(CheckpointError, match="another model"):
        evidence.ais(scaled(3.0), X, resume=tmp_path / "a", **options)
    with pyro.get_param_store().scope():
        evidence.ais(learned, X, resume=tmp_path / "b", **options)
        learned(X)
        evidence.ais(learned, X, resume=tmp_path / "c", **options)
        pyro.get_param_store()["observation_scale"] = torch.tensor(3.0, dtype=torch.double)
        with pytest.raises(CheckpointError, match="another model"):
            evidence.ais(learned, X, resume=tmp_path / "c", **options)


def weighted(x, weights):
    """Weights that all data share: z enters with their sum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z * weights.sum(), 0.5), obs=x)


@pytest.mark.parametrize("chunk", [2, 3, 4])
def test_a_shared_tensor_as_long_as_a_chunk_is_no_data(chunk):
    x, weights = torch.linspace(-2, 2, 7).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    whole = evidence.ais(weighted, x, weights, num_chains=64, num_temperatures=20)
    found = evidence.ais(weighted, x, weights, num_chains=64, num_temperatures=20, chunk=chunk)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x)
    for estimate in (whole, found):
        assert ((estimate.values - truth).abs() < 4 * estimate.se + 1e-3).all()
    guide = guides.Amortized(weighted, Prior(), encoder_input=lambda x, weights: x)
    weights_of = [evidence.log_weights(weighted, guide, x, weights, num_samples=8, chunk=c) for c in (7, chunk)]
    torch.testing.assert_close(weights_of[0], weights_of[1])


def test_an_encoder_called_posterior_is_not_taken_for_the_exact_one():
    vae, x = small_vae()
    vae.posterior = lambda x: dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
    assert evidence.bracket(vae, None, x, num_chains=4, num_temperatures=8).upper is None
