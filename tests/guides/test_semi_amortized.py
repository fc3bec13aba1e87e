"""SemiAmortized: the base at K = 0, the contraction law, exact total gradients."""

from __future__ import annotations

import pyro
import pytest
import torch
from bench import problems
from pyro.infer import Trace_ELBO

from pyrovae import guides
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder


def linear_encoder(x, dim):
    torch.manual_seed(3)
    return MLP([x.shape[1], 2 * dim]).to(x.dtype)


def test_no_steps_is_the_base_bit_for_bit():
    model, x = problems.ppca()
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, num_steps=0)
    assert torch.equal(guide.lam(x), base.lam(x))
    losses, gradients = [], []
    for one in (base, guide):
        with pyro.get_param_store().scope():
            torch.manual_seed(0)
            losses.append(Trace_ELBO().loss_and_grads(model, one, x))
        gradients.append([p.grad.clone() for p in (*model.parameters(), *base.parameters())])
        for p in (*model.parameters(), *base.parameters()):
            p.grad = None
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_contracts_by_the_law_with_exact_inner_gradients(steps):
    """mu_K - m = (I - alpha Lambda)^K (mu_0 - m): antithetic pairs make the gradient of the location exact."""
    model, x = problems.ppca()
    base = guides.Amortized(model, linear_encoder(x, 10))
    alpha = 0.5 / float(torch.linalg.eigvalsh(model.precision())[-1])
    guide = guides.SemiAmortized(base, steps, {"loc": alpha, "log_var": 1e-3}, 0.0, antithetic=True, max_norm=None)
    m = model.posterior(x).loc
    shrink = torch.linalg.matrix_power(torch.eye(10).double() - alpha * model.precision(), steps)
    expected = (base.lam(x)[:, :10] - m) @ shrink
    assert (guide.lam(x)[:, :10] - m - expected).abs().max() < 1e-10


def test_one_draw_per_step_does_not_contract_exactly():
    model, x = problems.ppca()
    base = guides.Amortized(model, linear_encoder(x, 10))
    alpha = 0.5 / float(torch.linalg.eigvalsh(model.precision())[-1])
    guide = guides.SemiAmortized(base, 5, {"loc": alpha, "log_var": 1e-3}, 0.0, max_norm=None)
    m = model.posterior(x).loc
    shrink = torch.linalg.matrix_power(torch.eye(10).double() - alpha * model.precision(), 5)
    expected = (base.lam(x)[:, :10] - m) @ shrink
    assert (guide.lam(x)[:, :10] - m - expected).abs().max() > 1e-3


def test_log_variance_ends_at_the_inverse_diagonal():
    model, x = problems.ppca(rows=4)
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, 3000, 0.004, 0.0, num_samples=4, antithetic=True, max_norm=None)
    with torch.no_grad():
        log_var = guide.lam(x)[:, 10:]
    target = -model.precision().diagonal().log()
    # The end point jitters with the noise of one step; its mean over data and dims is tighter.
    assert abs(float((log_var - target).mean())) < 0.02


@pytest.mark.parametrize("family", ["diagonal", "full-rank", "mixture"])
def test_total_gradient_is_that_of_finite_differences(family):
    torch.manual_seed(0)
    vae = VAE(LinearHeadDecoder(2, [6], (8,), torch.nn.Softplus).double(), 2, "gaussian")
    x = torch.randn(3, 8, dtype=torch.double)
    outputs = {"diagonal": 4, "full-rank": 5, "mixture": 10}[family]
    base = guides.Amortized(vae, MLP([8, 5, outputs], torch.nn.Tanh).double(), family)
    guide = guides.SemiAmortized(base, 4, 0.05, 0.5, max_norm=2.0)
    guide.space(x)

    def objective():
        torch.manual_seed(7)
        log_weights, u, log_q = guide.stratified(2, x)
        return (log_weights.exp() * (guide.space(x).bind(x)(u) - log_q)).sum()

    for parameter in (base.encoder[1].weight, vae.decoder.trunk[0].weight, vae.noise["log"]):
        (gradient,) = torch.autograd.grad(objective(), parameter)
        flat, step = parameter.data.view(-1), 1e-6
        flat[0] += step
        up = float(objective())
        flat[0] -= 2 * step
        down = float(objective())
        flat[0] += step
        exact = float(gradient.view(-1)[0])
        assert abs((up - down) / (2 * step) - exact) < 1e-5 * (1 + abs(exact))


