"""The losses: equal to Pyro's where they must be, per datum before any reduction, refused where they mean nothing."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from guides_registry import DENSITY, GUIDES, TRAINED, WITH_POSTERIOR
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyrovae import fit, guides, handlers, losses, models
from pyrovae.compat import compatible
from pyrovae.errors import IncompatibleError, PlateError, ScaleError
from pyrovae.models import (
    PPCA,
    VAE,
    VLAC,
    ChartAutoencoder,
    Diffusion,
    EnergyPriorVAE,
    HierarchicalEnergyPrior,
    HierarchicalVAE,
    JointEnergyPrior,
    LadderVAE,
    LossyVAE,
    PiecewiseAffineVAE,
    PixelCNNVAE,
    PriorChain,
    TextVAE,
)
from pyrovae.nets import MLP, ChartMLP, LadderDecoder, LinearHeadDecoder, LSTMDecoder, PixelCNN, TimeMLP

PIXELS, DIM, ROWS = 6, 3, 4


def vae(dtype=torch.float64):
    torch.manual_seed(1)
    return VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)).to(dtype), DIM, "gaussian")


def ppca():
    generator = torch.Generator().manual_seed(0)
    return PPCA(torch.randn(PIXELS, DIM, generator=generator, dtype=torch.double), noise=0.7)


def ladder():
    torch.manual_seed(1)
    return LadderVAE(LadderDecoder([1, 2], (PIXELS,), width=8).double(), [1, 2], "gaussian")


def vlac():
    torch.manual_seed(1)
    return VLAC(LadderDecoder([1, 2], (PIXELS,), width=8).double(), [1, 2], [2, 3], "gaussian")


def pixelcnn():
    torch.manual_seed(1)
    net = PixelCNN(1, 1, features=2, width=4, kernel_sizes=(3, 3))
    return PixelCNNVAE(LinearHeadDecoder(DIM, [8], (2, 2, 3)), net, DIM).double()


def lossy():
    torch.manual_seed(1)
    features = LinearHeadDecoder(DIM, [8], (2, 2, 3))
    return LossyVAE(features, DIM, num_features=2, width=4, num_transforms=2, hidden=(8,)).double()


class FloatWords(TextVAE):
    """Takes indices as floats, which the encoders of the registry can read."""

    def forward(self, x=None, size=None):
        return super().forward(None if x is None else x.long(), size)


def text():
    torch.manual_seed(1)
    return FloatWords(LSTMDecoder(6, DIM, embedding=3, hidden=4), DIM).double()


def piecewise_affine():
    torch.manual_seed(1)
    return PiecewiseAffineVAE([2, 3, PIXELS]).double()  # two latents are the most there are


_CHAIN = PriorChain(3, 1.2)


def energy_prior():
    torch.manual_seed(1)
    decoder = LinearHeadDecoder(DIM, [8], (PIXELS,))
    return EnergyPriorVAE(decoder, DIM, MLP([DIM, 4, 1]), "gaussian", chain=_CHAIN).double()


def joint_energy():
    torch.manual_seed(1)
    decoder = LadderDecoder([1, 2], (PIXELS,), width=8)
    return JointEnergyPrior(decoder, [1, 2], MLP([DIM, 4, 1]), "gaussian", chain=_CHAIN).double()


def hierarchical():
    torch.manual_seed(1)
    return HierarchicalVAE(nn.Linear(1, PIXELS), [1, 2], [nn.Linear(2, 2)], "gaussian").double()


def hierarchical_energy():
    torch.manual_seed(1)
    energies = [MLP([1, 4, 1]), MLP([2, 4, 1])]
    return HierarchicalEnergyPrior(
        nn.Linear(1, PIXELS), [1, 2], [nn.Linear(2, 2)], energies, "gaussian", chain=_CHAIN
    ).double()  # fmt: skip


def charts():
    torch.manual_seed(1)
    return ChartAutoencoder(ChartMLP(2, [DIM, 4]), nn.Linear(4, PIXELS)).double()


def diffusion():
    torch.manual_seed(1)
    return Diffusion(TimeMLP((PIXELS,), hidden=(8,)), (PIXELS,), 3, betas=(0.1, 0.5)).double()


MODELS = {
    "vae": vae, "ppca": ppca, "piecewise-affine": piecewise_affine, "energy-prior": energy_prior, "ladder": ladder,
    "joint-energy": joint_energy, "hierarchical": hierarchical, "hierarchical-energy": hierarchical_energy,
    "vlac": vlac, "pixelcnn": pixelcnn, "lossy": lossy, "charts": charts, "diffusion": diffusion, "text": text,
}  # fmt: skip
DIMS = {"piecewise-affine": 2}


def atlas_guide(model, pixels, dim, dtype=torch.float32):
    nets = nn.Linear(pixels, 4), ChartMLP(2, [4, 2 * dim]), nn.Linear(pixels, 2)
    return guides.Charts(model, *nets).to(dtype)


def forward_process(model, pixels, dim, dtype=torch.float32):
    return guides.ForwardProcess(model)


# Guides that some models alone can have, and losses of some models alone.
OF_SOME = {**WITH_POSTERIOR, "charts": atlas_guide, "forward-process": forward_process}
CLASSES = {"exact": guides.Exact, "charts": guides.Charts, "forward-process": guides.ForwardProcess}
LOSSES = {
    **losses.REGISTRY, "EnergyELBO": losses.EnergyELBO, "ChartLoss": losses.ChartLoss,
    "DiffusionELBO": losses.DiffusionELBO, "SimpleDiffusionLoss": losses.SimpleDiffusionLoss,
}  # fmt: skip
IMAGES = ("pixelcnn", "lossy")  # those that take binary images, here of 2 x 3 pixels


def data(rows=ROWS):
    return torch.randn(rows, PIXELS, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def gradients(loss, model, guide, *args):
    for parameter in (*model.parameters(), *guide.parameters()):
        parameter.grad = None
    torch.manual_seed(5)
    with pyro.get_param_store().scope():
        value = loss.loss_and_grads(model, guide, *args)
    return value, [p.grad for p in (*model.parameters(), *guide.parameters())]


def test_every_registered_model_is_tested():
    assert set(MODELS) == set(models.REGISTRY)


def scaled(x):
    """A constrained global, whose Jacobian AutoGuides keep in a Delta."""
    scale = pyro.sample("scale", dist.LogNormal(-3.0, 0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def test_the_jacobian_in_an_autoguide_s_delta_counts():
    """Pyro's KL of a Delta leaves it out: stock TraceMeanField_ELBO is 3 nats above the sampled ELBO here."""
    guide, x = AutoNormal(scaled, init_scale=0.2), 0.05 * torch.randn(5)
    guide(x)  # its setup draws numbers
    guide.locs.scale.data.fill_(-3.0)
    found = {}
    for loss in (losses.ELBO(num_particles=20), Trace_ELBO(num_particles=20), TraceMeanField_ELBO(num_particles=20)):
        torch.manual_seed(0)
        found[type(loss).__name__] = loss.loss(scaled, guide, x)
    assert found["ReparamELBO"] == pytest.approx(found["Trace_ELBO"], rel=1e-5)
    assert found["TraceMeanField_ELBO"] < found["Trace_ELBO"] - 2


