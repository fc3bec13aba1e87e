"""VLAC with a classifier: factorisations C and A by hand, against B and the exact posterior, trained, and refused."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from pyrovae import diagnose, evidence, fit, generate, guides, losses
from pyrovae.errors import IncompatibleError
from pyrovae.handlers import anneal
from pyrovae.models import VAE, VLAC
from pyrovae.nets import LinearHeadDecoder
from pyrovae.optim import Adam

PIXELS, NOISE = 7, 0.5


class Linear(nn.Module):
    """x = W z, and a record of the codes it was given."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.seen = nn.Parameter(weight), []

    def forward(self, z):
        self.seen.append(z.detach())
        return z @ self.weight.T


class Given(nn.Module):
    """The same rows, whatever the data."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, x):
        return self.rows


def vlac(sizes=(2, 2), numbers=(3, 3), classes="enumerated", dtype=torch.double, noise=NOISE, **options):
    torch.manual_seed(0)
    decoder = Linear(torch.randn(PIXELS, sum(sizes)).to(dtype))
    model = VLAC(decoder, sizes, numbers, "gaussian", classes=classes, noise=noise, learn_weights=True, **options)
    with torch.no_grad():
        for mixture in model.mixtures:
            mixture.logits.normal_()
    return model.to(dtype)


def nets(factorisation, dtype=torch.double, sizes=(2, 2), numbers=(3, 3)):
    torch.manual_seed(3)
    outputs = 2 * sum(sizes) * (numbers[0] if factorisation == "A" else 1)
    return nn.Linear(PIXELS, outputs).to(dtype), nn.Linear(PIXELS, sum(numbers)).to(dtype)


def data(rows, dtype=torch.double):
    return torch.randn(rows, PIXELS, dtype=dtype, generator=torch.Generator().manual_seed(2))


def one_loss(model, guide, x, beta=1.0):
    """TraceEnum_ELBO of one draw, and every batch of codes that the decoder was given for it."""
    guide.check_parameters(x)  # the first looks at the model, which run the decoder, too
    model.decoder.seen.clear()
    torch.manual_seed(4)
    with pyro.get_param_store().scope(), anneal(beta):
        value = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    return value, list(model.decoder.seen)


def per_class(model, z, level):
    """log pi_k + log N(z_l; mu_k, s_k), `[..., B, K]`, from all latents."""
    log_pi, mu, s = model.components(level)
    return log_pi + Normal(mu, s).log_prob(z[..., model.groups[f"z{level + 1}"]].unsqueeze(-2)).sum(-1)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_c_is_its_formula(rows, beta):
    """One run of the decoder, on codes without a dim of classes; a KL weight is one of y and z."""
    model, x = vlac(), data(rows)
    encoder, classifier = nets("C")
    value, seen = one_loss(model, guides.Classified(model, encoder, classifier), x, beta)
    assert [tuple(z.shape) for z in seen] == [(rows, 4)]
    (z,) = seen
    loc, log_var = encoder(x).chunk(2, -1)
    by_hand = Normal(model.mean(z), NOISE).log_prob(x).sum()
    by_hand = by_hand - beta * Normal(loc, (log_var / 2).exp()).log_prob(z).sum()
    for level, logits in enumerate(classifier(x).split([3, 3], -1)):
        log_r = torch.log_softmax(logits, -1)
        by_hand = by_hand + beta * (log_r.exp() * (per_class(model, z, level) - log_r)).sum()
    assert -value == pytest.approx(by_hand.item(), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_is_its_formula(rows):
    """The decoder runs once for every class; each class has a draw of its own."""
    model, x = vlac([2], [3]), data(rows)
    encoder, classifier = nets("A", sizes=[2], numbers=[3])
    value, seen = one_loss(model, guides.Classified(model, encoder, classifier, "A"), x)
    assert [tuple(z.shape) for z in seen] == [(3 * rows, 2)]
    z = seen[0].view(3, rows, 2)
    locs, log_vars = (part.view(rows, 3, 2) for part in encoder(x).chunk(2, -1))
    log_r = torch.log_softmax(classifier(x), -1)
    by_hand = 0.0
    for k in range(3):
        value_k = Normal(model.mean(z[k]), NOISE).log_prob(x).sum(-1) + per_class(model, z[k], 0)[:, k]
        value_k = value_k - Normal(locs[:, k], (log_vars[:, k] / 2).exp()).log_prob(z[k]).sum(-1)
        by_hand = by_hand + (log_r[:, k].exp() * (value_k - log_r[:, k])).sum()
    assert -value == pytest.approx(by_hand.item(), rel=1e-12)


def test_b_is_never_below_c_and_met_with_the_responsibilities():
    model, x = vlac(), data(6)
    encoder, classifier = nets("C")
    c, seen = one_loss(model, guides.Classified(model, encoder, classifier), x)
    b, same = one_loss(model, guides.Amortized(model, encoder), x)
    assert torch.equal(seen[0], same[0])
    assert -b > -c + 1e-3
    best = torch.cat([per_class(model, same[0], level).log_softmax(-1) for level in (0, 1)], -1).detach()
    met, again = one_loss(model, guides.Classified(model, encoder, Given(best)), x)
    assert torch.equal(again[0], same[0])
    assert met == pytest.approx(b, rel=1e-12)


class ExactA(nn.Module):
    """p(z | x, y = k) where the columns of W are orthogonal: locations, then log-variances."""

    def __init__(self, model):
        super().__init__()
        self.__dict__["model"] = model

    def forward(self, x):
        model, (_, mu, s) = self.model, self.model.components(0)
        square = model.decoder.weight.square().sum(0)
        var = 1 / (1 / s**2 + square / NOISE**2)
        loc = var * ((x @ model.decoder.weight).unsqueeze(1) / NOISE**2 + mu / s**2)
        return torch.cat([loc.flatten(1), var.log().expand_as(loc).flatten(1)], -1)


class ExactClasses(nn.Module):
    """log p(x, y = k)."""

    def __init__(self, model):
        super().__init__()
        self.__dict__["model"] = model

    def forward(self, x):
        model, (log_pi, mu, s) = self.model, self.model.components(0)
        weight = model.decoder.weight
        covariance = (weight * s.square().unsqueeze(1)) @ weight.T + NOISE**2 * torch.eye(PIXELS).double()
        return log_pi + MultivariateNormal(mu @ weight.T, covariance).log_prob(x.unsqueeze(1))


def test_a_is_exact_where_its_parts_are():
    """Its loss and every importance weight are log p(x), whatever was drawn; C, a Gaussian, cannot be."""
    model, x = vlac([2], [3]), data(6)
    with torch.no_grad():
        model.decoder.weight.copy_(torch.linalg.qr(model.decoder.weight)[0] * torch.tensor([1.5, 0.8]))
    guide = guides.Classified(model, ExactA(model), ExactClasses(model), "A")
    truth = torch.logsumexp(ExactClasses(model)(x), -1).detach()
    value, _ = one_loss(model, guide, x)
    assert -value == pytest.approx(float(truth.sum()), rel=1e-12)
    found = evidence.log_weights(model, guide, x, num_samples=7)
    torch.testing.assert_close(found, truth.expand(7, 6), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(guide.clusters(x), torch.softmax(ExactClasses(model)(x), -1))
    collapsed = vlac([2], [3], "collapsed")
    collapsed.load_state_dict(model.state_dict())
    torch.testing.assert_close(guide.space(x).log_joint(x[:, :2], x),
                               guides.Amortized(collapsed, nn.Identity()).space(x).log_joint(x[:, :2], x))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4])
def test_evidence_of_c_is_that_of_the_collapsed_model(dtype, rows):
    enumerated, collapsed = vlac(dtype=dtype), vlac(classes="collapsed", dtype=dtype)
    x, (encoder, classifier) = data(rows, dtype), nets("C", dtype)
    ours = guides.Classified(enumerated, encoder, classifier)
    theirs = guides.Amortized(collapsed, encoder)
    found = evidence.log_weights(enumerated, ours, x, num_samples=9)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    expected = evidence.log_weights(collapsed, theirs, x, num_samples=9)
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    assert evidence.iwae(enumerated, ours, x, num_samples=9).values.shape == (rows,)
    assert ours.posterior(x).base_dist.loc.dtype == dtype
    assert {name: value.shape for name, value in ours.sample(3, x).items()} == {
        "z2": (3, rows, 2), "z1": (3, rows, 2)
    }  # fmt: skip


def test_weights_of_a_have_the_evidence_as_their_mean():
    """IWAE with q(z | x) the mixture over y, against p(x) in closed form, within 4.5 standard errors."""
    model, x = vlac([2], [3]), data(4) / 2
    encoder, classifier = nets("A", sizes=[2], numbers=[3])
    guide = guides.Classified(model, encoder, classifier, "A")
    truth = torch.logsumexp(ExactClasses(model)(x), -1).detach()
    found = evidence.log_weights(model, guide, x, num_samples=20_000)
    ratio = (found - truth).exp()
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / math.sqrt(len(ratio))).all()
    assert (ratio.std(0) / math.sqrt(len(ratio)) < 0.1).all()


@pytest.mark.parametrize("factorisation", ["C", "A"])
def test_vectorised_particles_and_plain_particles_agree(factorisation):
    sizes, numbers = ([2], [3]) if factorisation == "A" else ([2, 2], [3, 3])
    model, x = vlac(sizes, numbers), data(3)
    guide = guides.Classified(model, *nets(factorisation, sizes=sizes, numbers=numbers), factorisation)
    guide.check_parameters(x)
    values = {}
    for vectorised in (False, True):
        torch.manual_seed(0)
        loss = TraceEnum_ELBO(num_particles=400, vectorize_particles=vectorised, max_plate_nesting=1)
        values[vectorised] = loss.loss(model, guide, x)
    assert values[True] == pytest.approx(values[False], rel=0.03)


@pytest.mark.parametrize("factorisation", ["C", "A"])
def test_gradients_are_those_of_the_formula(factorisation):
    """By central differences at fixed noise, for a weight of each net and of the model; stock SVI moves them all."""
    sizes, numbers = ([2], [3]) if factorisation == "A" else ([2, 2], [3, 3])
    model, x = vlac(sizes, numbers), data(5)
    encoder, classifier = nets(factorisation, sizes=sizes, numbers=numbers)
    guide = guides.Classified(model, encoder, classifier, factorisation)
    guide.check_parameters(x)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    torch.manual_seed(4)
    loss.loss_and_grads(model, guide, x)
    for weight in (encoder.weight, classifier.weight, model.decoder.weight, model.mixtures[0].locs):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[1, 0] += step
            values.append(one_loss(model, guide, x)[0])
            with torch.no_grad():
                weight[1, 0] -= step
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(weight.grad[1, 0]), rel=1e-5)
    pyro.clear_param_store()
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    SVI(model, guide, Adam(lr=1e-2), loss).step(x)
    after = [*model.parameters(), *guide.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


CORNERS = torch.tensor([[0.0, 3.0], [-2.6, -1.5], [2.6, -1.5]])


def agreement(found, truth):
    """Share of data whose cluster's majority is theirs, clusters all of different majorities."""
    table = torch.stack([torch.bincount(found[truth == k], minlength=3) for k in range(3)])
    assert sorted(table.argmax(0).tolist()) == [0, 1, 2]
    return float(table.max(0).values.sum()) / len(found)