def test_first_order_drops_the_path_through_the_steps():
    torch.manual_seed(0)
    vae = VAE(LinearHeadDecoder(2, [6], (8,), torch.nn.Softplus).double(), 2, "gaussian")
    x = torch.randn(3, 8, dtype=torch.double)
    base = guides.Amortized(vae, MLP([8, 4]).double())
    gradients = []
    for second in (True, False):
        guide = guides.SemiAmortized(base, 4, 0.05, second_order=second)
        torch.manual_seed(7)
        gradients.append(torch.autograd.grad(guide.lam(x).square().sum(), base.encoder[1].weight)[0])
        if not second:
            assert torch.autograd.grad(
                guide.lam(x).sum(), vae.decoder.trunk[0].weight, allow_unused=True
            )[0] is None
    assert not torch.allclose(*gradients)


def test_steps_improve_the_elbo_of_each_datum():
    """The sign: small steps with exact gradients raise every datum's own closed-form ELBO, step after step."""
    model, x = problems.ppca(rows=6)
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, 10, 0.002, 0.0, num_samples=50, antithetic=True, max_norm=None)
    exact, precision = model.posterior(x), model.precision()

    def kl(lam):  # KL(q || p) up to a constant, closed form
        loc, log_var = lam[:, :10], lam[:, 10:]
        gap = loc - exact.loc
        return 0.5 * ((gap @ precision * gap).sum(-1) + (log_var.exp() * precision.diagonal() - log_var).sum(-1))

    with torch.no_grad():
        values = torch.stack([kl(lam) for lam in guide.path(x)])
    assert (values[1:] < values[:-1]).all()


def test_clipping_is_per_datum_and_block():
    model, x = problems.ppca(rows=5)
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, 1, 1.0, 0.0, max_norm={"loc": 0.1, "log_var": 0.2})
    step = guide.path(x)[1] - guide.path(x)[0]
    assert torch.allclose(step[:, :10].norm(dim=-1), torch.full((5,), 0.1).double(), atol=1e-9)
    assert torch.allclose(step[:, 10:].norm(dim=-1), torch.full((5,), 0.2).double(), atol=1e-9)


def test_works_under_no_grad_and_gives_the_training_path():
    model, x = problems.ppca(rows=3)
    guide = guides.SemiAmortized(guides.Amortized(model, linear_encoder(x, 10)), 4, 0.01)
    torch.manual_seed(0)
    trained = guide.lam(x)
    torch.manual_seed(0)
    with torch.no_grad():
        evaluated = guide.lam(x)
    assert not evaluated.requires_grad
    assert torch.allclose(trained, evaluated, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": -1},
        {"num_samples": 0},
        {"momentum": 1.0},
        {"step_size": -0.1},
        {"step_size": {"loc": 0.1, "x": 1}},
    ],
)
def test_bad_options_raise(options):
    model, x = problems.ppca(rows=2)
    base = guides.Amortized(model, linear_encoder(x, 10))
    with pytest.raises(ValueError, match=r"needs|positive|each block"):
        guides.SemiAmortized(base, **options).lam(x)


def test_antithetic_mixture_raises_and_so_does_a_base_without_family():
    model, x = problems.ppca(rows=2)
    base = guides.Amortized(model, MLP([30, 42]).double(), "mixture")
    with pytest.raises(ValueError, match="symmetric noise"):
        guides.SemiAmortized(base, antithetic=True).lam(x)
    with pytest.raises(TypeError, match="a guide with a family"):
        guides.SemiAmortized(guides.ShortRun(model))
