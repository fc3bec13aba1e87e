"""Every guide x every clause of the contract, on one small VAE; and the estimators that must agree."""

from __future__ import annotations

import gc

import pyro
import pytest
import torch
from bench import problems
from guides_registry import DENSITY, GUIDES, MARGINAL, TRAINED, WITH_POSTERIOR
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyrovae import guides, losses
from pyrovae.errors import IncompatibleError, NoDensityError
from pyrovae.families import DiagonalNormal, MixtureOfNormals
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder

PIXELS, DIM = 6, 3
every_guide = pytest.mark.parametrize("name", GUIDES)
every_trained = pytest.mark.parametrize("name", TRAINED)
every_density = pytest.mark.parametrize("name", DENSITY)
every_trained_density = pytest.mark.parametrize("name", [name for name in DENSITY if name in TRAINED])


def small(name, dtype=torch.float32, likelihood="gaussian"):
    torch.manual_seed(1)
    vae = VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)).to(dtype), DIM, likelihood)
    return vae, GUIDES[name](vae, PIXELS, DIM, dtype)


def data(rows, dtype=torch.float32):
    return torch.randn(rows, PIXELS, dtype=dtype, generator=torch.Generator().manual_seed(2))


def test_every_registered_guide_is_tested():
    """Exact alone is not of every model: its clauses are in test_exact.py."""
    built = {type(small(name)[1]) for name in GUIDES}
    assert not set(GUIDES) & set(WITH_POSTERIOR)
    assert built | {guides.Exact} == set(guides.REGISTRY.values())


@every_guide
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5])
def test_shapes_and_dtypes(name, dtype, rows):
    _, guide = small(name, dtype)
    x = data(rows, dtype)
    assert guide.draws(7, x).shape == (7, rows, DIM)
    z = guide.sample(4, x)["z"]
    assert z.shape == (4, rows, DIM)
    assert z.dtype == dtype
    if name in DENSITY:
        if name in MARGINAL:
            q = guide.posterior(x)
            assert q.batch_shape == (rows,)
            assert q.event_shape == (DIM,)
        else:
            with pytest.raises(NoDensityError, match=r"guide\.log_weights"):
                guide.posterior(x)
        weights = guide.log_weights(6, x)
        assert weights.shape == (6, rows)
        assert weights.dtype == dtype
        assert torch.isfinite(weights).all()


@every_guide
def test_any_batch_size_on_the_same_guide(name):
    _, guide = small(name)
    for rows in (5, 2, 1, 7):
        assert guide.sample(2, data(rows))["z"].shape == (2, rows, DIM)


