"""Group by group: exchanged codes of a ladder whose groups are known, probes, and KL in closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyrovae import flows, guides
from pyrovae.diagnose import group_information, information, interventions, probe_groups
from pyrovae.diagnose.groups import image_slant, image_width, stroke_width
from pyrovae.errors import LatentError, NoDensityError, ScaleError
from pyrovae.models import VLAC, LadderVAE


class Two(nn.Module):
    """Three pixels: the deep latent in the first, the shallow one in the second, both in the third."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]).double())

    def forward(self, z):
        return z @ self.weight.T


class Read(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, :1], x[:, 1:2] / 2, torch.full((len(x), 2), -20.0, dtype=x.dtype)], 1)


def test_each_group_moves_what_it_holds():
    """Codes are the data's own: E|z - z'| of two normals is 2 / sqrt(pi), of the sum's two columns alike."""
    torch.manual_seed(0)
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    z = torch.randn(4000, 2).double()
    x = z @ model.decoder.weight.T.detach()
    found = interventions(
        model, guides.Amortized(model, Read()), x,
        {"first": lambda x: x[:, 0], "second": lambda x: x[:, 1], "sum": lambda x: x[:, 2], "both": lambda x: x[:, :2]},
    )  # fmt: skip
    assert found.groups == ("z2", "z1")
    step = 2 / torch.pi**0.5
    truth = torch.tensor([[step, 0.0, step, step], [0.0, 2 * step, step, 2 * step]]).double()
    assert ((found.effect - truth).abs() <= 4 * found.se + 1e-3).all()
    torch.testing.assert_close(found.share.sum(0), torch.ones(4).double())
    assert found.share[0, 0] > 0.999
    assert "z2" in repr(found)
    assert "100%" in repr(found)


def test_labels_count_as_changed_or_not():
    """The sign of a normal changes half of the time; integer rows count once, not once for each entry."""
    torch.manual_seed(0)
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    x = torch.randn(2000, 2).double() @ model.decoder.weight.T.detach()
    label = lambda x: (x[:, 0] > 0).long()  # noqa: E731  # as a user writes it
    found = interventions(
        model, guides.Amortized(model, Read()), x,
        {"label": label, "one-hot": lambda x: nn.functional.one_hot(label(x), 2)},
    )  # fmt: skip
    assert torch.equal(found.effect[:, 0], found.effect[:, 1])
    assert abs(float(found.effect[0, 0]) - 0.5) < 4 * float(found.se[0, 0])
    assert float(found.effect[1, 0]) == 0


def test_standard_error_counts_that_each_datum_is_in_two_pairs():
    """Over 300 data sets the mean's spread is the se it says, within 12 %; without the overlap it is 17 % more."""
    torch.manual_seed(0)
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    guide = guides.Amortized(model, Read())
    effects, errors = [], []
    for seed in range(300):
        z = torch.randn(60, 2, generator=torch.Generator().manual_seed(seed)).double()
        x = z @ model.decoder.weight.T.detach()
        found = interventions(model, guide, x, {"first": lambda x: x[:, 0].square()}, seed=seed)
        effects.append(found.effect[0, 0])
        errors.append(found.se[0, 0])
    ratio = float(torch.stack(effects).std() / torch.stack(errors).square().mean().sqrt())
    assert 0.88 < ratio < 1.12


def test_attributes_of_bars():
    """A bar of 2 x 8 pixels: outline of its columns and rows, width sqrt((w^2 - 1) / 12); sheared, its slant."""
    image = torch.zeros(3, 1, 20, 20)
    image[0, 0, 6:14, 9:11] = 1
    image[1, 0, 6:14, 7:13] = 1
    for row in range(6, 14):
        image[2, 0, row, row - 1 : row + 1] = 1
    thin, wide, slanted = (float(v) for v in stroke_width(image))
    assert thin == pytest.approx(2 * 16 / (2 * 8 + 2 * 2))
    assert wide == pytest.approx(2 * 48 / (2 * 8 + 2 * 6))
    assert slanted < wide
    assert image_width(image)[0] == pytest.approx(0.5)
    assert image_width(image)[1] == pytest.approx(((36 - 1) / 12) ** 0.5)
    assert image_slant(image)[:2].tolist() == pytest.approx([0.0, 0.0])
    assert image_slant(image)[2] == pytest.approx(1.0)
    assert torch.equal(image_slant(image), image_slant(image[:, 0]))


