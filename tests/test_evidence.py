"""Evidence: numbers that depend on nothing but data, guide and seed, with honest standard errors."""

from __future__ import annotations

import importlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from guides_registry import DENSITY, GUIDES, TRAINED
from torch import nn

from pyrovae import evidence, guides, handlers, losses, reference
from pyrovae.errors import IncompatibleError, NoDensityError, ScaleError
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder

PIXELS, DIM, ROWS = 6, 3, 7


def small(name, dtype=torch.float64):
    torch.manual_seed(1)
    vae = VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)).to(dtype), DIM, "gaussian")
    return vae, GUIDES[name](vae, PIXELS, DIM, dtype)


def data(rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("name", DENSITY)
def test_chunks_and_order_change_nothing(name):
    """Whole, in chunks of 1, 2 and 3, reversed, and a subset by `indices`: the same numbers to float64 rounding."""
    vae, guide = small(name)
    x = data()
    options = {"num_samples": 30, "seed": 3}
    whole = evidence.log_weights(vae, guide, x, **options)
    assert whole.shape == (30, ROWS)
    for chunk in (1, 2, 3):
        torch.testing.assert_close(evidence.log_weights(vae, guide, x, chunk=chunk, **options), whole,
                                   rtol=1e-9, atol=1e-9)  # fmt: skip
    back = torch.arange(ROWS).flip(0)
    turned = evidence.log_weights(vae, guide, x[back], indices=back.tolist(), **options)
    torch.testing.assert_close(turned.flip(1), whole, rtol=1e-9, atol=1e-9)
    some = evidence.log_weights(vae, guide, x[[5, 2]], indices=[5, 2], **options)
    torch.testing.assert_close(some, whole[:, [5, 2]], rtol=1e-9, atol=1e-9)
    one = evidence.log_weights(vae, guide, x[4:5], indices=[4], **options)
    torch.testing.assert_close(one, whole[:, 4:5], rtol=1e-9, atol=1e-9)
    other = evidence.log_weights(vae, guide, x, num_samples=30, seed=4)
    assert (other - whole).abs().amax(0).min() > 1e-3  # another seed is other noise for every datum


def test_noise_belongs_to_the_index_not_to_the_place():
    vae, guide = small("amortized")
    same = data()[:1].expand(4, -1).contiguous()
    weights = evidence.log_weights(vae, guide, same, num_samples=10)
    assert (weights[:, :1] - weights[:, 1:]).abs().amin(1).max() > 1e-3  # equal data, different noise
    weights = evidence.log_weights(vae, guide, same, num_samples=10, indices=[8, 8, 8, 8])
    torch.testing.assert_close(weights[:, :1].expand(-1, 4), weights)


@pytest.mark.parametrize("name", ["short-run", "short-run-hmc"])
def test_chunks_change_no_draw_of_a_chain(name, monkeypatch):
    vae, guide = small(name)
    x = data()
    truth = reference.hmc(vae, x, target_ess=500, progress=False)
    whole = reference.compare(guide, truth, x, num_samples=20)
    module = importlib.import_module("pyrovae.reference.compare")  # the package's name for it is the function
    inner = module.per_chunk
    monkeypatch.setattr(module, "per_chunk", lambda *a, **k: inner(*a, **{**k, "chunk": 2}))
    split = reference.compare(guide, truth, x, num_samples=20)
    torch.testing.assert_close(split.draws, whole.draws, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(split.sliced_w2, whole.sliced_w2)


def test_fixed_size_plate_runs_in_one_piece():
    """A plate whose size is written into the model cannot be split; the numbers are those of one chunk."""

    def model(x):
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, PIXELS), 1.0).to_event(1), obs=x)

    guide = GUIDES["amortized"](model, PIXELS, DIM, torch.float64)
    whole = evidence.log_weights(model, guide, data(), num_samples=9)
    assert torch.equal(evidence.log_weights(model, guide, data(), num_samples=9, chunk=2), whole)