@pytest.mark.parametrize("name", [n for n in DENSITY if n in TRAINED and "mixture" not in n])
@pytest.mark.parametrize("particles", [1, 3])
def test_elbo_is_trace_mean_field_elbo(name, particles):
    """Same seed, same value and gradients, to rounding."""
    model = vae()
    guide = GUIDES[name](model, PIXELS, DIM, torch.float64)
    theirs = gradients(TraceMeanField_ELBO(num_particles=particles), model, guide, data())
    ours = gradients(losses.ELBO(num_particles=particles), model, guide, data())
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


OWN = {"ppca": ("exact",), "piecewise-affine": ("exact",), "charts": ("charts",), "diffusion": ("forward-process",)}
TILTED = ("energy-prior", "joint-energy", "hierarchical-energy")
WITH_EVERY_GUIDE = {
    **dict.fromkeys(MODELS, ("ELBO", "ELBO(stratified)", "E_q log p(x,z)")),
    **dict.fromkeys(("vae", "ppca"), tuple(losses.REGISTRY)),
    **dict.fromkeys(TILTED, ("EnergyELBO",)), "diffusion": ("DiffusionELBO",),
}  # fmt: skip
# Every guide with every registered loss on two models; on the others every guide, and every loss, in one pair each;
# guides of some models alone with every loss on theirs.
TRIPLES = [
    (model, guide, loss) for model in MODELS for guide in (*GUIDES, *OWN.get(model, ())) for loss in LOSSES
    if loss in WITH_EVERY_GUIDE[model] or guide in ("amortized", *OF_SOME)
]  # fmt: skip


