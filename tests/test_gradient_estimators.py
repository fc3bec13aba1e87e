"""Sticking the landing and doubly reparameterised gradients: unbiased, silent where they must be, and worth having."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from pyro.infer import SVI
from torch import nn

from pyrovae import flows, guides, handlers, losses
from pyrovae.latents import LatentSpace
from pyrovae.losses.base import PerDatumLoss
from pyrovae.models import PPCA

PIXELS, DIM = 6, 3


class Rows(nn.Module):
    """An "encoder" that ignores its input: one free row of parameters per datum, so that rows are replicates."""

    def __init__(self, lam):
        super().__init__()
        self.lam = nn.Parameter(lam)

    def forward(self, x):
        return self.lam.expand(len(x), -1) if len(self.lam) == 1 else self.lam


def ppca():
    return problems.ppca(rows=3, latent=DIM, pixels=PIXELS, noise=0.8)


def linear(model, family, shift=0.0, log_scale=0.0):
    """pPCA's exact posterior as a linear encoder (full-rank), or the best factorised one; moved and widened."""
    enc = nn.Linear(PIXELS, 2 * DIM + (DIM * (DIM - 1) // 2 if family == "full-rank" else 0)).double()
    precision = model.precision().detach()
    map_ = torch.linalg.solve(precision, model.weight.detach().T / model.log_noise.detach().exp() ** 2)
    with torch.no_grad():
        enc.weight.zero_()
        enc.weight[:DIM] = map_
        enc.bias[:DIM] = shift - map_ @ model.bias
        if family == "diagonal":
            enc.bias[DIM:] = 2 * log_scale - precision.diagonal().log()
        else:
            factor = torch.linalg.cholesky(torch.linalg.inv(precision))
            enc.bias[DIM : 2 * DIM] = factor.diagonal().log() + log_scale
            enc.bias[2 * DIM :] = factor[tuple(torch.tril_indices(DIM, DIM, -1))]
    return guides.Amortized(model, enc, family)


def full_rank(model):
    return linear(model, "full-rank", 0.2, 0.2)


def semi(model):
    return guides.SemiAmortized(linear(model, "diagonal", 0.2, 0.2), num_steps=2, step_size=0.03)


def laplace(model):
    torch.manual_seed(7)
    return guides.Laplace(model, nn.Linear(PIXELS, DIM).double(), num_steps=2, update="damped")


def laplace_averaged(model):
    torch.manual_seed(7)
    return guides.Laplace(model, nn.Linear(PIXELS, DIM).double(), num_steps=2, update="damped", num_draws=2)


def iaf(model):
    torch.manual_seed(8)
    flow = flows.IAF(DIM, num_transforms=2, context=2, hidden=(8,), activation=nn.Tanh).double()
    return guides.Amortized(model, nn.Linear(PIXELS, flow.num_params).double(), flow)


ON_PPCA = {
    "diagonal": lambda model: linear(model, "diagonal", 0.2, 0.2), "full-rank": full_rank, "semi-amortized": semi,
    "laplace": laplace, "laplace-averaged": laplace_averaged,
}  # fmt: skip


def blocks(model, guide):
    named = {f"guide.{k}": p for k, p in guide.named_parameters()}
    if isinstance(model, nn.Module):
        named.update({f"model.{k}": p for k, p in model.named_parameters()})
    return {k: p for k, p in named.items() if p.requires_grad}


def gradient(value, named):
    """Gradient of a `[B]` value's sum by block; zeros where it does not reach."""
    found = torch.autograd.grad(value.sum(), list(named.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), found, strict=True)}


def sampled(loss, model, guide, x, calls, seed=0):
    """`calls` gradients of per_datum's sum: block -> [calls, *shape]. Call c starts from the same random state in any
    loss, so that refinement noise and draws are shared."""
    named, found = blocks(model, guide), []
    for call in range(calls):
        torch.manual_seed(1000 * seed + call)
        found.append(gradient(loss.per_datum(model, guide, x), named))
    return {k: torch.stack([f[k] for f in found]) for k in named}


def largest_z(draws, truth):
    """Mean of `draws - truth` in standard errors, each entry; 0 where both agree to rounding (1e-10 of the largest)."""
    off = draws - truth
    mean, se = off.mean(0), off.std(0) / len(off) ** 0.5
    rounding = 1e-10 * draws.abs().max()
    return torch.where(mean.abs() <= rounding, 0.0, mean / se.clamp_min(1e-300)).abs().max()


def noise_of(draws):
    """sqrt(E |g - E g|^2) of gradients `[n, ...]`, and its standard error."""
    squares = (draws - draws.mean(0)).reshape(len(draws), -1).square().sum(1)
    value = float(squares.mean().sqrt())
    return value, float(squares.std()) / len(squares) ** 0.5 / (2 * value) if value else 0.0


def replicates(loss, model, guide, x, times, seed=0):
    """Gradients of the guide's lam as if its rows were free parameters: `[times, B, P]`, one call."""
    with torch.no_grad():
        lam = guide.lam(x)
    free = guides.Amortized(model, Rows(lam.repeat(times, 1)), type(guide.family(x)))
    torch.manual_seed(seed)
    value = loss.per_datum(model, free, x.repeat(times, 1))
    return torch.autograd.grad(value.sum(), free.encoder.lam)[0].view(times, *lam.shape)


# Unbiased


def exact_elbo(model, guide, x):
    """log p(x) - KL(q || p(z | x)), `[B]`, in closed form at the guide's q, whatever q depends on."""
    with guide.in_program():
        q = guide._posterior(x)
    cov = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    p = model.posterior(x)
    return model.log_evidence(x) - torch.distributions.kl_divergence(dist.MultivariateNormal(q.mean, cov), p)


@pytest.mark.parametrize("name", ON_PPCA)
def test_elbo_gradients_are_the_closed_form_in_the_mean(name):
    """Guide and model parameters, also where q follows the model; per entry within 4 se of the exact gradient."""
    model, x = ppca()
    guide, times = ON_PPCA[name](model), 40
    wide, calls = x.repeat(times, 1), 100
    named, exact = blocks(model, guide), []
    for call in range(calls):
        torch.manual_seed(call)  # the same refinement noise as in `sampled`
        exact.append(gradient(exact_elbo(model, guide, wide), named))
    for estimator in ("reparam", "stl"):
        draws = sampled(losses.ELBO(estimator), model, guide, wide, calls)
        for k in named:
            assert draws[k].abs().max() > 0, k
            assert largest_z(draws[k], torch.stack([e[k] for e in exact])) < 4, (estimator, k)


def elbo_by_quadrature(space, lam, family, x, points):
    """E_q[log p - log q] per datum by Gauss-Hermite over the draw's noise, differentiable in lam."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = torch.cartesian_prod(*[torch.tensor(nodes)] * 3)
    mass = torch.cartesian_prod(*[torch.tensor(weights)] * 3).prod(-1) / (2 * math.pi) ** 1.5
    u = family.sample(lam, grid.unsqueeze(1).expand(-1, len(lam), -1))
    return torch.einsum("s,sb->b", mass, space.log_joint(u, x) - family(lam).log_prob(u))


def gamma_normal(name):
    """Data and a guide with free rows. Its q are narrow: under a wide one exp(u) has such tails that the kurtosis of a
    gradient is above 1000, and a standard error from 4,000 draws means little."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, generator=generator, dtype=torch.double)
    family = guides.Amortized(problems.gamma_normal, nn.Identity(), name).family(x)
    lam = 0.2 * torch.randn(3, family.num_params, generator=generator, dtype=torch.double)
    lam[:, family.blocks["log_var" if name == "diagonal" else "log_diag"]] -= 3.0 if name == "diagonal" else 1.5
    return x, family, guides.Amortized(problems.gamma_normal, Rows(lam), name)


@pytest.mark.parametrize("name", ["diagonal", "full-rank"])
def test_elbo_gradients_are_those_of_quadrature_on_a_non_conjugate_model(name):
    x, family, guide = gamma_normal(name)
    space, lam = LatentSpace(problems.gamma_normal, x), guide.encoder.lam
    truth, finer = (
        torch.autograd.grad(elbo_by_quadrature(space, lam, family, x, points).sum(), lam)[0] for points in (18, 24)
    )
    torch.testing.assert_close(truth, finer, rtol=1e-10, atol=1e-10)
    found = {e: replicates(losses.ELBO(e), problems.gamma_normal, guide, x, 8000) for e in ("reparam", "stl", "dreg")}
    for estimator, draws in found.items():
        for block, part in family.blocks.items():
            assert largest_z(draws[..., part], truth[:, part]) < 4, (estimator, block)
    assert torch.equal(found["stl"], found["dreg"])
    assert not torch.allclose(found["stl"], found["reparam"])


class Unsquared(PerDatumLoss):
    """Wrong: the score term left out of the IWAE, as if it were an ELBO (STL without the second weight)."""

    traits = losses.IWAE.traits

    def _per_datum(self, model, guide, *args, **kwargs):
        sampler = guide._sampler(*args, **kwargs)
        u, _ = sampler.draw(self.num_particles)
        weights = guide.space(*args).bind(*args)(u) - sampler.frozen_log_prob(u)
        return torch.logsumexp(weights, 0)


class SquaredTwice(PerDatumLoss):
    """Wrong: both weights on the whole term, so the model's own gradient has v_k^2 too."""

    traits = losses.IWAE.traits

    def _per_datum(self, model, guide, *args, **kwargs):
        sampler = guide._sampler(*args, **kwargs)
        u, _ = sampler.draw(self.num_particles)
        weights = guide.space(*args).bind(*args)(u) - sampler.frozen_log_prob(u)
        return (weights.detach().softmax(0) ** 2 * weights).sum(0)


def test_iwae_gradients_are_those_of_quadrature():
    """One latent, K = 3: E over the three draws' noise on a grid. Both wrong estimators are off by more than 5 se."""
    generator = torch.Generator().manual_seed(0)
    model = PPCA(torch.randn(2, 1, generator=generator, dtype=torch.double), noise=0.9)
    x = torch.randn(2, 2, generator=generator, dtype=torch.double)
    lam = torch.tensor([[0.2, -0.8]], dtype=torch.double)
    guide = guides.Amortized(model, Rows(lam))
    named, space = blocks(model, guide), LatentSpace(model, x)

    def by_quadrature(points):
        # Trapezoids: log sum exp has poles near the real axis, at which Gauss-Hermite converges slowly.
        nodes = torch.linspace(-6.5, 6.5, points, dtype=torch.double)
        mass = torch.exp(-(nodes**2) / 2) * (nodes[1] - nodes[0]) / math.sqrt(2 * math.pi)
        u = guide.family(x).sample(guide.lam(x), nodes.view(-1, 1, 1).expand(-1, 2, 1))
        w = space.log_joint(u, x) - guide.family(x)(guide.lam(x)).log_prob(u)  # [n, B]
        a, b, c = (w.view(*shape, 2) for shape in ((points, 1, 1), (1, points, 1), (1, 1, points)))
        bound = torch.stack(torch.broadcast_tensors(a, b, c)).logsumexp(0) - math.log(3)
        return gradient(torch.einsum("i,j,k,ijkb->b", mass, mass, mass, bound), named)

    truth, finer = by_quadrature(51), by_quadrature(71)
    times, calls = 400, 100
    wide = x.repeat(times, 1)

    def off(loss):
        draws = sampled(loss, model, guide, wide, calls)
        return {k: float(largest_z(draws[k] / times, truth[k])) for k in named}

    for k in named:
        torch.testing.assert_close(truth[k], finer[k], rtol=1e-6, atol=1e-6)
    for estimator in ("reparam", "dreg"):
        assert max(off(losses.IWAE(3, estimator)).values()) < 4, estimator
    unsquared, twice = off(Unsquared(3)), off(SquaredTwice(3))
    assert unsquared["guide.encoder.lam"] > 5
    assert max(z for k, z in unsquared.items() if k.startswith("model")) < 4  # there it is right
    assert twice["guide.encoder.lam"] < 4
    assert all(twice[f"model.parts.{k}"] > 5 for k in ("weight", "bias", "log_noise"))


@pytest.mark.parametrize("number", [1, 5])
def test_flows_are_frozen_whole(number):
    """A flow's weights, too: draw for draw against the plain estimator; K = 1 is sticking the landing."""
    model, x = ppca()
    guide, wide = iaf(model), x.repeat(40, 1)
    plain = sampled(losses.IWAE(number, "reparam"), model, guide, wide, 100)
    for loss in [losses.IWAE(number), *([losses.ELBO("stl")] if number == 1 else [])]:
        still = sampled(loss, model, guide, wide, 100)
        for k in plain:
            assert largest_z(still[k], plain[k]) < 4, k
            assert k.startswith("model") or not torch.allclose(still[k], plain[k]), k


@pytest.mark.parametrize("name", ON_PPCA)
def test_dreg_is_the_reparam_gradient_in_the_mean(name):
    """K = 5, draw for draw against the plain estimator (the difference is what the score identity replaces)."""
    model, x = ppca()
    guide, wide, calls = ON_PPCA[name](model), x.repeat(40, 1), 100
    plain = sampled(losses.IWAE(5, "reparam"), model, guide, wide, calls)
    doubly = sampled(losses.IWAE(5, "dreg"), model, guide, wide, calls)
    for k in plain:
        assert largest_z(doubly[k], plain[k]) < 4, k
    if name == "full-rank":  # the same comparison sees the wrong estimators
        wrong = sampled(Unsquared(5), model, guide, wide, calls)
        assert largest_z(wrong["guide.encoder.weight"], plain["guide.encoder.weight"]) > 5
        wrong = sampled(SquaredTwice(5), model, guide, wide, calls)
        assert largest_z(wrong["model.parts.weight"], plain["model.parts.weight"]) > 5


@pytest.mark.parametrize("name", ["diagonal", "full-rank"])
def test_dreg_on_a_non_conjugate_model(name):
    x, family, guide = gamma_normal(name)
    plain, doubly, wrong = (
        replicates(loss, problems.gamma_normal, guide, x, 8000)
        for loss in (losses.IWAE(5, "reparam"), losses.IWAE(5, "dreg"), Unsquared(5))
    )
    for block, part in family.blocks.items():
        assert largest_z(doubly[..., part], plain[..., part]) < 4, block
        assert largest_z(wrong[..., part], plain[..., part]) > 5, block


# Noise


def test_stl_is_silent_at_the_exact_posterior():
    """Each draw's gradient for the guide is zero to rounding; the plain estimator's is not."""
    model, x = ppca()
    guide = linear(model, "full-rank")
    stl, plain = (sampled(losses.ELBO(e), model, guide, x, 50) for e in ("stl", "reparam"))
    # Rounding: some 100 additions of terms as large as the two halves d log p / du and d log q / du.
    for k in ("guide.encoder.weight", "guide.encoder.bias"):
        size = plain[k].abs().amax()
        assert stl[k].abs().max() < 1e3 * torch.finfo(torch.double).eps * size, k
        assert plain[k].std(0).max() > 0.1 * size, k
    # The model's part is E_q[d log p(x, z)], whose mean is the gradient of the evidence (Fisher's identity).
    named = blocks(model, guide)
    truth = gradient(model.log_evidence(x), named)
    for k in ("model.parts.weight", "model.parts.bias", "model.parts.log_noise"):
        assert largest_z(stl[k], truth[k]) < 4, k


@pytest.mark.parametrize("loss", [losses.ELBO("stl"), losses.IWAE(5, "dreg")])
def test_stock_svi_lands(loss):
    """At a constant step size: noise that vanishes at the optimum lets KL(q || p) fall to rounding. One
    step of the plain estimator leaves it again."""
    model, x = ppca()
    for p in model.parameters():
        p.requires_grad_(False)
    guide = guides.Amortized(model, Rows(linear(model, "full-rank", 0.2, 0.2).lam(x).detach()), "full-rank")

    def gap():
        return float((model.log_evidence(x) - exact_elbo(model, guide, x)).sum())

    def steps(loss, number):
        # Near the optimum v_k = 1 / K: the K squares sum to 1 / K of an ELBO's gradient.
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.02 * loss.num_particles}), loss)
        for _ in range(number):
            svi.step(x)

    with torch.no_grad():
        assert gap() > 0.1
    steps(loss, 800)
    with torch.no_grad():
        assert gap() < 1e-10
    steps(losses.ELBO() if loss.name == "ELBO" else losses.IWAE(5, "reparam"), 1)
    with torch.no_grad():
        assert gap() > 1e-4


