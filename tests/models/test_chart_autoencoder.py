"""Chart autoencoders: the sum over charts by hand, the hard minimum as its limit, atlases that are known, training."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.distributions import Normal

from pyrovae import evidence, fit, generate, guides, losses
from pyrovae.compat import compatible
from pyrovae.errors import DataError, IncompatibleError
from pyrovae.farthest import farthest_points
from pyrovae.guides.charts import Charts
from pyrovae.losses.charts import ChartLoss
from pyrovae.models import VAE
from pyrovae.models.chart_autoencoder import ChartAutoencoder
from pyrovae.nets import MLP
from pyrovae.nets.charts import ChartMLP
from pyrovae.optim import Adam

PIXELS, NOISE = 5, 0.5


def atlas(number=3, dim=2, dtype=torch.double, noise=NOISE, **options):
    torch.manual_seed(0)
    model = ChartAutoencoder(ChartMLP(number, [dim, 8, 4]), nn.Linear(4, PIXELS), noise=noise, **options).to(dtype)
    guide = Charts(
        model, nn.Linear(PIXELS, 4), ChartMLP(number, [4, 8, 2 * dim]), nn.Linear(PIXELS, number)
    ).to(dtype)  # fmt: skip
    model.set_weights(torch.arange(1.0, number + 1).to(dtype) / number)
    return model, guide


def data(rows, dtype=torch.double):
    return torch.randn(rows, PIXELS, dtype=dtype, generator=torch.Generator().manual_seed(2))


def parts(guide, x):
    """log P(x) `[N, B]`, and locations and scales of logit z `[N, B, d]`."""
    every = torch.arange(guide.num_charts).unsqueeze(1)
    locs, log_vars = guide.charts(guide.encoder(x), every).chunk(2, -1)
    return torch.log_softmax(guide.predictor(x), -1).T, locs, (log_vars / 2).exp()


def log_logistic(u):
    """log sigma'(u)."""
    return nn.functional.logsigmoid(u) + nn.functional.logsigmoid(-u)


def test_pictures_need_a_chart():
    """Codes alone do not say which chart's decoder they are for; a draw of the chart would decide unseen."""
    model, guide = atlas()
    x = data(3)
    with pytest.raises(DataError, match=r"'x' depends on the discrete latent 'c'.*mean\(z, c\)"):
        generate.interpolate(model, guide, x, x.flip(0), steps=2)
    with pytest.raises(DataError, match="discrete latent 'c'"):
        generate.traverse(model, guide, x, 0, [0.0, 1.0])


def test_every_row_goes_through_its_own_net():
    torch.manual_seed(0)
    nets = ChartMLP(3, [2, 6, 6, 4]).double()
    z, c = torch.randn(7, 2).double(), torch.tensor([0, 2, 1, 1, 0, 2, 2])

    def one(row, a):
        for k in range(3):
            row = row if k == 0 else row.tanh()
            row = row @ nets.weights[k][a] + nets.biases[k][a]
        return row

    by_hand = torch.stack([one(z[b], int(c[b])) for b in range(7)])
    torch.testing.assert_close(nets(z, c), by_hand)
    everywhere = nets(z, torch.arange(3).unsqueeze(1))
    torch.testing.assert_close(everywhere, torch.stack([torch.stack([one(row, a) for row in z]) for a in range(3)]))
    again = nets(everywhere[..., :2], torch.arange(3).unsqueeze(1))
    torch.testing.assert_close(again[1, 4], one(everywhere[1, 4, :2], 1))
    slopes = [torch.autograd.functional.jacobian(lambda row, a=a: one(row, a), z[0]) for a in range(3)]
    steepest = torch.stack([torch.linalg.matrix_norm(slope, 2) for slope in slopes])
    assert (steepest <= nets.lipschitz()).all()
    linear = ChartMLP(3, [2, 4]).double()
    torch.testing.assert_close(linear.lipschitz(), torch.linalg.svdvals(linear.weights[0])[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5])