def test_bad_input():
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    guide = guides.Amortized(model, Read())
    with pytest.raises(ValueError, match="two data"):
        interventions(model, guide, torch.zeros(1, 3).double())
    with pytest.raises(ValueError, match="grey images"):
        interventions(model, guide, torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="not one row each"):
        interventions(model, guide, torch.zeros(4, 3).double(), {"all": lambda x: x.sum().view(1)})


def test_labels_are_read_off_the_group_that_holds_them():
    """Classes two apart in the deep group alone: the linear probe reaches Phi(1) there and a guess elsewhere."""
    torch.manual_seed(0)
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    y = torch.arange(6000) % 2
    z = torch.randn(6000, 2).double()
    z[:, 0] += 2 * y
    guide = guides.Amortized(model, Read())
    found = probe_groups(model, guide, z @ model.decoder.weight.T.detach(), y)
    assert (found.groups, found.kinds) == (("z2", "z1"), ("linear", "knn"))
    assert found.accuracy.shape == found.se.shape == (2, 2)
    assert abs(found.accuracy[0, 0] - float(torch.special.ndtr(torch.tensor(1.0)))) < 4 * found.se[0, 0]
    assert (found.accuracy[1] - 0.5).abs().max() < 4 * found.se[1, 0]
    assert found.accuracy[0, 0] >= found.accuracy[0, 1] > 0.7  # the vote of five neighbours is not Bayes' rule
    assert "3000 held-out data (3000 labels)" in repr(found)
    assert f"{found.probes[1][0].accuracy:.1%}" in repr(found)
    few = probe_groups(model, guide, z @ model.decoder.weight.T.detach(), y, kinds=["kmeans"], num_labels=10)
    assert few.probes[0][0].num_labels == 10
    assert few.accuracy[0, 0] > 0.7


def test_probes_refuse_bad_input():
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    guide = guides.Amortized(model, Read())
    with pytest.raises(ValueError, match="kinds"):
        probe_groups(model, guide, torch.zeros(4, 3).double(), torch.tensor([0, 1, 0, 1]), kinds=[])
    with pytest.raises(ValueError, match="labels"):
        probe_groups(model, guide, torch.zeros(4, 3).double(), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="1 data"):
        probe_groups(model, guide, torch.zeros(1, 3).double(), torch.tensor([0]))


