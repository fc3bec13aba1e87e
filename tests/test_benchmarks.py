"""The baselines that speed is measured against compute what ours does: a fast line against a wrong one is no result."""

from __future__ import annotations

import sys
from pathlib import Path

import pyro
import pytest
import torch

from pyrovae import guides, losses
from pyrovae.families import DiagonalNormal
from pyrovae.latents import LatentSpace
from pyrovae.refine import Clip, climb

PIXELS, HIDDEN, DIM, ROWS, STEPS = 12, 9, 4, 5, 4


@pytest.fixture(scope="module")
def bench():
    """`benchmarks/` is a folder of scripts, not a package."""
    path = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, path)
    try:
        import baselines
        import setting
    finally:
        sys.path.remove(path)
    return baselines, setting


@pytest.fixture
def problem(bench):
    """Nets in float64, spread out so that posteriors are no priors, and both kinds of data."""
    parts = bench[1].nets(PIXELS, HIDDEN, DIM)
    for p in [*parts.encoder.parameters(), *parts.decoder.parameters()]:
        p.data = 2 * p.data.double()
    parts.log_noise.data = parts.log_noise.data.double()
    draw = torch.Generator().manual_seed(1)
    grey = torch.rand(ROWS, PIXELS, generator=draw, dtype=torch.float64)
    eps = torch.randn(3, ROWS, DIM, generator=draw, dtype=torch.float64)
    with pyro.get_param_store().scope():
        yield parts, {"gaussian": grey, "bernoulli": grey.round()}, eps


def gradients(value, parameters):
    return torch.autograd.grad(value, parameters, allow_unused=True)


def assert_same(ours, theirs):
    """Equal but for float64 rounding, whose size is that of sums of a few hundred terms of these numbers."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_plain_vlae_is_the_damped_laplace_guide(bench, problem, likelihood):
    """Mean, precision, ELBO and its gradient by every parameter."""
    baselines, setting = bench
    parts, data, eps = problem
    x, parameters = data[likelihood], parts.parameters(likelihood)
    mu, factor = baselines.vlae_posterior(parts, x, likelihood, STEPS)
    assert (mu - parts.encoder(x).chunk(2, -1)[0]).abs().max() > 0.05  # the updates do something
    model = setting.vae(parts, likelihood)
    guide = guides.Laplace(model, parts.encoder, num_steps=STEPS, update="damped")
    q = guide.posterior(x)
    assert_same([q.loc, q.precision_matrix], [mu, factor @ factor.mT])

    root = torch.linalg.cholesky(q.precision_matrix)
    z = q.loc + torch.linalg.solve_triangular(root.mT, eps[0].unsqueeze(-1), upper=True).squeeze(-1)
    elbo = (LatentSpace(model, x).log_joint(z, x) - q.log_prob(z)).sum()
    plain = baselines.vlae_elbo(parts, x, eps[0], likelihood, STEPS)
    assert_same([elbo, *gradients(elbo, parameters)], [plain, *gradients(plain, parameters)])


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_amortized_baseline_has_the_default_loss(bench, problem, likelihood):
    baselines, setting = bench
    parts, data, _ = problem
    x, parameters = data[likelihood], parts.parameters(likelihood)
    guide = guides.Amortized(setting.vae(parts, likelihood), parts.encoder)
    loss = losses.ELBO()
    torch.manual_seed(0)
    ours = loss.differentiable_loss(guide.model, guide, x)
    torch.manual_seed(0)
    loc, log_var = parts.encoder(x).chunk(2, -1)
    bare = -baselines.elbo(parts, loc, log_var, torch.randn_like(loc), x, likelihood)
    assert_same([ours, *gradients(ours, parameters)], [bare, *gradients(bare, parameters)])


def test_refinement_baseline_takes_our_steps(bench, problem):
    """The same objective (analytic KL) climbed by the library's loop: lam_K, and the total derivative."""
    baselines, _ = bench
    parts, data, eps = problem
    x, parameters = data["bernoulli"], parts.parameters("bernoulli")
    options = {"step_size": 0.1, "momentum": 0.5, "max_norm": 0.7}
    theirs = torch.cat(baselines.refine(parts, x, eps, **options), -1)

    class Analytic:
        def gradient(self, lam, noise, *, create_graph=False):
            loc, log_var = lam.chunk(2, -1)
            value = baselines.elbo(parts, loc, log_var, noise, x, "bernoulli")
            return value.detach(), torch.autograd.grad(value, lam, create_graph=create_graph)[0]

    lam = parts.encoder(x)
    step_size = torch.full((2 * DIM,), 0.1, dtype=torch.float64)
    clip = Clip(DiagonalNormal(DIM), 0.7, lam)
    path, _ = climb(Analytic(), lam, list(eps), step_size=step_size, momentum=0.5, clip=clip, second_order=True)
    ours = path[-1]
    weight = torch.linspace(-1, 1, theirs.numel(), dtype=torch.float64).view_as(theirs)
    assert_same(
        [ours, *gradients((weight * ours).sum(), parameters)], [theirs, *gradients((weight * theirs).sum(), parameters)]
    )