def test_log_joint_in_logit_coordinates_sums_over_charts(dtype, rows):
    model, guide = atlas(dtype=dtype)
    x = data(rows, dtype)
    space = guide.space(x)
    assert (space.dim, space.enumerated) == (2, ("c",))
    u = torch.randn(4, rows, 2, dtype=dtype)
    each = [model.log_weights[a] + Normal(model.mean(u.sigmoid(), torch.tensor(a)), NOISE).log_prob(x).sum(-1)
            for a in range(3)]  # fmt: skip
    by_hand = torch.logsumexp(torch.stack(each), 0) + log_logistic(u).sum(-1)
    rounding = 1e-4 if dtype == torch.float32 else 1e-10
    found = space.log_joint(u, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, by_hand, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("rows", [1, 5])
def test_elbo_is_the_sum_over_charts(rows):
    """TraceEnum_ELBO at draws that are recovered from a trace with the same seed."""
    model, guide = atlas()
    x = data(rows)
    guide.check_parameters(x)
    seen = []
    decode = model.decode
    model.__dict__["decode"] = lambda z, c: (seen.append(z.detach()), decode(z, c))[1]
    with pyro.get_param_store().scope():
        value = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    (z,) = [found for found in seen if found.shape == (3, rows, 2)]
    log_p, locs, scales = parts(guide, x)
    u = z.logit()
    log_q = Normal(locs, scales).log_prob(u).sum(-1) - log_logistic(u).sum(-1)
    mean = decode(z, torch.arange(3).unsqueeze(1))
    inside = Normal(mean, NOISE).log_prob(x).sum(-1) + model.log_weights.unsqueeze(1) - log_p - log_q
    assert -value == pytest.approx((log_p.exp() * inside).sum().item(), rel=1e-10)


def test_other_losses_see_the_mixture_and_agree_on_the_evidence():
    """Importance weights of the mixture, against quadrature over the square."""
    model, guide = atlas()
    x = data(4) / 2
    line = (torch.arange(200, dtype=torch.double) + 0.5) / 200
    z = torch.cartesian_prod(line, line).unsqueeze(1)
    each = [model.log_weights[a] + Normal(model.mean(z, torch.tensor(a)), NOISE).log_prob(x).sum(-1) for a in range(3)]
    truth = torch.logsumexp(torch.stack(each), (0, 1)) - math.log(200**2)
    found = evidence.iwae(model, guide, x, num_samples=20_000)
    assert ((found.values - truth).abs() < 4.5 * found.se).all()
    assert (found.se < 0.1).all()
    mixture = losses.ELBO("stratified", 300).per_datum(model, guide, x)
    assert (mixture < truth + 0.1).all()
    amortized = guides.Amortized(model, MLP([PIXELS, 8, 4]).double())
    other = evidence.iwae(model, amortized, x, num_samples=20_000)
    assert ((other.values - truth).abs() < 4.5 * other.se).all()


def test_other_guides_take_the_model():
    model, _ = atlas(dtype=torch.float32)
    x = data(4, torch.float32)
    amortized = guides.Amortized(model, MLP([PIXELS, 8, 4]))
    for guide in (guides.ShortRun(model, 3, 0.1), guides.Laplace(model, MLP([PIXELS, 8, 2]), num_steps=2),
                  guides.SemiAmortized(amortized, num_steps=2, step_size=0.05)):  # fmt: skip
        z = guide.sample(2, x)["z"]
        assert z.shape == (2, 4, 2)
        assert ((z > 0) & (z < 1)).all()
        loss = losses.default_loss(guide)  # one that sums the chart out
        assert compatible(model, guide, loss) is None
        for parameter in model.parameters():
            parameter.grad = None
        with pyro.get_param_store().scope():
            assert math.isfinite(loss.loss_and_grads(model, guide, x))
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_hard_minimum_is_the_limit_of_the_sum():
    """-2 s^2 log sum_c p_c N(x; y_c, s^2), its constant taken out, falls to min_c |x - y_c|^2 as s goes to 0."""
    model, guide = atlas()
    x = data(6)
    logits, squared = guide._errors(x)
    gaps = []
    for noise in (0.1, 0.01):
        z = guide.coordinates(x).movedim(1, 0)
        mean = model.mean(z, torch.arange(3).unsqueeze(1))
        smooth = torch.logsumexp(model.log_weights.unsqueeze(1) + Normal(mean, noise).log_prob(x).sum(-1), 0)
        constant = -PIXELS * math.log(noise * math.sqrt(2 * math.pi))
        gaps.append(-2 * noise**2 * (smooth - constant) - squared.amin(-1))
    bound = -2 * torch.tensor([0.1, 0.01]).double() ** 2 * model.log_weights.min()
    assert all((gap > 0).all() and gap.max() < limit + 1e-9 for gap, limit in zip(gaps, bound, strict=True))
    # The published numbers have sigma^2 = 1/2.
    by_hand = squared.amin(-1) - (torch.softmax(-squared, -1) * torch.log_softmax(logits, -1)).sum(-1)
    torch.testing.assert_close(-ChartLoss().per_datum(model, guide, x), by_hand)
    sharp = squared / (2 * 0.2**2)
    by_hand = sharp.amin(-1) - (torch.softmax(-sharp, -1) * torch.log_softmax(logits, -1)).sum(-1)
    torch.testing.assert_close(-ChartLoss(noise=0.2).per_datum(model, guide, x), by_hand)


def test_chart_loss_trains_all_nets_under_stock_svi_and_counts_its_penalty_once_a_datum():
    model, guide = atlas()
    x = data(6)
    with pyro.get_param_store().scope():
        plain, penalised = (ChartLoss(weight).loss(model, guide, x) for weight in (0.0, 0.5))
    lipschitz = model.charts.lipschitz().mean() + guide.charts.lipschitz().mean()
    assert penalised - plain == pytest.approx(6 * 0.5 * float(lipschitz.detach()))
    assert plain == pytest.approx(-float(ChartLoss().per_datum(model, guide, x).sum().detach()))
    before = {name: value.clone() for part in (model, guide) for name, value in part.named_parameters(prefix=str(part))}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), ChartLoss())
    for _ in range(3):
        svi.step(x)
    after = {name: value for part in (model, guide) for name, value in part.named_parameters(prefix=str(part))}
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())  # draws a chart: unbiased, if noisy
    assert math.isfinite(svi.step(x))