def test_c_clusters_two_structures_apart():
    """Data = product of two three-cluster structures; the classifier finds one for each group, in one pass."""
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(3, (900,), generator=generator) for _ in range(2)]
    z = torch.cat([CORNERS[labels[1]], CORNERS[labels[0]]], -1) + 0.2 * torch.randn(900, 4, generator=generator)
    weight = torch.linalg.qr(torch.randn(10, 4, generator=generator))[0]
    x = z @ weight.T + 0.1 * torch.randn(900, 10, generator=generator)
    torch.manual_seed(0)
    model = VLAC(Linear(weight), [2, 2], [3, 3], "gaussian", noise=0.1, classes="enumerated")
    guide = guides.Classified(model, nn.Linear(10, 8), nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 6)))
    model.start_clusters(x @ weight)
    result = fit(model, guide, x, loss=TraceEnum_ELBO(max_plate_nesting=1), epochs=30, batch_size=100,
                 optimizer=Adam(lr=5e-3), validation=x[:100], progress=False)  # fmt: skip
    assert result.objective == "ELBO"
    assert result.curve[-1] > result.curve[0] + 10
    assert result.validation[-1][1] > result.validation[0][1] + 10
    for level, truth in enumerate(labels):
        assert agreement(guide.clusters(x, level).argmax(-1), truth) > 0.95