@pytest.mark.parametrize(("model_name", "guide_name", "loss_name"), TRIPLES)
def test_every_triple_runs_or_raises_what_compatible_says(model_name, guide_name, loss_name):
    model = MODELS[model_name]()
    x = (data() > 0).double().view(ROWS, 1, 2, 3) if model_name in IMAGES else data()
    if model_name == "text":
        x = torch.tensor([[3, 4, 5, 2, 0, 0], [5, 2, 0, 0, 0, 0], [4, 4, 4, 4, 4, 2], [3, 2, 0, 0, 0, 0]]).double()
    dim = DIMS.get(model_name, DIM)
    guide, loss = {**GUIDES, **OF_SOME}[guide_name](model, PIXELS, dim, torch.float64), LOSSES[loss_name]()
    reason = compatible(model, guide, loss)
    if reason is not None:
        for call in (loss.loss, loss.loss_and_grads, loss.per_datum):
            with pytest.raises(IncompatibleError) as raised:
                call(model, guide, x)
            assert str(raised.value) == reason
        return
    value, grads = gradients(loss, model, guide, x)
    assert math.isfinite(value)
    assert any(g is not None and g.abs().sum() > 0 for g in grads)
    if loss_name == "EnergyELBO":  # its gradient draws from the prior first; its value does not
        torch.manual_seed(5)
        value = loss.loss(model, guide, x)
    torch.manual_seed(5)
    rows = loss.per_datum(model, guide, x)
    assert rows.shape == (ROWS,)
    total = -float(rows.detach().sum())  # a sum of per_datum is minus the loss
    if hasattr(loss, "penalty"):
        torch.manual_seed(5)
        total += ROWS * float(LOSSES[loss_name]().penalty(model, guide, x).detach())
    assert total == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("guide_name", OF_SOME)
@pytest.mark.parametrize("model_name", MODELS)
def test_guides_of_some_models_alone_are_refused_by_the_others(model_name, guide_name):
    """`compatible` says of the class whether it can be built; a guide that was built for its model is refused, too."""
    model, reason = MODELS[model_name](), compatible(MODELS[model_name](), CLASSES[guide_name])
    assert (reason is None) == (guide_name in OWN.get(model_name, ()))
    if reason is not None:
        with pytest.raises((IncompatibleError, TypeError)):
            OF_SOME[guide_name](model, PIXELS, DIM, torch.float64)
        assert len(reason.splitlines()) == 1


def test_the_matrix_of_guides_and_losses():
    """Which pairs go together, written down once more: a change of traits must be meant."""
    model = vae()
    found = {
        guide: {name for name, loss in losses.REGISTRY.items()
                if compatible(model, build(model, PIXELS, DIM, torch.float64), loss()) is None}
        for guide, build in GUIDES.items()
    }  # fmt: skip
    batch = {"InfoVAE", "InfoVAE(stein)", "free bits", "soft free bits"}
    chains = {"ELBO", "ELBO(stratified)", "IWAE-5(reparam)"} | batch
    strat, plain = {"ELBO(stratified)"}, {"ELBO", "ELBO(stl)", "IWAE-5", "IWAE-5(reparam)"} | batch
    for guide, names in found.items():
        if "short-run" in guide:
            assert names == (chains if "density" in guide else {"E_q log p(x,z)"}), guide
        elif guide.startswith(("dais", "hvae")):
            assert names == chains, guide
        elif "recursive" in guide:
            assert names == strat | {"RecursiveELBO"}, guide
        elif "mixture" in guide:
            assert names == strat, guide
        elif guide not in TRAINED:
            assert not names, guide
        elif "laplace" in guide:
            assert names - strat == plain, guide
        else:
            assert names == plain | strat | {"MAE"}, guide


