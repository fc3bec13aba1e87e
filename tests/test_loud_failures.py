"""Every failure of the lower rooms is loud: the right error, and a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyrovae import guides, handlers, models
from pyrovae.errors import (
    BatchError,
    DataError,
    IncompatibleError,
    LatentError,
    ParameterCollision,
    PlateError,
    ScaleError,
)
from pyrovae.families import DiagonalNormal, FullRankNormal, LowRankNormal, MixtureOfNormals, get_family
from pyrovae.latents import LatentSpace
from pyrovae.losses.base import require_pair

X = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 2.0], [0.1, 0.2], [0.9, -0.3]])


def good(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).to_event(1), obs=x)


def bernoulli(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1).expand(x.shape)).to_event(1), obs=x)


# Plates


def test_missing_plate_lists_the_plates() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(PlateError, match=r"no plate 'data' \(plates found: 'rows' \(size 5\)\).*'other'.*plate=None"):
        LatentSpace(model, X)
    assert LatentSpace(model, X, plate="rows").dim == 1


def test_no_plate_at_all() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[:, 0])

    with pytest.raises(PlateError, match="plates found: none"):
        LatentSpace(model, X)


def test_latent_outside_the_plate() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(PlateError, match=r"\['mu'\] lie outside the plate 'data'.*\(size 5\).*poutine.condition"):
        LatentSpace(model, X)


@pytest.mark.parametrize("statement", ["sample", "factor"])
def test_observation_outside_the_plate(statement: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if statement == "sample":
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[:, 0])
        else:
            pyro.factor("x", z.sum())

    with pytest.raises(PlateError, match=r"\['x'\] lie outside the plate 'data'.*move them inside"):
        LatentSpace(model, X)


def test_plate_that_draws_its_own_rows() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as idx:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[idx, 0])

    with pytest.raises(PlateError, match=r"draws its own 2 of 5 rows.*pass the mini-batch.*subsample=idx"):
        LatentSpace(model, X)
    guide = guides.Amortized(model, nn.Linear(2, 2))
    with pytest.raises(PlateError, match="subsample=idx"):
        SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step(X)


def test_data_plate_must_be_the_outermost() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("features", 2, dim=-1), pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(PlateError, match="outermost one, at dim -1, but has dim -2"):
        LatentSpace(model, X)


def test_subsampled_inner_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("features", 8, subsample=torch.arange(2), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    with pytest.raises(PlateError, match="inner plate 'features' is subsampled: only the data plate may be"):
        LatentSpace(model, X)


def test_batch_dims_outside_any_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0))
            pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x[:, 0])

    with pyro.validation_enabled(False), pytest.raises(PlateError, match=r"'z' has batch shape \[2\].*to_event"):
        LatentSpace(model, X)


def test_observation_that_broadcasts_against_the_plate() -> None:
    """The classic: data [B, 1] beside a mean [B] make a density [B, B], summed without a word."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, :1])

    with pytest.raises(BatchError):
        LatentSpace(model, X[:1])
    for rows in (2, 5):
        with pytest.raises(PlateError, match=r"'x' has batch shape.*to_event.*same shape"):
            LatentSpace(model, X[:rows])


# Data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_data_that_are_not_finite(value: float) -> None:
    x = X.clone()
    x[1, 1] = value
    with pytest.raises(DataError, match="argument 0 has 1 NaN or infinite values: .*before inference"):
        LatentSpace(good, x)
    space = LatentSpace(good, X)
    with pytest.raises(DataError, match="'x' has 1 NaN or infinite"):
        space.log_joint(torch.zeros(5, 1), x=x)
    with pytest.raises(DataError, match="NaN or infinite"):
        guides.Amortized(good, nn.Linear(2, 2)).log_weights(3, x)


def test_grey_values_under_a_bernoulli() -> None:
    with pytest.raises(DataError, match="10 of 10|5 of 5.*'x'.*Bernoulli: binarise them, or use a continuous"):
        LatentSpace(bernoulli, X.sigmoid())
    space = LatentSpace(bernoulli, (X > 0).float())
    for lead in ((), (3,)):
        with pytest.raises(DataError, match="binarise"):
            space.log_joint(torch.zeros(*lead, 5, 1), X.sigmoid())
    vae = models.VAE(nn.Linear(1, 2), 1)
    with pytest.raises(DataError, match="grey values.*binarise.*likelihood='gaussian'"):
        vae(X.sigmoid())
    with pytest.raises(DataError, match="binarise"):
        guides.Amortized(vae, nn.Linear(2, 2)).log_weights(2, X.sigmoid())


