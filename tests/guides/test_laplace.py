"""Laplace: exact where the posterior is Gaussian, the published fractions, honest flags."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, init_to_value

from pyrovae import evidence, guides, losses
from pyrovae.errors import IncompatibleError
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder


class Start(torch.nn.Module):
    """An encoder that returns given starts."""

    def __init__(self, start):
        super().__init__()
        self.start = torch.nn.Parameter(start)

    def forward(self, x):
        return self.start[: len(x)]


def random_start(x, dim):
    return Start(5 * torch.randn(len(x), dim, dtype=x.dtype, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("num_draws", [0, 4])
def test_one_full_step_from_anywhere_is_the_exact_ppca_posterior(num_draws):
    model, x = problems.ppca()
    guide = guides.Laplace(model, random_start(x, 10), num_steps=1, update="full", num_draws=num_draws)
    q, exact = guide.posterior(x), model.posterior(x)
    assert (q.loc - exact.loc).abs().max() < 1e-10
    assert (q.covariance_matrix - exact.covariance_matrix).abs().max() < 1e-10
    mode = guide.mode(x)
    assert mode.converged.all()
    assert not mode.floored.any()


def test_single_draw_elbo_has_no_variance_when_exact():
    model, x = problems.ppca()
    guide = guides.Laplace(model, random_start(x, 10), num_steps=1, update="full")
    truth = float(model.log_evidence(x).sum())
    for _ in range(5):
        assert abs(-Trace_ELBO().loss(model, guide, x) - truth) < 1e-9 * abs(truth)
    weights = evidence.log_weights(model, guide, x, num_samples=3)
    assert (weights - model.log_evidence(x)).abs().max() < 1e-9


@pytest.mark.parametrize(("steps", "fraction"), [(1, 0.5), (2, 0.375), (3, 0.3125), (4, 0.2734375), (8, 0.196380615)])
def test_published_damping_leaves_the_published_fraction(steps, fraction):
    model, x = problems.ppca()
    encoder = random_start(x, 10)
    guide = guides.Laplace(model, encoder, num_steps=steps, update="damped")
    exact = model.posterior(x)
    error = guide.posterior(x).loc - exact.loc
    before = encoder(x) - exact.loc
    assert (error - fraction * before).abs().max() < 1e-7
    assert (guide.posterior(x).covariance_matrix - exact.covariance_matrix).abs().max() < 1e-10


def test_line_search_reaches_the_mode_of_a_smooth_decoder():
    torch.manual_seed(0)
    vae = VAE(LinearHeadDecoder(3, [12], (20,), torch.nn.Tanh).double(), 3)
    x = (torch.rand(6, 20) > 0.5).double()
    guide = guides.Laplace(vae, random_start(x, 3), num_steps=40)
    mode = guide.mode(x)
    assert mode.converged.all()
    u = mode.loc.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(guide.space(x).log_joint(u, x).sum(), u)
    assert gradient.abs().max() < 1e-3


def test_gradients_reach_encoder_and_decoder_through_mode_and_covariance():
    """The ELBO's gradient with frozen noise equals finite differences, in float64."""
    torch.manual_seed(0)
    vae = VAE(LinearHeadDecoder(2, [6], (8,), torch.nn.Softplus).double(), 2, "gaussian")
    x = torch.randn(3, 8, dtype=torch.double)
    guide = guides.Laplace(vae, MLP([8, 5, 2], torch.nn.Tanh).double(), num_steps=2, update="damped")
    guide.space(x)

    def objective():
        torch.manual_seed(7)
        return guide._weighted(4, x).mean(0).sum()

    for parameter in (guide.encoder[1].weight, vae.decoder.trunk[0].weight, vae.noise["log"]):
        _hold_against_differences(objective, parameter, 1e-6)


