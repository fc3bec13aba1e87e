"""The report: its words follow from exact problems whose answer is known beforehand."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from torch import nn

from pyrovae import guides, models, plots, reference
from pyrovae.diagnose import report
from pyrovae.errors import IncompatibleError, ScaleError

MODEL, X = problems.ppca(rows=40, latent=3, pixels=4, noise=1.0)


class Given(guides.Amortized):
    """The exact posterior of pPCA, moved by `shift` standard deviations; the best factorised one for a diagonal."""

    shift = 0.0

    def lam(self, x):
        q = self.model.posterior(x)
        loc = q.mean + self.shift * q.variance.sqrt()
        family = self.family(x)
        if "Diagonal" in repr(family):
            precision = q.precision_matrix.diagonal(dim1=-2, dim2=-1).expand_as(loc)
            return torch.cat([loc, -precision.log()], dim=-1)
        return family.pack(loc, q.scale_tril)


def given(family, shift=0.0):
    guide = Given(MODEL, nn.Identity(), family=family)
    guide.shift = shift
    return guide


def made(guide, *args, **options):
    return report(guide.model, guide, *args, **{"progress": False, "num_samples": 400, "seed": 0, **options})


def test_the_exact_posterior_loses_nothing():
    found = made(given("full-rank"), X, num_gaps=20, num_reference=20, num_simulated=300)
    text = " ".join(found.verdict)
    assert "loses nothing that can be measured" in text
    assert "below 0.5 for 40 and above 0.7 for 0 of 40" in text
    assert "on 0 of 20 data" in text
    assert "is calibrated" in text
    assert found.disagreeing == []
    assert (found.ess > 0.999).all()
    assert found.khat.shape == (40,)
    assert len(found.gaps.status) == 20
    assert len(found.reference.status) == 20
    assert found.verdict[0] in repr(found)
    assert "Verdict" in found._repr_html_()
    assert len(found.figures()) == 5


def test_a_shifted_guide_blames_the_encoder():
    found = made(given("full-rank", shift=1.0), X, num_gaps=20, num_reference=20, num_simulated=300)
    assert re.match(r"The encoder, not the family, loses (all|\d\.\d\d) of", found.verdict[0])
    assert "SemiAmortized" in found.verdict[0]
    assert len(found.disagreeing) == 20
    text = " ".join(found.verdict)
    assert "on 20 of 20 data" in text
    assert "not calibrated" in text
    assert "too high" in text


def test_a_factorised_guide_blames_the_family():
    found = made(given("diagonal"), X, num_gaps=20, num_reference=0)
    assert found.verdict[0].startswith("The family, not the encoder, loses")
    assert "full-rank" in found.verdict[0]
    assert found.reference is None
    assert found.comparison is None


def test_a_missed_mode_is_told():
    """One Gaussian on one of two modes: the chains disagree among themselves, and it is said."""

    class OneMode(guides.Amortized):
        def lam(self, x):
            return torch.tensor([[1.5, 2 * math.log(0.09)]], dtype=x.dtype).expand(len(x), 2)

    x = torch.full((4,), 2.25, dtype=torch.double)
    guide = OneMode(problems.bimodal, nn.Identity())
    chains = reference.hmc(problems.bimodal, x, progress=False, max_thin=1)
    found = made(guide, x, num_gaps=0, reference=chains)
    text = " ".join(found.verdict)
    assert "do not agree with each other" in text
    assert "several modes" in text
    exact = made(guide, x, num_gaps=0, reference=reference.exact(problems.bimodal, x))
    assert exact.disagreeing == [0, 1, 2, 3]


def test_a_guide_without_density_is_judged_by_chains_alone():
    chain = guides.ShortRun(MODEL, num_steps=30, step_size=0.3)
    found = made(chain, X, num_reference=5)
    assert "no density" in found.verdict[0]
    assert found.khat is None
    assert found.gaps is None
    assert found.comparison is not None
    assert found.worst == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_datum_of_either_precision_and_nothing_moves(dtype):
    torch.manual_seed(0)
    vae = models.VAE(nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 9)), 2).to(dtype)
    guide = guides.Amortized(vae, nn.Linear(9, 4).to(dtype))
    x = torch.bernoulli(torch.full((1, 9), 0.5, dtype=dtype))
    state, before = torch.get_rng_state(), [p.clone() for p in (*vae.parameters(), *guide.parameters())]
    found, again = (made(guide, x, num_samples=100) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0
    for p, old in zip((*vae.parameters(), *guide.parameters()), before, strict=True):
        assert torch.equal(p, old)
    assert found.verdict == again.verdict
    assert found.num_data == 1


def test_refusals():
    other, _ = problems.ppca(rows=3, latent=3, pixels=8)
    with pytest.raises(IncompatibleError):
        report(other, given("diagonal"), X)
    scaled = pyro.poutine.scale(MODEL, 0.5)
    guide = guides.Amortized(scaled, nn.Linear(8, 6).double())
    with pytest.raises(ScaleError):
        made(guide, X)


def test_joint_mode():
    """Eight schools: the mean-field guide is too narrow in tau, which the report says."""
    guide = guides.Amortized(problems.eight_schools(), None, plate=None)
    found = made(guide)
    assert found.num_data == 1
    assert found.reference.status == ("ok",)
    assert "training" in found.verdict[0]
    text = " ".join(found.verdict)
    assert "encoder" not in text
    assert "active" not in text
    assert "mutual information" not in text


def test_pictures():
    found = made(given("diagonal"), X, num_gaps=5, num_reference=0, num_simulated=200)
    bars = plots.gaps({"one": found.gaps, "two": found.gaps})
    assert [len(axis.patches) for axis in bars.axes] == [4, 10]
    widths = [patch.get_width() for patch in bars.axes[0].patches]
    assert widths[0] == pytest.approx(found.gaps.approximation.mean)
    assert widths[1] == pytest.approx(found.gaps.amortization.mean)
    histogram = plots.khat_histogram(found.khat)
    assert sum(patch.get_height() for patch in histogram.axes[0].patches) == 40
    ranks = plots.sbc(found.calibration)
    assert len(ranks.axes) == 5  # three latents, an empty place, the curves
    assert len(plots.tarp(found.calibration).axes[0].lines) == 2
    assert len(plots.coverage(found.calibration).axes) == 1


def test_a_subsampled_scale_is_no_obstacle():
    """A plate of a part of the data, scaled by N / B: the diagnostics are those of the rows."""

    def model(x, size=100):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.3, -1.0], dtype=torch.double)
    guide = guides.Amortized(model, nn.Linear(1, 2).double(), encoder_input=lambda x: x.unsqueeze(-1))
    assert made(guide, x).num_data == 2


def test_one_bad_datum_is_named():
    """One of forty encoder outputs is 20 sd off: the mean over data spreads as far as it is large, but is measured."""

    class OneOff(Given):
        def lam(self, x):
            lam = super().lam(x).clone()
            lam[0, 0] += 20
            return lam

    guide = OneOff(MODEL, nn.Identity(), family="full-rank")
    found = made(guide, X, num_reference=0, num_gaps=len(X))
    assert found.gaps.inference.mean < 3 * found.gaps.inference.mean_se
    assert "Datum 0 alone loses" in found.verdict[0]
    assert "encoder" in found.verdict[0]


def test_without_gaps_nothing_is_said_of_them():
    found = made(given("full-rank"), X[:8], num_gaps=0, num_reference=0)
    assert found.gaps is None
    assert "no density" not in " ".join(found.verdict)
    assert "k-hat is below" in found.verdict[0]