@pytest.mark.parametrize("loss_name", [n for n in losses.REGISTRY if n != "E_q log p(x,z)"])
def test_subsampling_multiplies_afterwards(loss_name):
    """loss = -(N / B) sum of per_datum, and per_datum does not know N."""
    x, index = torch.randn(5, 1), torch.tensor([3, 4, 50, 98, 99])
    net, other = nn.Linear(1, 2), nn.Linear(1, 2)
    found = []
    for size in (100, 1000):
        def model(x, index, size=size):
            problems.subsampled(x, index, size)

        loss = losses.REGISTRY[loss_name]()
        guide = guides.Amortized(model, net)
        if loss.traits.needs_stages:
            guide = guides.RecursiveMixture(model, [net, other], trunk="separate")
        torch.manual_seed(3)
        rows = loss.per_datum(model, guide, x, index)
        torch.manual_seed(3)
        with pyro.get_param_store().scope():
            value = loss.loss(model, guide, x, index)
        total = -float(rows.sum())
        if hasattr(loss, "penalty"):
            torch.manual_seed(3)
            total += 5 * float(losses.REGISTRY[loss_name]().penalty(model, guide, x, index).detach())
        assert value == pytest.approx(total * size / 5, rel=1e-5)
        found.append(rows.detach())
    torch.testing.assert_close(found[0], found[1])


def test_stratified_with_one_component_is_the_elbo():
    """M = 1: one draw with weight 1; equal to Trace_ELBO in expectation, value within 3 se of both, gradients too."""
    model = vae()
    base = GUIDES["amortized"](model, PIXELS, DIM, torch.float64)
    one = guides.Mixture([base])
    x = data()

    def sample(loss, guide, number=300):
        values, grads = [], []
        for seed in range(number):
            torch.manual_seed(seed + (0 if guide is one else 10_000))
            for p in (*model.parameters(), *base.parameters()):
                p.grad = None
            with pyro.get_param_store().scope():
                values.append(loss.loss_and_grads(model, guide, x))
            grads.append(torch.cat([p.grad.flatten() for p in (*model.parameters(), *base.parameters())]))
        return torch.tensor(values, dtype=torch.double), torch.stack(grads)

    (a, ga), (b, gb) = sample(losses.ELBO("stratified"), one), sample(Trace_ELBO(), base)
    assert abs(a.mean() - b.mean()) < 3 * (a.var() / 300 + b.var() / 300).sqrt()
    z = (ga.mean(0) - gb.mean(0)) / ((ga.var(0) + gb.var(0)) / 300 + 1e-12).sqrt()
    assert z.abs().max() < 4.5  # of about 170 components
    assert abs(float(z.square().mean()) - 1) < 0.6


def test_annealing_of_every_loss():
    """beta * (KL part) + (data part): linear in beta at the same draws, and per_datum is annealed like the loss."""
    model = vae()
    for name, estimator in (
        ("amortized", "reparam"), ("amortized", "stl"), ("laplace", "reparam"), ("mixture", "stratified"),
        ("recursive-mixture", "recursive"),
    ):  # fmt: skip
        guide = GUIDES[name](model, PIXELS, DIM, torch.float64)
        loss = losses.RecursiveELBO() if estimator == "recursive" else losses.ELBO(estimator)
        values = []
        for beta in (0.0, 0.5, 1.0):
            torch.manual_seed(0)
            with handlers.anneal(beta), pyro.get_param_store().scope():
                values.append(loss.loss(model, guide, data()))
        if name == "laplace":  # the mode itself moves with beta
            assert values[0] != values[2]
            continue
        assert values[1] == pytest.approx((values[0] + values[2]) / 2, rel=1e-10)
        torch.manual_seed(0)
        with torch.no_grad(), handlers.anneal(0.5):
            rows = loss.per_datum(model, guide, data())
        assert -float(rows.sum()) == pytest.approx(values[1], rel=1e-10)
        if estimator == "reparam":  # a KL from single draws may be negative
            assert values[0] < values[2]
    guide = GUIDES["amortized"](model, PIXELS, DIM, torch.float64)
    for estimator in ("reparam", "dreg"):
        with handlers.anneal(0.5), pytest.raises(ScaleError, match="not a bound"):
            losses.IWAE(3, estimator).loss(model, guide, data())


def test_iwae_rises_towards_the_evidence_and_never_above():
    model = ppca()
    torch.manual_seed(0)
    guide = GUIDES["amortized"](model, PIXELS, DIM, torch.float64)
    with torch.no_grad():
        for p in guide.parameters():
            p.mul_(0.3)
    x = data()
    truth = model.log_evidence(x).detach()
    means, ses = [], []
    for number in (1, 4, 16, 64, 256):
        with torch.no_grad():
            runs = torch.stack([losses.IWAE(number).per_datum(model, guide, x) for _ in range(200)])
        means.append(runs.mean(0))
        ses.append(runs.std(0) / 200**0.5)
        assert (means[-1] < truth + 4 * ses[-1]).all()
    for k in range(4):
        assert (means[k + 1] > means[k] - 4 * (ses[k] ** 2 + ses[k + 1] ** 2).sqrt()).all()
    assert (means[-1] - means[0] > 4 * ses[0]).all()


