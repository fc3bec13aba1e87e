"""Scores of strange data: Gaussian algebra on linear models, and curves against counts by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from torch import nn

from pyrovae import flows, guides, handlers
from pyrovae.diagnose import anomaly, detection
from pyrovae.errors import IncompatibleError, LatentError, NoDensityError, ScaleError
from pyrovae.models import VLAC, LadderVAE
from pyrovae.nets import LadderDecoder

GENERATOR = torch.Generator().manual_seed(0)
PIXELS, STEP, NOISE = 5, 0.7, 0.6
WEIGHT = torch.randn(PIXELS, 3, generator=GENERATOR, dtype=torch.double)
CHAIN = torch.tensor([[0.8], [-0.5]], dtype=torch.double)  # E[z1 | z2] = CHAIN z2
X = torch.randn(6, PIXELS, generator=GENERATOR, dtype=torch.double)


def chain(x):
    """z2 [1], then z1 [2] given it, then x."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2 @ CHAIN.to(x).T, STEP).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([z2, z1], -1) @ WEIGHT.to(x).T, NOISE).to_event(1), obs=x)


class Given(guides.Amortized):
    """q(u | x) = N(gain x, L L'); L diagonal for the family of that name."""

    def __init__(self, model, gain, tril, family="full-rank"):
        super().__init__(model, nn.Identity(), family=family)
        self.gain, self.tril = gain, tril

    def lam(self, x):
        loc = x @ self.gain.to(x).T
        if "Diagonal" in type(self.family(x)).__name__:
            return torch.cat([loc, 2 * self.tril.to(x).diagonal().log().expand_as(loc)], 1)
        return self.family(x).pack(loc, self.tril.to(x).expand(len(x), -1, -1))


GAIN = 0.3 * torch.randn(3, PIXELS, generator=GENERATOR, dtype=torch.double)
TRIL = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.4]], dtype=torch.double)


