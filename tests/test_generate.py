"""Imputation, interpolation and traversal: closed forms of pPCA, every guide, nothing moves."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from bench.piecewise_nets import circle, random_net
from guides_registry import GUIDES
from torch import nn

from pyrovae import generate, guides
from pyrovae.errors import DataError, IncompatibleError
from pyrovae.latents import LatentSpace
from pyrovae.models import VAE, PixelCNNVAE
from pyrovae.nets import LinearHeadDecoder, PixelCNN

ROWS, PIXELS, DIM = 6, 8, 3


def ppca():
    return problems.ppca(rows=ROWS, latent=DIM, pixels=PIXELS, noise=0.5)


def holes(rows=ROWS, pixels=PIXELS):
    return torch.rand(rows, pixels, generator=torch.Generator().manual_seed(1)) < 0.6


def conditional(model, x, mask):
    """Mean and sd of x given its seen part, from the joint Gaussian."""
    with torch.no_grad():
        total = model.weight @ model.weight.T + (2 * model.log_noise).exp() * torch.eye(PIXELS, dtype=x.dtype)
        mean, sd = x.clone(), torch.zeros_like(x)
        for row, seen in enumerate(mask):
            gain = total[~seen][:, seen] @ torch.linalg.inv(total[seen][:, seen])
            mean[row, ~seen] = model.bias[~seen] + gain @ (x[row, seen] - model.bias[seen])
            left = total[~seen][:, ~seen] - gain @ total[seen][:, ~seen]
            sd[row, ~seen] = left.diagonal().sqrt()
    return mean, sd


EXACT = {
    "laplace": lambda model: guides.Laplace(model, nn.Linear(PIXELS, DIM).double(), num_steps=1, update="full"),
    "local-svi": lambda model: guides.LocalSVI(model, "full-rank"),
    "short-run": lambda model: guides.ShortRun(model, num_steps=300, step_size=0.15),
    "exact": guides.Exact,
}


@pytest.mark.parametrize("name", EXACT)
def test_imputation_of_ppca_is_the_conditional(name):
    model, x = ppca()
    mask = holes()
    hidden = torch.where(mask, x, torch.full_like(x, torch.nan))
    found = generate.impute(model, EXACT[name](model), hidden, mask, num_samples=2000)
    mean, sd = conditional(model, x, mask)
    tolerance = 0.12 if name == "short-run" else 0.04  # 4 sd / sqrt(2000) is 0.09 sd; Langevin has a bias of its own
    assert ((found.mean - mean).abs() < 4 * sd / 2000**0.5 + tolerance * sd + 1e-9).all()
    torch.testing.assert_close(found.sd, sd, rtol=0.08, atol=1e-12)
    assert torch.equal(found.mean[mask], x[mask])
    if name == "short-run":
        assert found.khat is None
    else:
        assert (found.khat < 0.7).all()


def by_grid(model, x, mask):
    """Mean, sd and log density of the hidden part of one datum given the seen one, and the sd of one draw's density."""
    line = torch.linspace(-6, 6, 40_001 if model.latent_dim == 1 else 601, dtype=torch.double)
    z = torch.cartesian_prod(*[line] * model.latent_dim).reshape(-1, model.latent_dim)
    made = model.mean(z)
    each = torch.distributions.Normal(made, model.noise).log_prob(x)
    weight = (each[:, mask].sum(-1) - 0.5 * z.square().sum(-1)).softmax(0)
    mean = weight @ made
    sd = (model.noise**2 + weight @ (made - mean).square()).sqrt()
    density = each[:, ~mask].sum(-1).exp()
    log_density = (weight @ density).log()
    return mean, sd, log_density, (weight @ density.square() - (weight @ density) ** 2).clamp_min(0).sqrt()