def test_a_clusters_one_structure():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (900,), generator=generator)
    z = CORNERS[label] + 0.2 * torch.randn(900, 2, generator=generator)
    weight = torch.linalg.qr(torch.randn(8, 2, generator=generator))[0]
    x = z @ weight.T + 0.1 * torch.randn(900, 8, generator=generator)
    torch.manual_seed(0)
    model = VLAC(Linear(weight), [2], [3], "gaussian", noise=0.1, classes="enumerated")
    guide = guides.Classified(model, nn.Linear(8, 12), nn.Linear(8, 3), "A")
    model.start_clusters(x @ weight)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    result = fit(model, guide, x, loss=loss, epochs=40, batch_size=128, optimizer=Adam(lr=5e-3), progress=False)
    assert result.curve[-1] > result.curve[0] + 10
    assert agreement(guide.clusters(x).argmax(-1), label) > 0.95
    with torch.no_grad():
        own = -loss.loss(model, guide, x) / len(x)
    mixture = evidence.elbo(model, guide, x, num_samples=50)
    assert mixture.mean > own - 0.05  # the classes summed out of q as well


def test_losses_that_look_at_z_alone():
    """C refuses them, as they would leave its classifier untrained; A's mixture is trained by them, classifier too."""
    model, x = vlac(), data(4)
    guide = guides.Classified(model, *nets("C"))
    every = (losses.ELBO("stratified"), losses.ELBO(), losses.ELBO("stl"), losses.IWAE(3), losses.FreeBits(1.0))
    for loss in (None, *every):
        with pytest.raises(IncompatibleError, match=r"a part of Classified\(C\) as it is: .*TraceEnum_ELBO"):
            fit(model, guide, x, loss=loss, max_steps=1, progress=False)
    with pytest.warns(UserWarning, match="use TraceEnum_ELBO"):  # Pyro's own: classes drawn, not summed out
        assert math.isfinite(Trace_ELBO().loss(model, guide, x))
    model = vlac([2], [3])
    encoder, classifier = nets("A", sizes=[2], numbers=[3])
    fit(model, guides.Classified(model, encoder, classifier, "A"), x, max_steps=1, progress=False)
    assert not torch.equal(classifier.weight, nets("A", sizes=[2], numbers=[3])[1].weight)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [(lambda: guides.Classified(vlac(classes="collapsed"), *nets("C")), IncompatibleError, "classes='enumerated'"),
     (lambda: guides.Classified(vlac(), *nets("A"), "A"), IncompatibleError, "3 x 3 times a datum"),
     (lambda: guides.Classified(vlac(), *nets("C"), "B"), ValueError, "guides.Amortized is B"),
     (lambda: guides.Classified(VAE(LinearHeadDecoder(2, [4], (5,)), 2), *nets("C")), TypeError, "models.VLAC"),
     (lambda: guides.Classified(vlac(), guides.Amortized(vlac(), nets("C")[0]), nets("C")[1]), TypeError, "net itself"),
     (lambda: guides.Classified(vlac(), nn.Linear(7, 5).double(), nets("C")[1])(data(3)), ValueError, "8 outputs"),
     (lambda: guides.Classified(vlac(), nets("C")[0], nn.Linear(7, 5).double())(data(3)), ValueError,
      r"classifier must return logits of all groups, \[B, 6\]"),
     (lambda: guides.Classified(vlac([2], [3]), nn.Linear(7, 4).double(), nn.Linear(7, 3).double(), "A")(data(3)),
      ValueError, r"encoder must return locations and log-variances of all classes, \[B, 12\]"),
     (lambda: guides.Classified(vlac(), *nets("C")).clusters(data(3), 2), ValueError, "groups 0 to 1")],
)  # fmt: skip
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("loss", [losses.ELBO(), losses.FreeBits(0.5, "total")], ids=["ELBO", "free bits"])
def test_classes_that_a_loss_cannot_sum_over_are_named(loss):
    model = VLAC(torch.nn.Linear(4, 6), [2, 2], [3, 3], "gaussian", classes="enumerated")
    guide = guides.Amortized(model, torch.nn.Linear(6, 8))
    with pytest.raises(IncompatibleError, match="TraceEnum_ELBO"):
        loss.loss(model, guide, torch.zeros(5, 6))


