"""Batched HMC: exact moments, what it flags, and that nothing depends on how it is called."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from torch import nn

from pyrovae import evidence, guides, models, reference
from pyrovae.certification.problems import PROBLEMS
from pyrovae.certification.schools import posterior
from pyrovae.errors import CheckpointError, IncompatibleError, ReferenceRefused, ScaleError
from pyrovae.latents import LatentSpace
from pyrovae.memory import rows_within
from pyrovae.samplers import batched, init, mass
from pyrovae.slopes import slopes


def hmc(model, *args, **kwargs):
    return reference.hmc(model, *args, **{"progress": False, **kwargs})


def normal(x, scale):
    """u ~ N(0, 1), x | u ~ N(u, scale), one scale a datum."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(u, scale), obs=x)


def small_vae(dtype=torch.float32):
    torch.manual_seed(0)
    vae = models.VAE(nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 9)), 2).to(dtype)
    return vae, torch.bernoulli(torch.full((7, 9), 0.5, dtype=dtype))


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.parametrize("name", ["ppca", "correlated", "banana", "gamma-scale", "logistic"])
def test_exact_moments(name, kind):
    """Means within 4 standard errors, sds within 4 of theirs (5 %), every datum ok."""
    problem = PROBLEMS[name]()
    found = hmc(problem.model, problem.x, mass=kind)
    exact_sd = problem.truth.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert set(found.status) == {"ok"}
    assert (found.ess >= 2000).all()
    assert ((found.mean - problem.truth.mean).abs() < 4 * exact_sd / found.ess.sqrt().unsqueeze(-1)).all()
    assert ((found.sd / exact_sd - 1).abs() < 0.1).all()
    lp = LatentSpace(problem.model, problem.x).log_joint(found.draws, problem.x)
    torch.testing.assert_close(found.lp, lp)


def test_a_missed_mode_shows():
    """Two modes: R-hat sees chains that sit in different ones, and `compare` refuses those data."""
    problem = PROBLEMS["bimodal"]()
    found = hmc(problem.model, problem.x, max_thin=1)
    split = [i for i, status in enumerate(found.status) if status == "did not mix"]
    assert split
    guide = guides.Amortized(problem.model, nn.Linear(1, 2).double(), encoder_input=lambda x: x.unsqueeze(-1))
    refused = reference.compare(guide, found, problem.x, num_samples=100).refused if found.usable.any() else split
    assert set(split) <= set(refused)


def test_a_guide_that_misses_a_mode_is_found_out():
    """Every other chain starts from the prior."""
    x = torch.full((1,), 2.25, dtype=torch.double)

    class RightMode(guides.Amortized):
        def draws(self, num_samples, *args, **kwargs):
            return 1.5 + 0.05 * torch.randn(num_samples, 1, 1, dtype=torch.double)

    guide = RightMode(problems.bimodal, nn.Linear(1, 2).double(), encoder_input=lambda x: x.unsqueeze(-1))
    found = hmc(problems.bimodal, x, init=guide, max_thin=1)
    assert (found.initial[::2] > 1).all()
    assert (found.initial[1::2] < 0.5).any()
    assert found.status == ("did not mix",)
    one_mode = hmc(problems.bimodal, x, init=torch.full((8, 1, 1), 1.5, dtype=torch.double), max_thin=1)
    assert one_mode.draws.min() > 0


@pytest.mark.slow
def test_eight_schools():
    """Joint mode against the exact posterior of tau; the centred form is flagged, not reported as fine."""
    truth = posterior()
    found = hmc(problems.eight_schools(), plate=None)
    tau = found.samples()["tau"]
    assert found.status == ("ok",)
    assert abs(float(tau.mean()) - truth.mean) < 4 * truth.sd / math.sqrt(float(found.ess[0]))
    assert abs(float(tau.std()) / truth.sd - 1) < 0.1
    centred = hmc(problems.eight_schools(centred=True), plate=None, max_thin=1, target_ess=400)
    assert centred.status != ("ok",)
    guide = guides.Amortized(problems.eight_schools(centred=True), None, plate=None)
    with pytest.raises(ReferenceRefused):
        reference.compare(guide, centred)


