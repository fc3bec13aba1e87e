"""Objectives with a term of the whole batch: closed forms, special cases, and what they are for."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guides_registry import GUIDES
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import nn

from pyrovae import evidence, fit, guides, handlers, losses
from pyrovae.errors import IncompatibleError
from pyrovae.kernels import kernel_of, mmd2, stein_direction
from pyrovae.losses.mutual_divergence import pair_divergences
from pyrovae.models import VAE
from pyrovae.nets import LinearHeadDecoder
from pyrovae.optim import Adam

PIXELS, DIM, ROWS = 6, 3, 5


def pair(guide="amortized"):
    torch.manual_seed(1)
    model = VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)).double(), DIM, "gaussian")
    return model, GUIDES[guide](model, PIXELS, DIM, torch.float64)


def data(rows=ROWS):
    return torch.randn(rows, PIXELS, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def value_and_gradients(loss, model, guide, x):
    for parameter in (*model.parameters(), *guide.parameters()):
        parameter.grad = None
    torch.manual_seed(5)
    with pyro.get_param_store().scope():
        value = loss.loss_and_grads(model, guide, x)
    return value, [p.grad.clone() for p in (*model.parameters(), *guide.parameters())]


def kl_of(model, guide, x):
    with torch.no_grad():
        q = guide.posterior(x)
        return torch.distributions.kl_divergence(
            q, dist.Normal(torch.zeros(DIM).double(), 1.0).expand([len(x), DIM]).to_event(1)
        )


class Points(nn.Module):
    """An encoder that is told its answer: (loc, log-variance) of scalar latents, column by column."""

    def forward(self, x):
        return x[:, :2]


@pytest.mark.parametrize(
    "loss",
    [lambda: losses.InfoVAE(0.0, 1.0), lambda: losses.InfoVAE(0.0, 1.0, "stein"),
     lambda: losses.MutualPosteriorDivergence(0.0, 0.0), lambda: losses.FreeBits(1e-9),
     lambda: losses.FreeBits(1e-9, "dimension"), lambda: losses.FreeBits(1e9, soft=True)],
)  # fmt: skip
def test_the_elbo_is_a_special_case(loss):
    model, guide = pair()
    theirs = value_and_gradients(TraceMeanField_ELBO(), model, guide, data())
    ours = value_and_gradients(loss(), model, guide, data())
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight", [0.3, 4.0])
def test_infovae_with_alpha_1_minus_lambda_is_a_beta_vae(weight):
    model, guide = pair()
    beta = value_and_gradients(losses.InfoVAE(1 - weight, weight), model, guide, data())
    with handlers.anneal(weight):
        annealed = value_and_gradients(TraceMeanField_ELBO(), model, guide, data())
    plain = value_and_gradients(TraceMeanField_ELBO(), model, guide, data())
    assert beta[0] == pytest.approx(annealed[0], rel=1e-12)
    assert beta[0] - plain[0] == pytest.approx((weight - 1) * float(kl_of(model, guide, data()).sum()), rel=1e-9)
    for a, b in zip(beta[1], annealed[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def closed_form(mean, s, width):
    """MMD^2 between N(mean, s^2 I) and N(0, I) under exp(-r^2 / (2 width))."""
    d = len(mean)
    return (
        (width / (width + 2 * s**2)) ** (d / 2) + (width / (width + 2)) ** (d / 2)
        - 2 * (width / (width + 1 + s**2)) ** (d / 2) * math.exp(-sum(m * m for m in mean) / (2 * (width + 1 + s**2)))
    )  # fmt: skip


@pytest.mark.parametrize(("mean", "s"), [([0.5, -0.3, 0.2, 0.9, 0.0], 0.6), ([0.0, 0.0], 1.0)])
def test_mmd_is_unbiased(mean, s):
    generator = torch.Generator().manual_seed(0)
    d = len(mean)
    kernel = kernel_of("rbf", d)
    draws = torch.randn(400, 60, d, dtype=torch.double, generator=generator)
    other = draws.roll(7, 0)
    values = torch.stack([mmd2(s * a + torch.tensor(mean), b, kernel) for a, b in zip(draws, other, strict=True)])
    truth = closed_form(mean, s, d)
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 20


def test_the_original_kernel_goes_blind_and_the_default_does_not():
    """MMD^2 of a point at 0 from N(0, I_D): 1/D^2 decay against a constant; the table of the module, by draws."""
    generator = torch.Generator().manual_seed(0)
    for d, original, rbf in ((10, 0.0105, 0.160), (64, 0.000248, 0.156)):
        prior, point = torch.randn(2000, d, dtype=torch.double, generator=generator), torch.zeros(500, d).double()
        assert float(mmd2(point, prior, kernel_of("original", d))) == pytest.approx(original, rel=0.05)
        assert float(mmd2(point, prior, kernel_of("rbf", d))) == pytest.approx(rbf, rel=0.05)
        assert float(mmd2(point, prior, kernel_of("imq", d))) > 0.05


def test_stein_direction_in_closed_form():
    """q = N(m, v), p = N(0, 1), one latent: phi(y) = E_x[k(x, y) (-x) + dk/dx(x, y)], Gaussian integrals."""
    generator = torch.Generator().manual_seed(0)
    m, v, width = 0.7, 0.5, 1.0
    z = m + v**0.5 * torch.randn(4000, 1, dtype=torch.double, generator=generator)
    found = stein_direction(z, -z, kernel_of("rbf", 1, width))
    y = z
    k = (width / (width + v)) ** 0.5 * (-((y - m) ** 2) / (2 * (width + v))).exp()
    centre = (m * width + y * v) / (width + v)  # mean of x under q(x) k(x, y)
    truth = k * (-centre - (centre - y) / width)
    torch.testing.assert_close(found, truth, rtol=0.05, atol=0.03)


def test_the_penalty_is_mmd_to_the_prior_and_scales_with_the_plate():
    """Draws known (tiny posteriors): penalty = weight * MMD^2 against the run's prior draws; loss carries N."""
    def model(x, size):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[:, :1])

    x = torch.stack([torch.linspace(-1, 2, 200), torch.full((200,), -9.9)], 1).double()
    guide = guides.Amortized(model, Points())
    loss = losses.InfoVAE(0.0, 11.0)
    found = []
    for seed in range(60):
        torch.manual_seed(seed)
        found.append(float(loss.penalty(model, guide, x, 200)))
    n = 200
    z, width = x[:, :1], 1.0
    pairs = (-(z - z.T).square() / (2 * width)).exp()
    cross = (width / (width + 1)) ** 0.5 * (-z.square() / (2 * (width + 1))).exp().mean()
    truth = 10 * ((pairs.sum() - n) / (n * (n - 1)) + (width / (width + 2)) ** 0.5 - 2 * cross)
    se = torch.tensor(found).std() / 60**0.5
    assert abs(sum(found) / 60 - float(truth)) < 4 * float(se) + 0.01  # 0.01: the posteriors' own sd
    for size in (200, 1000):
        torch.manual_seed(3)
        value = loss.loss(model, guide, x, size)
        torch.manual_seed(3)
        rows = loss.per_datum(model, guide, x, size)
        torch.manual_seed(3)
        penalty = loss.penalty(model, guide, x, size)
        assert value == pytest.approx(size / 200 * -float(rows.sum()) + size * float(penalty), rel=1e-9)


