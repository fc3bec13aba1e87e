"""Latents on circles and spheres: the law of directions, exact posteriors, the family of directions, a small torus."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import Normal, VonMises

from pyrovae import evidence, fit, guides, losses
from pyrovae.directional import Directional, Directions
from pyrovae.handlers import LinearSchedule
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.optim import Adam

NOISE = 0.4


class Given(nn.Module):
    """The same parameters for every datum."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, x):
        return self.rows.expand(len(x), -1)


def grid(dim, reach=7.0, number=140):
    """Points of a lattice in R^dim `[G, dim]` and the volume of a cell; of an even number, so that 0, which has no
    direction, is none of them."""
    line = torch.linspace(-reach, reach, number, dtype=torch.double)
    points = torch.cartesian_prod(*[line] * dim)
    return points, float(line[1] - line[0]) ** dim


def circle(dtype=torch.double):
    """x = v + noise, v on the unit circle: the posterior of the angle is von Mises with kappa = |x| / noise^2."""
    return VAE(nn.Identity(), 2, "gaussian", noise=NOISE, manifold="torus").to(dtype)


def circle_data(dtype=torch.double):
    return torch.tensor([[0.6, 0.8], [-1.2, 0.3], [0.05, 0.0]], dtype=dtype)


def circle_evidence(x):
    """log p(x) = log N(|x|, 1 about 0) .. with the angle integrated out by a Bessel function."""
    kappa = x.norm(dim=-1) / NOISE**2
    bessel = torch.special.i0e(kappa).log() + kappa
    return bessel - (x.square().sum(-1) + 1) / (2 * NOISE**2) - math.log(2 * math.pi * NOISE**2)


@pytest.mark.parametrize(("manifold", "dim", "size"), [("torus", 6, 2), ("sphere", 3, 3)])
def test_directions_are_unit_vectors_and_the_prior_is_uniform(manifold, dim, size):
    model = VAE(nn.Identity(), dim, "gaussian", manifold=manifold)
    v = model.directions(torch.randn(20_000, dim, dtype=torch.double)).unflatten(-1, (-1, size))
    torch.testing.assert_close(v.norm(dim=-1), torch.ones_like(v[..., 0]))
    # Moments of the uniform law: mean 0, covariance I / m, within 4.5 standard errors.
    assert (v.mean(0).abs() < 4.5 / math.sqrt(20_000 * size)).all()
    second = torch.einsum("nki,nkj->kij", v, v) / len(v)
    assert (second - torch.eye(size, dtype=torch.double) / size).abs().max() < 4.5 * 0.5 / math.sqrt(20_000)


@pytest.mark.parametrize("manifold", ["torus", "sphere"])
def test_the_data_do_not_see_the_radius(manifold):
    """log p(x, c z) - log p(x, z) is the prior's alone: the posterior's radius is the prior's."""
    torch.manual_seed(0)
    model = VAE(nn.Linear(4, 5), 4, "gaussian", noise=NOISE, manifold=manifold).double()
    x, z = torch.randn(3, 5, dtype=torch.double), torch.randn(3, 4, dtype=torch.double)
    guide = guides.Amortized(model, nn.Linear(5, 8).double())
    space = guide.space(x)
    scaled = 2.7 * z
    prior = Normal(0.0, 1.0).log_prob(scaled).sum(-1) - Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(space.log_joint(scaled, x) - space.log_joint(z, x), prior)
    torch.testing.assert_close(model.mean(scaled), model.mean(z))


def test_posterior_of_the_angle_is_von_mises():
    """By quadrature over the plane, against torch's von Mises and a Bessel function."""
    model, x = circle(), circle_data()
    points, cell = grid(2, number=500)
    space = guides.Amortized(model, nn.Linear(2, 4).double()).space(x)
    log_joint = space.log_joint(points.unsqueeze(1).expand(-1, 3, -1), x).detach()
    found = torch.logsumexp(log_joint, 0) + math.log(cell)
    torch.testing.assert_close(found, circle_evidence(x), rtol=0, atol=2e-4)
    weights = torch.softmax(log_joint, 0)
    mean = torch.einsum("gn,gi->ni", weights, model.directions(points))
    kappa = x.norm(dim=-1) / NOISE**2
    expected = 1 - VonMises(torch.zeros_like(kappa), kappa).variance  # E of the cosine
    torch.testing.assert_close(mean, expected.unsqueeze(-1) * x / x.norm(dim=-1, keepdim=True), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["full-rank", "directions"])
