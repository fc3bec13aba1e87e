"""The gradient of a tilted prior: exact on grids, learnt on a problem whose prior is known, plumbing of the loss."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyrovae import guides, handlers, losses
from pyrovae.compat import GuideTraits, compatible
from pyrovae.emission import emit_draws
from pyrovae.errors import IncompatibleError, TrainingDiverged
from pyrovae.guides.base import Guide
from pyrovae.losses.energy import EnergyELBO
from pyrovae.models.energy_prior_vae import EnergyPriorVAE
from pyrovae.models.hierarchical_energy_prior import HierarchicalEnergyPrior
from pyrovae.models.joint_energy_prior import JointEnergyPrior
from pyrovae.models.tilted import PriorChain
from pyrovae.models.vae import VAE
from pyrovae.nets import MLP, LadderDecoder
from pyrovae.optim import Adam
from pyrovae.training import fit


class _Bottom(nn.Module):
    def forward(self, z):
        return 1.4 * torch.tanh(2 * z - 1) - 0.25 * z.square()


class _Top(nn.Module):
    def forward(self, z):
        return 0.8 * torch.tanh(z)


class _Conditional(nn.Module):
    """z1 | z2 ~ N(w z2, exp(log s)^2)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))

    def forward(self, z):
        return torch.cat([self.w * z, self.log_scale.expand_as(z)], -1)


class _Grid:
    """A scalar two-layer hierarchy with everything known on a grid; the tilt is not symmetric."""

    def __init__(self):
        slope = nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            slope.weight.fill_(1.2)
        self.model = _OnGrid(
            slope, [1, 1], [_Conditional()], [_Bottom(), _Top()], "gaussian", noise=0.5, scale_floor=0.0
        )
        self.x = torch.tensor([[0.9]], dtype=torch.float64)
        line = torch.linspace(-7, 7, 401, dtype=torch.float64)
        self.z = torch.cartesian_prod(line, line)  # (z2, z1): deepest first
        self.parameters = [*self.model.conditionals.parameters(), slope.weight]
        with torch.no_grad():
            self.prior = torch.softmax(self.log_prior(), 0)
            self.posterior = torch.softmax(self.log_joint(), 0)
        self.model.grid, self.model.weights = self.z, self.prior

    def log_prior(self):
        return self.model.tilt(self.z) + self.model.log_base(self.z)

    def log_joint(self):
        likelihood = torch.distributions.Normal(self.model.mean(self.z), 0.5).log_prob(self.x).sum(-1)
        return self.log_prior() + likelihood

    def exact(self):
        """The gradient of log p(x) with respect to w, log s and the decoder's slope."""
        value = torch.logsumexp(self.log_joint(), 0) - torch.logsumexp(self.log_prior(), 0)
        return torch.stack([g.flatten()[0] for g in torch.autograd.grad(value, self.parameters)])


class _OnGrid(HierarchicalEnergyPrior):
    """Draws of the prior are exact."""

    def sample_prior(self, number, *, tilted=True, num_steps=None):
        return self.grid[torch.multinomial(self.weights, number, replacement=True)]


class _FromGrid(Guide):
    """Exact draws of the one posterior, without density."""

    traits = GuideTraits(name="grid", has_density=False, reparameterised=False)

    def __init__(self, model, grid):
        super().__init__(model)
        self.__dict__["grid"] = grid

    def _draws(self, num_samples, x):
        index = torch.multinomial(self.grid.posterior, num_samples * len(x), replacement=True)
        return self.grid.z[index].reshape(num_samples, len(x), 2)

    def _prepare(self, space, args, kwargs):
        u = self._draws(1, *args)[0]
        return lambda: emit_draws(space.structure, u)


def _gradient(loss, grid, guide, number):
    for p in grid.parameters:
        p.grad = None
    loss.loss_and_grads(grid.model, guide, grid.x.expand(number, 1))
    return torch.stack([-p.grad.flatten()[0] / number for p in grid.parameters])


