"""Ladder models: exact toys, wiring, mixture priors against hand formulas, and what each depth learns."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyrovae import fit, guides, losses
from pyrovae.errors import DataError, IncompatibleError
from pyrovae.latents import LatentSpace
from pyrovae.models import VAE, VLAC, LadderVAE
from pyrovae.nets import LadderDecoder, LadderEncoder, LinearHeadDecoder
from pyrovae.optim import Adam
from pyrovae.schedules import DeepFirst

SIZES = [2, 3, 1]


def image_ladder(architecture="mlp", injection="gated", likelihood="bernoulli", **options):
    torch.manual_seed(0)
    decoder = LadderDecoder(SIZES, (1, 8, 8), 16, injection=injection, architecture=architecture)
    model = LadderVAE(decoder, SIZES, likelihood, **options)
    return model, guides.Amortized(model, LadderEncoder(SIZES, (1, 8, 8), 16, architecture=architecture))


class Linear(nn.Module):
    """x = W z: orthogonal columns, one norm for each group."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z):
        return z @ self.weight.T


class Exact(nn.Module):
    """q(z_l | x) = N(W_l' x / (a_l^2 + s^2), s^2 / (a_l^2 + s^2)), groups deepest first."""

    def __init__(self, weight, square, noise):
        super().__init__()
        self.weight, self.square, self.noise = weight, square, noise

    def forward(self, x):
        total = self.square + self.noise**2
        return torch.cat([x @ self.weight / total, (self.noise**2 / total).log().expand(len(x), -1)], -1)


def test_orthogonal_linear_ladder_has_no_gap():
    """Its posterior factorises over groups: every single log-weight is log p(x); groups exchanged, none is."""
    torch.manual_seed(0)
    noise = 0.6
    square = torch.tensor([2.0, 2.0, 2.0, 0.7, 0.7]).double()  # of 3 deep latents, then 2 shallow ones
    weight = torch.linalg.qr(torch.randn(9, 5).double())[0] * square.sqrt()
    model = LadderVAE(Linear(weight), [2, 3], "gaussian", noise=noise)
    x = torch.randn(6, 9).double()
    truth = torch.distributions.MultivariateNormal(
        torch.zeros(9).double(), weight @ weight.T + noise**2 * torch.eye(9).double()
    ).log_prob(x)
    found = guides.Amortized(model, Exact(weight, square, noise)).log_weights(4, x)
    torch.testing.assert_close(found, truth.expand(4, 6), rtol=1e-10, atol=1e-10)
    wrong = guides.Amortized(model, Exact(weight.flip(1), square.flip(0), noise)).log_weights(4, x)
    assert ((wrong - truth).abs() > 0.01).all()