def test_subsampled_plate_gives_nats_of_a_row():
    """N / B of the plate changes nothing: rows given alone or under a plate of 100."""

    def plain(x, index):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    net, x, index = nn.Linear(1, 2), torch.randn(5, 1), torch.tensor([3, 50, 51, 98, 99])
    found = [evidence.log_weights(model, guides.Amortized(model, net), x, index, num_samples=8, chunk=chunk)
             for model in (plain, problems.subsampled) for chunk in (2, 5)]  # fmt: skip
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["elbo", "iwae"])
def test_standard_errors_are_those_of_repeated_runs(name):
    """The spread over 300 seeds against the mean of the stated se, per datum; both known to a few percent."""
    model, x = problems.ppca(rows=4, latent=3)
    torch.manual_seed(0)
    guide = DENSITY["amortized"](model, 30, 3, torch.float64)
    with torch.no_grad():  # near the posterior, where the delta method holds: weights with light tails
        exact = model.posterior(x)
        design = torch.linalg.lstsq(x, exact.mean).solution
    lam = torch.cat([x @ design, exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).mul(1.3).log()], -1)

    class Known(nn.Module):
        def forward(self, rows):
            return torch.stack([lam[(x == row).all(-1)][0] for row in rows])

    guide = guides.Amortized(model, Known())
    runs = [getattr(evidence, name)(model, guide, x, num_samples=200, seed=seed) for seed in range(300)]
    spread = torch.stack([run.values for run in runs]).std(0)
    stated = torch.stack([run.se for run in runs])
    # se of a standard deviation from 300 runs: 1 / sqrt(600) = 4.1 %; 4 of them.
    assert ((stated.mean(0) / spread - 1).abs() < 0.17).all()
    mean, truth = torch.stack([run.values for run in runs]).mean(0), model.log_evidence(x)
    if name == "iwae":  # bias -Var(w) / (2 S p^2) = -se^2 / 2
        assert ((mean - truth + 0.5 * spread**2).abs() < 4 * spread / 300**0.5).all()
    else:
        q = dist.MultivariateNormal(lam[:, :3], torch.diag_embed(lam[:, 3:].exp()))
        gap = torch.distributions.kl_divergence(q, exact)
        assert ((mean - truth + gap).abs() < 4 * spread / 300**0.5).all()


def test_one_sample_has_no_standard_error():
    vae, guide = small("amortized")
    both = evidence.summarize(evidence.log_weights(vae, guide, data(), num_samples=1))
    for estimate in both:
        assert estimate.se.isnan().all()
        assert torch.isfinite(estimate.values).all()
    torch.testing.assert_close(both[0].values, both[1].values)


def test_summary_formulas():
    weights = torch.tensor([[0.0, -1.0], [1.0, -1.0], [3.0, -1.0]], dtype=torch.double)
    bound, iwae = evidence.summarize(weights)
    torch.testing.assert_close(bound.values, weights.mean(0))
    torch.testing.assert_close(bound.se, weights.std(0) / 3**0.5)
    w = weights.exp()
    torch.testing.assert_close(iwae.values, w.mean(0).log())
    torch.testing.assert_close(iwae.se, w.std(0, unbiased=False) / w.mean(0) / 3**0.5)
    assert iwae.name == "IWAE-3"
    assert {bound.kind, iwae.kind} == {"lower bound"}
    assert iwae.mean_se == pytest.approx(float(iwae.values.std() / 2**0.5))
    assert evidence.summarize(weights[:, :1])[0].mean_se == pytest.approx(float(bound.se[0]))
    assert "lower bound" in repr(iwae)
    assert "IWAE-3" in iwae._repr_html_()


