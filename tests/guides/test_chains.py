"""Chains with densities: importance weights that are unbiased whatever the chain does, and bounds that close with K."""

from __future__ import annotations

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyrovae import evidence, guides, losses, reference
from pyrovae.entropy import entropy
from pyrovae.errors import LatentError
from pyrovae.guides.dais import move
from pyrovae.models import PPCA
from pyrovae.nets import MLP
from pyrovae.optim import Adam

MEAN = torch.tensor([1.0, -1.0], dtype=torch.double)
COVARIANCE = 0.25 * torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.double)
DRAWS = 20_000


def correlated_gaussian():
    """log Z = 0; the best factorised Gaussian loses 0.830 nats."""
    pyro.sample("z", dist.MultivariateNormal(MEAN, COVARIANCE))


def base(model=correlated_gaussian):
    return guides.Amortized(model, None, plate=None)


def log_mean(weights):
    """Log of the mean weight, and its standard error."""
    value = torch.logsumexp(weights, 0) - math.log(len(weights))
    return value, (weights - value).exp().std(0) / len(weights) ** 0.5


def normal(x):
    """z ~ N(0, 1), x | z ~ N(z, 1/9): precision 10; at x = 10/9 the posterior is N(1, 1/10)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1 / 3), obs=x)


X = torch.tensor([10 / 9], dtype=torch.double)
EVIDENCE = float(dist.Normal(torch.zeros((), dtype=torch.double), math.sqrt(10 / 9)).log_prob(X))


def ppca(rows=6):
    generator = torch.Generator().manual_seed(0)
    model = PPCA(torch.randn(5, 2, generator=generator, dtype=torch.double), noise=0.5)
    return model, torch.randn(rows, 5, generator=generator, dtype=torch.double)


def encoder():
    return MLP([5, 8, 4], nn.Tanh).double()


def train(guide, steps=500, rate=0.02):
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(guide.model, guide, Adam(lr=rate), loss)
    for _ in range(steps):
        svi.step()
    with torch.no_grad():
        weights = guide.log_weights(DRAWS)[:, 0]
    return weights


@pytest.mark.parametrize("num_steps", [1, 4, 16])
@pytest.mark.parametrize(("step_size", "keep"), [(0.05, 0.1), (0.05, 0.9), (0.15, 0.5)])
def test_dais_weights_have_the_evidence_for_their_mean(num_steps, step_size, keep):
    """What a wrong sign anywhere would break, at step sizes that no one has tuned."""
    guide = guides.DAIS(base(), num_steps, step_size=step_size, keep=keep)
    with torch.no_grad():
        guide.bridges.normal_()
        guide.step[1] = -0.5
    weights = guide.log_weights(DRAWS)[:, 0].detach()
    value, se = log_mean(weights)
    assert se < 0.15
    assert abs(value) < min(0.15, 3 * se + 0.02)
    assert weights.mean() < -3


def test_the_dais_bound_closes_with_the_steps():
    elbos = []
    for num_steps in (1, 4, 16):
        torch.manual_seed(0)
        pyro.clear_param_store()
        weights = train(guides.DAIS(base(), num_steps))
        elbos.append((weights.mean(), weights.std() / DRAWS**0.5))
    for (low, low_se), (high, high_se) in itertools.pairwise(elbos):
        assert high - low > 3 * (low_se**2 + high_se**2).sqrt()
    assert elbos[0][0] > -0.9  # one step buys about nothing over the best factorised Gaussian, -0.830
    assert elbos[-1][0] > -0.40
    assert elbos[-1][0] < 0


def test_a_dais_step_keeps_volumes():
    def log_density(u):
        return -(u**4).sum(-1) / 4 + u.prod(-1).sin()

    size = torch.tensor([0.3, 0.7], dtype=torch.double)

    def step(both):
        u, v = move(both[:2], both[2:], size, log_density)
        return torch.cat([u, v])

    for _ in range(5):
        jacobian = torch.autograd.functional.jacobian(step, torch.randn(4, dtype=torch.double))
        assert abs(torch.linalg.det(jacobian) - 1) < 1e-10


def test_bridges_end_at_the_posterior_and_step_sizes_stay_below_their_maximum():
    guide = guides.DAIS(base(), 5, step_size=0.1, max_step_size=0.4)
    bridges, sizes = (part.detach().float() for part in guide.schedule())
    assert torch.allclose(bridges, torch.arange(1, 6) / 5.0)
    assert torch.allclose(sizes, torch.full((5,), 0.1))
    with torch.no_grad():
        guide.step.copy_(torch.tensor([0.0, 50.0]))
        guide.bridges.normal_()
    bridges, sizes = (part.detach().float() for part in guide.schedule())
    assert bridges[-1] == pytest.approx(1.0, abs=1e-6)
    assert (bridges.diff() > 0).all()
    assert sizes.max() <= 0.4


@pytest.mark.parametrize("build", [guides.DAIS, guides.HVAE])
def test_bounds_stay_below_the_evidence_on_a_linear_gaussian_model(build):
    """Trained by stock SVI; never above log p(x), of which the weights are unbiased estimates."""
    model, x = ppca()
    exact = model.log_evidence(x)
    guide = build(guides.Amortized(model, encoder()), 3, max_step_size=0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    svi = SVI(model, guide, Adam(lr=1e-2), losses.ELBO(num_particles=2))
    for _ in range(300):
        svi.step(x)
    with torch.no_grad():
        weights = guide.log_weights(4000, x)
    assert (weights.mean(0) < exact + 3 * weights.std(0) / 4000**0.5).all()
    value, se = log_mean(weights)
    assert (abs(value - exact) < 4 * se + 0.02).all()


def test_hvae_improves_on_its_base():
    """The base alone cannot be better than -0.830 here."""
    weights = train(guides.HVAE(base(), 2, dim=2))
    assert weights.mean() - 3 * weights.std() / DRAWS**0.5 > -0.82


def test_hvae_without_steps_is_its_base():
    """The same draws, weights and bound, by our losses and by Pyro's."""
    model, x = ppca()
    start = guides.Amortized(model, encoder())
    guide = guides.HVAE(start, 0)
    for measure in (
        lambda one: one.draws(7, x),
        lambda one: one.log_weights(7, x),
        lambda one: losses.IWAE(5, "reparam").per_datum(model, one, x),
        lambda one: losses.ELBO("stratified", num_particles=3).per_datum(model, one, x),
    ):
        values = []
        for one in (start, guide):
            torch.manual_seed(1)
            values.append(measure(one))
        assert torch.allclose(*values)
    # Pyro's program draws the base's noise elsewhere: in expectation.
    theirs, ours = (torch.tensor([-Trace_ELBO().loss(model, one, x) for _ in range(400)]) for one in (start, guide))
    assert abs(theirs.mean() - ours.mean()) < 3 * (theirs.var() / 400 + ours.var() / 400).sqrt()