@pytest.mark.parametrize("sizes", [[1, 8, 2], [2, 5, 3]])
def test_imputation_from_the_exact_posterior_of_a_piecewise_affine_net(sizes):
    """Two modes or one, any pattern of holes: the conditional by quadrature; every weight is the same."""
    model, draws = random_net(sizes, noise=0.3), 4000
    torch.manual_seed(0)
    x = model(None, size=5)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]]).bool()[:, : sizes[-1]]
    hidden = torch.where(mask, x, torch.full_like(x, torch.nan))
    found = generate.impute(model, guides.Exact(model), hidden, mask, num_samples=draws, truth=x)
    assert (found.khat == -torch.inf).all()
    for row, seen in enumerate(mask):
        mean, sd, log_density, spread = by_grid(model, x[row], seen)
        error = 4 / draws**0.5
        assert ((found.mean[row] - mean).abs() < error * sd)[~seen].all()
        torch.testing.assert_close(found.sd[row, ~seen], sd[~seen], rtol=2 * error, atol=0.0)
        assert (found.log_density[row].exp() - log_density.exp()).abs() <= error * spread + 1e-9
        exact = model.log_evidence(x[row : row + 1]) - model.marginal(seen).log_evidence(x[row : row + 1, seen])
        # the grid's error at kinks: its step squared
        assert float(exact.detach()) == pytest.approx(float(log_density), abs=1e-6 if sizes[0] == 1 else 3e-4)


@pytest.mark.parametrize(("name", "draws"), [("laplace", 4000), ("exact", 4000), ("short-run", 500)])
def test_the_density_of_the_truth_is_that_of_the_conditional(name, draws):
    model, x = ppca()
    mask = holes()
    guide = guides.ShortRun(model, num_steps=60, step_size=0.2) if name == "short-run" else EXACT[name](model)
    found = generate.impute(model, guide, x, mask, num_samples=draws, truth=x)
    bias = 0.1 if name == "short-run" else 0.0  # Langevin's
    with torch.no_grad():
        for row, seen in enumerate(mask):
            part, datum = model.marginal(seen), x[row : row + 1]
            exact = model.log_evidence(datum) - part.log_evidence(datum[:, seen])
            z = part.posterior(datum[:, seen]).sample((20_000,))
            mean = (z @ model.weight.T + model.bias)[..., ~seen]
            each = dist.Normal(mean, model.log_noise.exp()).log_prob(datum[:, ~seen]).sum(-1).exp()
            error = 4 * float(each.std() / each.mean()) / draws**0.5
            assert float(found.log_density[row]) == pytest.approx(float(exact), abs=error + bias + 1e-9)
    assert generate.impute(model, guide, x, mask, num_samples=25).log_density is None


def test_importance_weights_take_an_encoder_to_what_is_seen():
    """A wide encoder's draws are weighted to the conditional; where it cannot get there k-hat says so."""
    model, x = ppca()
    mask = holes()

    class Wide(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2 * DIM, dtype=x.dtype)  # the prior

    found = generate.impute(model, guides.Amortized(model, Wide()), x, mask, num_samples=20_000)
    mean, sd = conditional(model, x, mask)
    good = found.khat < 0.6
    assert good.any()
    assert ((found.mean - mean).abs() < 0.3 * sd + 1e-9)[good].all()

    class Off(nn.Module):
        def forward(self, x):
            return torch.cat([torch.full((len(x), DIM), 3.0), torch.full((len(x), DIM), -6.0)], 1).double()

    assert (generate.impute(model, guides.Amortized(model, Off()), x, mask).khat > 0.7).all()


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_imputes_and_stays_as_it_was(name):
    torch.manual_seed(1)
    model = VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)).double(), DIM, "gaussian")
    guide = GUIDES[name](model, PIXELS, DIM, torch.float64)
    x, mask = torch.randn(3, PIXELS).double(), holes(3)
    guide.draws(1, x)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    found = generate.impute(model, guide, x, mask, num_samples=30)
    again = generate.impute(model, guide, x, mask, num_samples=30, chunk=2)
    torch.testing.assert_close(found.mean, again.mean)
    assert found.mean.shape == found.sd.shape == x.shape
    assert torch.isfinite(found.mean).all()
    assert (found.sd[~mask] > 0).all()
    assert guide.model is model
    for a, b in zip(before, (*model.parameters(), *guide.parameters()), strict=True):
        assert torch.equal(a, b)
    assert guide.draws(2, x).shape == (2, 3, DIM)