def test_gradient_of_the_base_is_that_of_log_p():
    """Published-style numbers by quadrature, and the loss's gradient at exact draws of both phases; without the
    negative phase that of the base is another one, the decoder's the same."""
    grid = _Grid()
    exact = grid.exact()
    torch.testing.assert_close(exact, torch.tensor([-0.3431, -0.2564, -1.037], dtype=torch.float64), rtol=0, atol=5e-4)
    guide, number = _FromGrid(grid.model, grid), 300_000
    ours = _gradient(EnergyELBO(), grid, guide, number)
    # Standard deviations of one draw's gradient are below 2.2 (phases are independent).
    torch.testing.assert_close(ours, exact, rtol=0, atol=4 * 2.2 / math.sqrt(number))
    alone = losses.ExpectedLogJoint()
    alone.traits = replace(alone.traits, negative_phase=True)  # so that it takes the model at all
    without = _gradient(alone, grid, guide, number)
    torch.testing.assert_close(without[:2], torch.tensor([-0.181, -0.370], dtype=torch.float64), rtol=0, atol=0.016)
    assert (without[:2] - exact[:2]).abs().min() > 0.1
    assert abs(without[2] - exact[2]) < 4 * 2.2 / math.sqrt(number)


def _two_modes(number):
    """z = +-2 with scale 0.7, x = (z, -0.5 z) + 0.3 noise."""
    z = 2 * (torch.randint(0, 2, (number, 1)) * 2 - 1) + 0.7 * torch.randn(number, 1)
    weight = torch.tensor([[1.0, -0.5]])
    return z @ weight + 0.3 * torch.randn(number, 2)


def _linear_decoder():
    decoder = nn.Linear(1, 2)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.0], [-0.5]]))
        decoder.bias.zero_()
    return decoder.requires_grad_(False)


@pytest.mark.parametrize("scheme", ["short-run", "variational"])
def test_learns_a_prior_of_two_modes(scheme):
    """KL(true prior || learnt one) by quadrature; no Gaussian prior comes near.

    (Modes further apart do not mix within a short chain, whose draws then say nothing of their relative heights.)
    """
    torch.manual_seed(1)
    x = _two_modes(4000)
    energy = MLP([1, 16, 16, 1], nn.SiLU)
    model = EnergyPriorVAE(_linear_decoder(), 1, energy, "gaussian", noise=0.3, chain=PriorChain(40, 0.4))
    guide = guides.ShortRun(model, 12, 0.2) if scheme == "short-run" else guides.Amortized(model, MLP([2, 16, 2]))
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.9})
    result = fit(model, guide, x, optimizer=optimizer, batch_size=500, epochs=32, progress=False)
    assert result.objective.startswith("unnormalised")
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    step = z[1] - z[0]
    components = torch.distributions.Normal(torch.tensor([-2.0, 2.0], dtype=torch.float64), 0.7)
    true = torch.logsumexp(components.log_prob(z.unsqueeze(-1)), -1) - math.log(2)
    with torch.no_grad():
        learnt = (model.tilt(z.float().unsqueeze(-1)) + model.log_base(z.float().unsqueeze(-1))).double()
    learnt = learnt - torch.logsumexp(learnt, 0) - step.log()
    gaussian = torch.distributions.Normal(0.0, math.sqrt(4.49)).log_prob(z)  # the nearest one of all

    def kl(log_density):
        return float((true.exp() * (true - log_density)).sum() * step)

    assert kl(learnt) < 0.05
    assert kl(gaussian) > kl(learnt) + 0.2
    assert float((learnt.exp() * z.square()).sum() * step) == pytest.approx(4.49, abs=0.4)
    # Chains much longer than those of training stay where they are: no drift of the energy.
    energies = [model.tilt(model.sample_prior(1000, num_steps=k)).detach() for k in (300, 2500)]
    assert all(torch.isfinite(e).all() for e in energies)
    error = math.sqrt(sum(float(e.var()) / 1000 for e in energies))
    assert abs(float(energies[0].mean() - energies[1].mean())) < 4 * error


def _models(dtype=torch.float32):
    chain = PriorChain(3, 1.2)
    return {
        "one": EnergyPriorVAE(nn.Linear(3, 5), 3, MLP([3, 8, 1]), chain=chain).to(dtype),
        "joint": JointEnergyPrior(LadderDecoder([2, 1], (5,), 8), [2, 1], MLP([3, 8, 1]), chain=chain).to(dtype),
        "hierarchical": HierarchicalEnergyPrior(
            nn.Linear(2, 5), [2, 1], [nn.Linear(1, 4)], [MLP([2, 8, 1]), MLP([1, 8, 1])], chain=chain
        ).to(dtype),
    }