def chain(x):
    """z2 [1], then z1 [2] given it, then x."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2 * x.new_tensor([0.8, -0.5]), 0.7).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([z2, z1], -1), 0.6).to_event(1), obs=x)


TRIL = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.4]], dtype=torch.double)
X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)


class Given(guides.Amortized):
    """q(u | x) = N(0.5 x, L L'), or without its correlations."""

    def lam(self, x):
        loc = 0.5 * x
        if "Diagonal" in type(self.family(x)).__name__:
            return torch.cat([loc, 2 * TRIL.to(x).diagonal().log().expand_as(loc)], 1)
        return self.family(x).pack(loc, TRIL.to(x).expand(len(x), -1, -1))


def prior():
    lift = torch.tensor([[1.0], [0.8], [-0.5]]).double()
    return lift @ lift.T + torch.diag(torch.tensor([0.0, 0.49, 0.49]).double())


def normal_kl(loc, cov, against):
    q = MultivariateNormal(loc, cov.expand(len(loc), -1, -1))
    return kl_divergence(q, MultivariateNormal(torch.zeros_like(loc[0]), against))


@pytest.mark.parametrize("family", ["full-rank", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_of_the_groups_of_a_linear_chain(family, dtype):
    """The first group's is that of its marginal, the rest is the second's."""
    guide, x = Given(chain, nn.Identity(), family), X.to(dtype)
    cov = TRIL @ TRIL.T if family == "full-rank" else torch.diag(TRIL.diagonal() ** 2)
    whole, deep = normal_kl(0.5 * X, cov, prior()), normal_kl(0.5 * X[:, :1], cov[:1, :1], prior()[:1, :1])
    found = group_information(chain, guide, x, num_samples=2000)
    off = (found.kl_per_datum - torch.stack([deep, whole - deep])) / found.kl_se
    assert off.abs().max() < 5
    assert off.square().mean() < 3
    assert found.groups == ("z2", "z1")
    torch.testing.assert_close(found.kl, found.kl_per_datum.mean(1))
    torch.testing.assert_close(found.se, found.kl_per_datum.std(1) / 3)
    total = information(chain, guide, x, num_samples=2000)
    assert ((found.kl_per_datum.sum(0) - total.kl).abs() < 5 * (found.kl_se.sum(0) + total.kl_se)).all()
    again = group_information(chain, guide, x, num_samples=2000, chunk=4)
    torch.testing.assert_close(again.kl, found.kl, rtol=1e-5, atol=1e-5)


def test_kl_of_the_exact_posterior_of_laplace():
    """Its precision is given, not its covariance: marginals go through the factor."""
    guide = guides.Laplace(chain, nn.Linear(3, 3).double(), num_steps=2, update="full")
    cov = torch.linalg.inv(torch.linalg.inv(prior()) + torch.eye(3).double() / 0.36)
    loc = X @ cov / 0.36
    whole, deep = normal_kl(loc, cov, prior()), normal_kl(loc[:, :1], cov[:1, :1], prior()[:1, :1])
    found = group_information(chain, guide, X, num_samples=1000)
    assert ((found.kl_per_datum - torch.stack([deep, whole - deep])).abs() < 5 * found.kl_se).all()


def test_latents_on_other_supports():
    """exp(z1) as the site: KLs do not depend on coordinates."""

    def positive(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
            z1 = pyro.sample("z1", dist.LogNormal(z2 * x.new_tensor([0.8, -0.5]), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z2, z1.log()], -1), 0.6).to_event(1), obs=x)

    one, other = (group_information(m, Given(m, nn.Identity(), "full-rank"), X) for m in (chain, positive))
    torch.testing.assert_close(one.kl_per_datum, other.kl_per_datum)


def test_groups_that_are_off_have_no_active_unit():
    torch.manual_seed(0)
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)

    class Deep(nn.Module):
        def forward(self, x):  # the deep group follows x with sd 0.1, the shallow one is the prior
            return torch.cat([x[:, :1], torch.zeros_like(x[:, :1]), torch.full_like(x[:, :1], math.log(0.01)),
                              torch.zeros_like(x[:, :1])], 1)  # fmt: skip

    x = torch.randn(200, 3).double()
    found = group_information(model, guides.Amortized(model, Deep()), x)
    assert found.active.tolist() == [1, 0]
    assert found.sizes.tolist() == [1, 1]
    truth = 0.5 * (x[:, 0].square() + 0.01 - 1 - math.log(0.01)).mean()
    assert abs(found.kl[0] - truth) < 4 * float(found.kl_se[0].square().mean() / 200) ** 0.5
    assert found.kl_per_datum[1].abs().max() < 1e-12
    torch.testing.assert_close(found.mean_variance[:1], x[:, :1].var(0), rtol=0.05, atol=0.0)
    assert "1 of 1" in repr(found)
    assert "0 of 1" in repr(found)
    one = group_information(model, guides.Amortized(model, Deep()), x[:1])
    assert one.active.tolist() == [0, 0]
    torch.testing.assert_close(one.se, one.kl_se[:, 0])
    assert one.se[0] > 0
    assert repr(one).count("takes two data") == 2


def test_one_group_of_a_flow_is_all_there_is():
    def single(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), x.new_ones(3)).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.6).to_event(1), obs=x)

    def flow_guide(model):
        torch.manual_seed(0)
        flow = flows.IAF(3, num_transforms=1, context=4, hidden=(8,)).double()
        return guides.Amortized(model, nn.Linear(3, flow.num_params).double(), flow)

    found = group_information(single, flow_guide(single), X, num_samples=500)
    total = information(single, flow_guide(single), X, num_samples=500)
    assert ((found.kl_per_datum[0] - total.kl).abs() < 5 * (found.kl_se[0] + total.kl_se)).all()
    with pytest.raises(NoDensityError, match=r"over the sites \['z2'\] alone"):
        group_information(chain, flow_guide(chain), X)


def test_information_refuses_what_it_cannot_split():
    guide = Given(chain, nn.Identity(), "full-rank")
    with pytest.raises(ValueError, match="at least 2"):
        group_information(chain, guide, X, num_samples=1)
    with pytest.raises(NoDensityError):
        group_information(chain, guides.ShortRun(chain, num_steps=2), X)
    scaled = pyro.poutine.scale(chain, 0.5)
    with pytest.raises(ScaleError):
        group_information(scaled, Given(scaled, nn.Identity(), "full-rank"), X)
    summed = VLAC(Two(), [1, 1], [2, 2], "gaussian", classes="enumerated").double()
    with pytest.raises(LatentError, match="collapsed"):
        group_information(summed, guides.Amortized(summed, Read()), X)