def test_data_outside_the_support() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(1.0, 1.0))
            pyro.sample("x", dist.Exponential(z), obs=x[:, 1])

    with pytest.raises(DataError, match=r"2 of 5 data at site 'x' lie outside the support of Exponential"):
        LatentSpace(model, X)
    space = LatentSpace(model, X.abs())
    with pytest.raises(DataError, match="outside the support of Exponential"):
        space.log_joint(torch.zeros(5, 1), X)


@pytest.mark.parametrize("how", ["handler", "mask", "elementwise", "nothing counts"])
def test_masked_data_may_be_anything(how: str) -> None:
    """Missing pixels coded as -1."""
    x = (X > 0).float()
    x[0, 1] = x[3] = -1.0
    seen = x >= 0

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pixel = dist.Bernoulli(logits=z.unsqueeze(-1).expand(x.shape))
            if how == "handler":
                with poutine.mask(mask=(x >= 0).all(-1)):
                    pyro.sample("x", pixel.to_event(1), obs=x)
            elif how == "mask":
                pyro.sample("x", pixel.to_event(1).mask((x >= 0).all(-1)), obs=x)
            elif how == "elementwise":
                pyro.sample("x", pixel.mask(x >= 0).to_event(1), obs=x)
            else:
                with poutine.mask(mask=False):
                    pyro.sample("x", pixel.to_event(1), obs=x)

    space = LatentSpace(model, x)
    likelihood = torch.distributions.Bernoulli(torch.tensor(0.5)).log_prob(torch.ones(()))
    if how == "elementwise":
        expected = seen.sum(-1) * likelihood
    else:
        expected = 2 * seen.all(-1) * likelihood * (how != "nothing counts")
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    torch.testing.assert_close(space.log_joint(torch.zeros(5, 1), x), prior + expected)


def test_wrong_shape_of_the_data() -> None:
    vae = models.VAE(nn.Linear(1, 2), 1, "gaussian")
    with pytest.raises(DataError, match="data have shape .5, 3., but the decoder makes .2,. per datum"):
        vae(torch.zeros(5, 3))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(DataError, match=r"'x' have shape .5, 3., but the model makes .5, 2.: reshape"):
        LatentSpace(model, torch.zeros(5, 3))
    with pytest.raises(DataError, match="reshape one of them"):
        LatentSpace(model, X).log_joint(torch.zeros(5, 2), torch.zeros(5, 3))


def test_wrong_shape_of_u() -> None:
    space = LatentSpace(good, X)
    with pytest.raises(ValueError, match=r"u has shape \(4, 1\), expected \[..., 5, 1\]"):
        space.log_joint(torch.zeros(4, 1), X)


# Latents


def test_discrete_latent_without_enumeration() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(2.0))
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(LatentError, match=r"discrete latent 'k' \(Poisson\).*sum it out by hand"):
        LatentSpace(model, X)


def test_only_discrete_latents() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    with pytest.raises(LatentError, match="no continuous latent"):
        LatentSpace(model, X)