def test_sites_are_drawn_deepest_first():
    model, _ = image_ladder()
    space = LatentSpace(model, torch.zeros(2, 1, 8, 8))
    assert [site.name for site in space.sites] == ["z3", "z2", "z1"]
    assert {site.name: site.slice for site in space.sites} == model.groups
    assert space.dim == model.latent_dim == 6


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@pytest.mark.parametrize("injection", ["gated", "concat"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_variant_trains(architecture, injection, likelihood, rows):
    model, guide = image_ladder(architecture, injection, likelihood)
    x = torch.bernoulli(torch.full((rows, 1, 8, 8), 0.5))
    loss = losses.ELBO()
    loss.loss_and_grads(model, guide, x)
    parameters = [*model.parameters(), *guide.parameters()]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
    assert sum(bool(p.grad.any()) for p in parameters) >= len(parameters) - 1
    assert model(None, size=3).shape == (3, 1, 8, 8)
    assert model.mean(torch.zeros(2, 4, 6)).shape == (2, 4, 1, 8, 8)
    assert guide.log_weights(3, x).shape == (3, rows)


def test_a_datum_s_code_does_not_depend_on_its_batch():
    for architecture in ("mlp", "conv"):
        _, guide = image_ladder(architecture)
        x = torch.rand(5, 1, 8, 8)
        torch.testing.assert_close(guide.encoder(x)[2:3], guide.encoder(x[2:3]), rtol=1e-4, atol=1e-5)


def test_vectorised_particles_agree():
    model, guide = image_ladder()
    x = torch.bernoulli(torch.full((4, 1, 8, 8), 0.5))
    values = {}
    for vectorised in (False, True):
        torch.manual_seed(0)
        loss = Trace_ELBO(num_particles=400, vectorize_particles=vectorised, max_plate_nesting=1)
        values[vectorised] = loss.loss(model, guide, x)
    assert values[True] == pytest.approx(values[False], rel=0.02)


def test_groups_come_in_one_by_one():
    schedule = DeepFirst(stage=4, fade=2)
    assert [schedule.shares(step, 3) for step in (0, 4, 5, 6, 9, 20)] == [
        [0, 0, 1], [0, 0, 1], [0, 0.5, 1], [0, 1, 1], [0.5, 1, 1], [1, 1, 1]
    ]  # fmt: skip
    model, guide = image_ladder()
    x = torch.bernoulli(torch.full((8, 1, 8, 8), 0.5))
    fit(model, guide, x, schedule=schedule, max_steps=4, batch_size=8, progress=False)
    z = torch.randn(3, 6)
    moved = z.clone()
    moved[:, model.groups["z1"]] += 1
    assert torch.equal(model.mean(z), model.mean(moved))  # group 1 is still out
    fit(model, guide, x, schedule=schedule, max_steps=12, batch_size=8, progress=False)
    assert model.fade.tolist() == [1, 1, 1]
    assert not torch.equal(model.mean(z), model.mean(moved))
    plain = VAE(LinearHeadDecoder(2, [4], (5,)), 2)
    with pytest.raises(IncompatibleError, match="LadderVAE"):
        fit(plain, guides.Amortized(plain, nn.Linear(5, 4)), torch.zeros(4, 5), schedule=schedule, max_steps=1)


def test_a_staged_run_resumes(tmp_path):
    x = torch.bernoulli(torch.full((20, 1, 8, 8), 0.5))

    def run(steps, path):
        model, guide = image_ladder()
        fit(model, guide, x, schedule=DeepFirst(3, 3), max_steps=steps, batch_size=8, progress=False, checkpoint=path)
        return [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]

    run(5, tmp_path / "a")
    for a, b in zip(run(11, tmp_path / "a"), run(11, tmp_path / "b"), strict=True):
        assert torch.equal(a, b)


def clusters(classes="collapsed", **options):
    torch.manual_seed(0)
    model = VLAC(Linear(torch.randn(7, 4).double()), [2, 2], [3, 3], "gaussian", classes=classes, noise=0.5, **options)
    return model.double()


def test_vlac_is_its_formula_collapsed_and_enumerated():
    """ELBO at the same draws by hand, by the mixture density and by summing classes out, to 1e-11."""
    collapsed, enumerated = clusters(), clusters("enumerated")
    enumerated.load_state_dict(collapsed.state_dict())
    torch.manual_seed(1)
    x, encoder = torch.randn(5, 7).double(), nn.Linear(7, 8).double()
    values, by_hand = [], None
    for model, loss in ((collapsed, Trace_ELBO()), (enumerated, TraceEnum_ELBO(max_plate_nesting=1))):
        guide = guides.Amortized(model, encoder)
        guide.space(x)  # its first look at the model draws numbers
        torch.manual_seed(2)
        with pyro.get_param_store().scope():
            values.append(-loss.loss(model, guide, x))
    q = guides.Amortized(collapsed, encoder)
    loc, log_var = encoder(x).chunk(2, -1)
    torch.manual_seed(2)
    guide = guides.Amortized(collapsed, encoder)
    guide.space(x)
    torch.manual_seed(2)
    trace = poutine.trace(guide).get_trace(x)
    z = torch.cat([trace.nodes[name]["value"] for name in ("z2", "z1")], -1)
    by_hand = torch.distributions.Normal(collapsed.mean(z), 0.5).log_prob(x).sum()
    by_hand = by_hand - torch.distributions.Normal(loc, (log_var / 2).exp()).log_prob(z).sum()
    for level, part in ((0, z[:, 2:]), (1, z[:, :2])):
        log_pi, mu, s = collapsed.components(level)
        each = log_pi + torch.distributions.Normal(mu, s).log_prob(part[:, None]).sum(-1)
        by_hand = by_hand + torch.logsumexp(each, 1).sum()
        torch.testing.assert_close(collapsed.responsibilities(z, level), torch.softmax(each, 1))
    assert values[0] == pytest.approx(float(by_hand), rel=1e-11)
    assert values[1] == pytest.approx(float(by_hand), rel=1e-11)
    assert torch.equal(q.space(x).log_joint(z, x), guide.space(x).log_joint(z, x))
    other = guides.Amortized(enumerated, encoder).space(x).log_joint(z, x)
    torch.testing.assert_close(other, guide.space(x).log_joint(z, x))


def test_generation_from_a_cluster():
    model = clusters()
    with torch.no_grad():
        model.mixtures[1].locs[0] = 50.0
    far, near = model.generate(1, 0, 200), model.generate(1, 1, 200)
    assert far.shape == (200, 7)
    deep = model.decoder.weight[:, :2].sum(1)
    assert (far.mean(0) - near.mean(0) - 50 * deep).abs().max() < 0.2 * (50 * deep).abs().max()
    with pytest.raises(ValueError, match="clusters 0 to 2"):
        model.generate(1, 3, 5)


def test_clusters_start_where_the_codes_are():
    model = clusters(learn_weights=True)
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]]).double()
    label = torch.randint(3, (600,), generator=generator)
    codes = centres[label] + 0.3 * torch.randn(600, 2, generator=generator, dtype=torch.double)
    model.start_clusters(torch.cat([codes, codes.flip(0)], -1))
    for level, group in ((1, label), (0, label.flip(0))):
        log_pi, mu, s = (part.detach() for part in model.components(level))
        assert (torch.cdist(centres, mu).min(1).values < 0.15).all()
        assert ((s - 0.3).abs() < 0.05).all()
        assert log_pi.exp().sum() == pytest.approx(1.0)
        found = model.responsibilities(torch.cat([codes, codes.flip(0)], -1), level).argmax(-1)
        assert all((found[group == k] == found[group == k][0]).all() for k in range(3))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [(lambda: LadderDecoder([], (4,)), ValueError, "at least one latent"),
     (lambda: LadderDecoder([2], (1, 6, 6), architecture="conv"), ValueError, "divisible by 4"),
     (lambda: LadderDecoder([2], (4,), injection="add"), ValueError, "injection"),
     (lambda: LadderVAE(LadderDecoder([2, 1], (4,)), [1, 2]), ValueError, "made for groups"),
     (lambda: VLAC(LadderDecoder([2, 1], (4,)), [2, 1], [3]), ValueError, "num_clusters"),
     (lambda: VLAC(LadderDecoder([2], (4,)), [2], [3], classes="argmax"), ValueError, "classes"),
     (lambda: LadderVAE(LadderDecoder([2], (4,)), [2], "poisson"), ValueError, "likelihood"),
     (lambda: LadderVAE(LadderDecoder([2], (4,)), [2])(torch.zeros(3, 5)), DataError, "the decoder makes"),
     (lambda: LadderVAE(LadderDecoder([2], (4,)), [2])(torch.full((3, 4), 0.5)), DataError, "grey values")],
)  # fmt: skip
def test_bad_input(make, error, words):
    with pyro.validation_enabled(True), pytest.raises(error, match=words):
        make()