class Turn(nn.Module):
    """A datum on the unit circle as itself: features of charts by angle."""

    def forward(self, x):
        return x


class CircleCharts(ChartMLP):
    """Arcs of 3/4 of a circle around the angles 0 and pi, for their decoder and encoder in closed form."""

    def __init__(self, encode):
        super().__init__(2, [2, 2] if encode else [1, 2])
        self.encode = encode

    def forward(self, z, c):
        centre = math.pi * c.double()
        if not self.encode:
            angle = centre + 1.5 * math.pi * (z[..., 0] - 0.5)
            return torch.stack([angle.cos(), angle.sin()], -1)
        turn = torch.remainder(torch.atan2(z[..., 1], z[..., 0]) - centre + math.pi, 2 * math.pi) - math.pi
        share = (turn / (1.5 * math.pi) + 0.5).clamp(1e-6, 1 - 1e-6)
        return torch.stack([share.logit(), torch.zeros_like(share)], -1)


class CirclePredictor(nn.Module):
    """Probabilities in proportion to 1 + cos of the turn from each chart's centre."""

    def forward(self, x):
        return torch.stack([1 + x[:, 0], 1 - x[:, 0]], -1).clamp_min(1e-9).log()


def circle_atlas():
    model = ChartAutoencoder(CircleCharts(encode=False), nn.Identity(), noise=0.1).double()
    return model, Charts(model, Turn(), CircleCharts(encode=True), CirclePredictor())


def on_circle(rows, dtype=torch.double):
    angle = 2 * math.pi * torch.rand(rows, dtype=dtype)
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_an_exact_atlas_of_the_circle_is_consistent():
    """Transition maps are known; ways there and back end where they began; the filter keeps the predictor's halves."""
    from pyrovae.diagnose.faithfulness import coverage, cycle_residuals, unfaithfulness

    _, guide = circle_atlas()
    x = on_circle(400)
    torch.testing.assert_close(guide.reconstruct(x), x)
    found = cycle_residuals(guide, x, tau=0.2)
    assert found.values.max() < 1e-6
    assert len(found.values) == 2 * int((x[:, 0].abs() < 0.6).sum())  # P > 0.2 on both sides
    angle = torch.tensor([0.5 * math.pi, 0.45 * math.pi]).double()
    z = (angle / (1.5 * math.pi) + 0.5).unsqueeze(1)  # in chart 0
    other = guide.transition(z, torch.tensor([0, 0]), torch.tensor([1, 1]))
    torch.testing.assert_close(other[:, 0], (angle - math.pi) / (1.5 * math.pi) + 0.5)
    torch.testing.assert_close(guide.frequencies(x), guide.predict(x).mean(0))

    every, faithful = guide.generate(1000, faithful=False), guide.generate(1000)
    assert every.kept == 1
    assert faithful.kept == pytest.approx(2 / 3, abs=0.05)  # of each arc of 3/4 its own half
    assert (faithful.x[:, 0] * (1 - 2 * faithful.c) > 0).all()
    assert torch.equal(faithful.x, guide.generate(1000).x)
    assert unfaithfulness(faithful.x, x).mean() < 0.01
    # S points miss a datum whose share of the circle is w with probability exp(-S w), w ~ Gamma(2, 2 N).
    assert coverage(faithful.x, x) == pytest.approx(1 - (1 + 1000 / 800) ** -2, abs=0.05)
    assert coverage(faithful.x[:1], x) == 1 / 400


