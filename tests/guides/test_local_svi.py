"""LocalSVI: the optimum of the family, datum by datum, and what it leaves alone."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from torch.distributions import MultivariateNormal, kl_divergence

from pyrovae import evidence, flows, guides, reference
from pyrovae.ascent import Ascent
from pyrovae.models import PPCA, VAE
from pyrovae.nets import MLP, LinearHeadDecoder, Table
from pyrovae.refine import Objective

# Windows are compared on 128 pairs of draws and a datum stops when it gains less than their noise and 0.001 nats, two
# windows running at each of four step sizes: what is left is of the order of that noise, some 0.01 nats.
SHORT = 0.03


def as_normal(family, lam):
    q = family(lam)
    if isinstance(q, torch.distributions.Independent):
        return MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    return q


def short_of(model, x, family, lam, best=0.0):
    """KL(q || p(z|x)) above that of the best member of the family, `[B]`, closed form."""
    return kl_divergence(as_normal(family, lam), model.posterior(x)) - best


@pytest.mark.parametrize("noise", [0.5, 0.1**0.5])
def test_the_diagonal_optimum_of_ppca(noise):
    """Mean m, variance 1 / diag(Lambda), ELBO = log p(x) - the factorised gap."""
    model, x = problems.ppca(noise=noise)
    guide = guides.LocalSVI(model)
    fit = guide.fit(x)
    assert fit.converged.all()
    exact, precision = model.posterior(x), model.precision().detach()
    assert (short_of(model, x, guide.family(x), fit.lam, model.factorised_gap()) < SHORT).all()
    # 0.5 (mu - m)' Lambda (mu - m) and 0.5 sum_j (r_j - 1 - log r_j), r_j the ratio of variances, are parts of the KL.
    gap = fit.lam[:, :10] - exact.loc
    assert (0.5 * (gap @ precision * gap).sum(-1) < SHORT).all()
    ratio = fit.lam[:, 10:].exp() * precision.diagonal()
    assert (0.5 * (ratio - 1 - ratio.log()).sum(-1) < SHORT).all()
    away = model.log_evidence(x) - model.factorised_gap() - fit.elbo
    assert (away.abs() < 4 * fit.se + SHORT).all()
    assert abs(float(away.mean().detach())) < 4 * float(fit.se.mean()) / 40**0.5 + SHORT


def test_the_full_covariance_family_has_no_approximation_gap():
    model, x = problems.ppca()
    guide = guides.LocalSVI(model, "full-rank")
    fit = guide.fit(x)
    assert fit.converged.all()
    assert (short_of(model, x, guide.family(x), fit.lam) < SHORT).all()
    assert float(model.factorised_gap().detach()) > 10 * SHORT  # a diagonal q would have failed


def test_zero_and_encoder_starts_agree():
    model, x = problems.ppca()
    torch.manual_seed(0)
    base = guides.Amortized(model, MLP([30, 20]).double())
    family, best = base.family(x), model.factorised_gap()
    assert (short_of(model, x, family, base.lam(x), best) > 100).all()  # the encoder is untrained
    ends = [short_of(model, x, family, g.fit(x).lam, best) for g in (
        guides.LocalSVI(model), guides.LocalSVI(model, base=base)
    )]  # fmt: skip
    assert ((ends[0] - ends[1]).abs() < SHORT).all()


def test_every_datum_stops_by_itself():
    """Rows that start at the optimum need only the checks; the others climb."""
    model, x = problems.ppca(rows=8)
    loc = model.posterior(x).loc.detach()
    log_var = -model.precision().detach().diagonal().log().expand(8, -1)
    lam = torch.cat([loc, log_var], -1)
    lam[4:] = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).double()
    fit = guides.LocalSVI(model, base=guides.Amortized(model, Table(lam))).fit(x)
    assert fit.converged.all()
    assert (fit.steps[:4] < fit.steps[4:].min()).all()
    assert (fit.steps[:4] >= 50 * 2 * 4).all()  # check x patience x (reductions + 1)
    assert "8 of 8 data converged" in repr(fit)


def test_what_was_stopped_is_not_called_converged():
    model, x = problems.ppca(rows=5)
    for steps in (3, 70):  # before the first comparison, and in the middle of a window
        fit = guides.LocalSVI(model, max_steps=steps).fit(x)
        assert not fit.converged.any()
        assert (fit.steps == steps).all()


def test_fewer_steps_than_a_window_are_svi_with_that_many_steps():
    """Against a loop written out: Adam on [B, P] is B independent Adams."""
    model, x = problems.ppca(rows=3)
    torch.manual_seed(5)
    lam = guides.LocalSVI(model, max_steps=7, num_samples=2, optimizer=lambda p: torch.optim.Adam(p, lr=0.1)).lam(x)
    torch.manual_seed(5)
    objective = Objective(guides.LocalSVI(model).family(x), guides.LocalSVI(model).space(x).bind(x),
                          antithetic=True, path_only=True)  # fmt: skip
    draws = [torch.randn(2, 3, 10, dtype=torch.double) for _ in range(7)]
    for row in range(3):
        own = torch.zeros(3, 20, dtype=torch.double, requires_grad=True)
        adam = torch.optim.Adam([own], lr=0.1)
        for eps in draws:
            own.grad = -objective.gradient(own, eps)[1]
            own.grad[torch.arange(3) != row] = 0
            adam.step()
        assert torch.allclose(lam[row], own[row], rtol=0, atol=1e-12)


def test_path_derivative_is_the_elbo_s_gradient_and_has_no_noise_at_the_posterior():
    model, x = problems.ppca(rows=2)
    guide = guides.LocalSVI(model, "full-rank")
    family, log_joint = guide.family(x), guide.space(x).bind(x)
    q = model.posterior(x)
    lam = family.pack(q.loc, q.scale_tril).detach()
    plain = Objective(family, log_joint)
    path = Objective(family, log_joint, path_only=True)
    eps = torch.randn(6, 2, 10, dtype=torch.double)
    value, gradient = path.gradient(lam, eps)
    assert torch.allclose(value, model.log_evidence(x), rtol=0, atol=1e-10)
    assert gradient.abs().max() < 1e-10
    assert plain.gradient(lam, eps)[1].abs().max() > 0.1
    away = lam + 0.3 * torch.randn(2, 65, generator=torch.Generator().manual_seed(1)).double()
    draws = torch.randn(200, 50, 2, 10, dtype=torch.double)
    for objective in (plain, path):
        objective.record(away, draws[0])
    both = torch.stack([torch.stack([o.gradient(away, eps)[1] for eps in draws]) for o in (plain, path)])
    mean, se = both.mean(1), both.std(1) / 200**0.5
    assert ((mean[0] - mean[1]).abs() < 4.5 * se.square().sum(0).sqrt()).all()  # 130 coordinates


def test_a_mixture_finds_both_modes_where_a_gaussian_finds_one():
    """At x = 2.25 half the mass lies at either of two modes: a Gaussian on one of them misses log 2, and tails."""
    x = torch.tensor([2.25, 2.25], dtype=torch.double)
    truth = reference.exact(problems.bimodal, x).log_evidence
    at_modes = Table(torch.tensor([[1.4, -3.0], [-1.4, -3.0]], dtype=torch.double))
    encoder = guides.Amortized(problems.bimodal, at_modes, encoder_input=lambda x: x.unsqueeze(-1))
    single = guides.LocalSVI(problems.bimodal, base=encoder).fit(x)
    double = guides.LocalSVI(problems.bimodal, "mixture").fit(x)
    assert single.converged.all()
    assert double.converged.all()
    missed = truth - single.elbo
    assert (missed > math.log(2) - 4 * single.se).all()
    assert (missed < math.log(2) + 0.1).all()
    assert (truth - double.elbo < 0.05).all()


def test_a_reflection_turns_the_axes_of_two_latents_exactly():
    """With D = 2 one Householder reflection reaches every covariance: no approximation gap is left."""
    torch.manual_seed(0)
    weight = torch.randn(5, 2).double() @ torch.tensor([[1.0, 0.9], [0.0, 0.4]], dtype=torch.double)
    model, x = PPCA(weight, noise=0.5), torch.randn(6, 5).double()
    assert float(model.factorised_gap().detach()) > 10 * SHORT  # a diagonal q would have failed
    flow = flows.Householder(2, 1)
    fit = guides.LocalSVI(model, flow).fit(x)
    q, (direction,) = flow(fit.lam), flow.vectors(fit.lam).unbind(-2)
    unit = direction / direction.norm(dim=-1, keepdim=True)
    turn = torch.eye(2).double() - 2 * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    scale = (0.5 * fit.lam[:, 2:4]).exp()
    normal = MultivariateNormal(q.mean, turn @ torch.diag_embed(scale**2) @ turn)
    assert (kl_divergence(normal, model.posterior(x)) < SHORT).all()


def test_a_flow_s_weights_stay_and_its_parameters_move():
    x = torch.tensor([0.5, 0.2], dtype=torch.double)
    torch.manual_seed(0)
    flow = flows.Spline(1, num_transforms=1, context=3, hidden=(8,)).double()
    before = [p.detach().clone() for p in flow.parameters()]
    guide = guides.LocalSVI(problems.bimodal, flow)
    fit = guide.fit(x)
    assert fit.converged.all()
    assert {name for name, _ in guide.named_parameters()} == {f"flow.{name}" for name, _ in flow.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
    moved = (fit.lam - flow.init(2, dtype=torch.double)).abs().amax(0)
    assert (moved > 0.1).all()  # location, scale and every part of the context
    single = guides.LocalSVI(problems.bimodal).fit(x)
    assert (fit.elbo > single.elbo - 4 * fit.se.hypot(single.se)).all()


def nets(dtype=torch.float32):
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(LinearHeadDecoder(3, [8], (6,)), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3))
    return VAE(decoder.to(dtype), 3, "gaussian")


def test_fit_touches_neither_weights_nor_buffers_nor_random_state():
    vae = nets()
    x = torch.randn(5, 6)
    guide = guides.LocalSVI(vae, max_steps=120)
    guide.space(x)
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    rng, names = torch.get_rng_state(), set(pyro.get_param_store().keys())
    first = guide.fit(x)
    with torch.no_grad():
        second = guide.fit(x)
    assert torch.equal(first.lam, second.lam)  # no mask was drawn, and the same noise from the same state
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert set(pyro.get_param_store().keys()) == names
    assert vae.training
    assert not first.lam.requires_grad


def test_chunks_change_nothing():
    """Evaluation draws a datum's noise from the datum's own stream, whatever its neighbours need; ragged last chunk.

    Adam blows rounding up where a gradient vanishes, so that two searches agree within their tolerance; other noise
    would move single log-weights by their own spread.
    """
    model, x = problems.ppca(rows=5, latent=3, pixels=8)
    guide = guides.LocalSVI(model, reductions=1)

    def weights(rows=slice(None), **options):
        return evidence.log_weights(model, guide, x[rows], num_samples=20, **options)

    whole, parts, alone, other = weights(chunk=5), weights(chunk=2), weights(slice(3, 4), indices=[3]), weights(seed=1)
    assert (whole - parts).abs().mean(0).max() < SHORT
    assert (whole[:, 3:4] - alone).abs().mean() < SHORT
    assert (whole - other).abs().mean(0).min() > 3 * SHORT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_dtypes_and_one_datum(dtype, rows):
    model, x = problems.ppca(rows=rows, latent=3, pixels=8)
    model, x = model.to(dtype), x.to(dtype)
    guide = guides.LocalSVI(model)
    fit = guide.fit(x)
    assert fit.lam.dtype == fit.elbo.dtype == dtype
    assert fit.lam.shape == (rows, 6)
    assert (short_of(model, x, guide.family(x), fit.lam, model.factorised_gap()) < SHORT).all()


def test_joint_mode_is_svi_on_the_whole_program():
    """z ~ N(0, 1), x_i | z ~ N(z, 1): the posterior is N(sum x / (n + 1), 1 / (n + 1))."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, 1.5, 2.0], dtype=torch.double)
    fit = guides.LocalSVI(model, plate=None).fit(x)
    assert fit.lam.shape == (1, 2)
    q = torch.distributions.Normal(fit.lam[0, 0], (0.5 * fit.lam[0, 1]).exp())
    assert float(kl_divergence(q, torch.distributions.Normal(torch.tensor(1.0).double(), 0.5))) < SHORT


