"""The recorded log-joint against the program: values, gradients of both orders, and what makes a recording stale."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyrovae import data, models
from pyrovae.latents import LatentSpace
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.recording import recorded
from tests.bench import problems


def _vae(likelihood="bernoulli", dtype=torch.double, dim=3, pixels=7):
    torch.manual_seed(0)
    return models.VAE(LinearHeadDecoder(dim, [6], [pixels], nn.Tanh).to(dtype), dim, likelihood)


def _both(bound, u, beta=1.0, parameters=()):
    """Value, gradient, gradient of the squared gradient (with respect to u and the parameters) of program and graph."""
    found = []
    for function in (bound, recorded(bound, u)):
        leaf = u.detach().clone().requires_grad_()
        value = function(leaf, beta)
        (gradient,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), (leaf, *parameters))
        found.append((value.detach(), gradient.detach(), *second))
    assert recorded(bound, u) is not bound
    return found


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_graph_gives_the_program_s_numbers_and_gradients_of_both_orders(likelihood, lead, beta):
    model = _vae(likelihood)
    x = (torch.rand(5, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    space = LatentSpace(model, x)
    for seed, rows in ((0, x), (1, 1 - x)):  # the second batch replays the recording of the first
        bound = space.bind(rows)
        u = torch.randn(*lead, 5, 3, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        program, graph = _both(bound, u, beta, tuple(model.decoder.parameters()))
        for ours, theirs in zip(graph, program, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert len(space.recordings) == 1


@pytest.mark.parametrize("name", ["gamma_normal", "bimodal", "subsampled", "eight_schools"])
def test_graph_of_constrained_subsampled_and_joint_models(name):
    options, args = {}, (torch.linspace(-1, 1, 12, dtype=torch.double).reshape(4, 3),)
    if name == "bimodal":
        args = (torch.tensor([2.25, 0.3]),)
    if name == "subsampled":
        args = (torch.randn(6, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 1, 0, 17, 99, 3]))
    model = getattr(problems, name)
    if name == "eight_schools":
        model, args, options = problems.eight_schools(), (), {"plate": None}
    space = LatentSpace(model, *args, **options)
    bound = space.bind(*args)
    u = 0.5 * torch.randn(3, bound.rows.size, space.dim, dtype=space.dtype, generator=torch.Generator().manual_seed(0))
    program, graph = _both(bound, u)
    for ours, theirs in zip(graph, program, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4 if u.dtype == torch.float32 else 1e-10, atol=1e-4)


def test_enumerated_latents_are_recorded_too():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(z + 2.0 * c, 0.5), obs=x)

    x = torch.tensor([0.1, 2.0, -1.0], dtype=torch.double)
    bound = LatentSpace(model, x).bind(x)
    u = torch.randn(2, 3, 1, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(recorded(bound, u)(u), bound(u), rtol=1e-12, atol=1e-12)
    assert recorded(bound, u) is not bound


def test_parameters_are_seen_by_reference_and_new_ones_make_a_new_recording():
    model = _vae()
    x = torch.ones(2, 7, dtype=torch.double)
    space = LatentSpace(model, x)
    bound, u = space.bind(x), torch.ones(2, 3, dtype=torch.double)
    fast = recorded(bound, u)
    before = fast(u).detach()
    with torch.no_grad():
        model.decoder.head.weight.mul_(2.0)  # as an optimiser steps and load_state_dict copies
    torch.testing.assert_close(recorded(bound, u)(u), bound(u), rtol=1e-12, atol=1e-12)
    assert (bound(u) - before).abs().min() > 1e-4
    assert len(space.recordings) == 1
    model.decoder.head.weight = nn.Parameter(model.decoder.head.weight.detach().clone())  # same numbers, other tensor
    value = recorded(bound, u)(u).sum()
    (gradient,) = torch.autograd.grad(value, model.decoder.head.weight)
    assert gradient.abs().max() > 0
    assert len(space.recordings) == 2


def test_constrained_and_bare_parameters():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.7, dtype=torch.double), constraint=constraints.positive)

        def forward(self, x):
            shift = pyro.param("shift", torch.tensor(0.2, dtype=torch.double))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z + shift, self.scale), obs=x)

    model, x = Model(), torch.tensor([0.3, 1.0], dtype=torch.double)
    u = torch.tensor([[0.1], [-0.4]], dtype=torch.double)
    with pyro.get_param_store().scope():
        space = LatentSpace(model, x)
        bound = space.bind(x)
        first = recorded(bound, u)(u)
        first.sum().backward()
        assert model.scale_unconstrained.grad.abs() > 0
        with torch.no_grad():
            model.scale_unconstrained.add_(1.0)
        torch.testing.assert_close(recorded(bound, u)(u), bound(u))
        # another store: equal value, another tensor
        with pyro.get_param_store().scope():
            pyro.param("shift", torch.tensor(0.2, dtype=torch.double))
            value = recorded(bound, u)(u).sum()
            mine = pyro.get_param_store()._params["shift"]
            assert torch.autograd.grad(value, mine)[0].abs() > 0


def test_a_plain_attribute_that_changed_makes_a_new_recording():
    class Model(PyroModule):
        width = 1.0

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, self.width), obs=x)

    model, x = Model(), torch.tensor([0.3, 1.0], dtype=torch.double)
    bound, u = LatentSpace(model, x).bind(x), torch.tensor([[0.1], [-0.4]], dtype=torch.double)
    recorded(bound, u)
    model.width = 2.0
    torch.testing.assert_close(recorded(bound, u)(u), bound(u), rtol=1e-12, atol=1e-12)


def test_dropout_draws_a_new_mask_at_every_evaluation():
    torch.manual_seed(0)
    model = models.VAE(nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 4)), 2)
    x = torch.ones(3, 4)
    bound, u = LatentSpace(model, x).bind(x), torch.ones(3, 2)
    fast = recorded(bound, u)
    assert fast is not bound
    assert not torch.equal(fast(u), fast(u))
    torch.manual_seed(5)
    ours = fast(u)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, bound(u))
    model.eval()
    fast = recorded(bound, u)
    assert torch.equal(fast(u), fast(u))


def test_operations_in_place_keep_their_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)).double()
    model, x = models.VAE(net, 2), torch.ones(3, 4, dtype=torch.double)
    bound, u = LatentSpace(model, x).bind(x), torch.ones(3, 2, dtype=torch.double)
    fast = recorded(bound, u)
    assert fast is not bound
    for scale in (1.0, -2.0):
        torch.testing.assert_close(fast(scale * u), bound(scale * u), rtol=1e-12, atol=1e-12)


def test_control_flow_on_values_falls_back_with_a_warning():
    def branching(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z if float(z.detach().sum()) > 0 else 2 * z, 1.0), obs=x)

    def hidden(x):  # looks at the values behind the recorder's back: the check at other points finds out
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            scale = 1.0 if z.detach().clone().abs().max().tolist() < 1.5 else 3.0
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    x, u = torch.tensor([0.3, 1.0], dtype=torch.double), torch.ones(2, 1, dtype=torch.double)
    for model in (branching, hidden):
        bound = LatentSpace(model, x).bind(x)
        with pytest.warns(UserWarning, match="cannot be recorded"):
            assert recorded(bound, u) is bound
        assert recorded(bound, u) is bound  # remembered, and said once


def test_real_images_through_a_recording_and_ragged_batches():
    images = data.load("digits").train
    torch.manual_seed(0)
    model = models.VAE(MLP([4, 32, 64]), 4)
    space = LatentSpace(model, images[:10])
    for rows in (images[:10], images[10:20], images[20:23], images[23:24]):
        bound, u = space.bind(rows), torch.randn(len(rows), 4)
        torch.testing.assert_close(recorded(bound, u)(u), bound(u), rtol=1e-5, atol=1e-4)


def test_a_gradient_that_is_not_that_of_the_operations_is_not_recorded():
    """A weight used under no_grad has no gradient in the program; in a graph of operations it would have one."""

    class Held(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.double))

        def forward(self, x):
            with torch.no_grad():
                scale = self.weight * 2.0
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z * scale, 1.0).to_event(1), obs=x)

    x = torch.randn(3, 2, dtype=torch.double)
    bound, u = LatentSpace(Held(), x).bind(x), torch.randn(3, 2, dtype=torch.double)
    with pytest.warns(UserWarning, match="no_grad"):
        assert recorded(bound, u) is bound