def hierarchical(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        low = pyro.sample("low", dist.Normal(top.sum(-1), 0.5))
        pyro.sample("x", dist.Normal(low.unsqueeze(-1), 1.0).to_event(1), obs=x)


def test_prior_draws_of_dependent_latents_come_from_a_run_of_the_model():
    """A guide at the exact prior of a two-level model has nothing to pay; at independent sites it has."""
    torch.manual_seed(0)
    x = torch.zeros(400, 1)
    loss = losses.InfoVAE(0.0, 2.0)

    def prior_guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("low", dist.Normal(top.sum(-1), 0.5))

    def independent_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("low", dist.Normal(torch.zeros(()), 1.5).expand([len(x)]))

    def penalties(guide):
        return torch.stack([loss.penalty(hierarchical, guide, x) for _ in range(30)])

    exact, apart = penalties(prior_guide), penalties(independent_guide)
    assert abs(exact.mean()) < 4 * exact.std() / 30**0.5
    assert apart.mean() > 10 * apart.std() / 30**0.5


def test_pair_divergences_of_three_posteriors():
    """mu = 0, 1, 3, unit variances: K = 0.5, 4.5, 2; MPD 7/3, sd over ordered pairs 1.80739."""
    pairs = pair_divergences(torch.tensor([[0.0], [1.0], [3.0]]).double(), torch.zeros(3, 1).double())
    assert sorted(pairs.flatten().tolist()) == [0.5, 0.5, 2.0, 2.0, 4.5, 4.5]
    assert float(pairs.mean()) == pytest.approx(7 / 3)
    assert float(pairs.sum(-1).std()) == pytest.approx(1.80739, abs=1e-5)


def test_mae_penalty_by_hand_and_by_torch():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[:, :1])

    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]).double()
    guide = guides.Amortized(model, Points())
    found = float(losses.MutualPosteriorDivergence(2.0, 0.5).penalty(model, guide, x))
    assert found == pytest.approx(2 * math.log(1 + math.exp(-7 / 3)) + 0.5 * 1.80739, abs=1e-5)
    loc, log_var = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    normal = torch.distributions.Normal(loc, (log_var / 2).exp())
    first = torch.distributions.Normal(normal.loc[:, None], normal.scale[:, None])
    exact = torch.distributions.kl_divergence(first, normal)[~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(pair_divergences(loc, log_var), exact)


def test_mean_divergence_of_a_population():
    """mu ~ N(0, tau^2), one s: E m = tau^2 / s^2."""
    generator = torch.Generator().manual_seed(0)
    tau, s = 1.5, 0.5
    loc = tau * torch.randn(500, 40, 1, dtype=torch.double, generator=generator)
    values = torch.stack([pair_divergences(one, torch.full_like(one, 2 * math.log(s))).mean() for one in loc])
    assert abs(float(values.mean()) - tau**2 / s**2) < 4 * float(values.std()) / 500**0.5


@pytest.mark.parametrize(
    "guide",
    ["amortized-full-rank", "amortized-low-rank", "amortized-householder", "amortized-iaf", "semi-amortized"],
)
def test_mae_takes_flows_and_covariances(guide):
    model, guide = pair(guide)
    _, gradients = value_and_gradients(losses.MutualPosteriorDivergence(5.0, 1.0), model, guide, data())
    assert all(torch.isfinite(g).all() for g in gradients)
    assert float(losses.MutualPosteriorDivergence(5.0, 1.0).penalty(model, guide, data()).detach()) > 0


def test_equal_posteriors_have_a_finite_gradient():
    model, guide = pair()
    with torch.no_grad():
        guide.encoder[-1].weight.zero_()
    _, gradients = value_and_gradients(losses.MutualPosteriorDivergence(1.0, 1.0), model, guide, data())
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("per", ["dimension", "group", "total"])
@pytest.mark.parametrize("floor", [0.02, 3.0])
def test_free_bits_by_hand(per, floor):
    model, guide = pair()
    x = data()
    plain = value_and_gradients(TraceMeanField_ELBO(), model, guide, x)[0]
    found = value_and_gradients(losses.FreeBits(floor, per), model, guide, x)[0]
    with torch.no_grad():
        q = guide.posterior(x).base_dist
    each = 0.5 * (q.scale**2 + q.loc**2 - 1) - q.scale.log()
    parts = each.mean(0) if per == "dimension" else each.sum(1).mean().reshape(1)
    by_hand = ROWS * (parts.clamp_min(floor).sum() - parts.sum())
    assert found - plain == pytest.approx(float(by_hand), rel=1e-9, abs=1e-12)


def test_free_bits_below_the_floor_leave_the_reconstruction_alone():
    """No gradient of the KL is left: those of the guide are the reconstruction's."""
    model, guide = pair()
    floored = value_and_gradients(losses.FreeBits(1e6), model, guide, data())[1]
    with handlers.anneal(0.0):
        reconstruction = value_and_gradients(TraceMeanField_ELBO(), model, guide, data())[1]
    for a, b in zip(floored, reconstruction, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_free_bits_hold_the_kl_up():
    """The latent of a decoder that ignores it has KL 0 under the ELBO, the floor under free bits, hard and soft."""
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    x = torch.randn(256, 1)
    found = {}
    for name, loss in {
        "elbo": losses.ELBO(), "hard": losses.FreeBits(0.5), "each": losses.FreeBits(0.25, "dimension"),
    }.items():  # fmt: skip
        torch.manual_seed(0)
        encoder = nn.Linear(1, 4)
        with torch.no_grad():
            encoder.bias[:2] = 2.0  # above every floor: below one nothing would move
        guide = guides.Amortized(model, encoder)
        fit(model, guide, x, loss=loss, optimizer=Adam(lr=0.002), max_steps=2500, batch_size=256, progress=False)
        with torch.no_grad():
            q = guide.posterior(x).base_dist
        found[name] = float((0.5 * (q.scale**2 + q.loc**2 - 1) - q.scale.log()).sum(1).mean())
    assert found["elbo"] < 0.01
    assert found["hard"] == pytest.approx(0.5, abs=0.02)
    assert found["each"] == pytest.approx(0.5, abs=0.02)


def test_soft_free_bits_move_their_weight():
    model, guide = pair()
    kl = float(kl_of(model, guide, data()).mean())
    low, high = losses.FreeBits(2 * kl, soft=True), losses.FreeBits(kl / 2, soft=True)
    plain = value_and_gradients(losses.ELBO(), model, guide, data())[0]
    values = [value_and_gradients(low, model, guide, data())[0] for _ in range(3)]
    assert values[0] == pytest.approx(plain)
    assert values[2] - plain == pytest.approx(ROWS * (0.9**2 - 1) * kl, rel=1e-9)
    assert low.gamma == pytest.approx(0.9**3)
    high.load_state_dict(low.state_dict())
    for _ in range(5):
        value_and_gradients(high, model, guide, data())
    assert high.gamma == 1.0
    inside = losses.FreeBits(kl / 1.02, soft=True)
    inside.gamma = 0.5
    value_and_gradients(inside, model, guide, data())
    assert inside.gamma == 0.5


def test_soft_free_bits_resume_as_if_unbroken(tmp_path):
    def run(steps, path):
        model, guide = pair()
        loss = losses.FreeBits(3.0, soft=True)
        result = fit(model, guide, data(40), loss=loss, max_steps=steps, batch_size=16, progress=False,
                     checkpoint=path, checkpoint_every=1)  # fmt: skip
        return result.curve, loss.gamma, [p.detach().clone() for p in guide.parameters()]

    run(7, tmp_path / "a.pt")
    broken, unbroken = run(14, tmp_path / "a.pt"), run(14, tmp_path / "b.pt")
    assert broken[1] == unbroken[1] < 1
    assert broken[0] == unbroken[0]
    for a, b in zip(broken[2], unbroken[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("beta", "gain"), [(0.0, 0.0), (0.5, 0.5)])
def test_annealing_acts_on_kl_and_floor_alike(beta, gain):
    model, guide = pair()
    x = data()
    kl = float(kl_of(model, guide, x).mean())
    with handlers.anneal(beta):
        plain = value_and_gradients(losses.ELBO(), model, guide, x)[0]
        floored = value_and_gradients(losses.FreeBits(kl + 2), model, guide, x)[0]
        informed = value_and_gradients(losses.InfoVAE(0.5, 0.5), model, guide, x)[0]
    assert floored - plain == pytest.approx(gain * 2 * ROWS, abs=1e-9)
    assert plain - informed == pytest.approx(0.5 * beta * kl * ROWS, abs=1e-9)


@pytest.mark.parametrize("name", ["InfoVAE", "InfoVAE(stein)", "MAE", "free bits", "soft free bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_one_datum_and_both_dtypes(name, dtype, rows):
    torch.manual_seed(1)
    model = VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)).to(dtype), DIM, "gaussian")
    guide = GUIDES["amortized"](model, PIXELS, DIM, dtype)
    loss = losses.REGISTRY[name]()
    value, gradients = value_and_gradients(loss, model, guide, data(rows).to(dtype))
    assert math.isfinite(value)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert loss.per_datum(model, guide, data(rows).to(dtype)).dtype == dtype
    with torch.no_grad():
        assert math.isfinite(loss.loss(model, guide, data(rows).to(dtype)))


def toy(ignored):
    """x ~ N(0, 1) with decoder N(b z, c^2), or one that ignores z; encoder N(a x, s^2)."""
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros_like(z) if ignored else 0.9 * z, 0.5).to_event(1), obs=x)

    return model


