"""The model itself: gradients, the linear case, dtypes, what it refuses, and that the rest of the library takes it."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pytest
import torch
from bench.piecewise_nets import circle, log_joint, random_net
from pyro import poutine
from torch import nn

from pyrovae import diagnose, guides, reference
from pyrovae.errors import DataError
from pyrovae.latents import LatentSpace
from pyrovae.models import PPCA
from pyrovae.models.piecewise_affine_vae import PiecewiseAffineVAE
from pyrovae.nets import MLP


@pytest.mark.parametrize("sizes", [[1, 6, 2], [1, 5, 4, 3], [2, 4, 2]])
def test_gradient_of_the_evidence_is_that_of_finite_differences(sizes):
    """Boundaries move with the weights; every parameter and the data."""
    model = random_net(sizes, seed=4).requires_grad_(True)
    x = torch.randn(3, sizes[-1], generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    model.log_evidence(x).sum().backward()
    for tensor in [*model.parameters(), x]:
        values, step = tensor.data.view(-1), 1e-5
        for i in range(min(tensor.numel(), 6)):
            here, ends = float(values[i]), []
            for sign in (1, -1):
                values[i] = here + sign * step
                ends.append(float(model.log_evidence(x).detach().sum()))
            values[i] = here
            slope = float(tensor.grad.view(-1)[i])
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_a_second_derivative_is_refused():
    model = random_net([1, 4, 2]).requires_grad_(True)
    total = model.log_evidence(torch.zeros(2, 2).double()).sum()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(total, model.layers[0].weight, create_graph=True)


@pytest.mark.parametrize("latents", [1, 2])
def test_without_a_kink_it_is_probabilistic_pca(latents):
    model = random_net([latents, 5, 4, 3], leak=1.0, noise=0.5)
    zero = torch.zeros(1, latents, dtype=torch.double)
    bias = model.mean(zero)[0]
    weight = torch.stack([model.mean(zero + row)[0] - bias for row in torch.eye(latents).double()], -1)
    ppca = PPCA(weight, noise=0.5, bias=bias)
    x = ppca(None, size=6).detach()
    expected, q = ppca.posterior(x), model.posterior(x)
    assert torch.allclose(model.log_evidence(x), ppca.log_evidence(x), rtol=0, atol=1e-10)
    assert torch.allclose(q.mean, expected.mean, rtol=0, atol=1e-10)
    assert torch.allclose(q.covariance_matrix, expected.covariance_matrix, rtol=0, atol=1e-10)
    z = expected.sample((4,))
    assert torch.allclose(q.log_prob(z), expected.log_prob(z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [[1, 8, 2], [2, 5, 2]])
def test_float32_is_computed_in_float64_and_comes_back_in_float32(sizes):
    model = random_net(sizes)
    x = circle(4)
    single = PiecewiseAffineVAE([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)], noise=0.3)
    single.load_state_dict(model.state_dict())
    again = random_net(sizes)
    again.load_state_dict(single.state_dict())  # the rounded weights, in float64
    found = single.log_evidence(x.float())
    assert found.dtype == single.posterior(x.float()).mean.dtype == torch.float32
    assert torch.equal(found, again.log_evidence(x.float().double()).float())
    q = single.posterior(x.float())
    z = q.sample((50,))
    assert z.dtype == q.log_prob(z).dtype == torch.float32
    weights = log_joint(single, x.float(), z) - q.log_prob(z)
    assert torch.allclose(weights, found.expand_as(weights), atol=2e-4)


@pytest.mark.parametrize("sizes", [[1, 8, 3], [2, 5, 3]])
def test_some_outputs_alone_are_a_model_of_the_same_kind(sizes):
    model, x = random_net(sizes), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    seen = torch.tensor([True, False, True])
    part = model.marginal(seen)
    line = torch.linspace(-9, 9, 40_001 if sizes[0] == 1 else 901, dtype=torch.double)
    z = torch.cartesian_prod(*[line] * sizes[0]).reshape(-1, 1, sizes[0])
    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.double), 1.0).log_prob(z).sum(-1)
    each = torch.distributions.Normal(model.mean(z)[..., seen], model.noise).log_prob(x[:, seen]).sum(-1) + prior
    by_sum = torch.logsumexp(each, 0) + sizes[0] * (line[1] - line[0]).log()
    error = 2e-6 if sizes[0] == 1 else 3e-4  # of the sum, at kinks: its step squared
    assert torch.allclose(part.log_evidence(x[:, seen]), by_sum, rtol=0, atol=error)
    inside = part.posterior(x[:, seen]).log_prob(z[::1000])
    assert torch.allclose(inside, each[::1000] - by_sum, rtol=0, atol=error)
    whole = model.marginal(torch.ones(3).bool())
    assert torch.allclose(whole.log_evidence(x), model.log_evidence(x), rtol=0, atol=1e-11)
    nothing = model.marginal(torch.zeros(3).bool())
    assert torch.allclose(nothing.log_evidence(x[:, :0]), torch.zeros(4).double(), atol=1e-9)
    with torch.no_grad():  # a copy
        part.layers[0].weight.zero_()
    assert model.layers[0].weight.abs().min() > 0


def test_the_program_and_the_latent_space():
    model = random_net([1, 8, 2])
    x = circle(3)
    trace = poutine.trace(model).get_trace(x)
    assert trace.nodes["z"]["value"].shape == (3, 1)
    assert trace.nodes["x"]["fn"].batch_shape == (3,)
    space = LatentSpace(model, x)
    z = torch.randn(4, 3, 1, dtype=torch.double)
    assert torch.allclose(space.log_joint(z, x), log_joint(model, x, z), rtol=0, atol=1e-12)
    assert model(None, size=7).shape == (7, 2)
    assert model.mean(torch.zeros(5, 4, 1).double()).shape == (5, 4, 2)
    with pytest.raises(ValueError, match="size=n"):
        model()


def test_one_row_of_many_is_that_row():
    for sizes in ([1, 8, 2], [2, 5, 2]):
        model, x = random_net(sizes), circle(5)
        whole = model.log_evidence(x)
        parts = torch.cat([model.log_evidence(row[None]) for row in x])
        assert torch.allclose(whole, parts, rtol=0, atol=1e-11)


def test_references_and_gaps_take_it_for_exact():
    model, x = random_net([1, 8, 2]), circle(3)
    truth = reference.exact(model, x, num_samples=2000)
    assert torch.allclose(truth.log_evidence, model.log_evidence(x))

    def plain(x):
        return model(x)

    by_grid = reference.exact(plain, x, num_samples=100)
    assert torch.allclose(truth.log_evidence, by_grid.log_evidence, atol=1e-5)
    assert torch.allclose(truth.mean, by_grid.mean, atol=1e-4)
    assert torch.allclose(truth.sd, by_grid.sd, atol=1e-4)
    torch.manual_seed(0)
    guide = guides.Amortized(model, MLP([2, 2]).double())
    found = diagnose.gaps(model, guide, x, num_samples=200, local={"max_steps": 50})
    assert found.log_evidence.kind == "exact"


def test_gradient_ascent_on_the_evidence_climbs():
    model, x = random_net([1, 8, 2], noise=0.55, output=0.1).requires_grad_(True), circle(100)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = -model.log_evidence(x).mean()
        loss.backward()
        optimizer.step()
        values.append(-float(loss))
    assert values[-1] > values[0] + 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": [3, 8, 2]}, "1 or 2 latents, not for 3"),
        ({"layers": [1, 2]}, "at least two linear layers"),
        ({"layers": [nn.Linear(1, 4), nn.Linear(5, 2)]}, "that fit"),
        ({"layers": [nn.Linear(1, 4), 2]}, "not both"),
        ({"layers": [nn.Linear(1, 4, bias=False), nn.Linear(4, 2)]}, "with a bias"),
        ({"layers": [1, 4, 2], "leak": 0.0}, "leak must lie in"),
        ({"layers": [1, 4, 2], "noise": -1.0}, "noise must be positive"),
    ],
)
def test_what_it_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        PiecewiseAffineVAE(**arguments)


def test_data_of_another_width_are_refused():
    model = random_net([1, 4, 2])
    for call in (model, model.posterior, model.log_evidence):
        with pytest.raises(DataError, match=r"makes \[B, 2\]"), pyro.get_param_store().scope():
            call(torch.zeros(3, 5).double())


def test_layers_of_another_kind_are_refused():
    for layers in ([nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)], nn.Sequential(nn.Linear(1, 8), nn.LeakyReLU(0.2))):
        with pytest.raises(ValueError, match="takes widths or nn.Linear layers alone"):
            PiecewiseAffineVAE(layers)
    assert [layer.out_features for layer in PiecewiseAffineVAE([1, 8, np.int64(16), 2]).layers] == [8, 16, 2]


@pytest.mark.parametrize("sizes", [[1, 4, 2], [2, 4, 2]])
def test_data_that_are_no_numbers_are_refused(sizes):
    x = torch.zeros(3, 2)
    x[1, 0] = torch.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        PiecewiseAffineVAE(sizes).log_evidence(x)
