"""Models with tilted priors: the law of the prior's chain, the program's density, generation, and when log Z counts."""

from __future__ import annotations

import io
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyrovae import diagnose, generate, guides, losses, reference
from pyrovae.latents import LatentSpace
from pyrovae.models.energy_prior_vae import EnergyPriorVAE
from pyrovae.models.hierarchical_energy_prior import HierarchicalEnergyPrior
from pyrovae.models.hierarchical_vae import HierarchicalVAE
from pyrovae.models.joint_energy_prior import JointEnergyPrior
from pyrovae.models.ladder_vae import LadderVAE
from pyrovae.models.tilted import PriorChain
from pyrovae.models.vae import VAE
from pyrovae.nets import MLP, LadderDecoder
from pyrovae.recording import recorded


class Quadratic(nn.Module):
    """f(z) = sum_j h_j z_j - c_j z_j^2 / 2: the prior is N(h / (1 + c), 1 / (1 + c))."""

    def __init__(self, c, h):
        super().__init__()
        self.c, self.h = nn.Parameter(torch.tensor(c)), nn.Parameter(torch.tensor(h))

    def forward(self, z):
        return (self.h * z - 0.5 * self.c * z.square()).sum(-1)


def models(dtype=torch.float32):
    chain = PriorChain(3, 1.2)
    return {
        "one": EnergyPriorVAE(nn.Linear(3, 5), 3, MLP([3, 8, 1]), chain=chain).to(dtype),
        "joint": JointEnergyPrior(LadderDecoder([2, 1], (5,), 8), [2, 1], MLP([3, 8, 1]), chain=chain).to(dtype),
        "hierarchical": HierarchicalEnergyPrior(
            nn.Linear(2, 5), [2, 1], [nn.Linear(1, 4)], [MLP([2, 8, 1]), MLP([1, 8, 1])], chain=chain
        ).to(dtype),
    }


NAMES = ["one", "joint", "hierarchical"]


def data(number, dtype=torch.float32):
    return (torch.rand(number, 5) > 0.5).to(dtype)


@pytest.mark.parametrize(("num_steps", "step_size"), [(1, 0.4), (5, 0.3), (80, 0.5)])
def test_chain_of_a_quadratic_tilt_has_its_exact_law(num_steps, step_size):
    """Unadjusted Langevin on a Gaussian is AR(1): mean and variance after K steps from N(0, 1), in closed form."""
    c, h, number = torch.tensor([3.0, 0.5]), torch.tensor([2.0, -1.0]), 100_000
    chain = PriorChain(num_steps, step_size)
    model = EnergyPriorVAE(nn.Linear(2, 3), 2, Quadratic([3.0, 0.5], [2.0, -1.0]), chain=chain)
    z = model.sample_prior(number)
    precision, target = 1 + c, h / (1 + c)
    a = 1 - step_size**2 * precision / 2
    mean = target * (1 - a**num_steps)
    variance = a ** (2 * num_steps) + step_size**2 * (1 - a ** (2 * num_steps)) / (1 - a**2)
    assert ((z.mean(0) - mean).abs() < 4 * (variance / number).sqrt()).all()
    assert ((z.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / number)).all()
    base = model.sample_prior(number, tilted=False)
    assert ((base.var(0) - 1).abs() < 4 * math.sqrt(2 / number)).all()
    assert (base.mean(0).abs() < 4 / math.sqrt(number)).all()


class _Bend(nn.Module):
    """Mean and log scale of z1 that both bend with z2."""

    def forward(self, z):
        return torch.cat([1.5 * torch.tanh(z), 0.6 * torch.sin(z) - 0.5], -1)


class _Slope(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, z):
        return self.slope * torch.tanh(z)