def expected(x, rows, scale, target, loc, cov):
    """E log N(target; rows z, scale^2) for z ~ N(loc, cov), summed over rows, `[B]`."""
    away = (target - loc @ rows.T).square() + (rows @ cov @ rows.T).diagonal()
    return (-0.5 * away / scale**2 - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum(1)


def entropy(cov):
    return 0.5 * torch.linalg.slogdet(2 * math.pi * math.e * cov)[1]


def chain_terms(x, loc, cov):
    """E of log p(x | z), log p(z1 | z2), log p(z2)."""
    step = torch.cat([-CHAIN, torch.eye(2).double()], 1)
    deep = torch.tensor([[1.0, 0.0, 0.0]]).double()
    zero = torch.zeros(len(x), 1).double()
    return (
        expected(x, WEIGHT, NOISE, x, loc, cov), expected(x, step, STEP, zero, loc, cov),
        expected(x, deep, 1.0, zero, loc, cov),
    )  # fmt: skip


def chain_ratio(x, cov, drawn):
    """(ELBO, ELBO with `drawn` from the prior) by algebra."""
    loc = x @ GAIN.T
    elbo = sum(chain_terms(x, loc, cov)) + entropy(cov)
    if drawn == "z1":  # z2 from q, z1 = CHAIN z2 + noise
        lift = torch.cat([torch.eye(1).double(), CHAIN])
        spread = lift @ cov[:1, :1] @ lift.T + torch.diag(torch.tensor([0.0, STEP**2, STEP**2]).double())
        likely, _, prior = chain_terms(x, loc[:, :1] @ lift.T, spread)
        return elbo, likely + prior + entropy(cov[:1, :1])
    spread = cov.clone()
    spread[0], spread[:, 0] = 0, 0
    spread[0, 0] = 1
    likely, prior, _ = chain_terms(x, torch.cat([torch.zeros(len(x), 1).double(), loc[:, 1:]], 1), spread)
    return elbo, likely + prior + entropy(cov[1:, 1:])


def chain_evidence(x):
    lift = torch.cat([torch.eye(1).double(), CHAIN])
    prior = lift @ lift.T + torch.diag(torch.tensor([0.0, STEP**2, STEP**2]).double())
    cov = WEIGHT @ prior @ WEIGHT.T + NOISE**2 * torch.eye(PIXELS).double()
    return torch.distributions.MultivariateNormal(torch.zeros(PIXELS).double(), cov).log_prob(x)


def close(found, truth, largest=5.0):
    """Within standard errors: each value, and their spread."""
    off = (found.values - truth) / found.se
    assert (off.abs() < largest).all(), off
    assert float(off.square().mean()) < 3, off


def wide():
    """pPCA and its posterior, 1.2 times too wide."""
    model, x = problems.ppca(rows=20, latent=3, pixels=8, noise=0.7)
    precision = model.precision().detach()
    gain = torch.linalg.solve(precision, model.weight.detach().T) / 0.7**2
    tril = 1.2 * torch.linalg.cholesky(torch.linalg.inv(precision))
    return model, Given(model, gain, tril), x


def test_evidence_of_ppca():
    model, guide, x = wide()
    truth = -model.log_evidence(x).detach()
    found = anomaly(model, guide, x, num_samples=4000)
    close(found, truth)
    assert float(found.se.max()) < 0.03
    assert found.kind == "upper bound"
    assert found.name == "-IWAE-4000"


def test_elbo_adds_the_divergence():
    """KL of a Gaussian 1.2 times as wide, in 3 dimensions, is 3 (1.44 - 1 - log 1.44) / 2."""
    model, guide, x = wide()
    gap = 1.5 * (1.44 - 1 - math.log(1.44))
    close(anomaly(model, guide, x, score="elbo", num_samples=4000), gap - model.log_evidence(x).detach())


@pytest.mark.parametrize("family", ["full-rank", "diagonal"])
@pytest.mark.parametrize("drawn", ["z1", "z2"])
def test_layer_ratio_of_a_linear_chain(family, drawn):
    guide = Given(chain, GAIN, TRIL, family)
    cov = TRIL @ TRIL.T if family == "full-rank" else torch.diag(TRIL.diagonal() ** 2)
    elbo, cut = chain_ratio(X, cov, drawn)
    found = anomaly(chain, guide, X, score="layer-ratio", from_prior=drawn, num_samples=2000)
    close(found, elbo - cut)
    assert drawn in found.name
    assert found.kind == "estimate"
    tight = anomaly(chain, guide, X, score="layer-ratio", from_prior=[drawn], num_samples=8000, tight=True)
    # The importance-weighted bound of 8000 draws is still a little low on these data.
    assert ((tight.values - (chain_evidence(X) - cut)).abs() < 5 * tight.se + 0.05).all()
    assert (tight.values > found.values).all()


def test_the_number_of_groups_counts_from_the_last_drawn():
    guide = Given(chain, GAIN, TRIL)
    by_name = anomaly(chain, guide, X, score="layer-ratio", from_prior="z1")
    assert torch.equal(anomaly(chain, guide, X, score="layer-ratio").values, by_name.values)
    assert torch.equal(anomaly(chain, guide, X, score="layer-ratio", from_prior=1).values, by_name.values)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, z):
        return z @ self.weight.T


@pytest.mark.parametrize(("drawn", "away"), [(1, [2]), (2, [1, 2]), (["z2"], [1]), (["z1", "z3"], [0, 2])])
def test_layer_ratio_of_a_ladder(drawn, away):
    """LadderVAE with a linear decoder: groups z3, z2, z1 of one latent, standard normal."""
    model = LadderVAE(Linear(), [1, 1, 1], "gaussian", noise=NOISE)
    guide = Given(model, GAIN, TRIL, "diagonal")
    loc, var = X @ GAIN.T, TRIL.diagonal() ** 2
    kl = 0.5 * (loc.square() + var - 1 - var.log())
    cut_loc, cut_var = loc.clone(), var.clone()
    cut_loc[:, away], cut_var[away] = 0, 1
    truth = expected(X, WEIGHT, NOISE, X, loc, torch.diag(var)) - kl[:, away].sum(1)
    truth = truth - expected(X, WEIGHT, NOISE, X, cut_loc, torch.diag(cut_var))
    close(anomaly(model, guide, X, score="layer-ratio", from_prior=drawn, num_samples=2000), truth)