def test_iwae_at_the_exact_posterior_is_the_evidence():
    model = ppca()
    guide = guides.Laplace(model, nn.Linear(PIXELS, DIM).double(), num_steps=1, update="full")
    with torch.no_grad():
        torch.testing.assert_close(losses.IWAE(3).per_datum(model, guide, data()), model.log_evidence(data()))


def test_expected_log_joint_is_the_mean_log_density_at_the_draws():
    model = vae()
    guide = GUIDES["short-run"](model, PIXELS, DIM, torch.float64)
    torch.manual_seed(4)
    value = losses.ExpectedLogJoint(num_particles=3).per_datum(model, guide, data())
    torch.manual_seed(4)
    draws = guide.sample(3, data())["z"]
    by_hand = []
    for z in draws:
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(data())
        trace.compute_log_prob()
        by_hand.append(trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"])
    torch.testing.assert_close(value, torch.stack(by_hand).mean(0))
    _, grads = gradients(losses.ExpectedLogJoint(), model, guide, data())
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_expected_log_joint_counts_the_jacobian():
    """u = log s: log p(s) + log s, here with s ~ Gamma(3, 2)."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    guide = guides.ShortRun(problems.gamma_normal, num_steps=2)
    torch.manual_seed(0)
    value = losses.ExpectedLogJoint().per_datum(problems.gamma_normal, guide, x)
    torch.manual_seed(0)
    draw = {k: v[0] for k, v in guide.sample(1, x).items()}
    s, z = draw["s"], draw["z"]
    by_hand = (
        dist.Gamma(3.0, 2.0).log_prob(s) + s.log() + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        + dist.Normal((s * z.sum(-1)).unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    )  # fmt: skip
    torch.testing.assert_close(value, by_hand)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: losses.IWAE(0), "at least one sample"), (lambda: losses.ELBO("stratified", 0), "at least one sample"),
     (lambda: losses.ExpectedLogJoint(-1), "at least one sample"), (lambda: losses.ELBO("nuts"), "estimator"),
     (lambda: losses.ELBO("stl", 0), "at least one sample"), (lambda: losses.IWAE(3, "stl"), "estimator")],
)  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_guide_of_another_model_is_refused():
    for name, loss in losses.REGISTRY.items():
        if name != "E_q log p(x,z)":
            kind = "recursive-mixture" if loss().traits.needs_stages else "amortized"
            guide = GUIDES[kind](vae(), PIXELS, DIM, torch.float64)
            with pytest.raises(IncompatibleError, match="another model"):
                losses.REGISTRY[name]().loss(vae(), guide, data())


@pytest.mark.parametrize("make", [lambda: losses.ELBO("stl"), lambda: losses.ELBO("stratified"),
                                  lambda: losses.IWAE(3), lambda: losses.IWAE(3, "dreg")])  # fmt: skip
def test_a_stock_guide_is_told_which_loss_to_use(make):
    model = vae()
    for guide in (AutoDiagonalNormal(model), lambda x: None):
        for call in (make().loss, make().per_datum):
            with pytest.raises(IncompatibleError, match=r"takes one of pyrovae\.guides.*use losses\.ELBO\(\)"):
                call(model, guide, data())


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal])
def test_the_elbo_takes_stock_guides(make):
    model = ppca()
    torch.manual_seed(0)
    guide = make(poutine.block(model, expose=["z"]))
    guide(data())
    values = []
    for loss in (losses.ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(1)
        values.append(loss.loss(model, guide, data()))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    if make is AutoNormal:
        torch.manual_seed(1)
        assert -float(losses.ELBO().per_datum(model, guide, data()).sum()) == pytest.approx(values[0], rel=1e-12)
    else:  # one block for all rows
        with pytest.raises(PlateError, match=r"outside the plate 'data'.*loss\.loss"):
            losses.ELBO().per_datum(model, guide, data())


# Sticking the landing and doubly reparameterised gradients (their means and noise: test_gradient_estimators.py)


def small(name, dtype=torch.float32):
    model = vae(dtype)
    return model, GUIDES[name](model, PIXELS, DIM, dtype)


NEW = {
    "stl": lambda: losses.ELBO("stl"), "stl-3": lambda: losses.ELBO("stl", 3), "dreg": lambda: losses.IWAE(4, "dreg"),
}  # fmt: skip
ANY = ["amortized", "amortized-full-rank", "amortized-low-rank", "semi-amortized", "laplace", "laplace-averaged"]


@pytest.mark.parametrize("loss", NEW)
@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4])
def test_value_dtype_and_rows(name, loss, dtype, rows):
    """The value is the bound itself: that of log_weights at the same draws; with gradient or without."""
    model, guide = small(name, dtype)
    x, objective = data(rows).to(dtype), NEW[loss]()
    number = objective.num_particles
    torch.manual_seed(0)
    value = objective.per_datum(model, guide, x)
    assert value.shape == (rows,)
    assert value.dtype == dtype
    torch.manual_seed(0)
    weights = guide.log_weights(number, x)
    expected = torch.logsumexp(weights, 0) - math.log(number) if loss == "dreg" else weights.mean(0)
    torch.testing.assert_close(value, expected)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(objective.per_datum(model, guide, x), expected)
    value.sum().backward()
    for p in (*model.parameters(), *guide.parameters()):
        assert p.grad.dtype == dtype
        assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("loss", NEW)
def test_joint_mode(loss):
    """The whole program as one datum, draws by vmap."""
    model = problems.eight_schools()
    guide = guides.Amortized(model, None, "full-rank", plate=None)
    objective = NEW[loss]()
    torch.manual_seed(0)
    value = objective.per_datum(model, guide)
    torch.manual_seed(0)
    weights = guide.log_weights(objective.num_particles)
    expected = torch.logsumexp(weights, 0) - math.log(4) if loss == "dreg" else weights.mean(0)
    torch.testing.assert_close(value, expected)
    (g,) = torch.autograd.grad(value.sum(), guide.constant)
    assert (g != 0).all()


@pytest.mark.parametrize("loss", NEW)
def test_a_frozen_guide_trains_the_model_alone(loss):
    model, guide = small("amortized")
    for p in guide.parameters():
        p.requires_grad_(False)
    _, grads = gradients(NEW[loss](), model, guide, data(4).float())
    number = len(list(model.parameters()))
    assert all(g.abs().sum() > 0 for g in grads[:number])
    assert all(g is None for g in grads[number:])


@pytest.mark.parametrize("loss", NEW)
@pytest.mark.parametrize("name", ["mixture", "amortized-mixture", "semi-amortized-mixture"])
def test_mixtures_are_refused(name, loss):
    model, guide = small(name)
    for call in (NEW[loss]().per_datum, NEW[loss]().loss_and_grads):
        with pytest.raises(IncompatibleError, match=r"is not fully reparameterised.*ELBO\(estimator='stratified'\)"):
            call(model, guide, data(3).float())


@pytest.mark.parametrize("loss", ["stl", "dreg"])
@pytest.mark.parametrize("name", ["amortized", "semi-amortized", "laplace"])
def test_stock_svi_trains_with_it(name, loss):
    """Sixty steps, ragged last batches; the data's IWAE-200 rises by more than 5 paired standard errors."""
    model, guide = small(name)
    x = data(46).float() * 0.3
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), NEW[loss]())
    score = losses.IWAE(200)
    with torch.no_grad():
        before = score.per_datum(model, guide, x)
        for _ in range(30):
            with torch.enable_grad():
                svi.step(x[:32])
                svi.step(x[32:])
        gain = score.per_datum(model, guide, x) - before
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


@pytest.mark.parametrize(("loss", "name"), [("stl", "ELBO"), ("dreg", "IWAE-4")])
def test_fit_takes_it(loss, name):
    """The curve's last epoch is the objective itself: within 4 se of its value at the weights that stay fixed."""
    model, guide = small("amortized")
    x = data(40).float()
    result = fit(model, guide, x, loss=NEW[loss](), epochs=1, batch_size=16, progress=False, validation=x,
                 optimizer=pyro.optim.Adam({"lr": 0.0}))  # fmt: skip
    assert result.objective == name
    with torch.no_grad():
        runs = torch.stack([NEW[loss]().per_datum(model, guide, x).mean() for _ in range(200)])
    assert abs(result.curve[-1] - float(runs.mean())) < 4 * float(runs.std())
    assert abs(result.validation[-1][1] - float(runs.mean())) < 4 * float(runs.std())
