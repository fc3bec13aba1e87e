"""Diffusions as Pyro programs: the ELBO by single steps, whole chains and closed forms; sampling; what is refused."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import Normal, kl_divergence

from pyrovae import evidence, fit, guides, losses
from pyrovae.compat import compatible
from pyrovae.errors import DataError, IncompatibleError, ScaleError
from pyrovae.guides.forward_process import ForwardProcess
from pyrovae.handlers import anneal
from pyrovae.losses.diffusion import DiffusionELBO, SimpleDiffusionLoss
from pyrovae.models import VAE
from pyrovae.models.diffusion import Diffusion
from pyrovae.nets.time_mlp import TimeMLP
from pyrovae.optim import Adam
from pyrovae.runtime import evaluating

BETAS = (0.1, 0.6)


class Linear(nn.Module):
    """eps_theta(x, t) = slope_t x: the best there is where data are Gaussian."""

    def __init__(self, steps, dtype=torch.double):
        super().__init__()
        self.slope = nn.Parameter(0.1 + 0.1 * torch.arange(steps, dtype=dtype))

    def forward(self, x, t):
        return self.slope[t - 1].view(-1, *[1] * (x.dim() - 1)) * x


def best_slopes(model, variance):
    """E[eps | x_t] = sqrt(1 - abar) x_t / (abar v + 1 - abar) for data of variance v."""
    kept = model.signal[1:].square()
    return (1 - kept).sqrt() / (kept * variance + 1 - kept)


def linear(steps=4, event=(3,), dtype=torch.double, best_for=None, **options):
    model = Diffusion(Linear(steps, dtype), event, steps, betas=BETAS, **options)
    if best_for is not None:
        with torch.no_grad():
            model.net.slope.copy_(best_slopes(model, best_for))
    return model, ForwardProcess(model)


def data(rows, event=(3,), dtype=torch.double):
    return 1.5 * torch.randn(rows, *event, dtype=dtype, generator=torch.Generator().manual_seed(1))


def exact_elbo(model, x):
    """Term by term from Gaussians, for a linear net: E over x_t of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))."""
    beta = torch.linspace(*BETAS, model.num_steps, dtype=torch.double)
    alpha, kept = 1 - beta, torch.cat([torch.ones(1).double(), (1 - beta).cumprod(0)])
    prior = kl_divergence(Normal(kept[-1].sqrt() * x, (1 - kept[-1]).sqrt()), Normal(0.0, 1.0))
    total = -prior
    for t in range(1, model.num_steps + 1):
        b, a, before, now = beta[t - 1], alpha[t - 1], kept[t - 1], kept[t]
        backward = (1 - b / (1 - now).sqrt() * model.net.slope[t - 1]) / a.sqrt()  # mu_theta = backward x_t
        loc, var = now.sqrt() * x, 1 - now  # of x_t
        sigma = model.sigma[t - 1]
        if t == 1:  # E log N(x_0; backward x_1, sigma)
            error = (x - backward * loc).square() + backward**2 * var
            total = total - 0.5 * (error / sigma**2 + (2 * math.pi * sigma**2).log())
            continue
        to_x0, to_xt = before.sqrt() * b / (1 - now), a.sqrt() * (1 - before) / (1 - now)
        tilde = b * (1 - before) / (1 - now)
        gap = to_x0 * x + (to_xt - backward) * loc
        error = gap.square() + (to_xt - backward) ** 2 * var
        total = total - 0.5 * ((tilde + error) / sigma**2 - 1 - (tilde / sigma**2).log())
    return total.flatten(1).sum(1).detach()


def within(draws, truth, ses=4.5):
    """Whether means over the first dim are within standard errors of the truth."""
    se = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth).abs() < ses * se).all(), ((draws.mean(0) - truth) / se)
    return se


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("event", [(3,), (2, 2)])
def test_single_steps_all_steps_and_whole_chains_have_the_exact_elbo_as_their_mean(variance, event):
    model, guide = linear(event=event, variance=variance)
    x = data(3, event)
    truth = exact_elbo(model, x)
    many = x.repeat(4000, *[1] * len(event))
    with torch.no_grad():
        single = DiffusionELBO().per_datum(model, guide, many).view(4000, 3)
        every = DiffusionELBO(None).per_datum(model, guide, many).view(4000, 3)
        chains = guide.log_weights(4000, x)
    errors = [within(draws, truth).mean() for draws in (single, every, chains)]
    assert max(errors) < 0.3  # nats: means are known well enough to tell
    assert errors[1] < errors[0]


def test_stock_trace_elbo_of_model_and_guide_is_the_same_number():
    model, guide = linear(steps=3)
    x = data(3)
    many = x.repeat(500, 1)
    found = torch.tensor([-Trace_ELBO().loss(model, guide, many) / 500 for _ in range(20)]).double()
    assert within(found.unsqueeze(1), exact_elbo(model, x).sum().reshape(1)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5])
def test_unit_normal_data_are_reversed_exactly(dtype, rows):
    """With x_0 ~ N(0, 1), eps = sqrt(1 - abar) x_t and sigma^2 = beta the model is the forward process backwards:
    every whole-chain weight is log N(x; 0, I), and so is the ELBO."""
    model, guide = linear(dtype=dtype, best_for=1.0)
    x = data(rows, dtype=dtype)
    truth = Normal(0.0, 1.0).log_prob(x).sum(-1)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    weights = guide.log_weights(3, x)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.detach(), truth.expand(3, rows), rtol=rounding, atol=rounding)
    with pyro.get_param_store().scope():
        assert -Trace_ELBO().loss(model, guide, x) == pytest.approx(float(truth.sum()), rel=1e-5)
    if dtype == torch.float64:
        torch.testing.assert_close(exact_elbo(model, x), truth)
    found = evidence.iwae(model, guide, x, num_samples=4)
    torch.testing.assert_close(found.values, truth.double(), rtol=1e-5, atol=1e-5)
    assert DiffusionELBO().per_datum(model, guide, x).dtype == dtype


def test_generated_data_have_the_variance_that_the_linear_chain_gives():
    model, _ = linear(steps=6, best_for=4.0)
    variance = torch.ones(()).double()
    for t in range(6, 0, -1):
        beta, left = model.beta[t - 1], model.spread[t]
        backward = (1 - beta / left * model.net.slope[t - 1]) / (1 - beta).sqrt()
        variance = backward**2 * variance + (model.sigma[t - 1] ** 2 if t > 1 else 0)
    found = model.generate(40_000, seed=3)
    within(found.square().flatten().unsqueeze(1), variance.detach().reshape(1))
    assert torch.equal(found, model.generate(40_000, seed=3))
    with torch.no_grad():
        drawn = model(None, size=40_000)  # the Pyro program adds the noise of the likelihood
    within(drawn.square().flatten().unsqueeze(1), (variance + model.sigma[0] ** 2).detach().reshape(1))


@pytest.mark.parametrize("loss", [DiffusionELBO(4), SimpleDiffusionLoss(4)])
def test_training_finds_the_best_net_of_gaussian_data(loss):
    model, guide = linear()
    x = 2 * torch.randn(2048, 3, dtype=torch.double)
    start = exact_elbo(model, x).mean()
    result = fit(model, guide, x, loss=loss, optimizer=Adam(lr=3e-3), max_steps=300, batch_size=1024, progress=False)
    best, _ = linear(best_for=x.square().mean())
    short = exact_elbo(best, x).mean() - exact_elbo(model, x).mean()
    assert 0 <= short < 0.03 * (exact_elbo(best, x).mean() - start)
    assert result.objective == loss.name
    assert ("ELBO" in result.objective) == isinstance(loss, DiffusionELBO)


def test_subsampling_rows_scales_the_loss():
    model, guide = linear(best_for=1.0)

    class Subsampled(type(model)):
        def forward(self, x=None, size=None):
            with pyro.plate("data", 50, subsample=torch.arange(len(x))):
                return pyro.sample("x", pyro.distributions.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)

    x, loss = data(5), DiffusionELBO(None)
    torch.manual_seed(0)
    whole = loss.loss(model, guide, x)
    model.__class__ = Subsampled
    torch.manual_seed(0)
    with torch.no_grad():
        assert float(loss.differentiable_loss(model, guide, x)) == pytest.approx(10 * whole)


def test_ddim_of_gaussian_data_is_the_probability_flow():
    """x_T = x_0 sqrt(V_T / V_0) in the limit of many steps; there and back with the error of a first-order method."""
    steps, variance = 800, 4.0
    model = Diffusion(Linear(steps), (3,), steps, betas=(1e-4, 2e-2))
    with torch.no_grad():
        model.net.slope.copy_(best_slopes(model, variance))
    x = data(4)
    end = model.signal[-1] ** 2 * variance + model.spread[-1] ** 2
    flow = x * (end / variance).sqrt()
    errors = [float((model.invert(x, s) / flow - 1).abs().max()) for s in (100, 800)]
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 4
    around = [float((model.ddim(model.invert(x, s), s) / x - 1).abs().max()) for s in (100, 800)]
    assert around[1] < 0.01
    assert around[1] < around[0] / 4


def test_interpolation_ends_at_its_ends_and_stays_on_the_sphere_of_noises():
    model, _ = linear(steps=4, best_for=4.0)
    x, other = data(3), data(6)[3:]
    path = model.interpolate(x, other, steps=5, num_steps=4)
    assert path.shape == (5, 3, 3)
    torch.testing.assert_close(path[0], model.ddim(model.invert(x, 4), 4))
    torch.testing.assert_close(path[-1], model.ddim(model.invert(other, 4), 4))
    torch.testing.assert_close(model.interpolate(x, x, steps=3, num_steps=4)[1], path[0])
    # DDIM of a linear net is linear, so two ends of equal noise stay at its length.
    turned = x.roll(1, -1)
    middle = model.interpolate(x, turned, steps=3, num_steps=4)[1]
    torch.testing.assert_close(middle.norm(dim=-1), path[0].norm(dim=-1))


def test_averaged_weights_serve_evaluation_and_training_alone_moves_them():
    model, guide = linear(average=0.9)
    x = data(64)
    expected = model.net.slope.detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), DiffusionELBO())
    for step in range(1, 31):
        decay = min(0.9, step / (10 + step))
        expected = decay * expected + (1 - decay) * model.net.slope.detach()  # before the step: what it starts from
        svi.step(x)
    kept = model._averaged()["slope"].clone()
    torch.testing.assert_close(kept, expected)
    assert (kept - model.net.slope).abs().max() > 1e-3
    t = torch.ones(64, dtype=torch.long)
    torch.testing.assert_close(model.predict_noise(x, t), model.net.slope[0] * x)
    with evaluating(model):
        torch.testing.assert_close(model.predict_noise(x, t), kept[0] * x)
        DiffusionELBO().loss(model, guide, x)
    model.generate(3)
    assert torch.equal(model._averaged()["slope"], kept)
    other, _ = linear(average=0.9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.generate(3), model.generate(3))


def test_first_averages_are_means():
    model, _ = linear(average=0.999)
    with torch.no_grad():
        model.net.slope.fill_(5.0)
    model.update_average()  # 1 / 11 stays
    start = 0.1 + 0.1 * torch.arange(4).double()
    torch.testing.assert_close(model._averaged()["slope"], 5 + (start - 5) / 11)


def test_draws_are_forward_chains():
    model, guide = linear(steps=3)
    x = data(2)
    chains = guide.sample(20_000, x)
    assert {name: value.shape for name, value in chains.items()} == {f"x{t}": (20_000, 2, 3) for t in (1, 2, 3)}
    for t in (1, 3):
        within(chains[f"x{t}"], model.signal[t] * x)
        within((chains[f"x{t}"] - model.signal[t] * x).square(), model.spread[t] ** 2)
    assert guide.draws(5, x).shape == (5, 2, 9)
    space = guide.space(x)  # the model's own coordinates, in the model's order
    torch.manual_seed(2)
    u = guide.draws(5, x)
    torch.manual_seed(2)
    torch.testing.assert_close(space.unconstrain(guide.sample(5, x)), u)
    assert list(guide.parameters()) == []


def test_nets_are_trained_under_stock_svi():
    torch.manual_seed(0)
    model = Diffusion(TimeMLP((4,), hidden=(8, 8)), (4,), 5, betas=BETAS)
    guide, x = ForwardProcess(model), torch.randn(7, 4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), DiffusionELBO())
    for _ in range(3):
        svi.step(x)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    result = fit(model, guide, x, max_steps=1, progress=False)
    assert result.objective == "ELBO"  # the loss that fit takes by itself


def test_time_mlp_tells_times_apart_and_keeps_shapes():
    net = TimeMLP((2, 3), hidden=(8,)).double()
    x = torch.ones(4, 2, 3, dtype=torch.double)
    found = net(x, torch.tensor([1, 2, 2, 900]))
    assert found.shape == x.shape
    assert found.dtype == torch.double
    assert torch.equal(found[1], found[2])
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert (found[1] - found[3]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="hidden layer"):
        TimeMLP((2,), hidden=())
    with pytest.raises(ValueError, match="as many sines"):
        TimeMLP((2,), embedding=5)


def test_what_does_not_go_together_says_what_does():
    model, guide = linear()
    vae = VAE(nn.Linear(2, 3), 2, "gaussian")
    amortized = guides.Amortized(vae, nn.Linear(3, 4))
    assert "train it with guides.ForwardProcess(model)" in compatible(model, guides.Amortized)
    assert "losses.DiffusionELBO()" in compatible(model, guide, losses.ELBO)
    assert "losses.DiffusionELBO()" in compatible(guide=guide, loss=losses.IWAE)
    assert "models.Diffusion alone" in compatible(vae, amortized, DiffusionELBO())
    assert "models.Diffusion alone" in compatible(guide=amortized, loss=SimpleDiffusionLoss)
    assert "treats diffusion latents" in compatible(vae, guide)
    assert compatible(model, guide, DiffusionELBO) is None
    assert compatible(model, guide, Trace_ELBO()) is None
    with pytest.raises(IncompatibleError, match="nothing to infer"):
        evidence.iwae(model, guides.Amortized(model, nn.Linear(3, 24).double()), data(2))
    with pytest.raises(IncompatibleError, match="single steps"):
        losses.ELBO("stl").loss(model, guide, data(2))


def test_bad_input_is_refused():
    model, guide = linear()
    for wrong in ({"num_steps": 0}, {"betas": (0.0, 0.1)}, {"betas": (0.1, 1.0)}, {"variance": "x"}, {"average": 1.0}):
        with pytest.raises(ValueError):
            Diffusion(Linear(4), (3,), **{"num_steps": 4, **wrong})
    with pytest.raises(DataError, match="per datum"):
        model(data(2, (4,)))
    with pytest.raises(DataError, match="per datum"):
        DiffusionELBO().per_datum(model, guide, data(2, (4,)))
    with pytest.raises(ValueError, match="size=n"):
        model()
    with pytest.raises(ValueError, match="DDIM takes 1 to T = 4"):
        model.ddim(data(2), 5)
    with pytest.raises(ValueError, match="two ends"):
        model.interpolate(data(2), data(3))
    with pytest.raises(ValueError, match="at least one sample"):
        DiffusionELBO(0)
    with pytest.raises(TypeError, match="models.Diffusion"):
        ForwardProcess(VAE(nn.Linear(2, 3), 2))
    with pytest.raises(ScaleError), anneal(0.5):
        DiffusionELBO().per_datum(model, guide, data(2))
    with pytest.raises(ScaleError), anneal(0.5):
        guide.log_weights(2, data(2))


def test_between_opposite_noises_nothing_explodes():
    """Of single numbers: every pair of noises is parallel or opposite."""
    torch.manual_seed(0)
    model = Diffusion(TimeMLP((1,), hidden=(16,)), (1,), num_steps=20, betas=(1e-3, 0.2))
    start, end = torch.tensor([[3.0]]), torch.tensor([[-3.0]])
    assert model.invert(start, 20) * model.invert(end, 20) < 0
    path = model.interpolate(start, end, steps=5, num_steps=20)
    assert path.abs().max() < 10
    with pytest.raises(ValueError, match="event_shape="):
        Diffusion(TimeMLP((1,), hidden=(16,)), ())