def test_prior_and_likelihood_are_told_apart_where_classes_are_summed_out():
    """log p(z) and log p(x | z) of the enumerated model are the collapsed one's, and so is the KL to the prior."""
    torch.manual_seed(0)
    options = {"sizes": [2, 1], "num_clusters": [3, 4], "likelihood": "gaussian"}
    collapsed = VLAC(nn.Linear(3, 5), **options).double()
    enumerated = VLAC(nn.Linear(3, 5), **options, classes="enumerated").double()
    enumerated.load_state_dict(collapsed.state_dict())
    encoder, x, u = nn.Linear(5, 6).double(), torch.randn(4, 5).double(), torch.randn(7, 4, 3).double()
    ours, theirs = (guides.Amortized(model, encoder) for model in (collapsed, enumerated))
    for one, other in zip(ours.space(x).bind(x).terms(u), theirs.space(x).bind(x).terms(u), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    one, other = (diagnose.information(model, guide, x, num_samples=20)
                  for model, guide in ((collapsed, ours), (enumerated, theirs)))  # fmt: skip
    torch.testing.assert_close(one.kl, other.kl, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factorisation", ["C", "A"])
def test_hidden_values_are_imputed(factorisation):
    shape = {"sizes": (2,), "numbers": (3,)} if factorisation == "A" else {}
    model, x = vlac(**shape), data(3)
    guide = guides.Classified(model, *nets(factorisation, **shape), factorisation)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, ::2] = False
    found = generate.impute(model, guide, x, mask, num_samples=50)
    assert torch.equal(found.mean[mask], x[mask])
    assert found.mean.isfinite().all()
    assert (found.sd[~mask] > 0).all()
