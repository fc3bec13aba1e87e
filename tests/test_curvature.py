"""Curvature: Fisher products by definition, the precision against autograd's Hessian, fast path against generic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae import models
from pyrovae.curvature import Curvature, floor_eigenvalues
from pyrovae.fisher import fisher
from pyrovae.latents import LatentSpace
from pyrovae.nets import LinearHeadDecoder

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def hessian(space: LatentSpace, u: Tensor, *args: Any) -> Tensor:
    """Minus the Hessian of the log-joint per datum, by autograd, `[B, D, D]`."""
    u = u.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(space.log_joint(u, *args).sum(), u, create_graph=True)
    columns = [torch.autograd.grad(gradient[:, d].sum(), u, retain_graph=True)[0] for d in range(u.shape[1])]
    return -torch.stack(columns, -1)


# The Fisher registry

PARAMETERS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "Normal": (dist.Normal, {"loc": randn(3), "scale": randn(3, seed=1).exp()}),
    "Laplace": (dist.Laplace, {"loc": randn(3), "scale": randn(3, seed=1).exp()}),
    "Bernoulli": (dist.Bernoulli, {"logits": randn(3)}),
    "Categorical": (dist.Categorical, {"logits": randn(3, 4)}),
    "Poisson": (dist.Poisson, {"rate": randn(3).exp()}),
    "NegativeBinomial": (
        lambda logits: dist.NegativeBinomial(torch.tensor(2.5, dtype=DOUBLE), logits=logits), {"logits": randn(3)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARAMETERS)
def test_fisher_is_the_covariance_of_the_score(case: str) -> None:
    """F v = E[s s'v], s the gradient of log p in the parameters; different parameters are uncorrelated."""
    make, parameters = PARAMETERS[case]
    number = 20_000
    draws = make(**parameters).sample((number,))
    leaves = {name: value.expand(number, *value.shape).clone().requires_grad_() for name, value in parameters.items()}
    scores = torch.autograd.grad(make(**leaves).log_prob(draws).sum(), list(leaves.values()))
    blocks = fisher(make(**parameters))
    assert blocks is not None
    assert set(blocks) == set(parameters)
    for (name, value), score in zip(parameters.items(), scores, strict=True):
        tangent = randn(*value.shape, seed=2)
        torch.testing.assert_close(blocks[name].parameter, getattr(make(**parameters), name))
        along = score * tangent
        terms = score * (along.sum(-1, keepdim=True) if case == "Categorical" else along)
        error = terms.mean(0) - blocks[name].product(tangent)
        assert (error.abs() < 4 * terms.std(0) / math.sqrt(number) + 1e-12).all()  # a Laplace score squared is constant
        for other in scores:
            if other is not score:
                cross = score * other
                assert (cross.mean(0).abs() < 4 * cross.std(0) / math.sqrt(number) + 1e-12).all()


def test_wrapped_distributions_have_the_fisher_information_of_their_base() -> None:
    base = dist.Poisson(randn(2, 3).exp())
    for fn in (base.to_event(1), base.mask(torch.ones(2, 3) > 0), base.mask(torch.ones(2, 3) > 0).to_event(2)):
        blocks = fisher(fn)
        assert blocks is not None
        assert torch.equal(blocks["rate"].product(base.rate), torch.ones(2, 3, dtype=DOUBLE))
    assert fisher(dist.StudentT(3.0)) is None


# Models whose Gauss-Newton matrix is the Hessian

W, HIDDEN, OUTPUT = randn(5, 2, seed=3), randn(2, 8, seed=4), randn(8, 5, seed=5)


def linear_gaussian(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.5).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, 0.7).to_event(1), obs=x)


def logistic(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ W.T).to_event(1), obs=(x > 0).double())


def relu_net(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        logits = torch.relu(z @ HIDDEN + 0.1) @ OUTPUT
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=(x > 0).double())