def test_importance_weights_give_the_evidence(family):
    model, x = circle(), circle_data()
    q, outputs = (Directional(2, 2), 3) if family == "directions" else ("full-rank", 5)
    rows = torch.zeros(1, outputs).double()
    rows[:, 0] = 0.5
    guide = guides.Amortized(model, Given(rows), q)
    found = evidence.iwae(model, guide, x, num_samples=20_000)
    assert ((found.values - circle_evidence(x)).abs() < 4.5 * found.se).all()
    assert (found.se < 0.1).all()


def test_every_kind_of_guide_takes_the_model():
    model, x = VAE(LinearHeadDecoder(4, [8], (5,)), 4, "gaussian", manifold="torus"), torch.randn(4, 5)
    amortized = guides.Amortized(model, MLP([5, 8, 8]))
    for guide in (amortized, guides.ShortRun(model, 3, 0.1), guides.Laplace(model, MLP([5, 8, 4]), num_steps=2),
                  guides.SemiAmortized(amortized, num_steps=2, step_size=0.05)):  # fmt: skip
        assert guide.draws(2, x).shape == (2, 4, 4)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("size", [2, 3])
def test_densities_of_directions_integrate_to_one_and_belong_to_their_draws(size, scale):
    loc = torch.tensor([1.0, 2.0, -1.0])[:size].double().unsqueeze(0)
    q = Directions(loc, torch.tensor([scale]).double())
    points, cell = grid(size, number=500 if size == 2 else 120)
    mass = q.log_prob(points).exp() * cell
    assert float(mass.sum()) == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close(mass @ points, q.mean, rtol=0, atol=4e-3)
    draws = q.rsample((40_000,))
    for moment in (lambda u: u, torch.square, lambda u: u * u.roll(1, -1), lambda u: u.norm(dim=-1, keepdim=True)):
        drawn = moment(draws)
        assert ((drawn.mean(0) - mass @ moment(points)).abs() < 4.5 * drawn.std(0) / 200 + 4e-3).all()


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_draws_are_those_of_expectations(size):
    """d E[f] / d(loc, log s) by reparameterised draws against differences of quadratures."""
    loc, log_s = torch.tensor([0.6, 0.5, -0.4])[:size].double(), torch.tensor(-0.5).double()
    direction = torch.tensor([0.3, -1.0, 0.7])[:size].double()

    def f(u):
        v = nn.functional.normalize(u, dim=-1)
        return (v @ direction) ** 3 + v[..., 0] * v[..., 1]

    points, _ = grid(size, number=400 if size == 2 else 70)

    def expectation(at):
        q = Directions(at[:size].unsqueeze(0), at[size:].exp())
        # Normalised: what the lattice misses of the mass has no say.
        mass = q.log_prob(points).exp()
        return (mass * f(points)).sum() / mass.sum()

    at = torch.cat([loc, log_s.reshape(1)])
    shifts = 1e-3 * torch.eye(size + 1).double()
    truth = torch.stack([(expectation(at + e) - expectation(at - e)) / 2e-3 for e in shifts])
    leaf = at.clone().requires_grad_()
    found = []
    for _ in range(20):
        q = Directions(leaf[:size].unsqueeze(0), leaf[size:].exp())
        found.append(torch.autograd.grad(f(q.rsample((4000,))).mean(), leaf)[0])
    found = torch.stack(found)
    se = found.std(0) / math.sqrt(20)
    assert ((found.mean(0) - truth).abs() < 5 * se + 2e-3).all(), (found.mean(0), truth, se)
    assert float(se.max()) < 0.02


def test_uniform_directions_cost_nothing_and_the_elbo_is_tight_on_the_circle():
    """KL of the widest member from the prior is that of the angle alone; at von Mises' own width the gap is small."""
    wide = Directional(4, 2)
    q = wide(wide.init(1, dtype=torch.double))
    u = q.rsample((20_000,))
    kl = q.log_prob(u) - Normal(0.0, 1.0).log_prob(u).sum(-1)
    assert 0 < float(kl.mean()) < 0.002
    model, x = circle(), circle_data()[:1]
    kappa = x.norm(dim=-1) / NOISE**2
    rows = torch.cat([x, -kappa.log().unsqueeze(-1)], -1)
    tight = evidence.elbo(model, guides.Amortized(model, Given(rows), Directional(2, 2)), x, num_samples=20_000)
    gap = float(circle_evidence(x) - tight.values)
    assert 0 < gap < 0.02 + 4.5 * float(tight.se)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4])