@pytest.mark.parametrize("fn", [dist.Wishart(3.0, torch.eye(2)), dist.ProjectedNormal(torch.ones(3))])
def test_support_without_coordinates(fn: Any) -> None:
    """No bijection from R^n with a Jacobian: matrices of full storage, points on a sphere."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", fn)
            pyro.sample("x", dist.Normal(m.flatten(1).sum(-1), 1.0), obs=x[:, 0])

    with pytest.raises(LatentError, match="support of site 'm'.*no coordinates in R.n.*reparameterise"):
        LatentSpace(model, X)


def test_kl_weight_beside_summed_latents() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(ScaleError, match="summed out"):
        LatentSpace(model, X).bind(X)(torch.zeros(5, 1), 0.5)


# Rows


def test_rows_that_see_each_other() -> None:
    def model(x: Tensor) -> None:
        centred = x - x.mean(0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=centred[:, 0])

    with pytest.raises(BatchError, match="depends on the other rows.*argument 0.*rows that see each other"):
        LatentSpace(model, X)


class Normalised(nn.Module):
    def __init__(self, track: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, track_running_stats=track)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)


def test_batch_norm_is_judged_in_eval_mode() -> None:
    model = Normalised(track=True)
    model.norm.running_mean.fill_(0.5)
    LatentSpace(model, X)
    assert model.training
    with pytest.raises(BatchError, match="rows that see each other"):  # batch statistics even in eval mode
        LatentSpace(Normalised(track=False), X)


def test_length_b_hyper_parameter_taken_for_data() -> None:
    def model(x: Tensor, weights: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(weights.sum(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(BatchError, match=r"argument 0, argument 1.*not data \(pass batched"):
        LatentSpace(model, X, torch.arange(5.0))
    assert LatentSpace(model, X, torch.arange(5.0), batched=(0,)).dim == 1
    with pytest.raises(BatchError, match="batched names the argument 'y'"):
        LatentSpace(model, X, torch.arange(5.0), batched=("y",))
    assert LatentSpace(model, X, torch.arange(4.0)).dim == 1


# Scales


@pytest.mark.parametrize("per_row", [False, True])
def test_importance_weights_refuse_a_scale(per_row: bool) -> None:
    def model(x: Tensor) -> None:
        scale: Any = 1 - 0.5 * (x[:, 0] > 1) if per_row else 0.5
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = guides.Amortized(model, nn.Linear(2, 2))
    with pytest.raises(ScaleError, match="'z' has scale 0.5.*KL weight 1"):
        guide.log_weights(2, X)
    with pytest.raises(ScaleError, match="'z' has scale 0.5"):
        LatentSpace(model, X).require_unit_scale(X)


def test_importance_weights_refuse_a_kl_weight() -> None:
    guide = guides.Amortized(good, nn.Linear(2, 2))
    with handlers.anneal(0.5), pytest.raises(ScaleError, match="KL weight of 0.5: evaluate with 1"):
        guide.log_weights(2, X)
    assert guide.log_weights(2, X).shape == (2, 5)


def test_negative_kl_weight() -> None:
    for beta in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="must not be negative"):
            handlers.anneal(beta)


# Guides


def vae() -> models.VAE:
    return models.VAE(nn.Linear(1, 2), 1, "gaussian")


def test_two_models_with_equal_names() -> None:
    """Stock SVI, no scope: the second pair would silently not be trained."""

    def train() -> None:
        model = vae()
        svi = SVI(model, guides.Amortized(model, nn.Linear(2, 2)), Adam({"lr": 1e-3}), Trace_ELBO())
        svi.step(X)
        svi.step(X)

    train()
    with pytest.raises(ParameterCollision, match=r"parameter '.*' of Amortized.*clear_param_store.*scope\(\)"):
        train()
    with pyro.get_param_store().scope():
        train()
    pyro.clear_param_store()
    train()


def test_evaluating_two_models_is_no_collision() -> None:
    for _ in range(2):
        model = vae()
        guide = guides.Amortized(model, nn.Linear(2, 2))
        guide.log_weights(2, X)
        guide.sample(2, X)
        guide.posterior(X)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (nn.Linear(2, 3), r"takes lam with 2 columns \(loc, log_var\), got 3: give the encoder 2 outputs"),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), r"one row of parameters per datum, \[B, P\].*\(10,\)"),
    ],
)
def test_encoder_of_the_wrong_width(encoder: nn.Module, message: str) -> None:
    guide = guides.Amortized(good, encoder)
    for use in (guide.posterior, guide, lambda x: guide.sample(2, x)):
        with pytest.raises(ValueError, match=message):
            use(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_of_another_precision_than_the_encoder(dtype: torch.dtype) -> None:
    other = torch.float64 if dtype == torch.float32 else torch.float32
    guide = guides.Amortized(good, nn.Linear(2, 2, dtype=dtype))
    with pytest.raises(DataError, match=f"the encoder computes in {dtype}, its input is {other}: convert the data"):
        guide.posterior(X.to(other))


def test_guide_of_another_model() -> None:
    first, second = vae(), vae()
    guide = guides.Amortized(first, nn.Linear(2, 2))
    require_pair(first, guide, Trace_ELBO())
    with pytest.raises(IncompatibleError, match="Amortized was built for another model: build a guide"):
        require_pair(second, guide, Trace_ELBO())


def test_constant_posterior_needs_joint_mode() -> None:
    with pytest.raises(ValueError, match="plate=None, or an encoder"):
        guides.Amortized(good, None)


@pytest.mark.parametrize("number", [0, -1])
def test_no_samples(number: int) -> None:
    guide, space = guides.Amortized(good, nn.Linear(2, 2)), LatentSpace(good, X)
    uses: list[Callable[..., Any]] = [guide.sample, guide.log_weights, guide.draws, space.prior]
    for use in uses:
        with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {number}"):
            use(number, X)


# Families


def test_families_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="unknown family 'flow': choose one of diagonal"):
        get_family("flow", 2)
    with pytest.raises(ValueError, match="given for a model with 3"):
        get_family(DiagonalNormal(2), 3)
    with pytest.raises(ValueError, match="at least one dimension"):
        FullRankNormal(0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LowRankNormal(3, rank=0)
    with pytest.raises(ValueError, match="at least one component"):
        MixtureOfNormals(3, 0)
    with pytest.raises(ValueError, match=r"takes lam with 5 columns \(loc, log_diag, lower\), got 4"):
        FullRankNormal(2)(torch.zeros(1, 4))