@pytest.mark.parametrize("name", [n for n in DENSITY if n in TRAINED])
def test_agrees_with_the_losses(name):
    """ELBO and IWAE-5 of `evidence` and of `losses` on the same rows, within 4 se of their difference."""
    vae, guide = small(name)
    x = data(4)
    noisy = "semi" in name or "averaged" in name  # refinement noise is shared by the draws of a call
    bound = torch.stack([evidence.elbo(vae, guide, x, num_samples=20, seed=s).values.mean() for s in range(40)])
    loss = losses.ELBO("reparam" if guide.traits.reparameterised else "stratified")
    with torch.no_grad():
        theirs = torch.stack([loss.per_datum(vae, guide, x).mean() for _ in range(150)])
    se = (bound.var() / len(bound) + theirs.var() / len(theirs)).sqrt()
    assert abs(bound.mean() - theirs.mean()) < 4 * se
    if not guide.traits.reparameterised or noisy:
        return
    tighter = torch.stack([evidence.iwae(vae, guide, x, num_samples=5, seed=s).values.mean() for s in range(100)])
    with torch.no_grad():
        iwae = losses.IWAE(5, "dreg" if guide.traits.marginal else "reparam")
        theirs = torch.stack([iwae.per_datum(vae, guide, x).mean() for _ in range(100)])
    assert abs(tighter.mean() - theirs.mean()) < 4 * (tighter.var() / 100 + theirs.var() / 100).sqrt()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_one_row(rows, dtype):
    """float32 and float64 agree in distribution; a single row works; values are float64 always."""
    vae, guide = small("amortized", dtype)
    estimate = evidence.iwae(vae, guide, data(rows, dtype), num_samples=4000)
    assert estimate.values.shape == estimate.se.shape == (rows,)
    assert estimate.values.dtype == torch.float64
    wide, wide_guide = small("amortized")
    wide.load_state_dict(vae.state_dict())
    wide_guide.load_state_dict(guide.state_dict())
    other = evidence.iwae(wide, wide_guide, data(rows), num_samples=4000, seed=1)
    assert ((estimate.values - other.values).abs() < 4 * (estimate.se**2 + other.se**2).sqrt()).all()


def test_refuses_what_is_not_the_joint_density():
    vae, guide = small("amortized")
    with handlers.anneal(0.5), pytest.raises(ScaleError, match="KL weight of 0.5"):
        evidence.iwae(vae, guide, data())

    def scaled(x):
        with pyro.poutine.scale(scale=0.5):
            vae(x)

    bent = guides.Amortized(scaled, MLP([PIXELS, 4, 2 * DIM]).double())
    with pytest.raises(ScaleError, match="scale 0.5"):
        evidence.elbo(scaled, bent, data())


def test_refuses_another_model_and_guides_without_density():
    vae, guide = small("amortized")
    other, chain = small("short-run")
    with pytest.raises(IncompatibleError, match="another model"):
        evidence.iwae(other, guide, data())
    with pytest.raises(NoDensityError, match=r"guide\.sample"):
        evidence.iwae(other, chain, data())
    for options, message in (({"num_samples": 0}, "num_samples"), ({"chunk": 0}, "chunk"), ({"indices": [0]}, "each")):
        with pytest.raises(ValueError, match=message):
            evidence.log_weights(vae, guide, data(), **options)


def test_leaves_everything_as_it_was():
    """Weights, BatchNorm buffers, training flags, store and random state."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(PIXELS, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2 * DIM))
    vae = VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)), DIM, "gaussian")
    guide = guides.Amortized(vae, net)
    x = data(dtype=torch.float32)
    pyro.param("mine", torch.ones(2))
    before = {k: v.clone() for part in (vae, guide) for k, v in part.state_dict().items()}
    rng = torch.get_rng_state()
    evidence.iwae(vae, guide, x, num_samples=20)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for part in (vae, guide) for k, v in part.state_dict().items())
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert all(m.training for m in (*net, vae, guide))
    assert all(p.grad is None for p in (*vae.parameters(), *guide.parameters()))


def test_bare_parameters_of_the_caller_are_seen():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 2), scale).to_event(1), obs=x)

    guide = guides.Amortized(model, MLP([PIXELS, 2 * DIM]))
    x = data(dtype=torch.float32)
    narrow = evidence.elbo(model, guide, x, num_samples=5)
    pyro.get_param_store()["scale"] = torch.tensor(3.0)
    wide = evidence.elbo(model, guide, x, num_samples=5)
    assert (narrow.values - wide.values).abs().min() > 1e-3