def test_without_tempering_momentum_is_not_cooled():
    plain, hot = guides.HVAE(base(), 4, temperature=1.0), guides.HVAE(base(), 4, temperature=0.25)
    assert torch.equal(plain.schedule().detach().float(), torch.ones(5))
    assert not hasattr(plain, "heat")
    schedule = hot.schedule().tolist()
    assert schedule[0] == pytest.approx(2.0)
    assert schedule[-1] == pytest.approx(1.0)
    assert schedule[2] == pytest.approx(2.0 - (2 / 4) ** 2)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_hvae_weights_have_the_evidence_for_their_mean(temperature):
    guide = guides.HVAE(base(), 3, step_size=0.12, temperature=temperature, dim=2)
    value, se = log_mean(guide.log_weights(DRAWS)[:, 0].detach())
    assert se < 0.1
    assert abs(value) < 3 * se + 0.02


@pytest.mark.parametrize("build", [guides.DAIS, guides.HVAE])
def test_the_gradient_is_that_of_the_bound(build):
    """Against finite differences of the same draws, for every parameter."""
    model, x = ppca(3)
    guide = build(guides.Amortized(model, encoder()), 3, step_size=0.2)

    def bound():
        torch.manual_seed(4)
        return guide.log_weights(2, x).mean()

    parameters = [*guide.parameters(), *model.parameters()]
    found = torch.autograd.grad(bound(), parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                ends.append(bound())
                parameter -= sign * 1e-5 * direction
        assert (gradient * direction).sum() == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)


def test_dais_improves_on_its_base_in_eight_schools():
    """Joint mode, a constrained site and an inner plate. NUTS gives tau a standard deviation of 3.20."""
    model, found, spread = problems.eight_schools(), [], []
    for improved in (False, True):
        torch.manual_seed(0)
        pyro.clear_param_store()
        guide = guides.Amortized(model, None, plate=None)
        guide = guides.DAIS(guide, 8) if improved else guide
        loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, guide, Adam(lr=0.02), loss)
        for _ in range(700):
            svi.step()
        found.append(evidence.elbo(model, guide, num_samples=4000))
        tau = guide.sample(100_000)["tau"].view(20, -1).std(-1)
        spread.append((tau.mean(), tau.std() / 20**0.5))
    assert found[1].values - found[0].values > 3 * (found[0].se ** 2 + found[1].se ** 2).sqrt()
    (before, before_se), (after, after_se) = spread
    assert after - before > 3 * (before_se**2 + after_se**2).sqrt()
    assert after < 3.3
    assert guide.sample(5)["eta"].shape == (5, 8)