def _hold_against_differences(objective, parameter, tolerance, step=1e-5):
    """The objective's gradient with respect to the parameter's first entry is its central difference."""
    (gradient,) = torch.autograd.grad(objective(), parameter)
    with torch.no_grad():
        flat = parameter.view(-1)
        flat[0] += step
        up = objective()
        flat[0] -= 2 * step
        down = objective()
        flat[0] += step
    assert abs((up - down) / (2 * step) - gradient.view(-1)[0]) < tolerance * (1 + abs(gradient.view(-1)[0]))


def test_averaging_finds_the_gaussian_nearest_in_kl():
    """On a skewed posterior (Bernoulli, few pixels) the averaged form has the higher ELBO, by more than 5 se."""
    torch.manual_seed(0)
    vae = VAE(torch.nn.Linear(2, 6).double(), 2)
    vae.decoder.weight.data.mul_(6)
    x = (torch.rand(40, 6) > 0.5).double()
    start = Start(torch.zeros(40, 2, dtype=torch.double))
    at_mode = guides.Laplace(vae, start, num_steps=30)
    averaged = guides.Laplace(vae, start, num_steps=30, num_draws=40)
    assert at_mode.mode(x).converged.all()
    gain = (
        evidence.elbo(vae, averaged, x, num_samples=2000).values
        - evidence.elbo(vae, at_mode, x, num_samples=2000).values
    )
    assert gain.mean() > 5 * gain.std() / 40**0.5


def test_centred_eight_schools_has_no_joint_mode_and_says_so():
    model = problems.eight_schools(centred=True)
    guide = guides.Laplace(model, None, num_steps=60, plate=None)
    assert not guide.mode().converged.any()


def test_non_centred_eight_schools_has_one():
    guide = guides.Laplace(problems.eight_schools(), None, num_steps=60, plate=None)
    mode = guide.mode()
    assert mode.converged.all()
    # The mode of this form, found by hand: log tau at 3.37, smallest curvature of the exact Hessian 0.041.
    space = guide.space()
    tau = next(site for site in space.sites if site.name == "tau")
    assert float(mode.loc[0, tau.slice]) == pytest.approx(3.37, abs=0.02)
    hessian = torch.autograd.functional.hessian(lambda u: -space.log_joint(u).sum(), mode.loc).reshape(10, 10)
    assert float(torch.linalg.eigvalsh(hessian)[0]) == pytest.approx(0.041, abs=0.001)
    # Gauss-Newton, which the guide uses, leaves out the residuals' curvature: close, and positive definite.
    assert float(torch.linalg.eigvalsh(mode.precision[0])[0]) == pytest.approx(0.041, abs=0.008)


@pytest.mark.parametrize(
    "options", [{"num_steps": -1}, {"update": "steepest"}, {"step_size": 0.0}, {"num_draws": 3}, {"encoder": None}]
)
def test_bad_options_raise(options):
    model = problems.ppca(rows=2)[0]
    options = {"encoder": MLP([30, 10]), **options}
    with pytest.raises(ValueError, match=r"needs|must be|learns"):
        guides.Laplace(model, options.pop("encoder"), **options)


def test_wrong_encoder_width_raises():
    model, x = problems.ppca(rows=2)
    guide = guides.Laplace(model, MLP([30, 7]).double())
    with pytest.raises(ValueError, match="start of the search"):
        guide.posterior(x)


def test_mode_has_no_gradient_and_moves_no_random_state():
    model, x = problems.ppca(rows=3)
    guide = guides.Laplace(model, MLP([30, 10]).double())
    state = torch.get_rng_state()
    assert not guide.mode(x).loc.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    pyro.clear_param_store()