@every_trained
def test_gradients_reach_every_parameter(name):
    vae, guide = small(name)
    loss = losses.default_loss(guide)
    with pyro.get_param_store().scope():
        loss.loss_and_grads(vae, guide, data(5))
    trained = dict(vae.named_parameters())
    if name in DENSITY:  # chains have no parameters; a starting guide is not trained by them
        trained.update(guide.named_parameters())
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@every_trained
def test_stock_svi_trains_it(name):
    """Fifty stock steps on the model's own data improve the guide's objective by more than 5 standard errors."""
    vae, guide = small(name)
    x = data(32)
    loss = Trace_ELBO()
    svi = SVI(vae, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    before = torch.tensor([svi.evaluate_loss(x) for _ in range(20)])
    for _ in range(50):
        svi.step(x)
    after = torch.tensor([svi.evaluate_loss(x) for _ in range(20)])
    se = (before.var() / 20 + after.var() / 20).sqrt()
    assert before.mean() - after.mean() > 5 * se


@every_guide
def test_repeatable_under_a_seed_and_sensitive_to_it(name):
    _, guide = small(name)
    x = data(3)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(guide.draws(2, x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@every_guide
def test_save_and_load(name, tmp_path):
    vae, guide = small(name)
    x = data(3)
    other_vae, other = small(name)
    for parameter in (*other_vae.parameters(), *other.parameters()):
        parameter.data.normal_()
    torch.save({"model": vae.state_dict(), "guide": guide.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other_vae.load_state_dict(state["model"])
    other.load_state_dict(state["guide"])
    torch.manual_seed(0)
    expected = guide.draws(2, x)
    torch.manual_seed(0)
    assert torch.equal(other.draws(2, x), expected)
    assert not any("decoder" in key for key in guide.state_dict()), "a guide must not own the model's parameters"


@every_guide
def test_repr_names_the_class(name):
    guide = small(name)[1]
    assert repr(guide).startswith(type(guide).__name__ + "(")
    assert "plate='data'" in repr(guide)


@every_guide
def test_evaluation_leaves_weights_buffers_and_random_state_alone(name):
    vae, guide = small(name)
    x = data(4)
    before = {k: v.clone() for part in (vae, guide) for k, v in part.state_dict().items()}
    rng = torch.get_rng_state()
    names = set(pyro.get_param_store().keys())
    from pyrovae import evidence, reference

    if name in DENSITY:
        evidence.log_weights(vae, guide, x, num_samples=30)
    else:
        truth = reference.hmc(vae, x, target_ess=400, progress=False)
        reference.compare(guide, truth, x, num_samples=50)
    assert torch.equal(rng, torch.get_rng_state())
    after = {k: v for part in (vae, guide) for k, v in part.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert set(pyro.get_param_store().keys()) == names
    assert vae.training
    assert guide.training


@every_guide
@torch.no_grad()
def test_works_under_no_grad_and_with_particles(name):
    vae, guide = small(name)
    x = data(4)
    torch.manual_seed(0)
    one = torch.tensor([Trace_ELBO().loss(vae, guide, x) for _ in range(300)])
    many = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    runs = torch.tensor([many.loss(vae, guide, x) for _ in range(12)])
    se = (one.var() / len(one) + runs.var() / len(runs)).sqrt()
    assert abs(one.mean() - runs.mean()) < 4 * se
    # Independent particles: the spread of a mean of 400 is a twentieth of one draw's (chains, too, must be redrawn);
    # guides that find a posterior with noise share that noise among the particles of a call.
    shared = {"averaged": 2.0, "semi": 2.0, "boosted": 1.3, "escalating": 2.0}
    assert runs.std() < one.std() / next((factor for part, factor in shared.items() if part in name), 4.0)


def test_short_run_has_no_density():
    vae, guide = small("short-run")
    with pytest.raises(NoDensityError, match=r"use guide\.sample"):
        guide.log_weights(3, data(2))
    with pytest.raises(NoDensityError, match=r"use guide\.sample"):
        guide.posterior(data(2))
    with pytest.raises(IncompatibleError, match="ExpectedLogJoint"):
        losses.IWAE(5).loss(vae, guide, data(2))
    assert losses.default_loss(guide).name == "E_q log p(x,z)"


@every_density
def test_estimators_agree_on_two_sites_one_constrained(name):
    """Trace_ELBO, TraceMeanField_ELBO and the mean of log_weights within 3 se; what cannot be unbiased raises."""
    torch.manual_seed(3)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    guide = DENSITY[name](problems.gamma_normal, 3, 3)
    # Near the posterior the weights have light tails, so that standard errors mean something.
    with pyro.get_param_store().scope():
        svi = SVI(problems.gamma_normal, guide, pyro.optim.Adam({"lr": 2e-2}), losses.default_loss(guide))
        for _ in range(0 if "laplace" in name or name not in TRAINED else 200):
            svi.step(x)
    if name == "laplace":
        _agree_draw_by_draw(guide, x)
        return
    repeats = 40 if "laplace" in name else 200 if "boosted" in name else 600
    anew = "semi" in name or "boosted" in name or "escalating" in name
    weights = torch.cat([guide.log_weights(40, x) for _ in range(100)]) if anew else guide.log_weights(4000, x)
    # The noise by which a posterior is found is shared by the draws of one call: independent units are calls.
    units = weights.sum(1).view(100, -1).mean(1) if anew or "averaged" in name else weights.sum(1)
    if "averaged" in name:
        units = torch.stack([guide.log_weights(40, x).sum(1).mean() for _ in range(30)])
    mean, se = units.mean(), units.std() / len(units) ** 0.5

    def agrees(loss, repeats=repeats):
        with torch.no_grad():
            values = torch.tensor([-loss.loss(problems.gamma_normal, guide, x) for _ in range(repeats)])
        total = (se**2 + values.var() / repeats).sqrt()
        assert abs(values.mean() - mean) < 3 * total, type(loss).__name__

    agrees(Trace_ELBO())
    agrees(Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1), 30)
    if name not in TRAINED:
        return
    if guide.traits.reparameterised:
        agrees(TraceMeanField_ELBO())
        agrees(losses.ELBO())
    else:
        with pytest.raises(NotImplementedError, match="fully reparametrized|fully reparameterized"):
            TraceMeanField_ELBO().loss(problems.gamma_normal, guide, x)
        with pytest.raises(IncompatibleError, match="stratified"):
            losses.ELBO().loss(problems.gamma_normal, guide, x)
    if guide.traits.stratified:
        agrees(losses.ELBO("stratified"))


def _agree_draw_by_draw(guide, x):
    """A Gaussian at the mode of this skewed posterior has weights of heavy tails, so that standard errors mean nothing:
    under the same seed every loss must give the same number."""
    vectorised = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    for loss, draws in ((Trace_ELBO(), 1), (vectorised, 50), (TraceMeanField_ELBO(), 1), (losses.ELBO(), 1)):
        for seed in range(10):
            torch.manual_seed(seed)
            value = -loss.loss(problems.gamma_normal, guide, x)
            torch.manual_seed(seed)
            expected = guide.log_weights(draws, x).detach().mean(0).sum().item()
            assert value == pytest.approx(expected, rel=1e-4), type(loss).__name__


@every_trained_density
def test_iwae_loss_is_per_datum(name):
    vae, guide = small(name)
    if not guide.traits.reparameterised:
        with pytest.raises(IncompatibleError, match="reparameterised"):
            losses.IWAE(8).per_datum(vae, guide, data(4))
        return
    x, estimator = data(4), "dreg" if name in MARGINAL else "reparam"
    values = torch.stack([losses.IWAE(8, estimator).per_datum(vae, guide, x) for _ in range(50)]).mean(0)
    bound = torch.stack([losses.IWAE(1, estimator).per_datum(vae, guide, x) for _ in range(400)])
    assert values.shape == (4,)
    assert (values > bound.mean(0) - 3 * bound.std(0) / 20).all()  # increasing in K


@every_trained
def test_memory_does_not_grow(name):
    vae, guide = small(name)
    x = data(8)
    svi = SVI(vae, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    counts = []
    for step in range(60):
        svi.step(x)
        if step in (20, 59):
            gc.collect()
            counts.append(sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor)))
    assert counts[1] <= counts[0] + 5


@pytest.mark.parametrize("name", [n for n in GUIDES if "short" not in n])
@torch.no_grad()
def test_subsampled_plate(name):
    """loss x B/N equals the loss on the same rows without a plate scale, and the model saw the rows asked for."""
    torch.manual_seed(0)
    index = torch.tensor([10, 11, 40, 41, 97, 99])
    x = torch.randn(6, 1)
    seen = []

    def model(x, index):
        seen.append(index)
        problems.subsampled(x, index)

    guide = DENSITY[name](model, 1, 1)
    plain = torch.tensor([Trace_ELBO().loss(model, guide, x, index) for _ in range(200)]) * 6 / 100
    weights = torch.stack([-guide.log_weights(20, x, index).sum(1).mean() for _ in range(60)])
    se = (plain.var() / 200 + weights.var() / 60).sqrt()
    assert abs(plain.mean() - weights.mean()) < 3 * se + 1e-5  # exact posteriors: rounding only
    rows = [value for value in seen if len(value) == 6]
    assert all(torch.equal(value, index) for value in rows)
    from pyro import poutine

    trace = poutine.trace(guide).get_trace(x, index)
    assert torch.equal(torch.as_tensor(trace.nodes["data"]["value"]), index)


@pytest.mark.parametrize("build", [guides.Amortized, lambda model, net, family: guides.LocalSVI(model, family)])
def test_a_callable_family_is_asked_what_it_offers(build):
    """A mixture made by a function of D is a mixture: its weights have no reparameterised gradient."""
    model, _ = problems.ppca(rows=4, latent=3, pixels=5)
    traits = build(model, MLP([5, 16]).double(), lambda dim: MixtureOfNormals(dim, 2)).traits
    assert not traits.reparameterised
    assert not traits.gaussian_sites
    assert build(model, MLP([5, 6]).double(), lambda dim: DiagonalNormal(dim)).traits.gaussian_sites