def test_what_is_seen_decides_and_what_is_hidden_does_not():
    model, x = ppca()
    mask = holes()
    guide = EXACT["laplace"](model)
    found = generate.impute(model, guide, x, mask)
    other = generate.impute(model, guide, torch.where(mask, x, x + 100), mask)
    assert torch.equal(found.mean, other.mean)
    nothing = generate.impute(model, guide, x, torch.zeros_like(mask), num_samples=4000)
    sd = (model.weight @ model.weight.T).diagonal().add(0.25).sqrt().detach()
    torch.testing.assert_close(nothing.sd, sd.expand_as(nothing.sd), rtol=0.08, atol=0.0)
    everything = generate.impute(model, guide, x, torch.ones_like(mask))
    assert torch.equal(everything.mean, x)
    assert not everything.sd.any()


def test_binary_images_of_one_datum():
    torch.manual_seed(0)
    model = VAE(LinearHeadDecoder(2, [8], (1, 4, 4)), 2)
    guide = guides.Amortized(model, nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))
    x = torch.bernoulli(torch.full((1, 1, 4, 4), 0.5))
    found = generate.impute(model, guide, x, torch.rand(1, 1, 4, 4) < 0.5)
    assert found.mean.shape == (1, 1, 4, 4)
    assert ((found.mean >= 0) & (found.mean <= 1)).all()
    assert found.mean.dtype == torch.float32


def test_lines_between_data_of_ppca_are_lines():
    """E[x | z] is linear in z: the ends are the reconstructions, the middle their mean."""
    model, x = ppca()
    guide = EXACT["laplace"](model)
    path = generate.interpolate(model, guide, x, x.flip(0), steps=5)
    assert path.shape == (5, ROWS, PIXELS)
    torch.testing.assert_close(path[2], (path[0] + path[4]) / 2)
    torch.testing.assert_close(path[0], path[4].flip(0), rtol=0.2, atol=0.2)  # means of 100 draws each
    with torch.no_grad():
        truth = model.posterior(x).mean @ model.weight.T + model.bias
    assert (path[0] - truth).abs().max() < 0.3


def test_a_traversal_moves_one_latent():
    model, x = ppca()
    guide = EXACT["laplace"](model)
    found = generate.traverse(model, guide, x, 1, [-2.0, 0.0, 2.0])
    assert found.shape == (3, ROWS, PIXELS)
    step = (2 * model.weight[:, 1]).detach()
    torch.testing.assert_close(found[2] - found[1], step.expand(ROWS, -1))
    torch.testing.assert_close(found[1] - found[0], step.expand(ROWS, -1))


def test_pictures_leave_nothing_in_the_parameter_store():
    model = VAE(nn.Linear(DIM, PIXELS), DIM)
    space = LatentSpace(model, torch.zeros(ROWS, PIXELS))
    generate.decode(space, torch.zeros(2, ROWS - 1, DIM), torch.zeros(ROWS - 1, PIXELS))  # a batch not seen before
    assert not list(pyro.get_param_store())


def test_constrained_latents_and_other_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Gamma(3.0, 2.0))
            pyro.sample("y", dist.Normal(s.unsqueeze(-1) * torch.ones(4), 1.0).to_event(1), obs=x)

    x = torch.rand(3, 4)
    guide = guides.Amortized(model, nn.Linear(4, 2))
    found = generate.traverse(model, guide, x, 0, [-1.0, 1.0], site="y")
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0]).exp().view(2, 1, 1).expand(2, 3, 4))
    assert generate.impute(model, guide, x, torch.rand(3, 4) < 0.5, site="y").sd.shape == (3, 4)
    with pytest.raises(DataError, match=r"observes \['y'\]"):
        generate.traverse(model, guide, x, 0, [0.0])