def _data(number, dtype=torch.float32):
    return (torch.rand(number, 5) > 0.5).to(dtype)


def _guides(model, dtype=torch.float32):
    return {
        "amortized": guides.Amortized(model, MLP([5, 8, 6]).to(dtype)),
        "mixture": guides.Amortized(model, MLP([5, 14]).to(dtype), "mixture"),
        "semi": guides.SemiAmortized(guides.Amortized(model, MLP([5, 8, 6]).to(dtype)), num_steps=2, step_size=0.05),
        "laplace": guides.Laplace(model, MLP([5, 8, 3]).to(dtype), num_steps=2),
        "dais": guides.DAIS(guides.Amortized(model, MLP([5, 8, 6]).to(dtype)), num_steps=2),
        "short-run": guides.ShortRun(model, 3, 0.1),
    }


@pytest.mark.filterwarnings("ignore:the log-density cannot be recorded")
@pytest.mark.parametrize("guide_name", ["amortized", "mixture", "semi", "laplace", "dais", "short-run"])
@pytest.mark.parametrize("model_name", ["one", "joint", "hierarchical"])
def test_one_step_of_stock_svi_trains_everything(model_name, guide_name):
    """Every parameter of both gets a gradient and moves; B = 1 and a ragged batch go through."""
    model = _models()[model_name]
    guide = _guides(model)[guide_name]
    assert isinstance(losses.default_loss(guide), EnergyELBO)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), EnergyELBO())
    for number in (6, 1):
        before = {n: p.detach().clone() for part in (model, guide) for n, p in part.named_parameters()}
        assert math.isfinite(svi.step(_data(number)))
        for part in (model, guide):
            for name, p in part.named_parameters():
                # A constant of f has the gradient 1 - 1; Laplace's encoder learns where its search starts.
                if not name.endswith("3.bias") and guide_name != "laplace":
                    assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_surrogate_has_no_value(dtype):
    """Reported numbers are the objective's; the gradient is that of f(z+) - f(z-) and of log p0 likewise."""
    model = _models(dtype)["hierarchical"]
    guide, x = guides.Amortized(model, MLP([5, 8, 6]).to(dtype)), _data(4, dtype)
    inner = losses.ELBO()
    inner.traits = replace(inner.traits, negative_phase=True)
    parameters = [*model.parameters(), *guide.parameters()]

    def run(loss, method):
        for p in parameters:
            p.grad = None
        torch.manual_seed(3)
        with pyro.get_param_store().scope():
            value = getattr(loss, method)(model, guide, x)
        if method == "differentiable_loss":
            value.backward()
            value = value.item()
        return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    def phases():
        torch.manual_seed(3)
        f, log_base = model.negative_phase(4)
        grads = torch.autograd.grad((f + log_base).sum(), parameters, allow_unused=True)
        after = torch.get_rng_state()
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)], after

    negative, state = phases()
    torch.manual_seed(3)

    def positive():
        for p in parameters:
            p.grad = None
        torch.set_rng_state(state)
        with pyro.get_param_store().scope():
            value = inner.loss_and_grads(model, guide, x)
        return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    value, plain = positive()
    for method in ("loss_and_grads", "differentiable_loss"):
        found, grads = run(EnergyELBO(), method)
        assert found == pytest.approx(value, rel=1e-5 if dtype == torch.float32 else 1e-10)
        for ours, plus, minus in zip(grads, plain, negative, strict=True):
            torch.testing.assert_close(ours, plus + minus)
            assert ours.dtype == dtype
    torch.manual_seed(0)
    held_out = EnergyELBO().loss(model, guide, x)
    torch.manual_seed(0)
    assert held_out == pytest.approx(inner.loss(model, guide, x), rel=1e-6)  # no chain, no random numbers


class _Subsampled(EnergyPriorVAE):
    """Rows of a larger data set."""

    total = 4

    def forward(self, x=None, size=None):
        with pyro.plate("data", self.total, subsample=torch.arange(len(x))):
            z = self.latents()
            return self.observe(self._decode(z), z.dim() - 1, x)