@pytest.mark.parametrize("build", [guides.DAIS, guides.HVAE])
def test_refined_bases_are_trained(build):
    model, x = ppca()
    start = guides.SemiAmortized(guides.Amortized(model, encoder()), 2, 0.05)
    guide = build(start, 2)
    loss = losses.ELBO()
    loss.loss_and_grads(model, guide, x)
    assert all(p.grad is not None and p.grad.any() for p in guide.parameters())


# short runs


@pytest.mark.parametrize(("num_steps", "step_size"), [(5, 0.1), (20, 0.05), (3, 0.2)])
def test_a_short_run_at_fixed_noise_has_this_density(num_steps, step_size):
    """A linear map: log |det| = K log |1 - 5 s^2|, and the weights' mean is the evidence."""
    guide = guides.DensityShortRun(normal, num_steps, step_size)
    torch.manual_seed(0)
    with torch.no_grad():
        u, log_q, folded = guide._walk(100_000, X)
    shrink = 1 - 5 * step_size**2
    start = log_q + num_steps * math.log(shrink)
    assert not folded.any()
    torch.manual_seed(0)
    u_0 = guide.space(X).prior(100_000, X)
    assert torch.allclose(start, dist.Normal(0.0, 1.0).log_prob(u_0[..., 0]))
    weights = guide.space(X).log_joint(u, X) - log_q
    value, se = log_mean(weights[:, 0])
    assert se < 0.02
    assert abs(value - EVIDENCE) < 0.02 + 3 * se
    assert weights.mean() < EVIDENCE


def test_the_bound_is_the_evidence_less_the_conditional_divergence():
    """E_eps KL(q(. | eps) || p) in closed form: q(. | eps) = N(m(eps), a^2K), m linear in eps."""
    num_steps, s = 10, 0.15
    a = 1 - 5 * s**2
    variance = a ** (2 * num_steps)
    bias = 1 - (1 - a**num_steps)  # E m(eps) = 1 - a^K, the target's mean is 1
    spread = s**2 * (1 - variance) / (1 - a**2)
    expected = 0.5 * (10 * (variance + bias**2 + spread) - 1 - math.log(10 * variance))
    guide = guides.DensityShortRun(normal, num_steps, s)
    weights = guide.log_weights(100_000, X)[:, 0]
    assert weights.mean() == pytest.approx(EVIDENCE - expected, abs=4 * float(weights.std()) / 100_000**0.5)


def test_steps_that_fold_are_counted_and_reported():
    small, large = guides.DensityShortRun(normal, 4, 0.1), guides.DensityShortRun(normal, 4, [0.1, 0.1, 0.5, 0.5])
    assert float(small.non_injective(10, X)) == 0.0
    assert float(large.non_injective(10, X)) == pytest.approx(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.log_weights(10, X)
    with pytest.warns(UserWarning, match=r"50\.00% of the Langevin steps are not injective"):
        large.log_weights(10, X)
    for guide, share in ((small, 0.0), (large, 0.5)):  # the same weights, each chain with its own share
        torch.manual_seed(0)
        weights, folded = guide.audited_log_weights(10, X)
        assert folded.shape == (10, 1)
        assert torch.allclose(folded, torch.full_like(folded, share))
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(weights, guide.log_weights(10, X))


def test_a_short_run_may_start_from_a_guide():
    model, x = ppca()
    start = guides.Amortized(model, encoder())
    guide = guides.DensityShortRun(model, 3, 0.05, init=start)
    value, se = log_mean(guide.log_weights(20_000, x).detach())
    inside = se < 0.1
    assert inside.any()
    assert (abs(value - model.log_evidence(x))[inside] < 3.5 * se[inside] + 0.02).all()


def test_its_training_is_that_of_a_short_run():
    """The gradient for the model is that of log p at draws held constant."""
    model, x = ppca()
    found = []
    for guide in (guides.ShortRun(model, 4, 0.1), guides.DensityShortRun(model, 4, 0.1)):
        loss = losses.ExpectedLogJoint() if isinstance(guide, guides.ShortRun) else losses.ELBO()
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(2)
        loss.loss_and_grads(model, guide, x)
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


GRID = [0.05 * 1.08**i for i in range(30)]


@pytest.mark.parametrize(("num_steps", "best", "frozen"), [(1, 0.440, 0.387), (5, 0.317, 0.224), (20, 0.201, 0.119)])
def test_step_sizes_of_both_criteria(num_steps, best, frozen):
    """On a Gaussian posterior both optima are known: the frozen-noise one is little more than half of the best."""
    guide = guides.ShortRun(normal, num_steps)
    found = guides.tune_step_size(guide, X, criterion="frozen-noise", candidates=GRID, num_samples=4000)
    assert found.best == pytest.approx(frozen, rel=0.09)
    assert guide.steps == [found.best] * num_steps
    sampled = guides.tune_step_size(guide, X, criterion="sample", candidates=GRID, num_samples=4000)
    assert sampled.best == pytest.approx(best, rel=0.2)
    assert sampled.best > found.best
    assert "KL - log p(x)" in repr(found)


def test_a_schedule_keeps_its_shape():
    guide = guides.ShortRun(normal, 4, [0.4, 0.2, 0.1, 0.1])
    found = guides.tune_step_size(guide, X, candidates=[0.1, 0.3], num_samples=200)
    assert guide.steps == pytest.approx([found.best * f for f in (1, 0.5, 0.25, 0.25)])


def test_tuning_leaves_random_state_and_training_flags_alone():
    model, x = ppca()
    model.train()
    guide, state = guides.ShortRun(model, 3), torch.get_rng_state()
    guides.tune_step_size(guide, x, candidates=[0.05, 0.1], num_samples=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_entropy_of_known_laws():
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 5.0], dtype=torch.double)
    draws = scale.unsqueeze(-1) * torch.randn(4000, 3, 2, dtype=torch.double)
    exact = 2 * scale.log() + math.log(2 * math.pi * math.e)
    assert torch.allclose(entropy(draws), exact, atol=0.1)
    uniform = torch.rand(4000, 1, 1, dtype=torch.double)
    assert abs(float(entropy(uniform))) < 0.06