def poisson(x: Tensor) -> None:
    """Canonical link: J'FJ in the rate equals the Hessian."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((0.5 * z @ W.T).exp()).to_event(1), obs=x.abs().round())


def categorical(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Categorical(logits=z @ W.T), obs=x.argmax(-1))


def scalar_site(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0))
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(2 * z - w, 0.5), obs=x[:, 0])


def inner_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("features", x.shape[1], dim=-2):
            t = pyro.sample("t", dist.Normal(x.new_zeros(()), x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0])[:, None]))
            pyro.sample("x", dist.Normal(m + 3 * t, 0.5), obs=x.T)


def masked(how: str) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            fn, rows = dist.Normal(z @ W.T, 0.7), x[:, 0] > 0
            if how == "handler":
                with poutine.mask(mask=rows):
                    pyro.sample("x", fn.to_event(1), obs=x)
            elif how == "rows":
                pyro.sample("x", fn.to_event(1).mask(rows), obs=x)
            elif how == "elements":
                pyro.sample("x", fn.mask(x > 0).to_event(1), obs=x)
            elif how == "both":
                pyro.sample("x", fn.mask(x > 0).to_event(1).mask(rows), obs=x)
            else:
                with poutine.mask(mask=False):
                    pyro.sample("x", fn.to_event(1), obs=x)

    return model


def scaled(where: str) -> Callable[[Tensor], None]:
    """A user's scale, one number per row."""

    def model(x: Tensor) -> None:
        per_row = x[:, 0].abs() + 0.1
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=per_row if where == "latent" else 1.0):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.5).to_event(1))
            with poutine.scale(scale=per_row if where == "observed" else 1.0):
                pyro.sample("x", dist.Normal(z @ W.T, 0.7).to_event(1), obs=x)

    return model


def masked_categorical(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        logits = torch.stack([z @ W.T, -z @ W.T], -2)  # two draws from five classes
        obs = torch.stack([x.argmax(-1), x.argmin(-1)], -1)
        pyro.sample("x", dist.Categorical(logits=logits).mask(torch.stack([x[:, 0] > 0, x[:, 1] > 0], -1)).to_event(1),
                    obs=obs)  # fmt: skip


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", 100, subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.5).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, 0.7).to_event(1), obs=x)


def outside_the_registry(x: Tensor) -> None:
    """A heavy-tailed observation, a factor and a constrained latent: all in the exact Hessian."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 0.3).to_event(1))
        s = pyro.sample("s", dist.Gamma(x.new_tensor(20.0), 20.0))
        pyro.sample("x", dist.StudentT(5.0, z @ W.T, s.unsqueeze(-1) + 3).to_event(1), obs=x)
        pyro.factor("f", -(z**4).sum(-1))
        pyro.sample("y", dist.Normal(z[:, 0], 1.0), obs=x[:, 0])


def moving_count(x: Tensor) -> None:
    """A negative binomial whose total count depends on the latents has no registered Fisher information."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 0.2).to_event(1))
        fn = dist.NegativeBinomial((z[:, :1] + 2).exp().expand(-1, 5), logits=0.3 * z @ W.T)
        pyro.sample("x", fn.to_event(1), obs=(5 * x.abs()).round())


def summed_out(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)))
        z = pyro.sample("z", dist.Normal(0.2 * k, 1.0))
        pyro.sample("x", dist.Normal(z + 0.1 * k, 1.0), obs=x[:, 0])