def test_whitened_chain_targets_the_stated_prior():
    """Moments of both layers against quadrature of exp(f1 + f2) p0; without T's Jacobian they would be others."""
    model = HierarchicalEnergyPrior(
        nn.Linear(1, 2), [1, 1], [_Bend()], [_Slope(1.5), _Slope(-1.0)], chain=PriorChain(300, 0.15), scale_floor=0.0
    )
    line = torch.linspace(-8, 8, 801)
    z = torch.cartesian_prod(line, line)  # (z2, z1)
    log_p = model.tilt(z) + model.log_base(z)
    scale = model.prior(0, z[:, :1]).base_dist.scale[:, 0]
    features = torch.stack([z[:, 0], z[:, 1], z[:, 0].square(), z[:, 1].square(), z[:, 0] * z[:, 1]], -1)

    def moments(log_density):
        return (torch.softmax(log_density.double(), 0).unsqueeze(-1) * features).sum(0)

    number = 8000
    draws = model.sample_prior(number)
    found = torch.stack(
        [draws[:, 0], draws[:, 1], draws[:, 0].square(), draws[:, 1].square(), draws[:, 0] * draws[:, 1]], -1
    )
    # 1 % for the bias of steps of 0.15, whose variance is too large by s^2 / 4 of itself.
    error = 4 * found.std(0) / math.sqrt(number) + 0.01 * found.square().mean(0).sqrt()
    assert ((found.mean(0) - moments(log_p)).abs() < error).all()
    assert ((found.mean(0) - moments(log_p - scale.log())).abs() > error).any()


def test_whitening_and_base_agree():
    """log p0(T(e)) + log |det dT/de| = log N(e; 0, I); base draws are T of normals."""
    model = models(torch.float64)["hierarchical"]
    eps = torch.randn(4, 3, dtype=torch.float64)
    z = model.unwhiten(eps)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda e: model.unwhiten(e[None])[0], e) for e in eps])
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum(-1)
    torch.testing.assert_close(model.log_base(z) + torch.linalg.slogdet(jacobian)[1], normal)
    torch.manual_seed(5)
    trace = poutine.trace(super(type(model), model).forward).get_trace(None, size=4)
    sites = torch.cat([trace.nodes["z2"]["value"], trace.nodes["z1"]["value"]], -1)
    expected = sum(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for name in ("z1", "z2"))
    torch.testing.assert_close(model.log_base(sites), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_of_the_program(name, dtype):
    """log-joint = base + tilt + likelihood, for one datum and many, with leading dims; ours = the traced one."""
    model = models(dtype)[name]
    for number in (1, 4):
        x = data(number, dtype)
        space = LatentSpace(model, x)
        u = torch.randn(3, number, 3, dtype=dtype)
        likelihood = torch.distributions.Bernoulli(probs=model.mean(u)).log_prob(x).sum(-1)
        flat = u.flatten(0, 1)
        expected = (model.log_base(flat) + model.tilt(flat)).reshape(3, number) + likelihood
        found = space.log_joint(u, x)
        torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)
        assert found.dtype == dtype
        trace = poutine.trace(poutine.condition(model, space.constrain(u[0]))).get_trace(x)
        assert trace.log_prob_sum().item() == pytest.approx(expected[0].sum().item(), rel=1e-5)
        trace = poutine.trace(model).get_trace(x)
        assert trace.nodes["tilt"]["is_observed"]
        assert trace.nodes["tilt"]["fn"].log_prob(trace.nodes["tilt"]["value"]).shape == (number,)