def test_a_broken_transition_is_seen():
    from pyrovae.diagnose.faithfulness import cycle_residuals

    _, guide = circle_atlas()
    x = on_circle(400)
    forward = CircleCharts.forward

    class Skewed(CircleCharts):
        def forward(self, z, c):
            return forward(self, z, c) + 0.5 * c.unsqueeze(-1)  # logits in chart 1 are off

    guide.charts.__class__ = Skewed
    assert cycle_residuals(guide, x, tau=0.2).values.median() > 0.05


def test_nearest_neighbours_by_hand():
    from pyrovae.diagnose.faithfulness import coverage, unfaithfulness

    train, generated = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.2], [0.9], [0.4], [1e-9 + 5]])
    torch.testing.assert_close(unfaithfulness(generated, train), torch.tensor([0.2, 0.1, 0.4, 0.0]).double())
    assert coverage(generated, train) == 1
    assert coverage(generated[:3], train) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="rows of one shape"):
        coverage(generated, torch.zeros(3, 2))


def test_farthest_points_of_a_line():
    x = torch.tensor([0.0, 1.0, 2.0, 7.0, 10.0]).reshape(5, 1, 1)
    chosen, radius = farthest_points(x, 4)
    assert chosen.tolist() == [0, 4, 3, 2]
    assert radius == 1
    assert farthest_points(x, 2, first=4)[0].tolist() == [4, 0]
    with pytest.raises(DataError, match="6 farthest points need as many points, got 5"):
        farthest_points(x, 6)


def trained(loss, steps):
    torch.manual_seed(0)
    x = on_circle(400, torch.float32)
    model = ChartAutoencoder(ChartMLP(3, [1, 16, 4]), MLP([4, 16, 2], nn.Tanh))
    guide = Charts(model, MLP([2, 16, 4], nn.Tanh), ChartMLP(3, [4, 16, 2]), MLP([2, 16, 3], nn.Tanh))
    seeds = guide.start(x, num_steps=150, lr=1e-2)
    started = guide.predict(x).argmax(-1), guide.coordinates(x)
    if steps:
        fit(model, guide, x, loss=loss, optimizer=Adam(lr=1e-2), max_steps=steps, batch_size=200, progress=False)
        model.set_weights(guide.frequencies(x))
    return model, guide, x, seeds, started


def test_start_gives_every_chart_a_place_of_its_own():
    _, guide, x, seeds, (named, z) = trained(None, 0)
    assert named[seeds].tolist() == [0, 1, 2]
    own = z[seeds, torch.arange(3), 0]
    assert (own - 0.5).abs().max() < 0.25
    nearest = torch.cdist(x, x[seeds]).argmin(1)
    assert (named == nearest).float().mean() > 0.9
    again = trained(None, 0)
    assert torch.equal(again[3], seeds)
    assert torch.equal(again[1].coordinates(x), guide.coordinates(x))


@pytest.mark.parametrize("loss", ["smooth", "hard"])
def test_a_circle_is_learned_by_three_arcs(loss):
    """What passes the filter lies on the circle and reaches all of it, which no image of one interval can closely."""
    from pyrovae.diagnose.faithfulness import coverage, cycle_residuals

    objective = TraceEnum_ELBO(max_plate_nesting=1) if loss == "smooth" else ChartLoss(1e-4, noise=0.1)
    _, guide, x, _, _ = trained(objective, 300)
    assert (guide.reconstruct(x) - x).norm(dim=-1).mean() < 0.05
    assert guide.frequencies(x).min() > 0.05  # no chart has died
    generated = guide.generate(400).x
    off = (generated.norm(dim=-1) - 1).abs()
    assert off.mean() < 0.05
    angle = torch.atan2(generated[:, 1], generated[:, 0]).sort().values
    gaps = torch.cat([angle.diff(), angle[:1] + 2 * math.pi - angle[-1:]])
    assert gaps.max() < 0.3
    assert coverage(generated, x) > 0.3
    assert cycle_residuals(guide, x, tau=0.1).values.median() < 0.05