EXACT = {
    "linear-Gaussian": linear_gaussian,
    "logistic": logistic,
    "ReLU net": relu_net,
    "Poisson": poisson,
    "categorical": categorical,
    "scalar sites": scalar_site,
    "inner plate": inner_plate,
    "subsampled": subsampled,
    "outside the registry": outside_the_registry,
    "moving count": moving_count,
    "summed out": summed_out,
    "masked categorical": masked_categorical,
    **{f"mask: {how}": masked(how) for how in ("handler", "rows", "elements", "both", "nothing counts")},
    **{f"scale: {where}": scaled(where) for where in ("latent", "observed")},
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("case", EXACT)
def test_expansion_is_that_of_the_log_joint(case: str, rows: int) -> None:
    model, x = EXACT[case], randn(rows, 5, seed=6)
    space = LatentSpace(model, x)
    u = 0.3 * randn(rows, space.dim, seed=7)
    found = Curvature(space.bind(x)).at(u)
    leaf = u.clone().requires_grad_()
    value = space.log_joint(leaf, x)
    torch.testing.assert_close(found.log_joint, value.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.gradient, torch.autograd.grad(value.sum(), leaf)[0], rtol=1e-9, atol=1e-9)
    assert not found.floored.any()
    torch.testing.assert_close(found.precision, hessian(space, u, x), rtol=1e-9, atol=1e-9)
    assert not found.precision.requires_grad


def test_scale_parameters_that_move_count_too() -> None:
    """x ~ N(0, exp(z)): J'FJ = 2, whatever the data (the Hessian is 2 x^2 / exp(2 z))."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(x.new_zeros(()), z.exp()), obs=x)

    x = randn(4)
    found = Curvature(LatentSpace(model, x).bind(x)).at(randn(4, 1))
    torch.testing.assert_close(found.precision, torch.full((4, 1, 1), 3.0, dtype=DOUBLE))


def test_annealing_weighs_the_latent_part() -> None:
    for model in (linear_gaussian, outside_the_registry):
        x = randn(3, 5, seed=6)
        space = LatentSpace(model, x)
        u, bound = 0.2 * randn(3, space.dim), space.bind(x)
        whole, part, none = (Curvature(bound, beta=beta).at(u) for beta in (1.0, 0.25, 0.5))
        torch.testing.assert_close(part.log_joint, bound(u, 0.25))
        torch.testing.assert_close(none.precision - part.precision, (whole.precision - part.precision) / 3)
    prior = torch.eye(2, dtype=DOUBLE) / 1.5**2
    x = randn(3, 5, seed=6)
    bound = LatentSpace(linear_gaussian, x).bind(x)
    one, zero = (Curvature(bound, beta=beta).at(randn(3, 2)).precision for beta in (1.0, 0.0))
    torch.testing.assert_close(one - zero, prior.expand(3, 2, 2))


def test_one_structure_serves_other_batches_and_parameters() -> None:
    x = randn(4, 5, seed=6)
    space = LatentSpace(linear_gaussian, x)
    for rows in (4, 2, 1):
        expected = torch.eye(2, dtype=DOUBLE) / 1.5**2 + W.T @ W / 0.49
        precision = Curvature(space.bind(x[:rows])).at(randn(rows, 2)).precision
        torch.testing.assert_close(precision, expected.expand(rows, 2, 2))


# Joint mode


def test_joint_mode() -> None:
    y, sigma = randn(8) * 10, randn(8, seed=1).exp() * 10

    def schools(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.LogNormal(y.new_zeros(()), 1.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    space = LatentSpace(schools, y, plate=None)
    u = 0.3 * randn(1, 10)
    found = Curvature(space.bind(y)).at(u)
    tau, eta = u[0, 1].exp(), u[0, 2:]
    by_tau, by_eta = (tau * eta).unsqueeze(-1), tau * torch.eye(8, dtype=DOUBLE)
    jacobian = torch.cat([torch.ones(8, 1, dtype=DOUBLE), by_tau, by_eta], 1)
    prior = torch.diag(torch.tensor([1 / 25, 1.0, *[1.0] * 8], dtype=DOUBLE))
    expected = prior + jacobian.T @ (jacobian / sigma.unsqueeze(-1) ** 2)
    torch.testing.assert_close(found.precision[0], expected, rtol=1e-9, atol=1e-9)
    assert not found.floored.any()


# Not positive definite


def test_hierarchical_prior_is_floored_and_says_so() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            log_s = pyro.sample("log_s", dist.Normal(x.new_zeros(()), 3.0))
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), log_s.exp().unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 5.0), obs=x)

    x = randn(2)
    space = LatentSpace(model, x)
    u = torch.tensor([[0.0, 2.0, 1.0, -1.0], [0.0, 0.1, 0.1, 0.1]], dtype=DOUBLE)
    found = Curvature(space.bind(x), floor=0.05).at(u)
    exact = hessian(space, u, x)
    negative = torch.linalg.eigvalsh(exact)[:, 0] < 0
    assert negative.any()
    assert not negative.all()
    assert torch.equal(found.floored, negative)
    torch.testing.assert_close(found.precision[~negative], exact[~negative])
    values, vectors = torch.linalg.eigh(exact[negative])
    expected = vectors @ torch.diag_embed(values.abs().clamp_min(0.05)) @ vectors.mT
    torch.testing.assert_close(found.precision[negative], expected)


def test_floor() -> None:
    good = torch.eye(2, dtype=DOUBLE) * 1e-6
    bad = torch.diag(torch.tensor([-3.0, -1e-9], dtype=DOUBLE))
    nan = torch.full((2, 2), math.nan, dtype=DOUBLE)
    found, floored = floor_eigenvalues(torch.stack([good, bad, nan]), 0.1)
    assert floored.tolist() == [False, True, True]
    torch.testing.assert_close(found[0], good)
    torch.testing.assert_close(found[1], torch.diag(torch.tensor([3.0, 0.1], dtype=DOUBLE)))
    torch.testing.assert_close(found[2], 0.1 * torch.eye(2, dtype=DOUBLE))


# The fast path


class Generic:
    """The same model without its fast path."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any) -> None:
        self.model(*args)


def decoder(activation: type[nn.Module], shape: tuple[int, ...] = (5,)) -> LinearHeadDecoder:
    torch.manual_seed(8)
    return LinearHeadDecoder(2, [6, 7], shape, activation).double()


FAST = {
    "bernoulli": (models.VAE(decoder(nn.ReLU), 2), (5,)),
    "gaussian": (models.VAE(decoder(nn.Tanh), 2, "gaussian"), (5,)),
    "images": (models.VAE(decoder(nn.Tanh, (2, 3)), 2), (2, 3)),
    "pPCA": (models.PPCA(W, noise=0.5), (5,)),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("case", FAST)
def test_fast_path_equals_the_generic_one(case: str, rows: int) -> None:
    model, shape = FAST[case]
    assert model.linear_head("x") is not None
    x = (randn(rows, *shape, seed=6) > 0).double()
    u = randn(rows, 2)
    fast, slow = (Curvature(LatentSpace(m, x).bind(x)).at(u) for m in (model, Generic(model)))
    for one, other in zip(fast[:3], slow[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class TwoHeads(nn.Module):
    """Two observed sites on one trunk; `wrong` names the site whose head lies."""

    def __init__(self, wrong: str | None) -> None:
        super().__init__()
        self.wrong = wrong
        torch.manual_seed(8)
        self.trunk = nn.Sequential(nn.Linear(2, 6), nn.Tanh()).double()
        self.x, self.y = nn.Linear(6, 5).double(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.x(self.trunk(z)), 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(self.y(self.trunk(z)), 1.0).to_event(1), obs=x[:, :3])

    def linear_head(self, site: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        return self.trunk, getattr(self, site).weight * (1.1 if site == self.wrong else 1.0)


@pytest.mark.parametrize("wrong", ["x", "y"])
def test_wrong_head_raises(wrong: str) -> None:
    x = randn(4, 5)
    with pytest.raises(ValueError, match=rf"TwoHeads.linear_head\('{wrong}'\) does not reproduce.*correct the method"):
        Curvature(LatentSpace(TwoHeads(wrong), x).bind(x)).at(randn(4, 2))


def test_head_is_verified_again_when_parameters_change() -> None:
    model, x, u = TwoHeads(None), randn(4, 5), randn(4, 2)
    curvature = Curvature(LatentSpace(model, x).bind(x))
    slow = Curvature(LatentSpace(Generic(model), x).bind(x))
    torch.testing.assert_close(curvature.at(u).precision, slow.at(u).precision, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        model.y.weight.mul_(1.5)
    torch.testing.assert_close(curvature.at(u).precision, slow.at(u).precision, rtol=1e-10, atol=1e-10)
    model.wrong = "y"
    with torch.no_grad():
        model.y.weight.mul_(1.5)
    with pytest.raises(ValueError, match="linear_head"):
        curvature.at(u)


# Differentiating through


@pytest.mark.parametrize("path", ["fast", "generic"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_log_determinant_is_differentiable(path: str, likelihood: Any) -> None:
    """With respect to the decoder's weights and the point, against finite differences."""
    vae = models.VAE(decoder(nn.Softplus), 2, likelihood)
    model = vae if path == "fast" else Generic(vae)
    x = (randn(2, 5, seed=6) > 0).double()
    bound = LatentSpace(model, x).bind(x)
    names = ["trunk.0.weight", "head.weight", "head.bias"]
    leaves = dict(vae.decoder.named_parameters())

    def log_det(u: Tensor) -> Tensor:
        return torch.linalg.slogdet(Curvature(bound).at(u, create_graph=True).precision)[1].sum()

    u = randn(2, 2).requires_grad_()
    points = [u, *(leaves[name] for name in names)]
    gradients = torch.autograd.grad(log_det(u), points, materialize_grads=True, allow_unused=True)
    step = 1e-5
    for leaf, gradient in zip(points, gradients, strict=True):
        direction = randn(*leaf.shape, seed=9)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.add_(sign * step * direction)
            ends.append(log_det(u).item())
            with torch.no_grad():
                leaf.sub_(sign * step * direction)
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_gradient_and_log_joint_are_differentiable_too() -> None:
    x = randn(2, 5, seed=6)
    bound = LatentSpace(poisson, x).bind(x)
    u = randn(2, 2).requires_grad_()

    def expansion(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(Curvature(bound).at(u, create_graph=True))[:3]

    assert torch.autograd.gradcheck(expansion, (u,))
    with torch.no_grad():  # inner loops of an evaluation
        found = Curvature(bound).at(u)
    assert not found.gradient.requires_grad
    torch.testing.assert_close(found.precision, expansion(u)[2].detach())


def test_a_term_linear_in_the_latents_may_have_parameters() -> None:
    class Tilted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0]).double())

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.factor("tilt", (z * self.w).sum(-1))
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = randn(3, 2)
    curvature = Curvature(LatentSpace(Tilted(), x).bind(x))
    expected = 5.0 * torch.eye(2, dtype=torch.double)
    assert torch.allclose(curvature.at(x).precision, expected.expand(3, 2, 2))
    p = randn(4, 3, 2)
    assert torch.allclose(curvature.products(x)(p), 5.0 * p)
    assert torch.allclose(curvature.operator(x).product(p[0]), 5.0 * p[0])


def test_a_head_with_large_parameters_is_right_too() -> None:
    torch.manual_seed(0)
    model = models.VAE(LinearHeadDecoder(3, [200, 200], (50,)), 3)
    with torch.no_grad():
        model.decoder.head.weight.mul_(500.0)
    x = (torch.randn(6, 50) > 0).float()
    found = Curvature(LatentSpace(model, x).bind(x)).at(3 * torch.randn(6, 3))
    assert found.precision.isfinite().all()


def test_group_norm_goes_one_direction_at_a_time() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.GroupNorm(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    model = models.VAE(net.double(), 2, "gaussian")
    x, u = randn(3, 5), randn(3, 2)
    curvature = Curvature(LatentSpace(model, x).bind(x))
    p = randn(4, 3, 2)
    precision, _ = curvature.precision(u)
    with pytest.warns(UserWarning, match="one direction at a time"):
        found = curvature.products(u)(p)
    assert torch.allclose(found, (precision @ p.unsqueeze(-1)).squeeze(-1), rtol=1e-9)