def test_family_of_directions_trains_under_stock_svi_and_every_loss(dtype, rows):
    torch.manual_seed(0)
    model = VAE(LinearHeadDecoder(6, [8], (5,)), 6, "gaussian", manifold="torus").to(dtype)
    guide = guides.Amortized(model, MLP([5, 8, 9]).to(dtype), Directional(6, 2))
    x = torch.randn(rows, 5, dtype=dtype)
    assert guide.posterior(x).rsample().dtype == dtype
    for loss in (Trace_ELBO(), losses.ELBO(), losses.ELBO("stl"), losses.IWAE(3)):
        with pyro.get_param_store().scope():
            loss.loss_and_grads(model, guide, x)
        for part in (model, guide):
            assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
            part.zero_grad()
    with torch.no_grad():
        weights = guide.log_weights(4000, x).double()
        many = losses.ELBO().per_datum(model, guide, x.repeat(4000, 1)).double().view(4000, rows)
    assert ((weights.mean(0) - many.mean(0)).abs() < 4.5 * weights.std(0) * math.sqrt(2 / 4000)).all()


def test_extreme_concentrations_stay_finite():
    for size in (2, 3):
        family = Directional(2 * size, size)
        lam = torch.tensor([[1.0] + (size - 1) * [0.0] + size * [1e-6] + [-60.0, 60.0]], requires_grad=True)
        u = family(lam).rsample((500,))
        value = family(lam).log_prob(u).sum()
        (gradient,) = torch.autograd.grad(value, lam)
        assert u.isfinite().all()
        assert value.isfinite()
        assert gradient.isfinite().all()


def render(angles, pixels=8, kappa=2.0):
    """A blob on a torus of pixels, `[..., 2] -> [..., pixels^2]`."""
    u = torch.arange(pixels) * 2 * math.pi / pixels
    first, second = angles[..., 0, None, None], angles[..., 1, None, None]
    return torch.exp(kappa * (torch.cos(u[:, None] - first) + torch.cos(u - second) - 2)).flatten(-2)


def test_a_torus_of_images_has_the_topology_of_its_latents():
    """Both circles of the data are wound around both circles of the latents: the integer matrix of windings, by which
    a map between tori is known up to deformation, is invertible; decoded angles are periodic and continuous."""
    torch.manual_seed(0)
    x = render(torch.rand(512, 2) * 2 * math.pi)
    model = VAE(LinearHeadDecoder(4, [48], (64,), nn.Tanh), 4, "gaussian", manifold="torus")
    encoder = MLP([64, 48, 6], nn.Tanh)
    with torch.no_grad():
        encoder[-1].bias[4:] = -2.0  # a third of a radian to begin with
    guide = guides.Amortized(model, encoder, Directional(4, 2))
    fit(model, guide, x, optimizer=Adam(lr=1e-2), max_steps=300, kl_weight=LinearSchedule(200, 0.2), progress=False)
    with torch.no_grad():
        error = (model.mean(guide.posterior(x).mean) - x).square().sum(-1).mean()
        assert error < 0.1 * x.var(0).sum()
        around = torch.linspace(0, 2 * math.pi, 65)
        loops = torch.ones(2, 65, 2)
        loops[0, :, 0], loops[1, :, 1] = around, around
        v = guide.posterior(render(loops).flatten(0, 1)).mean.view(2, 65, 2, 2)
        angle = torch.atan2(v[..., 1], v[..., 0])
        steps = torch.remainder(angle.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
        assert steps.abs().max() < 1  # fine enough to follow
        winding = (steps.sum(1) / (2 * math.pi)).round()
        assert abs(float(torch.linalg.det(winding))) == 1
        angles = torch.cartesian_prod(around, around).view(65, 65, 2)
        decoded = model.mean(torch.stack([angles.cos(), angles.sin()], -1).flatten(-2))
        torch.testing.assert_close(decoded[0], decoded[-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(decoded[:, 0], decoded[:, -1], atol=1e-5, rtol=0)
        apart = torch.pdist(x[:200]).max()
        assert (decoded[1:] - decoded[:-1]).norm(dim=-1).max() < 0.3 * apart
        assert (decoded[:, 1:] - decoded[:, :-1]).norm(dim=-1).max() < 0.3 * apart


def test_bad_manifolds_and_families_are_refused():
    for manifold, dim in (("torus", 3), ("sphere", 1)):
        with pytest.raises(ValueError, match="two latents for each circle"):
            VAE(nn.Linear(dim, 5), dim, manifold=manifold)
    with pytest.raises(ValueError, match="'plane', 'torus' or 'sphere'"):
        VAE(nn.Linear(2, 5), 2, manifold="klein")
    for dim, size in ((4, 3), (4, 4)):
        with pytest.raises(ValueError, match="circles take 2"):
            Directional(dim, size)
    with pytest.raises(ValueError, match="6 outputs"):
        Directional(4, 2)(torch.zeros(1, 5))