def test_learned_weights_are_those_of_the_data():
    """With learn_weights, gradients of the sum reach p; without, p stays where it was set."""
    model, guide = atlas(learn_weights=True)
    with pyro.get_param_store().scope():
        TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, data(5))
    assert model.weights.logits.grad.abs().max() > 1e-3
    torch.testing.assert_close(model.log_weights.exp().detach(), torch.arange(1.0, 4).double() / 6)
    fixed, _ = atlas()
    assert "weights.logits" not in dict(fixed.named_parameters())
    assert "weights.logits" in fixed.state_dict()


def test_what_does_not_go_together_is_refused():
    model, guide = atlas()
    vae = VAE(nn.Linear(2, PIXELS), 2, "gaussian")
    amortized = guides.Amortized(vae, nn.Linear(PIXELS, 4))
    assert "has no charts" in compatible(vae, amortized, ChartLoss())
    assert compatible(model, guide, ChartLoss) is None
    assert compatible(model, guide, TraceEnum_ELBO()) is None
    with pytest.raises(IncompatibleError, match="has no charts"):
        ChartLoss().loss(vae, amortized, data(2, torch.float32))
    with pytest.raises(IncompatibleError, match="sum over"):
        losses.ELBO().loss(model, guides.Amortized(model, nn.Linear(PIXELS, 4).double()), data(2))
    with pytest.raises(TypeError, match="ChartAutoencoder"):
        Charts(vae, nn.Linear(5, 4), ChartMLP(3, [4, 4]), nn.Linear(5, 3))
    with pytest.raises(TypeError, match="ChartMLP"):
        ChartAutoencoder(nn.Linear(2, 4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="3 nets with 4 outputs"):
        Charts(model, nn.Linear(5, 4), ChartMLP(3, [4, 3]), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="logits of 3 charts"):
        Charts(model, nn.Linear(5, 4).double(), ChartMLP(3, [4, 4]).double(), nn.Linear(5, 2).double()).predict(data(2))
    with pytest.raises(ValueError, match="3 finite numbers"):
        model.set_weights(torch.ones(2))
    with pytest.raises(ValueError, match="must not be negative"):
        ChartLoss(-1.0)
    with pytest.raises(DataError, match="per datum"):
        model(torch.zeros(2, PIXELS + 1).double())
    with torch.no_grad():  # the predictor sees chart 0 everywhere, which the model never draws
        guide.predictor.weight.zero_()
        guide.predictor.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
        model.weights.logits.copy_(torch.tensor([-50.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="fewer than 1 in 50"):
        guide.generate(10)


def test_judging_moves_neither_nets_nor_random_state():
    """In training mode, as stock SVI leaves a guide: no dropout, no BatchNorm statistics."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(4, PIXELS), nn.BatchNorm1d(PIXELS))
    model = ChartAutoencoder(ChartMLP(3, [2, 8, 4]), decoder)
    encoder = nn.Sequential(nn.Linear(PIXELS, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    guide = Charts(model, encoder, ChartMLP(3, [4, 8, 4]), nn.Linear(PIXELS, 3))
    x = data(6, torch.float32)
    c, z = torch.zeros(6, dtype=torch.long), torch.full((6, 2), 0.3)
    before, state = [b.clone() for b in (*model.buffers(), *guide.buffers())], torch.get_rng_state()
    for judge in (guide.coordinates, guide.predict, guide.frequencies, guide.reconstruct,
                  lambda rows: guide.transition(z, c, c + 1)):  # fmt: skip
        torch.testing.assert_close(judge(x), judge(x), rtol=0, atol=0)
    assert all(map(torch.equal, before, (*model.buffers(), *guide.buffers())))
    assert torch.equal(torch.get_rng_state(), state)
    assert guide.training


def test_a_dead_chart_may_weigh_nothing():
    model, guide = atlas()
    with torch.no_grad():
        guide.predictor.bias[1] -= 2000
    model.set_weights(guide.frequencies(data(20)))
    assert float(model.log_weights[1]) < -600
    assert torch.isfinite(evidence.elbo(model, guide, data(3), num_samples=5).values).all()
    with pytest.raises(ValueError, match="none negative and not all of them 0"):
        model.set_weights(torch.zeros(3).double())
    with pytest.raises(ValueError, match="at least one draw"):
        guide.generate(0)