def test_without_a_tilt_they_are_their_bases():
    """f = 0: the log-joint of a VAE, a ladder and a Gaussian hierarchy with the same nets."""
    x, u = data(4), torch.randn(4, 3)
    for name, model in models().items():
        for p in model.energy.parameters():
            nn.init.zeros_(p)
        if name == "one":
            plain = VAE(model.decoder, 3)
        elif name == "joint":
            plain = LadderVAE(model.decoder, [2, 1])
        else:
            plain = HierarchicalVAE(model.decoder, [2, 1], list(model.conditionals))
        ours, theirs = (LatentSpace(m, x).log_joint(u, x) for m in (model, plain))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_generation_runs_the_training_chain(name):
    """Latents of `model(None, size=n)` are `sample_prior(n)`; particles are different draws; outside values win."""
    model = models()[name]
    torch.manual_seed(3)
    z = model.sample_prior(6)
    torch.manual_seed(3)
    trace = poutine.trace(model).get_trace(None, size=6)
    for site, part in model.places().items():
        assert torch.equal(trace.nodes[site]["value"], z[:, part])
        assert not trace.nodes[site]["is_observed"]
    assert trace.nodes["_RETURN"]["value"].shape == (6, 5)
    fixed = {site: torch.zeros(6, part.stop - part.start if part.stop else 3) for site, part in model.places().items()}
    trace = poutine.trace(poutine.condition(model, fixed)).get_trace(None, size=6)
    torch.testing.assert_close(trace.nodes["x"]["fn"].mean, model.mean(torch.zeros(6, 3)))
    for parallel in (False, True):
        drawn = Predictive(model, num_samples=4, parallel=parallel)(None, size=2)
        first = drawn[next(iter(model.places()))]
        assert first.shape[:2] == (4, 2)
        assert drawn["x"].shape == (4, 2, 5)
        assert len(first.flatten(0, 1).unique(dim=0)) == 8


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_leaves_weights_and_random_state(name):
    model = models()[name]
    x, guide = data(4), guides.Amortized(model, MLP([5, 6]))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    state = torch.get_rng_state()
    LatentSpace(model, x)
    guide.log_weights(5, x)
    generate.interpolate(model, guide, x, x.flip(0), steps=3)
    state_after_draws = torch.get_rng_state()
    assert all(torch.equal(v, before[n]) or n == "log_z" for n, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.set_rng_state(state)
    guide.log_weights(5, x)
    assert torch.equal(torch.get_rng_state(), state_after_draws)  # nothing but the guide's own draws


def test_pictures_and_posteriors():
    """Codes decode, a grid posterior and short runs meet: what knows a program knows a tilted one."""
    torch.manual_seed(0)
    model = EnergyPriorVAE(nn.Linear(1, 5), 1, Quadratic([2.0], [3.0]))
    x = data(3)
    exact = reference.exact(model, x, num_samples=2000)
    u = guides.ShortRun(model, 60, 0.3).draws(2000, x)
    draws = exact.pooled
    gap = (u.mean(0) - draws.mean(0)).abs()
    assert (gap < 4 * (u.var(0) / 2000 + draws.var(0) / 2000).sqrt() + 0.01).all()
    untilted = reference.exact(VAE(model.decoder, 1), x, num_samples=2000).pooled
    assert ((untilted.mean(0) - draws.mean(0)).abs() > 0.2).all()


@pytest.mark.parametrize("name", NAMES)
def test_log_z_counts_until_a_weight_of_the_prior_moves(name):
    """Never stale: weights, dtype, loading and optimisers' own way of writing are all seen; the decoder does not
    matter."""
    model = models()[name]
    x, u = data(4), torch.randn(4, 3)
    space = LatentSpace(model, x)
    plain = space.log_joint(u, x)
    assert not model.normalised
    model.normalise(1.25)
    assert model.normalised
    torch.testing.assert_close(space.log_joint(u, x), plain - 1.25)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.add_(0.0)
    assert model.normalised
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    weights = [*model.energy.parameters()]
    if name == "hierarchical":
        weights.append(next(model.conditionals.parameters()))
    for weight in weights:
        model.normalise(1.25)
        with torch.no_grad():
            weight.add_(0.5)
        assert not model.normalised
        with torch.no_grad():
            weight.sub_(0.5)
    with torch.no_grad():
        weights[0].add_(0.5)
    saved.seek(0)
    model.load_state_dict(torch.load(saved))
    assert model.normalised
    torch.testing.assert_close(space.log_joint(u, x), plain - 1.25)
    other = models()[name]
    saved.seek(0)
    other.load_state_dict(torch.load(saved))
    assert other.normalised
    assert not model.double().normalised


@pytest.mark.filterwarnings("error:the log-density cannot be recorded")
def test_a_recorded_density_follows_log_z():
    """Chains that replay a recording see the change; and it can be recorded."""
    model = models(torch.float64)["one"]
    x = data(4, torch.float64)
    guide = guides.ShortRun(model, 3, 0.1)
    guide.draws(2, x)
    bound = guide.space(x).bind(x)
    u = torch.randn(2, 4, 3, dtype=torch.float64)
    plain = recorded(bound, u)(u)
    model.normalise(2.0)
    torch.testing.assert_close(recorded(bound, u)(u), plain - 2.0)
    model.forget_log_z()
    torch.testing.assert_close(recorded(bound, u)(u), plain)


def test_bad_arguments():
    decoder = nn.Linear(2, 5)
    with pytest.raises(ValueError, match="one number per row"):
        EnergyPriorVAE(decoder, 2, nn.Linear(2, 3))
    for chain in (PriorChain(0, 0.1), PriorChain(5, 0.0)):
        with pytest.raises(ValueError, match="num_steps"):
            EnergyPriorVAE(decoder, 2, nn.Linear(2, 1), chain=chain)
    with pytest.raises(ValueError, match="energy each"):
        HierarchicalEnergyPrior(decoder, [2, 1], [nn.Linear(1, 4)], [nn.Linear(2, 1)])
    with pytest.raises(ValueError, match="need 1 conditionals"):
        HierarchicalVAE(decoder, [2, 1], [])
    with pytest.raises(ValueError, match="scale_floor"):
        HierarchicalVAE(decoder, [2, 1], [nn.Linear(1, 4)], scale_floor=-1.0)
    with pytest.raises(ValueError, match="4 numbers"):
        HierarchicalVAE(decoder, [2, 1], [nn.Linear(1, 3)])(None, size=2)
    with pytest.raises(ValueError, match="pass above"):
        HierarchicalVAE(decoder, [2, 1], [nn.Linear(1, 4)]).prior(0)
    model = models()["one"]
    with pytest.raises(ValueError, match="at least one draw"):
        model.sample_prior(0)
    with pytest.raises(ValueError, match="finite"):
        model.normalise(math.nan)
    with pytest.raises(ValueError, match="size=n"):
        model()


def test_hierarchy_trains_as_a_plain_model():
    """`HierarchicalVAE` by itself is an ordinary model for ordinary losses, particle dims and closed KLs included."""
    model = HierarchicalVAE(nn.Linear(2, 5), [2, 1], [nn.Linear(1, 4)])
    guide, x = guides.Amortized(model, MLP([5, 6])), data(4)
    weights = guide.log_weights(2000, x).sum(1).detach()
    for loss in (Trace_ELBO(2000, vectorize_particles=True), losses.ELBO(num_particles=100)):
        with pyro.get_param_store().scope():
            value = loss.loss(model, guide, x)
        error = float(weights.std()) * math.sqrt(1 / 2000 + 1 / 100)
        assert -value == pytest.approx(float(weights.mean()), abs=4 * error)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), losses.ELBO())
    before = [p.detach().clone() for p in model.parameters()]
    svi.step(x)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_diagnostics_say_what_a_tilted_prior_leaves_open():
    """KL is to the base; log p(x) of an audit lacks log Z until it is measured, the divergences never do."""
    torch.manual_seed(0)
    model = EnergyPriorVAE(nn.Linear(1, 5), 1, Quadratic([3.0], [2.0]), chain=PriorChain(3, 1.2)).double()
    guide, x = guides.Amortized(model, nn.Linear(5, 2).double()), data(4, torch.double)
    assert "KL to the prior's base" in repr(diagnose.information(model, guide, x))
    before = diagnose.audit(model, guide, x, num_samples=4000)
    assert before.log_evidence.kind == before.elbo.kind == "unnormalised"
    log_z = 2.0**2 / (2 * 4) - 0.5 * math.log(4)  # of exp(2 z - 3 z^2 / 2) under N(0, 1)
    model.normalise(log_z)
    after = diagnose.audit(model, guide, x, num_samples=4000)
    assert after.log_evidence.kind == after.elbo.kind == "estimate"
    assert torch.allclose(before.log_evidence.values - after.log_evidence.values, torch.full((4,), log_z).double())
    assert torch.allclose(before.kl.values, after.kl.values)
    assert (after.errors.abs() < 4).all()


def test_weights_written_behind_the_counter_are_seen():
    """`.data` leaves no trace in a tensor's version."""
    model = models()["one"]
    model.normalise(0.3)
    assert model.normalised
    for parameter in model.energy.parameters():
        parameter.data.mul_(2)
    assert not model.normalised
    for parameter in model.energy.parameters():
        parameter.data.div_(2)
    assert model.normalised
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in model.energy.parameters())),
                                        model.energy.parameters())  # fmt: skip
    assert not model.normalised