def _smooth(likelihood="gaussian", activation=torch.nn.Softplus):
    torch.manual_seed(0)
    vae = VAE(LinearHeadDecoder(2, [6], (8,), activation).double(), 2, likelihood)
    x = torch.randn(3, 8, dtype=torch.double)
    return vae, x if likelihood == "gaussian" else (x > 0).double()


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_implicit_gradient_is_that_of_the_searched_mode(likelihood):
    """Finite differences of the ELBO through a converged search; a smooth decoder, where Gauss-Newton is not H."""
    vae, x = _smooth(likelihood)
    start = Start(torch.zeros(3, 2, dtype=torch.double))
    guide = guides.Laplace(vae, start, num_steps=60, tolerance=1e-9, num_probes=0)
    guide.space(x)

    def objective():
        torch.manual_seed(7)
        return guide._weighted(4, x).mean(0).sum()

    assert guide.mode(x).converged.all()
    parameters = [vae.decoder.trunk[0].weight, vae.decoder.head.weight]
    parameters += [vae.noise["log"]] if likelihood == "gaussian" else []
    for parameter in parameters:
        _hold_against_differences(objective, parameter, 1e-5)


@pytest.mark.parametrize("loss", [losses.ELBO(), losses.IWAE(3, estimator="reparam")], ids=["ELBO", "IWAE"])
def test_probes_leave_the_mean_gradient_alone(loss):
    """The covariance's gradient by products and probes has the mean of the exact one, within 4 standard errors."""
    vae, x = _smooth("bernoulli")
    start = Start(torch.zeros(3, 2, dtype=torch.double))
    found = []
    for num_probes in (0, 1):
        guide = guides.Laplace(vae, start, num_steps=4, num_probes=num_probes)
        torch.manual_seed(0)
        draws = []
        for _ in range(250):
            value = loss.per_datum(vae, guide, x).sum()
            draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, [*vae.decoder.parameters()])]))
        found.append(torch.stack(draws))
    exact, probed = found
    se = ((exact.var(0) + probed.var(0)) / len(exact)).sqrt()
    away = (exact.mean(0) - probed.mean(0)).abs() / se
    assert away.max() < 4.5  # of 80 parameters
    assert away.mean() < 1.2


def test_gauss_newton_alone_would_give_another_gradient():
    """The control for the test above: with H replaced by Lambda the gradient of a smooth decoder is visibly off."""
    vae, x = _smooth()
    guide = guides.Laplace(vae, Start(torch.zeros(3, 2, dtype=torch.double)), num_steps=60, tolerance=1e-9)
    u = guide.mode(x).loc.requires_grad_()
    space = guide.space(x)
    (slope,) = torch.autograd.grad(space.log_joint(u, x).sum(), u, create_graph=True)
    exact = torch.stack([torch.autograd.grad(slope[:, d].sum(), u, retain_graph=True)[0] for d in range(2)], 1)
    assert (-exact - guide.mode(x).precision).abs().max() > 1e-2


@pytest.mark.parametrize("num_probes", [0, 2])
def test_encoder_descends_its_distance_from_the_mode(num_probes):
    """Gradient of the encoder's output: Lambda (mu - mu_0), whatever the model's own gradient is."""
    vae, x = _smooth()
    start = Start(torch.randn(3, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0)))
    guide = guides.Laplace(vae, start, num_steps=30, num_probes=num_probes)
    mode = guide.mode(x)
    expected = (mode.precision @ (mode.loc - start.start.detach()).unsqueeze(-1)).squeeze(-1)
    for loss in (Trace_ELBO(), losses.ELBO(), losses.ELBO("stl"), losses.IWAE(3)):
        start.start.grad = None
        with pyro.get_param_store().scope():
            loss.loss_and_grads(vae, guide, x)
        torch.testing.assert_close(-start.start.grad, expected, rtol=1e-7, atol=1e-9)


def test_envelope_holds_the_posterior_constant():
    """The decoder's gradient is that of log p(x, z) at draws that do not move."""
    vae, x = _smooth()
    start = Start(torch.zeros(3, 2, dtype=torch.double))
    for update in ("newton", "damped"):
        guide = guides.Laplace(vae, start, num_steps=3, update=update, gradient="envelope")
        q = guide.posterior(x)
        assert not q.loc.requires_grad
        assert not q.scale_tril.requires_grad
        torch.manual_seed(1)
        (ours,) = torch.autograd.grad(guide._weighted(2, x).mean(0).sum(), vae.decoder.head.weight)
        torch.manual_seed(1)
        u = q.loc + (q.scale_tril @ torch.randn(2, 3, 2, dtype=torch.double).unsqueeze(-1)).squeeze(-1)
        value = guide.space(x).log_joint(u, x).mean(0).sum()
        (expected,) = torch.autograd.grad(value, vae.decoder.head.weight)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def _logistic(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x @ w) / s), obs=y)