@pytest.mark.parametrize("number", [1, 5])
def test_dreg_is_silent_at_the_exact_posterior(number):
    model, x = ppca()
    guide = linear(model, "full-rank")
    doubly, plain = (sampled(losses.IWAE(number, e), model, guide, x, 20) for e in ("dreg", "reparam"))
    for k in ("guide.encoder.weight", "guide.encoder.bias"):
        assert doubly[k].abs().max() < 1e3 * torch.finfo(torch.double).eps * plain[k].abs().max()


def quieter(a, b):
    return b[0] - a[0] > 4 * math.hypot(a[1], b[1])


@pytest.mark.parametrize(
    ("still", "plain"), [(losses.ELBO("stl"), losses.ELBO()), (losses.IWAE(5, "dreg"), losses.IWAE(5, "reparam"))]
)
def test_where_the_landing_helps_and_where_it_hurts(still, plain):
    """The two regimes; and a q that follows the model to its exact posterior, whose whole gradient has no noise."""
    model, x = ppca()

    def noises(guide):
        return (noise_of(replicates(loss, model, guide, x, 1000, seed)) for seed, loss in enumerate((still, plain)))

    a, b = noises(linear(model, "diagonal"))  # the best factorised Gaussian
    assert quieter(a, b)
    a, b = noises(linear(model, "diagonal", log_scale=-1.0))  # a factor e too narrow
    assert quieter(b, a)
    guide = guides.Laplace(model, nn.Linear(PIXELS, DIM).double(), num_steps=1, update="full")
    a, b = (noise_of(sampled(loss, model, guide, x, 50)["model.parts.weight"]) for loss in (still, plain))
    assert quieter(b, a)
    assert b[0] < 1e-10 * a[0]


