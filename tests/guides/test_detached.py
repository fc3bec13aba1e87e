"""The ablations of SemiAmortized and the base of LocalSVI: which parameters get which gradient, exactly.

The table of Kim et al. (2018), float64, noise frozen by reseeding:

    detached      encoder: the ELBO's gradient at lam_0      decoder: the ELBO's at lam_K, lam_K constant
    detached-kl   encoder: -KL(q(lam_0) || q(lam_K))         decoder: the same
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from guides_registry import flow_guide
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyrovae import flows, guides, handlers, losses
from pyrovae.errors import ScaleError
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder, Table

STEPS, ROWS = 3, 4
OUTPUTS = {"diagonal": 6, "full-rank": 9, "low-rank": 9, "mixture": 14}


def start(family="diagonal"):
    """Model and base guide over 3 latents, and data."""
    torch.manual_seed(0)
    vae = VAE(LinearHeadDecoder(3, [7], (9,), torch.nn.Tanh).double(), 3, "bernoulli")
    x = torch.bernoulli(torch.full((ROWS, 9), 0.4, dtype=torch.double))
    if family in OUTPUTS:
        base = guides.Amortized(vae, MLP([9, 5, OUTPUTS[family]], torch.nn.Tanh).double(), family)
    else:
        base = flow_guide(vae, 9, flows.IAF(3, 1, context=2, hidden=(4,), activation=torch.nn.Tanh), torch.double)
    return vae, base, x


def setting(family="diagonal", **options):
    vae, base, x = start(family)
    return vae, base, guides.SemiAmortized(base, STEPS, 0.1, **options), x


def stepped(loss, vae, guide, x, seed=7):
    """Gradients by one stock SVI step: with SGD at rate 1 they are what the parameters lost."""
    guide(x)  # the check of parameters has been made
    parameters = {f"model.{n}": p for n, p in vae.named_parameters()}
    parameters.update({f"guide.{n}": p for n, p in guide.named_parameters()})
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pyro.get_param_store().scope():
        svi = SVI(vae, guide, pyro.optim.SGD({"lr": 1.0}), loss)
        torch.manual_seed(seed)
        svi.step(x)
    gradients = {name: before[name] - p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data.copy_(before[name])
    return gradients


def encoder_of(base, x, direction):
    """Gradient of minus <lam_0, direction> for the encoder's parameters."""
    named = dict(base.encoder.named_parameters())
    found = torch.autograd.grad(base.lam(x), list(named.values()), -direction)
    return {f"guide.base.encoder.{name}": value for name, value in zip(named, found, strict=True)}


def elbo_slope(base, x, seed=7, beta=1.0, samples=1):
    """grad_lam of the plain ELBO at lam_0, with the first step's noise."""
    family, log_joint = base.family(x), base.space(x).bind(x)
    torch.manual_seed(seed)
    eps = torch.randn(samples, len(x), family.strata_noise_dim, dtype=torch.double)
    lam = base.lam(x).detach().requires_grad_()
    if family.entropy(lam) is not None:
        elbo = log_joint(family.sample(lam, eps), beta).mean(0) + beta * family.entropy(lam)
    else:
        log_weights, u, log_q = family.stratified_and_log_prob(lam, eps)
        elbo = (log_weights.exp() * (log_joint(u, beta) - beta * log_q)).sum(0)
    return torch.autograd.grad(elbo.sum(), lam)[0]


def frozen(vae, base, guide, x, seed=7):
    """A guide with the constant lam_K, and the random state in which its draws are made."""
    torch.manual_seed(seed)
    lam = guide.path(x)[-1].detach()
    flow = base.flow
    return guides.Amortized(vae, Table(lam), base.family_spec if flow is None else flow), torch.get_rng_state()


def assert_close(ours, theirs):
    assert set(theirs) <= set(ours)
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() < 1e-12 * (1 + expected.abs().max()), name
        assert expected.abs().max() > 1e-6, name


def decoder_of(loss, vae, constant, x, state):
    constant(x)
    with pyro.get_param_store().scope():
        torch.set_rng_state(state)
        loss.loss_and_grads(vae, constant, x)
    found = {f"model.{name}": p.grad.clone() for name, p in vae.named_parameters()}
    for p in (*vae.parameters(), *constant.parameters()):
        p.grad = None
    return found