def test_shared_draws_cancel():
    """What the groups in K cost is in both bounds with the same draws: the paired error is the smaller one."""
    model = LadderVAE(Linear(), [1, 1, 1], "gaussian", noise=3.0)
    guide = Given(model, GAIN, 0.01 * TRIL, "diagonal")  # log q(z_K) spreads by 1 / sqrt(2) a group, log p(x|z) little
    found = anomaly(model, guide, X, score="layer-ratio", from_prior="z1", num_samples=500)
    one_group = 0.5**0.5 / 500**0.5
    assert (found.se < 2 * one_group).all()


def test_latents_on_other_supports():
    """The same chain with exp(z1) as its site: the same numbers, Jacobian and all."""

    def positive(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
            z1 = pyro.sample("z1", dist.LogNormal(z2 @ CHAIN.T, STEP).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z2, z1.log()], -1) @ WEIGHT.T, NOISE).to_event(1), obs=x)

    for drawn in ("z1", "z2"):
        one, other = (
            anomaly(m, Given(m, GAIN, TRIL), X, score="layer-ratio", from_prior=drawn) for m in (chain, positive)
        )
        torch.testing.assert_close(one.values, other.values)


@pytest.mark.parametrize("score", ["evidence", "elbo", "layer-ratio"])
def test_chunks_change_nothing_and_nothing_changes(score):
    guide = Given(chain, GAIN, TRIL)
    state = torch.get_rng_state()
    whole = anomaly(chain, guide, X, score=score)
    assert torch.equal(torch.get_rng_state(), state)
    for chunk in (1, 4):  # 6 data: ragged
        torch.testing.assert_close(anomaly(chain, guide, X, score=score, chunk=chunk).values, whole.values)
    last = anomaly(chain, guide, X[5:], score=score, indices=[5])
    torch.testing.assert_close(last.values, whole.values[5:])
    other = anomaly(chain, guide, X, score=score, seed=1)
    assert not torch.allclose(other.values, whole.values)


def test_float32_of_one_datum():
    guide = Given(chain, GAIN, TRIL)
    x = X[:1].float()
    elbo, cut = chain_ratio(X[:1], TRIL @ TRIL.T, "z1")
    found = anomaly(chain, guide, x, score="layer-ratio", num_samples=2000)
    assert found.values.shape == found.se.shape == (1,)
    close(found, elbo - cut)
    assert anomaly(chain, guide, x, score="layer-ratio", num_samples=1).se.isnan().all()


def test_weights_and_batch_norm_stay():
    torch.manual_seed(0)
    model = LadderVAE(LadderDecoder([2, 3], (1, 8, 8), width=8), [2, 3])
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
    guide = guides.Amortized(model, encoder)
    x = torch.bernoulli(torch.full((5, 1, 8, 8), 0.5))
    before = [t.clone() for t in (*model.state_dict().values(), *guide.state_dict().values())]
    found = anomaly(model, guide, x, score="layer-ratio", num_samples=20)
    assert guide.training
    assert found.values.isfinite().all()
    for a, b in zip(before, (*model.state_dict().values(), *guide.state_dict().values()), strict=True):
        assert torch.equal(a, b)
    again = anomaly(model, guide, x, score="layer-ratio", num_samples=20, chunk=2)
    torch.testing.assert_close(again.values, found.values, rtol=1e-5, atol=1e-5)