def test_signal_to_noise_rises_with_dreg_and_falls_without():
    """Like 1 / sqrt(K) for the plain gradient (Rainforth et al. 2018), like sqrt(K) for the other (Tucker et al. 2019).

    z ~ N(0, 1), x | z ~ N(z, 1) and a q near the posterior; |mean| / sd of the gradient of q's mean over replicates,
    its standard error by the delta method for a normal gradient, sqrt((1 + r^2 / 2) / n).
    """
    model = PPCA(torch.ones(1, 1, dtype=torch.double), noise=1.0)
    times, ratios = 40_000, {}
    x = torch.ones(times, 1, dtype=torch.double)
    guide = guides.Amortized(model, Rows(torch.tensor([[0.8, -0.4]], dtype=torch.double).repeat(times, 1)))
    for estimator in ("reparam", "dreg"):
        for number in (4, 16, 64):
            torch.manual_seed(number)
            value = losses.IWAE(number, estimator).per_datum(model, guide, x)
            g = torch.autograd.grad(value.sum(), guide.encoder.lam)[0][:, 0]
            ratio = float(g.mean().abs() / g.std())
            ratios[estimator, number] = ratio, math.sqrt((1 + ratio**2 / 2) / times)
    for small, large in ((4, 16), (16, 64)):
        for estimator, sign in (("reparam", -1), ("dreg", 1)):
            (a, a_se), (b, b_se) = ratios[estimator, small], ratios[estimator, large]
            assert sign * (b - a) > 4 * math.hypot(a_se, b_se), (estimator, small, large)
    for estimator, exponent in (("dreg", 0.5), ("reparam", -0.5)):  # over a factor 16 of K
        (a, a_se), (b, b_se) = ratios[estimator, 4], ratios[estimator, 64]
        se = math.hypot(a_se / a, b_se / b) / math.log(16)
        assert abs(math.log(b / a) / math.log(16) - exponent) < 4 * se, estimator


