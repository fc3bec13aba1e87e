"""Flows as guides: cost under Pyro's losses, ownership of their weights, emission, and posteriors they must fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from test_emission import Y, eight_schools, local
from test_flows import BUILD, Passes, every_flow, with_nets
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyrovae import checkpoint, evidence, fit, flows, guides, losses
from pyrovae.models import PPCA, VAE
from pyrovae.nets import MLP


def flow_guide(name: str, model: Callable[..., object], pixels: int, dim: int, layers: int = 2) -> guides.Amortized:
    torch.manual_seed(4)
    flow = BUILD[name](dim, layers)
    return guides.Amortized(model, MLP([pixels, 8, flow.num_params], nn.Tanh), flow)


def small(name: str) -> tuple[VAE, guides.Amortized]:
    torch.manual_seed(4)
    vae = VAE(nn.Linear(3, 6), 3, "gaussian")
    return vae, flow_guide(name, vae, 6, 3)


@with_nets
def test_net_passes_of_pyros_losses(name: str) -> None:
    for model, pixels, x in ((small(name)[0], 6, torch.randn(5, 6)), (problems.gamma_normal, 3, torch.randn(5, 3))):
        pyro.clear_param_store()
        guide = flow_guide(name, model, pixels, 3)
        passes = Passes(guide.flow)
        guide(x)  # the first call looks at the programs, once
        passes.read()
        for loss in (
            Trace_ELBO(),
            TraceMeanField_ELBO(),
            Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1),
            TraceMeanField_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1),
            losses.ELBO(),
            losses.IWAE(5, "reparam"),
        ):
            loss.loss_and_grads(model, guide, x)
            assert passes.read() == 2, type(loss).__name__
        guide.log_weights(11, x)
        assert passes.read() == 2


@every_flow
def test_weights_belong_to_the_guide_and_are_trained_by_stock_svi(name: str) -> None:
    vae, guide = small(name)
    assert guide.traits.reparameterised
    assert not guide.traits.gaussian_sites
    assert guide.traits.name == f"Amortized({name})"
    assert repr(guide).startswith(f"Amortized(family={type(guide.flow).__name__}(dim=3, num_transforms=2")
    before = {key: value.clone() for key, value in guide.named_parameters()}
    assert {f"flow.{key}" for key, _ in guide.flow.named_parameters()} <= set(before)
    svi = SVI(vae, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(torch.randn(8, 6))
    for key, value in guide.named_parameters():
        assert not torch.equal(value, before[key]), key
    for key, _ in guide.flow.named_parameters():
        assert f"guide.flow$$${key}" in pyro.get_param_store()


@every_flow
def test_training_goes_on_from_a_checkpoint_as_if_unbroken(name: str, tmp_path: object) -> None:
    data = torch.randn(40, 6)
    states = []
    for file, lengths in (("whole.pt", (11,)), ("broken.pt", (4, 11))):
        for steps in lengths:
            pyro.clear_param_store()
            vae, guide = small(name)
            fit(vae, guide, data, max_steps=steps, batch_size=16, checkpoint=f"{tmp_path}/{file}", progress=False)
        states.append({**guide.state_dict(), **vae.state_dict()})
        content = checkpoint.load(f"{tmp_path}/{file}")
        assert all(torch.equal(content["state"]["modules"]["guide"][k], v) for k, v in guide.state_dict().items())
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    other = small(name)[1]
    other.load_state_dict(guide.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), guide.parameters(), strict=True))


@every_flow
def test_emitted_at_its_own_site_or_packed(name: str) -> None:
    _, guide = small(name)
    x = torch.randn(4, 6)
    trace = poutine.trace(guide).get_trace(x)
    assert isinstance(trace.nodes["z"]["fn"], dist.TransformedDistribution)
    assert "_u" not in trace.nodes
    assert guide.space(x).site_posteriors(trace) == {"z": None}
    pyro.clear_param_store()
    guide = flow_guide(name, problems.gamma_normal, 3, 3)
    x = torch.randn(4, 3)
    trace = poutine.trace(guide).get_trace(x)
    assert trace.nodes["_u"]["fn"].event_shape == (3,)
    assert guide.space(x).site_posteriors(trace) == {"s": None, "z": None}


@every_flow
@pytest.mark.parametrize("mode", ["site", "local", "joint"])
def test_vectorised_sequential_and_importance_weights_agree(mode: str, name: str) -> None:
    """One vector site, inner plates with constrained sites, and joint mode without encoder."""
    torch.manual_seed(5)
    if mode == "site":
        model: Callable[..., object] = VAE(nn.Linear(3, 6), 3, "gaussian")
        guide, x = flow_guide(name, model, 6, 3), torch.randn(4, 6)
    elif mode == "local":
        model, x = local, torch.randn(4, 2)
        guide = flow_guide(name, model, 2, 3)
    else:
        model, x = eight_schools, Y
        guide = guides.Amortized(model, None, flow_of_ten(name), plate=None, example=(Y,))
    nesting = 2 if mode == "local" else 1
    with torch.no_grad():
        weights = guide.log_weights(3000, x).sum(-1)
        expected, se = weights.mean(), weights.std() / math.sqrt(len(weights))
        for loss in (Trace_ELBO, TraceMeanField_ELBO):
            for particles, repeats in ((100, 20), (1, 200)):
                elbo = loss(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=nesting)
                values = torch.tensor([-elbo.loss(model, guide, x) for _ in range(repeats)])
                both = math.hypot(se, values.std() / math.sqrt(repeats))
                assert abs(values.mean() - expected) < 3.5 * both, (loss.__name__, particles)


def flow_of_ten(name: str) -> flows.Flow:
    if name == "householder":
        return flows.Householder(10, 2)
    kind = {"iaf": flows.IAF, "coupling": flows.Coupling, "spline": flows.Spline}[name]
    return kind(10, 2, context=3, hidden=(12,), activation=nn.Tanh)


def test_refined_by_gradient_steps_through_the_flow() -> None:
    vae, base = small("iaf")
    guide = guides.SemiAmortized(base, num_steps=2, step_size=0.05)
    x = torch.randn(5, 6)
    losses.ELBO().loss_and_grads(vae, guide, x)
    for key, value in guide.named_parameters():
        assert value.grad is not None, key
        assert value.grad.abs().sum() > 0, key


# What they are for


def trained(model: Callable[..., object], guide: guides.Amortized, x: Tensor, steps: int) -> None:
    """From close to the family's own start."""
    last = guide.encoder[-1]
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.copy_(guide.family(x).init(1, dtype=x.dtype)[0])
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-2}, "gamma": 0.05 ** (1 / steps)}
    )
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, optimizer, losses.ELBO())
        for _ in range(steps):
            svi.step(x)
            optimizer.step()