def test_a_plate_of_fixed_size():
    """Rows that cannot be taken apart: the same numbers in expectation."""

    def fixed(x):
        with pyro.plate("data", 6):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ CHAIN.T, STEP).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z2, z1], -1) @ WEIGHT.T, NOISE).to_event(1), obs=x)

    elbo, cut = chain_ratio(X, TRIL @ TRIL.T, "z1")
    close(anomaly(fixed, Given(fixed, GAIN, TRIL), X, score="layer-ratio", num_samples=500), elbo - cut)


def test_likely_but_strange_data():
    """Pixels with less noise than the model's are likelier than its own, whatever their shallow latents are.

    The evidence then ranks strange data below known ones; the layer ratio asks what the shallow group has to add.
    """
    pixels, noise = 40, 0.5
    weight = torch.randn(pixels, 2, generator=torch.Generator().manual_seed(1), dtype=torch.double)

    class Pixels(nn.Module):
        def forward(self, z):
            return z @ weight.T

    model = LadderVAE(Pixels(), [1, 1], "gaussian", noise=noise).double()
    precision = torch.eye(2).double() + weight.T @ weight / noise**2
    gain = torch.linalg.solve(precision, weight.T) / noise**2
    guide = Given(model, gain, torch.linalg.cholesky(torch.linalg.inv(precision)))
    z, eps = (torch.randn(2, 150, n, generator=torch.Generator().manual_seed(2 + n)).double() for n in (2, pixels))
    z[1, :, 1] = z[1, :, 1].sign() * 2.5  # the shallow group, drawn last
    known, strange = z[0] @ weight.T + noise * eps[0], z[1] @ weight.T + 0.5 * noise * eps[1]
    blind = detection(*(anomaly(model, guide, x, num_samples=50) for x in (known, strange)))
    seen = detection(*(anomaly(model, guide, x, score="layer-ratio", num_samples=50) for x in (known, strange)))
    assert blind.auroc + 4 * blind.auroc_se < 0.5
    assert seen.auroc - 4 * seen.auroc_se > 0.8


class Noisy(nn.Module):
    def forward(self, x):
        return torch.randn(len(x), 6, dtype=x.dtype)


def test_guides_that_cannot_be_scored():
    short = guides.ShortRun(chain, num_steps=2)
    for score in ("evidence", "elbo", "layer-ratio"):
        with pytest.raises(NoDensityError):
            anomaly(chain, short, X, score=score)
    dais = guides.DAIS(guides.Amortized(chain, nn.Linear(PIXELS, 6).double()), num_steps=2)
    assert anomaly(chain, dais, X, num_samples=10).values.isfinite().all()
    with pytest.raises(NoDensityError):
        anomaly(chain, dais, X, score="layer-ratio")
    flow = flows.IAF(3, num_transforms=1, context=4, hidden=(8,)).double()
    through = guides.Amortized(chain, nn.Linear(PIXELS, flow.num_params).double(), flow)
    with pytest.raises(NoDensityError, match=r"over the sites \['z2'\] alone"):
        anomaly(chain, through, X, score="layer-ratio")
    with pytest.raises(NoDensityError, match="two posteriors"):
        anomaly(chain, guides.Amortized(chain, Noisy()), X, score="layer-ratio")


def test_models_that_have_no_layer_ratio():
    model, guide, x = wide()
    with pytest.raises(IncompatibleError, match=r"one, 'z': use score='evidence'"):
        anomaly(model, guide, x, score="layer-ratio")
    summed = VLAC(Linear(), [1, 2], [2, 2], "gaussian", classes="enumerated").double()
    with pytest.raises(LatentError, match="classes='collapsed'"):
        anomaly(summed, guides.Amortized(summed, nn.Linear(PIXELS, 6).double()), X, score="layer-ratio")
    collapsed = VLAC(Linear(), [1, 2], [2, 2], "gaussian").double()
    found = anomaly(collapsed, guides.Amortized(collapsed, nn.Linear(PIXELS, 6).double()), X, score="layer-ratio")
    assert found.values.isfinite().all()
    ladder = LadderVAE(Linear(), [1, 1, 1], "gaussian", noise=NOISE)
    with pytest.raises(NoDensityError, match="one after another"):
        anomaly(ladder, Given(ladder, GAIN, TRIL), X, score="layer-ratio", from_prior="z2")