LOSSES = {
    "Trace_ELBO": lambda: Trace_ELBO(),
    "Trace_ELBO particles": lambda: Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "ELBO": lambda: losses.ELBO(),
    "ELBO stl": lambda: losses.ELBO("stl", num_particles=2),
    "ELBO stratified": lambda: losses.ELBO("stratified", num_particles=2),
    "IWAE": lambda: losses.IWAE(4),
    "IWAE dreg": lambda: losses.IWAE(4, "dreg"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("inner", ["gradient", "svi"])
def test_detached_trains_the_encoder_at_the_start_and_the_decoder_at_the_end(loss, inner):
    options = {"step_size": 0.1} if inner == "gradient" else {}
    vae, base, x = start()
    guide = guides.SemiAmortized(base, STEPS, inner=inner, gradient="detached", max_norm=0.3, **options)
    constant, state = frozen(vae, base, guide, x)
    ours = stepped(LOSSES[loss](), vae, guide, x)
    assert_close(ours, encoder_of(base, x, elbo_slope(base, x)))
    assert_close(ours, decoder_of(LOSSES[loss](), vae, constant, x, state))


@pytest.mark.parametrize("family", ["full-rank", "low-rank", "mixture", "iaf"])
@pytest.mark.parametrize("gradient", ["detached", "detached-kl"])
def test_every_family(family, gradient):
    loss = losses.ELBO("stratified") if family == "mixture" else Trace_ELBO()
    vae, base, guide, x = setting(family, gradient=gradient, num_samples=2)
    constant, state = frozen(vae, base, guide, x)
    slope = elbo_slope(base, x, samples=2) if gradient == "detached" else -kl_slope(base, guide, x, samples=2)
    ours = stepped(loss, vae, guide, x)
    assert_close(ours, encoder_of(base, x, slope))
    assert_close(ours, decoder_of(loss, vae, constant, x, state))


def kl_slope(base, guide, x, samples=1):
    """grad_lam KL(q(lam) || q(lam_K)) at lam_0: closed for Gaussians, else at the noise drawn after the steps'."""
    family = base.family(x)
    torch.manual_seed(7)
    target = guide.path(x)[-1].detach()
    lam = base.lam(x).detach().requires_grad_()
    if type(family).__name__ in ("DiagonalNormal", "FullRankNormal", "LowRankNormal"):
        kl = kl_divergence(family(lam), family(target))
    else:
        torch.manual_seed(7)
        for _ in range(STEPS + 1):
            eps = torch.randn(samples, len(x), family.strata_noise_dim, dtype=torch.double)
        log_weights, u, log_q = family.stratified_and_log_prob(lam, eps)
        kl = (log_weights.exp() * (log_q - family(target).log_prob(u))).sum(0)
    return torch.autograd.grad(kl.sum(), lam)[0]


@pytest.mark.parametrize("loss", ["Trace_ELBO", "TraceMeanField_ELBO", "ELBO", "IWAE"])
def test_detached_kl_trains_the_encoder_towards_the_refined_posterior(loss):
    vae, base, guide, x = setting(gradient="detached-kl")
    constant, state = frozen(vae, base, guide, x)
    ours = stepped(LOSSES[loss](), vae, guide, x)
    assert_close(ours, encoder_of(base, x, -kl_slope(base, guide, x)))
    assert_close(ours, decoder_of(LOSSES[loss](), vae, constant, x, state))


def test_the_term_has_no_value():
    """The losses of a detached guide are those of the constant lam_K, bit for bit."""
    for gradient in ("detached", "detached-kl"):
        vae, base, guide, x = setting(gradient=gradient)
        constant, state = frozen(vae, base, guide, x)
        for make in LOSSES.values():
            values = []
            for seed, one in (torch.manual_seed(7).get_state(), guide), (state, constant):
                with pyro.get_param_store().scope():
                    one(x)
                    torch.set_rng_state(seed)
                    values.append(make().loss_and_grads(vae, one, x))
            assert values[0] == values[1]


@pytest.mark.parametrize("beta", [0.3, 0.0])
@pytest.mark.parametrize("loss", ["Trace_ELBO", "TraceMeanField_ELBO", "ELBO"])
def test_annealing_weighs_the_kl_of_the_encoder_s_elbo_and_nothing_else(beta, loss):
    vae, base, guide, x = setting(gradient="detached")
    with handlers.anneal(beta):
        ours = stepped(LOSSES[loss](), vae, guide, x)
    assert_close(ours, encoder_of(base, x, elbo_slope(base, x, beta=beta)))


def test_annealing_under_losses_that_take_log_q():
    vae, base, guide, x = setting("mixture", gradient="detached")
    with handlers.anneal(0.3):
        ours = stepped(losses.ELBO("stratified"), vae, guide, x)
    assert_close(ours, encoder_of(base, x, elbo_slope(base, x, beta=0.3)))
    with handlers.anneal(0.0), pytest.raises(ScaleError, match="start the schedule"):
        losses.ELBO("stratified").loss_and_grads(vae, guide, x)


def test_a_subsampled_plate_scales_the_encoder_s_gradient_like_everything_else():
    def model(x, index):
        with pyro.plate("data", 50, subsample=index):
            zero = torch.zeros(2, dtype=torch.double)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sin(), 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    x, index = torch.randn(5, 2, dtype=torch.double), torch.arange(5, 10)
    base = guides.Amortized(model, MLP([2, 4]).double())
    guide = guides.SemiAmortized(base, STEPS, 0.1, gradient="detached")
    for loss in (Trace_ELBO(), losses.IWAE(2)):
        guide(x, index)
        torch.manual_seed(7)
        with pyro.get_param_store().scope():
            loss.loss_and_grads(model, guide, x, index)
        family, log_joint = base.family(x, index), base.space(x, index).bind(x, index)
        torch.manual_seed(7)
        eps = torch.randn(1, 5, 2, dtype=torch.double)
        lam = base.lam(x, index)
        elbo = log_joint(family.sample(lam, eps)).mean(0) + family.entropy(lam)
        (expected,) = torch.autograd.grad(elbo.sum(), base.encoder[1].weight)
        assert torch.allclose(base.encoder[1].weight.grad, -10 * expected, rtol=1e-12, atol=1e-12)
        base.encoder[1].weight.grad = None


def test_joint_mode():
    """One constant posterior for the whole program, outside any plate."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.double), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z.sin(), 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.double)
    base = guides.Amortized(model, None, plate=None, example=(x,))
    guide = guides.SemiAmortized(base, STEPS, 0.05, gradient="detached")
    guide.check_parameters(x)
    torch.manual_seed(7)
    with pyro.get_param_store().scope():
        Trace_ELBO().loss_and_grads(model, guide, x)
    torch.manual_seed(7)
    eps = torch.randn(1, 1, 2, dtype=torch.double)
    family, lam = base.family(x), base.constant.detach().requires_grad_()
    elbo = base.space(x).bind(x)(family.sample(lam, eps)).mean(0) + family.entropy(lam)
    (expected,) = torch.autograd.grad(elbo.sum(), lam)
    assert torch.allclose(base.constant.grad, -expected, rtol=1e-12, atol=1e-12)


def test_no_steps_and_a_frozen_encoder():
    vae, base, x = start()
    for gradient in ("detached", "detached-kl"):
        guide = guides.SemiAmortized(base, 0, gradient=gradient)
        assert torch.equal(guide.lam(x), base.lam(x))
        assert guide.lam(x).requires_grad  # nothing to detach: the base itself
    base.requires_grad_(False)
    guide = guides.SemiAmortized(base, STEPS, 0.1, gradient="detached")
    for p in vae.parameters():
        p.grad = None
    Trace_ELBO().loss_and_grads(vae, guide, x)
    assert all(p.grad is not None for p in vae.parameters())
    assert all(p.grad is None for p in base.parameters())


def test_refinement_of_a_refined_guide_keeps_its_base_in_training():
    """SemiAmortized on a detached SemiAmortized: only the inner one's term reaches the encoder."""
    vae, base, inner, x = setting(gradient="detached")
    outer = guides.SemiAmortized(inner, 2, 0.1, gradient="detached")
    ours = stepped(Trace_ELBO(), vae, outer, x)
    expected = {name.replace("guide.base", "guide.base.base"): value
                for name, value in encoder_of(base, x, elbo_slope(base, x)).items()}  # fmt: skip
    assert_close(ours, expected)


@pytest.mark.parametrize("loss", ["Trace_ELBO", "TraceMeanField_ELBO", "ELBO", "IWAE"])
def test_local_svi_trains_its_base_at_the_start_and_the_model_at_the_end(loss):
    vae, base, x = start()
    guide = guides.LocalSVI(vae, base=base, max_steps=6, num_samples=2)
    torch.manual_seed(7)
    slope = elbo_slope(base, x, samples=2)
    torch.manual_seed(7)
    lam = guide.lam(x)  # consumes what the step does: both draw for the slope
    assert not lam.requires_grad
    state = torch.get_rng_state()
    ours = stepped(LOSSES[loss](), vae, guide, x)
    assert_close(ours, encoder_of(base, x, slope))
    assert_close(ours, decoder_of(LOSSES[loss](), vae, guides.Amortized(vae, Table(lam)), x, state))


def test_local_svi_without_base_is_the_svi_baseline():
    vae, _, x = start()
    guide = guides.LocalSVI(vae, max_steps=6)
    assert not list(guide.parameters())
    torch.manual_seed(7)
    lam = guide.lam(x)
    state = torch.get_rng_state()
    ours = stepped(losses.ELBO(), vae, guide, x)
    assert_close(ours, decoder_of(losses.ELBO(), vae, guides.Amortized(vae, Table(lam)), x, state))