def test_two_structures_are_clustered_apart():
    """Data = product of two independent three-cluster structures; each group finds one, in some order."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, (1500,), generator=generator) for _ in range(2))
    corners = torch.tensor([[0.0, 3.0], [-2.6, -1.5], [2.6, -1.5]])
    z = torch.cat([corners[second], corners[first]], -1) + 0.2 * torch.randn(1500, 4, generator=generator)
    weight = torch.linalg.qr(torch.randn(10, 4, generator=generator))[0]
    x = z @ weight.T + 0.1 * torch.randn(1500, 10, generator=generator)
    torch.manual_seed(0)
    model = VLAC(Linear(weight), [2, 2], [3, 3], "gaussian", noise=0.1)
    guide = guides.Amortized(model, nn.Linear(10, 8))
    encoded = x @ weight
    model.start_clusters(encoded)
    fit(model, guide, x, epochs=30, batch_size=100, optimizer=Adam(lr=3e-3), progress=False)
    with torch.no_grad():
        loc = guide.posterior(x).mean
    for level, truth in ((0, first), (1, second)):
        found = model.responsibilities(loc, level).argmax(-1)
        table = torch.stack([torch.bincount(found[truth == k], minlength=3) for k in range(3)])
        assert int(table.max(0).values.sum()) > 0.95 * 1500
        assert (table.max(0).indices.sort().values == torch.arange(3)).all()