def test_step_sizes_far_apart_run_in_groups():
    """A datum known to 1e-4 and one known to 0.5: each is right, and each has its own number of leapfrog steps."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.double)
    scale = torch.tensor([1e-4, 0.5, 1.0], dtype=torch.double)
    found = hmc(normal, x, scale)
    variance = 1 / (1 + scale**-2)
    sd = variance.sqrt()
    assert set(found.status) == {"ok"}
    assert ((found.mean[:, 0] - variance * x / scale**2).abs() < 4 * sd / found.ess.sqrt()).all()
    assert ((found.sd[:, 0] / sd - 1).abs() < 0.1).all()

    ends = torch.tensor([[1e-3], [1.0], [1.1]]).squeeze(-1)
    whole = LatentSpace(normal, x, scale).bind(x, scale)
    run = reference.hmc.__globals__["_Run"](whole, None, None, None)
    assert [group.tolist() for group in run._groups(ends)] == [[0], [1, 2]]
    assert run._groups(torch.ones(3))[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_seeds_and_nothing_else_moves(dtype):
    vae, x = small_vae(dtype)
    vae.decoder.train()
    before = [p.clone() for p in vae.parameters()]
    state = torch.get_rng_state()
    first, again = (hmc(vae, x, target_ess=100, warmup=60, chunk=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, old) and p.requires_grad for p, old in zip(vae.parameters(), before, strict=True))
    assert vae.decoder.training
    assert len(pyro.get_param_store()) == 0
    assert torch.equal(first.draws, again.draws)
    assert first.draws.shape == (8, 25, 7, 2)
    assert first.draws.dtype == dtype
    assert first.samples()["z"].shape == (8, 25, 7, 2)
    assert not torch.equal(first.draws, hmc(vae, x, target_ess=100, warmup=60, chunk=3, seed=1).draws)
    for name in ("ess_bulk", "ess_tail", "divergences", "accept_prob", "ebfmi", "step_size", "num_leapfrog", "thin"):
        assert getattr(first.chains, name).shape == (7,)
    assert first.chains.energy.shape == first.chains.diverging.shape == first.lp.shape == (8, 25, 7)
    one = hmc(vae, x[:1], target_ess=100, warmup=60)
    assert one.draws.shape == (8, 25, 1, 2)
    torch.testing.assert_close(
        first.lp, LatentSpace(vae, x).log_joint(first.draws, x), rtol=1e-5, atol=1e-4
    )  # fmt: skip


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Killed in the second chunk and resumed: the draws of an unbroken run; another run's folder is refused."""
    vae, x = small_vae()
    options = {"target_ess": 100, "warmup": 60, "chunk": 3}
    unbroken = hmc(vae, x, **options)
    whole, calls = batched.warm_up, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(batched, "warm_up", dies)
    with pytest.raises(KeyboardInterrupt):
        hmc(vae, x, resume=tmp_path, **options)
    resumed = hmc(vae, x, resume=tmp_path, **options)
    assert torch.equal(resumed.draws, unbroken.draws)
    assert resumed.status == unbroken.status
    assert torch.equal(resumed.chains.ebfmi, unbroken.chains.ebfmi)
    before = len(calls)
    assert torch.equal(hmc(vae, x, resume=tmp_path, **options).draws, unbroken.draws)
    assert len(calls) == before
    with pytest.raises(CheckpointError, match="other weights, data or settings"):
        hmc(vae, x, resume=tmp_path, **{**options, "seed": 1})


def test_data_continue_alone():
    """Chains go on only for the data that need it (two modes with a low wall between), and come back in order."""
    x = torch.tensor([0.0, 0.6, 0.0, 0.6, 0.2], dtype=torch.double)
    found = hmc(problems.bimodal, x)
    slow = x > 0.5
    assert found.chains.thin[slow].min() > found.chains.thin[~slow].max()
    truth = reference.exact(problems.bimodal, x)
    assert found.usable.all()
    assert ((found.mean - truth.mean).abs() < 4 * truth.sd / found.ess.sqrt().unsqueeze(-1)).all()
    assert ((found.sd / truth.sd - 1).abs() < 0.05).all()