def test_images_without_a_mean_are_refused():
    net = PixelCNN(1, 1, features=2, width=4, kernel_sizes=(3,))
    model = PixelCNNVAE(LinearHeadDecoder(2, [4], (2, 3, 3)), net, 2)
    guide = guides.Amortized(model, nn.Sequential(nn.Flatten(), nn.Linear(9, 4)))
    with pytest.raises(DataError, match="not known in closed form"):
        generate.traverse(model, guide, torch.zeros(2, 1, 3, 3), 0, [0.0])


def test_bad_input():
    model, x = ppca()
    guide = EXACT["laplace"](model)
    with pytest.raises(DataError, match="mask must be bool"):
        generate.impute(model, guide, x, torch.ones_like(x))
    for truth in (x[:1], torch.full_like(x, torch.nan)):
        with pytest.raises(DataError, match="truth must be finite and of shape"):
            generate.impute(model, guide, x, torch.ones_like(x).bool(), truth=truth)
    with pytest.raises(ValueError, match="two ends"):
        generate.interpolate(model, guide, x, x, steps=1)
    with pytest.raises(ValueError, match="one shape"):
        generate.interpolate(model, guide, x, x[:2])
    with pytest.raises(ValueError, match="latents 0 to 2"):
        generate.traverse(model, guide, x, 3, [0.0])


def test_an_exact_posterior_of_whole_data_alone_is_refused():
    class Conjugate(pyro.nn.PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)

        def posterior(self, x):
            return dist.Normal(x.sum(-1, keepdim=True) / 3, 3**-0.5).to_event(1)

    model, x = Conjugate(), circle(4)
    with pytest.raises(IncompatibleError, match="give the model marginal"):
        generate.impute(model, guides.Exact(model), x, torch.ones_like(x).bool())


def inlier_or_outlier(scales, shifts):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            c = pyro.sample("c", dist.Categorical(torch.ones(len(scales))), infer={"enumerate": "parallel"})
            loc = z[..., :1] + torch.tensor(shifts)[c].unsqueeze(-1)
            scale = torch.tensor(scales)[c].unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc.expand(*loc.shape[:-1], 4), scale).to_event(1), obs=x)

    return model


@pytest.mark.parametrize(("scales", "shifts"), [((1.0, 1.0, 1.0), (0.0, 3.0, 0.0)), ((0.1, 5.0), (0.0, 0.0))])
def test_pictures_that_a_discrete_latent_decides_are_refused(scales, shifts):
    """In the middle of its support, and in the variance alone."""
    model, x = inlier_or_outlier(scales, shifts), torch.zeros(3, 4)
    space = LatentSpace(model, x)
    with pytest.raises(DataError, match="depends on the discrete latent 'c'"):
        generate.decode(space, torch.zeros(2, 3, 2), x)
    with pytest.raises(DataError, match="depends on the discrete latent 'c'"):
        generate.impute(model, guides.Amortized(model, nn.Linear(4, 4)), x, torch.rand(3, 4) < 0.5)


def test_a_plate_inside_that_of_the_data():
    """`[plate, data]` in the program, `[S, B, plate]` in the picture."""

    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("pixels", 3, dim=-2):
                pyro.sample("x", dist.Normal(z[..., 0] + 10 * torch.arange(3.0).unsqueeze(-1), 1.0), obs=x)

    x, u = torch.zeros(3, 4), torch.randn(5, 4, 2)
    space = LatentSpace(model, x)
    mean, variance = generate.decode(space, u, x)
    torch.testing.assert_close(mean, u[..., :1] + 10 * torch.arange(3.0))
    torch.testing.assert_close(variance, torch.ones(5, 4, 3))


def test_arguments_named_as_rows_are_kept_beside_the_mask():
    model, x = ppca()
    mask = holes()
    found = [
        generate.impute(model, guides.LocalSVI(model, "full-rank", batched=batched), x, mask)
        for batched in ("auto", [0])
    ]  # fmt: skip
    torch.testing.assert_close(found[0].mean, found[1].mean)