def heavy(x):
    """Steps of an untrained chain are too large for the small scales of some data."""
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x.squeeze(-1))


@pytest.mark.parametrize("kind", [guides.DAIS, guides.HVAE])
def test_a_chain_that_runs_away_costs_its_own_weight_alone(kind):
    x = torch.tensor([[0.3], [2.0]])
    net = nn.Linear(1, 4)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    guide = kind(guides.Amortized(heavy, net), 4, step_size=0.3)
    with torch.no_grad(), pytest.warns(UserWarning, match="chains ran away to infinity and count with weight zero"):
        weights = guide.log_weights(8000, x)
    assert not weights.isnan().any()
    lost = weights.isneginf().double().mean(0)
    assert ((lost > 0) & (lost < 0.1)).all()
    value = torch.logsumexp(weights.double(), 0) - math.log(8000)
    assert (abs(value - reference.exact(heavy, x).log_evidence) < 0.2).all()


def switched(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        z = pyro.sample("z", dist.Normal(2.0 * k - 1, 0.7))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x.squeeze(-1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: guides.DAIS(base(), 0), ValueError, "num_steps >= 1"),
        (lambda: guides.DAIS(base(), 2, step_size=2.0), ValueError, "max_step_size"),
        (lambda: guides.DAIS(base(), 2, keep=1.0), ValueError, "between 0 and 1"),
        (lambda: guides.DAIS(guides.ShortRun(normal)), TypeError, "Gaussian family"),
        (lambda: guides.DAIS(guides.Amortized(normal, nn.Linear(1, 6), "mixture")), TypeError, "Gaussian family"),
        (lambda: guides.HVAE(base(), -1), ValueError, "num_steps >= 0"),
        (lambda: guides.HVAE(base(), 2, temperature=0.0), ValueError, "temperature"),
        (lambda: guides.HVAE(base(), 2, dim=0), ValueError, "number of latents"),
        (lambda: guides.HVAE(base(), 2, dim=3).log_weights(5), ValueError, "the model has 2 latents"),
        (lambda: guides.DensityShortRun(switched).log_weights(5, X), LatentError, "start from a guide"),
        (lambda: guides.DensityShortRun(normal, 0), ValueError, "num_steps >= 1"),
        (lambda: guides.DensityShortRun(normal, 2, [0.1]), ValueError, "one per step"),
        (lambda: guides.DensityShortRun(normal, init=guides.ShortRun(normal)), TypeError, "with a family"),
        (lambda: guides.DensityShortRun(normal, temperature=-1.0), ValueError, "temperature"),
        (lambda: guides.tune_step_size(guides.ShortRun(normal), X, criterion="best"), ValueError, "criterion"),
        (lambda: guides.tune_step_size(guides.ShortRun(normal), X, candidates=[]), ValueError, "positive"),
        (lambda: guides.tune_step_size(guides.ShortRun(normal, kernel="hmc"), X, criterion="frozen-noise"),
         ValueError, "Langevin steps"),
        (lambda: entropy(torch.zeros(3, 1, 1)), ValueError, "draws"),
    ],
)  # fmt: skip
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