@pytest.mark.parametrize("loss", [losses.ELBO("stl"), losses.ELBO("stl", 3), losses.IWAE(4)])
def test_rows_are_independent(loss):
    """No gradient leaks between rows: each v_k is normalised over the draws of its own datum."""
    model, x = ppca()
    guide = guides.Amortized(model, Rows(0.1 * torch.arange(18, dtype=torch.double).view(3, 6)))
    value = loss.per_datum(model, guide, x)
    for row in range(3):
        (g,) = torch.autograd.grad(value[row], guide.encoder.lam, retain_graph=True)
        assert (g[row] != 0).all()
        assert (torch.cat([g[:row], g[row + 1 :]]) == 0).all()


def test_annealed_stl_is_the_gradient_of_the_annealed_elbo():
    """E log p(x | z) - beta KL(q || p(z)) in closed form on pPCA."""
    model, x = ppca()
    guide, times, calls, beta = full_rank(model), 40, 100, 0.3
    named = blocks(model, guide)

    def annealed():
        with guide.in_program():
            q = guide._posterior(x)
        noise, w = model.log_noise.exp(), model.weight
        spread = torch.einsum("xd,bde,xe->b", w, q.covariance_matrix, w)
        squares = (x - model.bias - q.mean @ w.T).square().sum(-1) + spread
        data_part = -0.5 * squares / noise**2 - PIXELS * (model.log_noise + 0.5 * math.log(2 * math.pi))
        prior = dist.MultivariateNormal(x.new_zeros(DIM), torch.eye(DIM, dtype=x.dtype))
        return data_part - beta * torch.distributions.kl_divergence(q, prior)

    truth = gradient(annealed(), named)
    with handlers.anneal(beta):
        draws = sampled(losses.ELBO("stl"), model, guide, x.repeat(times, 1), calls)
    for k in named:
        assert largest_z(draws[k] / times, truth[k]) < 4, k


def test_particles_average():
    """100 particles: a hundredth of the variance."""
    model, x = ppca()
    guide = full_rank(model)
    one, many = (noise_of(replicates(losses.ELBO("stl", n), model, guide, x, 500, n)) for n in (1, 100))
    assert abs(one[0] / 10 - many[0]) < 4 * math.hypot(one[1] / 10, many[1])