def test_slopes_are_those_of_autograd():
    vae, x = small_vae(torch.float64)
    space = LatentSpace(vae, x)
    bound, u = space.bind(x), torch.randn(3, 7, 2, dtype=torch.double)
    ours, theirs = slopes(bound, u), init(bound, u)
    for found in (ours.at(u).gradient, ours.gradient(u)):
        torch.testing.assert_close(found, theirs.gradient)
    torch.testing.assert_close(ours.at(u).log_density, theirs.log_density)
    assert not ours.at(u).log_density.requires_grad


def test_models_that_cannot_be_recorded_run_anyway():
    def model(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            shift = 0.0 if float(u.detach().mean()) < 100 else 1.0
            pyro.sample("x", dist.Normal(u + shift, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0], dtype=torch.double)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hmc(model, x)
    assert any("cannot be recorded" in str(w.message) for w in caught)
    assert ((found.mean[:, 0] - x / 2).abs() < 4 * math.sqrt(0.5) / found.ess.sqrt()).all()


def test_a_plate_of_fixed_size_runs_whole():
    size = 4

    def model(x):
        with pyro.plate("data", size):
            u = pyro.sample("u", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    x = torch.arange(4, dtype=torch.double)
    found = hmc(model, x, chunk=2)
    assert ((found.mean[:, 0] - x / 2).abs() < 4 * math.sqrt(0.5) / found.ess.sqrt()).all()


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_masses(kind):
    """Whitening undoes pushing, pulling is the transpose, and estimates recover a covariance."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 4, 4, generator=generator, dtype=torch.double).tril() + 2 * torch.eye(4, dtype=torch.double)
    normals = torch.randn(500, 8, 3, 4, generator=generator, dtype=torch.double)
    draws = torch.einsum("bij,scbj->scbi", root, normals)
    found = mass.estimate(draws, dense=kind == "dense")
    q, g = normals[0], normals[1]
    torch.testing.assert_close(found.whiten(found.push(q)), q)
    torch.testing.assert_close((found.push(q) * g).sum(-1), (q * found.pull(g)).sum(-1))
    covariance = root @ root.mT
    if kind == "dense":
        torch.testing.assert_close(found.factor @ found.factor.mT, covariance, rtol=0.1, atol=0.5)
        torch.testing.assert_close(found.log_size(), torch.logdet(found.factor) / 4)
    else:
        torch.testing.assert_close(found.factor, covariance.diagonal(dim1=-2, dim2=-1).sqrt(), rtol=0.05, atol=0)


def test_energy_fraction_is_its_formula():
    energies = 1e6 + torch.randn(50, 4, 3, dtype=torch.double)
    running = batched._Energies()
    for energy in energies:
        running.add(energy)
    change = (energies[1:] - energies[:-1]).square().sum(0)
    expected = change / (energies - energies.mean(0)).square().sum(0)
    torch.testing.assert_close(running.ebfmi(), expected.amin(0), rtol=1e-6, atol=0)


def test_transitions_keep_the_target():
    """From exact draws of N(0, diag(1, 9)), chains with a poor mass stay there: moments within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    sd = torch.tensor([1.0, 3.0], dtype=torch.double)
    chains = 20_000
    u = sd * torch.randn(chains, 1, 2, generator=generator, dtype=torch.double)

    class Target:
        @staticmethod
        def at(u):
            return init(lambda v: -0.5 * (v / sd).square().sum(-1), u)

        @staticmethod
        def gradient(u):
            return -u / sd**2

    tuned = batched.Tuned(torch.full((1,), 1.2, dtype=torch.double), mass.unit(u, dense=False), 3.0)
    state = Target.at(u)
    for _ in range(5):
        state, visit = batched.transition(state, Target, tuned, 3, generator)
    assert 0.3 < float(visit.accept_prob.mean()) < 0.99
    assert (state.u.mean(0)[0].abs() < 4 * sd / chains**0.5).all()
    assert ((state.u.std(0)[0] / sd - 1).abs() < 4 / (2 * chains) ** 0.5).all()


def test_memory_bounds_the_chunk():
    vae, x = small_vae()
    bound = LatentSpace(vae, x).bind(x)
    u = torch.zeros(1, 7, 2)
    one, two = rows_within(0.01, bound, u, 8), rows_within(0.02, bound, u, 8)
    assert abs(two - 2 * one) <= 1
    assert abs(rows_within(0.01, bound, u, 16) - one / 2) <= 1
    hidden = 0.01 * 2**30 / (8 * 2 * 4 * (2 + 16 + 9))  # at least latents, hidden units and logits are kept
    assert hidden / 4 < one < hidden
    with pytest.raises(ValueError, match="memory must be positive"):
        rows_within(0.0, bound, u, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_chains": 1}, "num_chains >= 2"), ({"warmup": 10}, "warmup >= 50"), ({"max_thin": 0}, "max_thin"),
     ({"num_samples": 100}, "hardly be worth"), ({"mass": "full"}, "'diagonal' or 'dense'"),
     ({"target_accept": 1.5}, "between 0 and 1"), ({"init": torch.zeros(8, 3, 2)}, "3 data"),
     ({"init": torch.zeros(2, 7, 2)}, "init must have shape"), ({"memory": -1.0}, "memory must be positive"),
     ({"init": torch.full((8, 7, 2), torch.nan)}, "not finite")],
)  # fmt: skip
def test_bad_input_is_refused(options, words):
    vae, x = small_vae()
    with pytest.raises(ValueError, match=words):
        hmc(vae, x, **options)


def test_other_refusals():
    vae, x = small_vae()
    wide = models.VAE(nn.Linear(65, 9), 65)
    with pytest.raises(ValueError, match="at most 64 latents"):
        hmc(wide, x, mass="dense")
    with pytest.raises(ScaleError):
        hmc(pyro.poutine.scale(vae, 0.5), x)
    other, _ = small_vae()
    guide = guides.Amortized(other, nn.Linear(9, 4))
    with pytest.raises(IncompatibleError):
        hmc(vae, x, init=guide)


def test_shared_tensors_as_long_as_a_subset_are_no_data():
    """Chunks, and data that go on alone: three weights all data share, z ~ N(0, 1), x | z ~ N(z sum(w), 0.5^2)."""

    def model(x, w):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z * w.sum(), 0.5), obs=x)

    x, w = torch.linspace(-1, 1, 7).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    for chunk in (None, 3, 2):
        found = hmc(model, x, w, chunk=chunk, target_ess=1000)
        se = found.sd / found.ess.sqrt().unsqueeze(1)
        assert ((found.mean[:, 0] - 0.8 * x).abs() < 4 * se[:, 0]).all()

    def two_modes(x, w):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z**2 * w.sum(), 0.5), obs=x)

    x, w = torch.tensor([0.0, 0.6, 0.0, 0.6, 0.2]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    for weights in (w, torch.tensor([0.5, 0.5]).double()):
        found = hmc(two_modes, x, weights)
        exact = reference.exact(two_modes, x, weights)
        assert found.usable.all()
        torch.testing.assert_close(found.sd, exact.sd, rtol=0.08, atol=0.0)


def test_a_reference_belongs_to_its_model_and_weights():
    model, x = small_vae()
    guide = guides.Amortized(model, nn.Linear(9, 4))
    found = hmc(model, x, target_ess=400)
    reference.compare(guide, found, x)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    with pytest.raises(ValueError, match="before these weights"):
        reference.compare(guide, found, x)
    with pytest.raises(ValueError, match="before these weights"):
        evidence.bracket(model, guide, x, reference=found, num_samples=10, num_chains=4, num_temperatures=4)


def test_a_target_below_400_is_enough():
    x, scale = torch.linspace(-1, 1, 5), torch.full((5,), 0.5)
    found = hmc(normal, x, scale, target_ess=100)
    assert found.usable.all()


def test_nuts_judges_its_divergences():
    def funnel(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(torch.zeros(()), 3.0))
            z = pyro.sample("z", dist.Normal(0.0, (v / 2).exp()))
            pyro.sample("x", dist.Normal(z, 10.0), obs=x)

    found = reference.nuts(funnel, torch.zeros(1), num_chains=2, num_samples=300, warmup=300, progress=False)
    assert found.divergences > 1
    assert not found.usable.any()