def correlated() -> tuple[PPCA, Tensor, Tensor, Tensor]:
    """pPCA with two latents that compensate for one another: model, data, log p(x), posterior precision."""
    weight = torch.tensor([[1.0, 0.9], [0.5, 0.6], [1.2, 1.0]]).double()
    model = PPCA(weight, noise=0.4).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 2, generator=generator).double()
    x = z @ weight.T + 0.4 * torch.randn(64, 3, generator=generator).double()
    marginal = MultivariateNormal(torch.zeros(3).double(), weight @ weight.T + 0.16 * torch.eye(3).double())
    return model, x, marginal.log_prob(x), torch.eye(2).double() + weight.T @ weight / 0.16


@pytest.mark.parametrize("name", ["householder", "iaf"])
def test_trained_on_a_correlated_posterior_it_beats_every_factorised_normal(name: str) -> None:
    """Householder contains the posterior, IAF comes close; the best factorised normal is 1.01 nats short."""
    model, x, exact, precision = correlated()
    factorised = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert factorised == pytest.approx(1.0102, abs=1e-4)
    torch.manual_seed(0)
    flow = (flows.Householder(2, 1) if name == "householder" else flows.IAF(2, 2, context=4, hidden=(16,))).double()
    guide = guides.Amortized(model, MLP([3, 32, flow.num_params], nn.Tanh).double(), flow)
    trained(model, guide, x, 600)
    gap = (exact - evidence.log_weights(model, guide, x, num_samples=1000)).mean(1)
    mean, se = gap.mean(), gap.std() / math.sqrt(len(gap))
    assert mean > -3 * se
    assert mean + 3 * se < 0.1 * factorised


def test_householder_at_the_exact_posterior_has_no_gap_at_any_draw() -> None:
    model, x, exact, precision = correlated()
    values, axes = torch.linalg.eigh(precision)
    reflection = axes if torch.linalg.det(axes) < 0 else axes * torch.tensor([1.0, -1.0]).double()
    v = torch.tensor([1.0, 0.0]).double() - reflection[:, 0]  # I - 2 v v' / |v|^2 sends e_1 to the first axis
    flow = flows.Householder(2, 1).double()
    guide = guides.Amortized(model, nn.Linear(3, 6).double(), flow)
    weight = model.weight.detach()
    with torch.no_grad():
        guide.encoder.weight.zero_()
        guide.encoder.weight[:2] = reflection.T @ torch.linalg.solve(precision, weight.T / 0.16)
        guide.encoder.bias.copy_(torch.cat([torch.zeros(2).double(), -values.log(), v]))
    assert (guide.log_weights(50, x) - exact).abs().max() < 1e-12


def test_a_spline_covers_two_modes_where_a_normal_takes_one() -> None:
    """z ~ N(0, 1), x | z ~ N(z^2, 1/16) at x = 1/2: two touching modes; the best normal is 0.637 nats short."""
    grid = torch.linspace(-6, 6, 60_001, dtype=torch.float64)
    x = torch.tensor([0.5], dtype=torch.float64)
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.25).log_prob(x)
    width = grid[1] - grid[0]
    exact = torch.logsumexp(log_joint, 0) + width.log()

    def bound(loc: Tensor, log_scale: Tensor) -> Tensor:
        log_q = dist.Normal(loc, log_scale.exp()).log_prob(grid)
        return (log_q.exp() * (log_joint - log_q)).sum() * width

    best = max(
        float(bound(torch.tensor(loc), torch.tensor(log_scale)))
        for loc in torch.linspace(0, 1, 41).tolist()
        for log_scale in torch.linspace(-2.5, 0.0, 51).tolist()
    )
    single = float(exact) - best
    assert single == pytest.approx(0.637, abs=2e-3)
    torch.manual_seed(0)
    flow = flows.Spline(1, 1, context=2, hidden=(16,)).double()
    guide = guides.Amortized(
        problems.bimodal, MLP([1, flow.num_params]).double(), flow, encoder_input=lambda x: x.unsqueeze(-1)
    )
    trained(problems.bimodal, guide, x.repeat(64), 600)
    gap = exact - evidence.log_weights(problems.bimodal, guide, x, num_samples=20_000)[:, 0]
    assert gap.mean() + 3 * gap.std() / math.sqrt(len(gap)) < 0.5 * single
    left = (guide.draws(2000, x) < 0).double().mean()
    assert 0.3 < left < 0.7