def test_progress_bar_changes_nothing():
    model, x = problems.ppca(rows=2)
    plain, shown = (guides.LocalSVI(model, max_steps=60, progress=bar).fit(x) for bar in (False, True))
    assert torch.equal(plain.lam, shown.lam)


def test_an_optimiser_that_overshoots_is_reported():
    model, x = problems.ppca(rows=2)
    with pytest.raises(FloatingPointError, match="smaller step"):
        guides.LocalSVI(model, optimizer=lambda p: torch.optim.SGD(p, lr=1e6)).fit(x)
    with pytest.raises(FloatingPointError, match="smaller step"):
        guides.LocalSVI(model, max_steps=20, optimizer=lambda p: torch.optim.SGD(p, lr=1e6)).fit(x)


def test_bad_options_raise():
    model, x = problems.ppca(rows=2)
    other, _ = problems.ppca(rows=2)
    base = guides.Amortized(model, MLP([30, 20]).double())
    with pytest.raises(TypeError, match="built for the same model"):
        guides.LocalSVI(other, base=base)
    with pytest.raises(TypeError, match="a guide with a family"):
        guides.LocalSVI(model, base=guides.ShortRun(model))
    with pytest.raises(ValueError, match="leave family out"):
        guides.LocalSVI(model, "diagonal", base=base)
    with pytest.raises(ValueError, match="must exist before the guide"):
        guides.LocalSVI(model, "iaf")
    with pytest.raises(ValueError, match="unknown family"):
        guides.LocalSVI(model, "diagnoal").fit(x)
    for options in ({"max_steps": 0}, {"num_samples": 0}, {"check": 0}, {"reductions": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            guides.LocalSVI(model, **options)
    for options in ({"shrink": 1.0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="shrink"):
            Ascent(**options)


def test_repr_and_traits_follow_the_family():
    model, _ = problems.ppca(rows=2)
    base = guides.Amortized(model, MLP([30, 42]).double(), "mixture")
    for guide in (guides.LocalSVI(model, "mixture"), guides.LocalSVI(model, base=base)):
        assert not guide.traits.reparameterised
        assert not guide.traits.gaussian_sites
    plain = guides.LocalSVI(model)
    assert plain.traits.reparameterised
    assert plain.traits.gaussian_sites
    assert repr(plain) == "LocalSVI(family='diagonal', max_steps=5000, plate='data')"
    assert repr(guides.LocalSVI(model, base=base)).startswith("LocalSVI(base=Amortized(")
