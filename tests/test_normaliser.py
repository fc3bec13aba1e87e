"""log Z by annealing against closed forms and quadrature, and what results say with it and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyrovae import diagnose, evidence, guides
from pyrovae.errors import DataError, IncompatibleError, NormaliserError
from pyrovae.evidence.normaliser import log_normaliser, normalise
from pyrovae.models.energy_prior_vae import EnergyPriorVAE
from pyrovae.models.hierarchical_energy_prior import HierarchicalEnergyPrior
from pyrovae.models.joint_energy_prior import JointEnergyPrior
from pyrovae.models.tilted import PriorChain
from pyrovae.models.vae import VAE
from pyrovae.nets import MLP, LadderDecoder


class _Quadratic(nn.Module):
    def __init__(self, c, h):
        super().__init__()
        self.c, self.h = nn.Parameter(torch.tensor(c)), nn.Parameter(torch.tensor(h))

    def forward(self, z):
        return (self.h * z - 0.5 * self.c * z.square()).sum(-1)


def _exact(dim, c, h):
    return dim * (h**2 / (2 * (1 + c)) - 0.5 * math.log(1 + c))


def _data(number, dtype=torch.float32):
    return (torch.rand(number, 5) > 0.5).to(dtype)


@pytest.mark.parametrize("dim", [1, 32])
def test_log_z_of_a_quadratic_tilt(dim):
    """log Z = D (h^2 / (2 (1 + c)) - log(1 + c) / 2), within 4 standard errors; the model stays as it is."""
    model = EnergyPriorVAE(nn.Linear(dim, 3), dim, _Quadratic(3.0, 2.0))
    state = torch.get_rng_state()
    found = log_normaliser(model, num_temperatures=150, num_chains=256, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.normalised
    assert abs(found.mean - _exact(dim, 3.0, 2.0)) < 4 * float(found.se[0])
    assert float(found.se[0]) < 0.3
    assert found.kind == "lower bound"
    again = log_normaliser(model, num_temperatures=150, num_chains=256, seed=1)
    assert torch.equal(found.values, again.values)


class _Bend(nn.Module):
    def forward(self, z):
        return torch.cat([1.5 * torch.tanh(z), 0.6 * torch.sin(z) - 0.5], -1)


def test_log_z_of_nets_by_quadrature():
    """A joint net over two groups, and energies on a bent hierarchy; float64, exact on a grid of the plane."""
    torch.manual_seed(2)
    net = MLP([2, 16, 1], nn.Tanh)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)
    models = [
        JointEnergyPrior(LadderDecoder([1, 1], (5,), 8), [1, 1], net).double(),
        HierarchicalEnergyPrior(
            nn.Linear(1, 5), [1, 1], [_Bend()], [MLP([1, 8, 1], nn.Tanh), MLP([1, 8, 1], nn.Tanh)]
        ).double(),
    ]
    line = torch.linspace(-9, 9, 901, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    for model in models:
        with torch.no_grad():
            exact = torch.logsumexp(model.tilt(z) + model.log_base(z), 0) + 2 * (line[1] - line[0]).log()
        found = log_normaliser(model, num_temperatures=30, num_chains=256)
        assert abs(found.mean - float(exact)) < 4 * float(found.se[0])
        assert found.values.dtype == torch.float64


@pytest.fixture
def tilted():
    torch.manual_seed(0)
    model = EnergyPriorVAE(nn.Linear(2, 5), 2, _Quadratic(3.0, 2.0), chain=PriorChain(20, 0.3))
    guide = guides.Amortized(model, MLP([5, 4]))
    return model, guide, _data(6)


def test_kinds_say_whether_log_z_is_known(tilted):
    """Unnormalised, then an estimate (two lower bounds in a fraction are none), then unnormalised again."""
    model, guide, x = tilted

    some = {"num_chains": 4, "num_temperatures": 4}

    def kinds():
        found = [
            evidence.iwae(model, guide, x, num_samples=5), evidence.elbo(model, guide, x, num_samples=5),
            diagnose.anomaly(model, guide, x, num_samples=5), diagnose.anomaly(model, guide, x, score="elbo"),
            evidence.ais(model, x, **some), evidence.reverse_ais(model, guide.draws(4, x), x, **some),
        ]  # fmt: skip
        return {estimate.kind for estimate in found}

    assert kinds() == {"unnormalised"}
    assert evidence.bracket(model, guide, x, num_samples=10, **some).lower.kind == "unnormalised"
    model.normalise(log_normaliser(model, num_temperatures=10).mean)
    assert kinds() == {"estimate"}
    with torch.no_grad():
        model.energy.c.add_(0.1)
    assert evidence.iwae(model, guide, x, num_samples=5).kind == "unnormalised"
    plain = VAE(model.decoder, 2)
    other = guides.Amortized(plain, guide.encoder)
    assert evidence.iwae(plain, other, x, num_samples=5).kind == "lower bound"
    assert diagnose.anomaly(plain, other, x, num_samples=5).kind == "upper bound"


def test_normalised_evidence_is_that_of_the_equal_gaussian_prior(tilted):
    """A quadratic tilt of N(0, I) is N(m, v I): AIS of the tilted model meets that of a shifted, scaled decoder."""
    model, _, x = tilted
    model.normalise(_exact(2, 3.0, 2.0))
    ours = evidence.ais(model, x, num_temperatures=100)
    decoder = nn.Linear(2, 5)
    with torch.no_grad():  # z = 1/2 + e / 2
        decoder.weight.copy_(model.decoder.weight / 2)
        decoder.bias.copy_(model.decoder.bias + model.decoder.weight.sum(1) / 2)
    plain = evidence.ais(VAE(decoder, 2), x, num_temperatures=100)
    error = float((ours.se.square() + plain.se.square()).sum().sqrt()) / len(x)
    assert abs(ours.mean - plain.mean) < 4 * error
    assert 4 * error < abs(_exact(2, 3.0, 2.0)) / 2


def test_numbers_with_and_without_log_z_are_not_compared(tilted):
    model, guide, x = tilted
    lower = evidence.iwae(model, guide, x, num_samples=20)
    gaps = diagnose.gaps(model, guide, x, num_samples=50, local={"max_steps": 10})
    assert gaps.approximation.kind == "lower bound"  # log Z cancels
    assert "unnormalised" in repr(gaps)
    assert evidence.difference(lower, lower)[0] == 0
    model.normalise(0.5)
    normalised = evidence.iwae(model, guide, x, num_samples=20)
    torch.testing.assert_close(lower.values - normalised.values, torch.full((6,), 0.5).double())
    again = diagnose.gaps(model, guide, x, num_samples=50, local={"max_steps": 10})
    assert again.inference.mean == pytest.approx(gaps.inference.mean, abs=1e-3)
    with pytest.raises(ValueError, match="log_normaliser"):
        evidence.difference(lower, normalised)
    with pytest.raises(ValueError, match="log_normaliser"):
        diagnose.gaps(model, guide, x, num_samples=20, log_evidence=lower)
    with torch.no_grad():
        model.energy.c.add_(1.0)
    given = diagnose.gaps(model, guide, x, num_samples=20, local={"max_steps": 2}, log_evidence=lower)
    assert given.inference.kind == "estimate"


def test_anomalies_do_not_need_log_z(tilted):
    """Scores of evidence move by one number for all; layer ratios not at all."""
    model, guide, x = tilted
    strange = torch.ones(5, 5)
    found = []
    for log_z in (None, 1.5):
        if log_z is not None:
            model.normalise(log_z)
        scores = [diagnose.anomaly(model, guide, rows, num_samples=200) for rows in (x, strange)]
        found.append((diagnose.detection(*scores), scores[0].values))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1] - found[0][1], torch.full((6,), 1.5).double(), rtol=0, atol=1e-5)
    ladder = JointEnergyPrior(LadderDecoder([2, 1], (5,), 8), [2, 1], MLP([3, 8, 1]))
    over = guides.Amortized(ladder, MLP([5, 6]))
    ratio = diagnose.anomaly(ladder, over, x, score="layer-ratio", num_samples=50)
    ladder.normalise(3.0)
    same = diagnose.anomaly(ladder, over, x, score="layer-ratio", num_samples=50)
    torch.testing.assert_close(ratio.values, same.values, rtol=0, atol=1e-5)
    assert same.kind == "estimate"


def test_refusals(tilted):
    """No tilt, no log Z; and a prior whose draws are a chain's simulates no exact posterior."""
    model, _, x = tilted
    with pytest.raises(IncompatibleError, match="does not have"):
        log_normaliser(VAE(nn.Linear(2, 5), 2))
    with pytest.raises(DataError, match="factor"):
        evidence.bdmc(model, x, num_chains=2, num_temperatures=5)


def test_log_z_is_put_in_where_it_is_found():
    model = EnergyPriorVAE(nn.Linear(4, 3), 4, _Quadratic(3.0, 2.0))
    found = normalise(model, num_temperatures=200)
    assert model.normalised
    assert float(model.log_z) == pytest.approx(found.log_z.mean)
    assert abs(found.log_z.mean - _exact(4, 3.0, 2.0)) < 4 * float(found.log_z.se[0])
    assert abs(found.rise) < 4 * found.rise_se


def test_a_tilt_far_out_is_not_normalised():
    """p = N(60, I): log Z = 1800 in each dimension, which annealing from N(0, I) does not reach."""
    model = EnergyPriorVAE(nn.Linear(4, 3), 4, _Quadratic(0.0, 60.0))
    with pytest.raises(NormaliserError, match="annealing did not find log Z"):
        normalise(model, num_temperatures=50)
    assert not model.normalised