def test_bad_input():
    guide = Given(chain, GAIN, TRIL)
    with pytest.raises(ValueError, match="'layer-ratio', got 'loss'"):
        anomaly(chain, guide, X, score="loss")
    for drawn in (0, 2):
        with pytest.raises(ValueError, match="between 1 and 1"):
            anomaly(chain, guide, X, score="layer-ratio", from_prior=drawn)
    for drawn in ("z3", ["z1", "z2"], []):
        with pytest.raises(ValueError, match=r"some, not all, of the latent sites \['z2', 'z1'\]"):
            anomaly(chain, guide, X, score="layer-ratio", from_prior=drawn)
    with pytest.raises(ValueError, match="num_samples"):
        anomaly(chain, guide, X, score="layer-ratio", num_samples=0)
    with pytest.raises(IncompatibleError):
        anomaly(lambda x: chain(x), guide, X, score="layer-ratio")
    with handlers.anneal(0.5), pytest.raises(ScaleError):
        anomaly(chain, guide, X, score="layer-ratio")
    scaled = pyro.poutine.scale(chain, 0.5)
    with pytest.raises(ScaleError):
        anomaly(scaled, Given(scaled, GAIN, TRIL), X, score="layer-ratio")


def test_detection_by_hand():
    known, strange = torch.tensor([0.0, 1.0, 2.0, 3.0, 2.0]), torch.tensor([2.0, 4.0, 1.5, torch.inf])
    found = detection(known, strange)
    wins = (strange.unsqueeze(1) > known).double() + 0.5 * (strange.unsqueeze(1) == known).double()
    assert found.auroc == pytest.approx(float(wins.mean()))
    assert found.auroc_se == pytest.approx(float(wins.mean(1).var() / 4 + wins.mean(0).var() / 5) ** 0.5)
    assert found.fpr80 == pytest.approx(3 / 5)  # all four strange ones are needed: threshold 1.5
    # Precision at each strange datum found: 2 of 2, then 3 of 6 (three ties at 2), then 4 of 7.
    assert found.auprc == pytest.approx(0.5 * 1 + 0.25 * 3 / 6 + 0.25 * 4 / 7)
    assert (found.num_in, found.num_out) == (5, 4)
    assert "at random 0.444" in repr(found)
    upside_down = detection(-known, -strange)
    assert upside_down.auroc == pytest.approx(1 - found.auroc)


def test_error_of_auroc_covers():
    """Two normals one apart: AUROC is Phi(1 / sqrt 2), and its standard error that of repetitions."""
    truth = float(torch.special.ndtr(torch.tensor(0.5**0.5)))
    generator = torch.Generator().manual_seed(0)
    found = [
        detection(torch.randn(60, generator=generator), 1 + torch.randn(90, generator=generator)) for _ in range(300)
    ]
    off = torch.tensor([(one.auroc - truth) / one.auroc_se for one in found])
    assert abs(float(off.mean())) < 4 / 300**0.5
    assert 0.85 < float(off.std()) < 1.15
    assert detection(torch.zeros(3), torch.ones(2)).auroc == 1.0
    assert detection(torch.zeros(3), torch.ones(2)).fpr80 == 0.0


def test_detection_of_few_and_of_bad_scores():
    assert math.isnan(detection(torch.zeros(3), torch.ones(1)).auroc_se)
    for known, strange in ((torch.zeros(0), torch.ones(2)), (torch.ones(2), torch.tensor([0.0, torch.nan])),
                           (torch.ones(2, 2), torch.ones(2))):  # fmt: skip
        with pytest.raises(ValueError, match="must be numbers"):
            detection(known, strange)
