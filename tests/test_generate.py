"""Imputation, interpolation and traversal: closed forms of pPCA, every guide, nothing moves."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from guides_registry import GUIDES
from torch import nn

from pyrovae import generate, guides
from pyrovae.errors import DataError
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
    with pytest.raises(ValueError, match="two ends"):
        generate.interpolate(model, guide, x, x, steps=1)
    with pytest.raises(ValueError, match="one shape"):
        generate.interpolate(model, guide, x, x[:2])
    with pytest.raises(ValueError, match="latents 0 to 2"):
        generate.traverse(model, guide, x, 3, [0.0])