class Linear(nn.Module):
    """loc a x, log-variance t, from a = s = 1/2."""

    def __init__(self):
        super().__init__()
        self.a, self.t = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-1.4))

    def forward(self, x):
        return torch.cat([self.a * x, self.t.expand(len(x), 1)], 1)


def test_information_is_preferred_where_the_elbo_drops_it():
    """alpha = 1, large lambda: a^2 + s^2 = 1 and s on its way to 0, far below the posterior's that the ELBO finds,
    (1 + 0.9^2 / 0.5^2)^-1/2 = 0.486; the ELBO with a decoder that ignores z: a = 0, s = 1."""
    torch.manual_seed(0)
    x = torch.randn(2000, 1)
    x = (x - x.mean()) / x.std()
    found = {}
    for name, loss, ignored in (
        ("mmd", losses.InfoVAE(1.0, 200.0), False), ("stein", losses.InfoVAE(1.0, 200.0, "stein"), False),
        ("elbo", losses.ELBO(), False), ("ignored", losses.ELBO(), True),
    ):  # fmt: skip
        encoder, model = Linear(), toy(ignored)
        fit(model, guides.Amortized(model, encoder), x, loss=loss, optimizer=Adam(lr=0.01), max_steps=800,
            batch_size=200, progress=False)  # fmt: skip
        found[name] = abs(float(encoder.a)), float((encoder.t / 2).exp())
    for name in ("mmd", "stein"):
        a, s = found[name]
        assert a**2 + s**2 == pytest.approx(1.0, abs=0.1), found
        assert s < 0.486 * 0.6, found
    assert found["elbo"][1] == pytest.approx(0.486, abs=0.02)
    assert found["ignored"] == (pytest.approx(0.0, abs=0.05), pytest.approx(1.0, abs=0.05))


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: losses.InfoVAE(0.0, 1e-3), "alpha \\+ lambda must be at least 1"),
     (lambda: losses.InfoVAE(1.5, 1.0), "at most 1"), (lambda: losses.InfoVAE(divergence="js"), "divergence"),
     (lambda: losses.InfoVAE(kernel="laplace"), "kernel"), (lambda: losses.InfoVAE(bandwidth=0.0), "positive"),
     (lambda: losses.InfoVAE(kernel="original", bandwidth=1.0), "fixed"),
     (lambda: losses.InfoVAE(num_particles=0), "at least one sample"),
     (lambda: losses.MutualPosteriorDivergence(-1.0), "negative"), (lambda: losses.FreeBits(0.0), "positive"),
     (lambda: losses.FreeBits(1.0, "channel"), "per must be"),
     (lambda: losses.FreeBits(1.0, "dimension", soft=True), "per='total'")],
)  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_said_is_said_so():
    model, guide = pair("amortized-full-rank")
    with pytest.raises(IncompatibleError, match="per='group' or per='total'"):
        losses.FreeBits(0.5, "dimension").loss(model, guide, data())
    joint = guides.Amortized(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), None, plate=None)
    with pytest.raises(IncompatibleError, match="plate=None"):
        losses.InfoVAE().loss(joint.model, joint)