@pytest.mark.parametrize("kind", ["amortized", "short-run", "stock"])
def test_the_negative_phase_scales_as_the_plate(kind):
    """N / B = 50 multiplies both phases: gradients are 50 times those of the batch alone."""
    model, x = _Subsampled(nn.Linear(3, 5), 3, MLP([3, 8, 1]), chain=PriorChain(3, 1.2)), _data(4)

    def stock(x):
        with pyro.plate("data", model.total, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x[:, :3], 0.5).to_event(1))

    guide = stock if kind == "stock" else _guides(model)[kind]
    found = []
    for total in (4, 200):
        model.total = total
        for p in model.parameters():
            p.grad = None
        torch.manual_seed(2)
        with pyro.get_param_store().scope():
            EnergyELBO().loss_and_grads(model, guide, x)
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(50 * one, other, rtol=1e-4, atol=1e-4)


def test_other_losses_are_refused_and_other_models():
    """Either way the sentence names the cure."""
    model = _models()["one"]
    guide = guides.Amortized(model, MLP([5, 8, 6]))
    for loss in (losses.ELBO(), losses.ELBO("stl"), losses.IWAE(5), losses.InfoVAE(), losses.FreeBits()):
        assert "losses.EnergyELBO()" in compatible(model, guide, loss)
        with pytest.raises(IncompatibleError, match=r"losses\.EnergyELBO"):
            loss.loss(model, guide, _data(3))
    assert compatible(EnergyPriorVAE, guides.ShortRun, losses.ExpectedLogJoint()) is not None
    for guide_name, one in _guides(model).items():
        assert compatible(model, one, EnergyELBO()) is None, guide_name
    plain = VAE(nn.Linear(3, 5), 3)
    theirs = guides.Amortized(plain, MLP([5, 8, 6]))
    assert "losses.ELBO()" in compatible(plain, theirs, EnergyELBO())
    with pytest.raises(IncompatibleError, match="does not have"):
        EnergyELBO().loss(plain, theirs, _data(3))
    wrapped = pyro.poutine.mask(model, mask=True)
    with pytest.raises(IncompatibleError, match="unwrapped"):
        EnergyELBO().loss(wrapped, theirs, _data(3))


def test_objectives_within():
    """Bounds may be passed and keep their own needs; objectives with a penalty may not."""
    model, x = _models()["one"], _data(4)
    guide, mixture = _guides(model)["amortized"], _guides(model)["mixture"]
    for objective in (losses.ELBO("stl"), losses.IWAE(3), Trace_ELBO()):
        loss = EnergyELBO(objective)
        with pyro.get_param_store().scope():
            assert math.isfinite(loss.loss_and_grads(model, guide, x))
        assert loss.per_datum(model, guide, x).shape == (4,) if hasattr(objective, "per_datum") else True
    assert EnergyELBO(losses.IWAE(3)).name == "unnormalised IWAE-3"
    assert "reparameterised" in compatible(model, mixture, EnergyELBO(losses.ELBO()))
    assert "no density" in compatible(model, guides.ShortRun(model), EnergyELBO(losses.ELBO()))
    assert not losses.ELBO().traits.negative_phase  # the caller's class is as it was
    with pytest.raises(IncompatibleError, match="bound"):
        EnergyELBO(losses.FreeBits())


def test_a_kl_weight_tempers_the_whole_prior():
    """At weight 0 neither phase of the energy is left; the value is linear in the weight at the same draws."""
    model, x = _models(torch.float64)["hierarchical"], _data(4, torch.float64)
    guide = guides.Amortized(model, MLP([5, 8, 6]).double())
    values = []
    for beta in (0.0, 0.5, 1.0):
        for p in model.parameters():
            p.grad = None
        torch.manual_seed(0)
        with handlers.anneal(beta), pyro.get_param_store().scope():
            values.append(EnergyELBO().loss_and_grads(model, guide, x))
        prior = [*model.energy.parameters(), *model.conditionals.parameters()]
        of_prior = sum(float(p.grad.abs().sum()) for p in prior)
        assert (of_prior == 0) == (beta == 0)
    assert values[1] == pytest.approx((values[0] + values[2]) / 2, rel=1e-10)
    torch.manual_seed(0)
    u = guide.space(x).prior(3, x)
    bound = guide.space(x).bind(x)
    latent, rest = bound.terms(u)
    tilt = model.tilt(u)
    with handlers.anneal(0.3):
        torch.testing.assert_close(bound(u, 0.3), 0.3 * (latent + tilt) + rest - tilt)