def test_joint_mode_equals_pyro_s_laplace_approximation():
    """Mean and covariance of `AutoLaplaceApproximation(...).laplace_approximation()`, its SVI run to the same mode."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.double)
    y = torch.bernoulli((x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.double)).sigmoid(), generator=generator)
    guide = guides.Laplace(_logistic, None, num_steps=100, plate=None, tolerance=1e-10, example=(x, y))
    frozen = guide.laplace_approximation(x, y)
    ours = frozen.posterior(x, y)
    with pyro.get_param_store().scope():
        theirs = AutoLaplaceApproximation(_logistic, init_loc_fn=init_to_value(values=_values(guide, x, y)))
        theirs(x, y)
        optimizer = torch.optim.LBFGS([theirs.loc], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

        def closure():
            optimizer.zero_grad()
            loss = Trace_ELBO().differentiable_loss(_logistic, theirs, x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
        q = theirs.laplace_approximation(x, y).get_posterior()
    torch.testing.assert_close(ours.loc[0], q.loc.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.covariance_matrix[0], q.covariance_matrix.detach(), rtol=1e-4, atol=1e-6)
    # x'w / s is not linear in (w, s): Gauss-Newton is another matrix
    other = guides.Laplace(_logistic, None, num_steps=100, plate=None, curvature="fisher", example=(x, y))
    assert (other.mode(x, y).precision - ours.precision_matrix).abs().max() > 0.1


def _values(guide, x, y):
    return guide.space(x, y).constrain(guide.mode(x, y).loc + 0.3)


def test_frozen_approximation_of_local_data():
    model, x = problems.ppca(rows=5)
    guide = guides.Laplace(model, random_start(x, 10), num_steps=20, tolerance=1e-9)
    frozen = guide.laplace_approximation(x)
    exact = model.posterior(x)
    assert (frozen.posterior(x).loc - exact.loc).abs().max() < 1e-7
    assert (frozen.posterior(x).covariance_matrix - exact.covariance_matrix).abs().max() < 1e-9
    with pytest.raises(ValueError, match="parameters of 5 data"):
        frozen.posterior(x[:3])
    assert evidence.elbo(model, frozen, x, num_samples=10).values.shape == (5,)  # chunked over all rows at once


def test_a_decoder_that_torch_cannot_differentiate_three_times_is_refused_in_training():
    net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.LayerNorm(6), torch.nn.Tanh(), torch.nn.Linear(6, 5))
    vae, x = VAE(net.double(), 2, "gaussian"), torch.randn(3, 5, dtype=torch.double)
    start = Start(torch.zeros(3, 2, dtype=torch.double))
    guide = guides.Laplace(vae, start)
    with torch.no_grad():
        assert guide.log_weights(3, x).isfinite().all()
    with pytest.raises(IncompatibleError, match="LayerNorm.*RMSNorm"):
        losses.ELBO().loss_and_grads(vae, guide, x)
    with pyro.get_param_store().scope():
        losses.ELBO().loss_and_grads(vae, guides.Laplace(vae, start, gradient="envelope"), x)


def test_joint_mode_with_fisher_information_takes_several_rows():
    vae, x = _smooth()
    guide = guides.Laplace(vae, None, num_steps=5, plate=None, curvature="fisher", example=(x,))
    assert guide.mode(x).loc.shape == (1, 6)


def test_no_steps_train_the_encoder_through_the_start():
    vae, x = _smooth()
    start = Start(torch.randn(3, 2, dtype=torch.double))
    with pyro.get_param_store().scope():
        losses.ELBO().loss_and_grads(vae, guides.Laplace(vae, start, num_steps=0), x)
    assert start.start.grad.abs().max() > 1e-3