def test_mae_of_points_is_refused():
    model, _ = pair()
    with pytest.raises(IncompatibleError, match="this guide has none"):
        losses.MutualPosteriorDivergence().loss(model, AutoDelta(model), data())


def test_curves_are_named_for_what_they_are():
    model, guide = pair()
    for name, shown in (("InfoVAE", "InfoVAE"), ("MAE", "MAE"), ("free bits", "free-bits ELBO")):
        result = fit(model, guide, data(), loss=losses.REGISTRY[name](), max_steps=1, progress=False)
        assert result.objective == shown


class Subsampled(nn.Module):
    """A model of N data of which a batch is given, with one scalar latent."""

    def __init__(self, number, latent=None):
        super().__init__()
        self.number, self.latent = number, latent or dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)

    def forward(self, x):
        with pyro.plate("data", self.number, subsample=torch.arange(len(x))):
            z = pyro.sample("z", self.latent)
            mean = z.sum(-1, keepdim=True) if self.latent.event_shape else z.unsqueeze(-1)
            pyro.sample("x", dist.Normal(mean.expand(*mean.shape[:-1], 3), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("divergence", ["mmd", "stein"])
def test_the_penalty_does_not_know_how_many_data_there_are(divergence):
    """Its gradient per datum is that of the batch, whatever the plate's N/B."""
    gradients = []
    for number in (6, 60, 6000):
        torch.manual_seed(0)
        model, encoder = Subsampled(number), nn.Linear(3, 4).double()
        guide, x = guides.Amortized(model, encoder), torch.randn(6, 3).double()
        loss = losses.InfoVAE(0.0, 100.0, divergence)
        guide.space(x)
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(loss.penalty(model, guide, x), encoder.weight)[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", ["mmd", "stein"])
def test_one_code_says_nothing_of_their_distribution(divergence):
    model, guide = pair()
    ours = value_and_gradients(losses.InfoVAE(0.0, 1000.0, divergence), model, guide, data(1))
    elbo = value_and_gradients(TraceMeanField_ELBO(), model, guide, data(1))
    assert ours[0] == pytest.approx(elbo[0], rel=1e-12)
    for a, b in zip(ours[1], elbo[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="at least two points"):
        mmd2(torch.zeros(1, 2), torch.zeros(5, 2), kernel_of("rbf", 2))


@pytest.mark.parametrize("loss", [losses.InfoVAE(), losses.MutualPosteriorDivergence(), losses.FreeBits()],
                         ids=["info", "mae", "free bits"])  # fmt: skip
def test_scalar_sites(loss):
    """A site that is one number per datum is a row of one."""
    torch.manual_seed(0)
    scalar, row = Subsampled(4, dist.Normal(torch.tensor(0.0).double(), 1.0)), Subsampled(
        4, dist.Normal(torch.zeros(1).double(), 1.0).to_event(1)
    )  # fmt: skip
    encoder, x, values = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), []
    for model in (scalar, row):
        guide = guides.Amortized(model, encoder)
        guide.space(x)
        torch.manual_seed(1)
        values.append(float(loss.penalty(model, guide, x).detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-10)


@pytest.mark.parametrize(
    "make",
    [lambda: losses.InfoVAE(0.0, 1000.0), lambda: losses.MutualPosteriorDivergence(5.0, 5.0),
     lambda: losses.FreeBits(50.0, "total"), lambda: losses.FreeBits(0.1, soft=True)],
    ids=["info", "mae", "free bits", "soft free bits"],
)  # fmt: skip
def test_held_out_data_are_judged_by_the_elbo(make):
    """What is kept as the best is the best by the ELBO, not by an objective with a penalty or a moving weight."""
    model, guide = pair()
    loss, held_out = make(), data(9)
    result = fit(model, guide, data(20), loss=loss, validation=held_out, epochs=2, batch_size=7, progress=False)
    weights = evidence.log_weights(model, guide, held_out, num_samples=4000)
    one_draw = float(weights.std(0).square().sum().sqrt()) / len(held_out)  # the validation takes one of each datum
    assert abs(result.validation[-1][1] - float(weights.mean())) < 4.5 * one_draw


def test_a_new_run_forgets_the_weight_of_soft_free_bits():
    model, guide = pair()
    loss = losses.FreeBits(100.0, soft=True)
    fit(model, guide, data(20), loss=loss, epochs=3, batch_size=7, progress=False)
    assert loss.gamma < 0.5
    model, guide = pair()
    fit(model, guide, data(20), loss=loss, max_steps=1, batch_size=7, progress=False)
    assert loss.gamma == pytest.approx(0.9)