def test_runaway_energies_stop_training():
    """Before anything moves, with what to do."""
    model, x = _models()["one"], _data(4)
    guide = guides.Amortized(model, MLP([5, 8, 6]))
    with torch.no_grad():
        model.energy[-1].bias.fill_(2e9)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingDiverged, match="negative phase"):
        fit(model, guide, x, epochs=1, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    """Chains draw from the run's random state, which a checkpoint keeps; 5 = 3 + 2 within an epoch."""
    x, found = _data(20), []
    for parts in ((5,), (3, 5)):
        torch.manual_seed(4)
        model = _models()["joint"]
        guide = guides.Amortized(model, MLP([5, 8, 6]))
        for stop in parts:
            fit(model, guide, x, batch_size=6, max_steps=stop, progress=False,
                checkpoint=tmp_path / f"{len(parts)}.pt")  # fmt: skip
        found.append([p.detach().clone() for p in (*model.parameters(), *guide.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_held_out_numbers_do_not_choose_a_model():
    """log Z moves with training: early stopping is refused."""
    model = _models()["one"]
    guide = guides.Amortized(model, MLP([5, 8, 6]))
    with pytest.raises(ValueError, match="leave patience out"):
        fit(model, guide, _data(6), validation=_data(6), patience=2, progress=False)
    result = fit(model, guide, _data(6), validation=_data(4), epochs=1, progress=False)
    assert math.isfinite(result.validation[0][1])
    assert result.objective == "unnormalised ELBO"


def test_training_forgets_a_measured_log_z():
    model, x = _models()["one"], _data(4)
    guide = guides.Amortized(model, MLP([5, 8, 6]))
    model.normalise(0.7)
    EnergyELBO().loss(model, guide, x)
    assert model.normalised
    # Optimisers of Pyro move `p.data`, which leaves no trace in a parameter's version.
    SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), EnergyELBO()).step(x)
    assert not model.normalised


def _translated(num_steps):
    """Norm of the linear tilt after training a model in which all codes may move along with it."""
    torch.manual_seed(0)
    energy = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        energy.weight.copy_(torch.tensor([[2.0, 0.0]]))
    model = EnergyPriorVAE(nn.Linear(2, 3), 2, energy, "gaussian", noise=0.3, chain=PriorChain(num_steps, 0.3))
    guide = guides.Amortized(model, nn.Linear(3, 4))
    x = torch.randn(200, 3) @ torch.randn(3, 3)
    fit(model, guide, x, loss=losses.EnergyELBO(), epochs=60, optimizer=Adam(lr=0.05), progress=False)
    return float(energy.weight.detach().norm())


def test_a_chain_that_keeps_its_start_runs_away_and_says_so():
    """A translation of codes, decoder and tilt moves no density: only a draw that lags makes it grow."""
    with pytest.warns(UserWarning, match=r"PriorChain\(num_steps=20, step_size=0.3\) keeps 40% of its start"):
        lagging = _translated(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = _translated(100)
    assert lagging > 2 * fine


class _Exploding(nn.Module):
    """A scale that grows with the layer above without bound."""

    def forward(self, z):
        return torch.cat([z, 30 * z], -1)


def test_a_prior_s_chain_that_runs_away_stops_training():
    """Through conditional scales it may reach infinity: told as what it is, before anything moves."""
    torch.manual_seed(0)
    energies = [MLP([1, 8, 1]), MLP([1, 8, 1])]
    model = HierarchicalEnergyPrior(nn.Linear(1, 5), [1, 1], [_Exploding()], energies)
    guide = guides.Amortized(model, MLP([5, 8, 4]))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingDiverged, match="negative phase"):
        fit(model, guide, _data(8), epochs=3, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
