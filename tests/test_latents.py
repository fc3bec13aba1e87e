"""LatentSpace: the log-joint against densities written by hand, leading dims, arguments, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrovae import noise
from pyrovae.errors import BatchError, LatentError
from pyrovae.latents import LatentSpace

DOUBLE = torch.float64


def draw(space: LatentSpace, rows: int, *lead: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, rows, space.dim, dtype=space.dtype, generator=generator)


def by_loop(space: LatentSpace, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The log-joint of `[S, B, D]`, one sample at a time."""
    return torch.stack([space.log_joint(one, *args, **kwargs) for one in u])


def log_normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """By hand, in double precision: `torch.distributions` makes float32 of plain numbers."""
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return -0.5 * ((value - loc) / scale) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


# Densities by hand: model, data, and the same density from u alone.


def scalars(x: Tensor) -> None:
    zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(2 * one, 3 * one))
        b = pyro.sample("b", dist.LogNormal(zero, 0.5 * one))
        c = pyro.sample("c", dist.Beta(2 * one, 4 * one))
        pyro.sample("x", dist.Normal(c, a + b), obs=x)


def scalars_by_hand(u: Tensor, x: Tensor) -> Tensor:
    a, b, c = u[..., 0].exp(), u[..., 1].exp(), torch.sigmoid(u[..., 2])
    gamma = 2 * math.log(3) + a.log() - 3 * a  # shape 2, rate 3: Gamma function of 2 is 1
    normal = -0.5 * (u[..., 1] / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    beta = math.log(20) + c.log() + 3 * (1 - c).log()  # B(2, 4) = 1/20
    likelihood = -0.5 * ((x - c) / (a + b)) ** 2 - (a + b).log() - 0.5 * math.log(2 * math.pi)
    return gamma + a.log() + normal + beta + c.log() + (1 - c).log() + likelihood


def simplex(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)))
        pyro.sample("x", dist.Categorical(p), obs=x[:, 0].long())


def simplex_by_hand(u: Tensor, x: Tensor) -> Tensor:
    transform = biject_to(constraints.simplex)
    p = transform(u)
    # The Jacobian of the first two coordinates, by autograd.
    jacobian = torch.stack([torch.func.jacfwd(lambda v: transform(v)[:-1])(row) for row in u.reshape(-1, 2)])
    log_det = torch.linalg.slogdet(jacobian)[1].reshape(u.shape[:-1])
    dirichlet = math.lgamma(6) - math.lgamma(2) - math.lgamma(3) + p[..., 1].log() + 2 * p[..., 2].log()
    likelihood = p.log().gather(-1, x.long().expand(*p.shape[:-1], 1)).squeeze(-1)
    return dirichlet + log_det + likelihood


def cholesky(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(2.0, dtype=x.dtype)))
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), scale_tril=factor), obs=x)


def cholesky_by_hand(u: Tensor, x: Tensor) -> Tensor:
    r = torch.tanh(u[..., 0])  # the correlation; LKJ(2) in two dims has density 3/4 (1 - r^2)
    quadratic = (x[..., 0] ** 2 - 2 * r * x[..., 0] * x[..., 1] + x[..., 1] ** 2) / (1 - r**2)
    return math.log(0.75) + 2 * (1 - r**2).log() - 0.5 * (quadratic + (1 - r**2).log()) - math.log(2 * math.pi)


def matrix(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2, 3), 1.0).to_event(2))
        s = pyro.sample("s", dist.Exponential(x.new_ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-2), s + 0.1).to_event(1), obs=x)


def matrix_by_hand(u: Tensor, x: Tensor) -> Tensor:
    z, log_s = u[..., :6].reshape(*u.shape[:-1], 2, 3), u[..., 6:]
    prior = log_normal(z, 0.0, 1.0).sum((-1, -2)) + (log_s - log_s.exp()).sum(-1)
    return prior + log_normal(x, z.sum(-2), log_s.exp() + 0.1).sum(-1)


def inner_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("features", x.shape[1], dim=-2):
            t = pyro.sample("t", dist.Gamma(x.new_tensor(2.0), 1.0))
            w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(m + w.sum(-1), t), obs=x.T)


def inner_plate_by_hand(u: Tensor, x: Tensor) -> Tensor:
    k = x.shape[1]
    m, log_t, w = u[..., 0], u[..., 1 : 1 + k], u[..., 1 + k :].reshape(*u.shape[:-1], k, 2)
    prior = log_normal(m, 0.0, 2.0) + (2 * log_t - log_t.exp()).sum(-1)
    prior = prior + log_normal(w, 0.0, 1.0).sum((-1, -2))
    return prior + log_normal(x, m.unsqueeze(-1) + w.sum(-1), log_t.exp()).sum(-1)


def weighted(x: Tensor) -> None:
    """A mask, an elementwise mask under to_event, a user's scale and a factor."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("x0", dist.Normal(z, 1.0), obs=x[:, 0])
        pyro.sample("x1", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).mask(x > 0).to_event(1), obs=x)
        with poutine.scale(scale=0.3):
            pyro.sample("x2", dist.Normal(z, 2.0), obs=x[:, 1])
        pyro.factor("f", -(z**4))


def weighted_by_hand(u: Tensor, x: Tensor) -> Tensor:
    z = u[..., 0]
    normal = log_normal(x, z.unsqueeze(-1), 1.0)
    total = log_normal(z, 0.0, 1.0) + torch.where(x[:, 0] > 0, normal[..., 0], 0.0)
    total = total + torch.where(x > 0, normal, 0.0).sum(-1)
    return total + 0.3 * log_normal(x[:, 1], z, 2.0) - z**4


def mixture(x: Tensor) -> None:
    """Two discrete latents, one of which moves a continuous one's prior."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.2, 0.3, 0.5])))
        j = pyro.sample("j", dist.Bernoulli(x.new_tensor(0.4)))
        z = pyro.sample("z", dist.Normal(x.new_tensor([-1.0, 0.0, 2.0])[k], 1.0))
        pyro.sample("x", dist.Normal(z + 0.7 * j, 0.5), obs=x)


def mixture_by_hand(u: Tensor, x: Tensor) -> Tensor:
    z, terms = u[..., 0], []
    for weight, loc in zip((0.2, 0.3, 0.5), (-1.0, 0.0, 2.0), strict=True):
        for j, chance in ((0, 0.6), (1, 0.4)):
            prior = math.log(weight * chance) + log_normal(z, loc, 1.0)
            terms.append(prior + log_normal(x, z + 0.7 * j, 0.5))
    return torch.stack(terms).logsumexp(0)


X = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 2.0], [0.1, 0.2], [0.9, -0.3]], dtype=DOUBLE)
BY_HAND: dict[str, tuple[Callable[..., None], Callable[..., Tensor], Tensor]] = {
    "scalars": (scalars, scalars_by_hand, X[:, 0]),
    "simplex": (simplex, simplex_by_hand, torch.tensor([[0.0], [2.0], [1.0], [1.0]], dtype=DOUBLE)),
    "cholesky": (cholesky, cholesky_by_hand, X),
    "matrix": (matrix, matrix_by_hand, torch.cat([X, X[:, :1]], 1)),
    "inner plate": (inner_plate, inner_plate_by_hand, X),
    "weighted": (weighted, weighted_by_hand, X),
    "mixture": (mixture, mixture_by_hand, X[:, 0]),
}


@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_log_joint_is_the_density_by_hand(case: str, rows: int) -> None:
    model, by_hand, x = BY_HAND[case]
    space = LatentSpace(model, x)
    x = x[:rows]
    for lead in ((), (3,), (2, 3)):
        u = draw(space, rows, *lead)
        torch.testing.assert_close(space.log_joint(u, x), by_hand(u, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", BY_HAND)
def test_float32(case: str) -> None:
    model, by_hand, x = BY_HAND[case]
    x = x.float()
    space = LatentSpace(model, x)
    u = draw(space, len(x), 2)
    value = space.log_joint(u, x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), by_hand(u.double(), x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", sorted(set(BY_HAND) - {"mixture"}))
def test_log_joint_is_differentiable_and_rows_are_independent(case: str) -> None:
    model, by_hand, x = BY_HAND[case]
    space = LatentSpace(model, x)
    u = draw(space, len(x)).requires_grad_()
    (found,) = torch.autograd.grad(space.log_joint(u, x).sum(), u)
    (expected,) = torch.autograd.grad(by_hand(u, x).sum(), u)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", sorted(set(BY_HAND)))
def test_constrain_and_unconstrain_are_inverse(case: str) -> None:
    model, _, x = BY_HAND[case]
    space = LatentSpace(model, x)
    for lead in ((), (1,), (4,)):
        u = draw(space, len(x), *lead)
        values = space.constrain(u)
        for site in space.sites:
            expected = (*lead, *site.inner, len(x))
            assert values[site.name].shape[: len(expected)] == expected, (site.name, lead)
        torch.testing.assert_close(space.unconstrain(values), u, rtol=1e-8, atol=1e-8)


def test_constrained_values_are_those_the_model_sees() -> None:
    space = LatentSpace(inner_plate, X)
    u = draw(space, len(X))
    seen = poutine.trace(poutine.condition(inner_plate, space.constrain(u))).get_trace(X)
    for name, value in space.constrain(u).items():
        assert torch.equal(seen.nodes[name]["value"], value)
        assert seen.nodes[name]["fn"].shape() == value.shape


# Subsampling


def subsampled(idx: Tensor, x: Tensor) -> None:
    with pyro.plate("data", 100, subsample=idx):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_values_per_datum_carry_no_subsampling_scale() -> None:
    x = torch.arange(6, dtype=DOUBLE) / 3
    idx = torch.arange(10, 16)
    space = LatentSpace(subsampled, idx, x)
    plate = space.read_plate(idx, x)
    assert plate is not None
    assert (plate.size, plate.full_size) == (6, 100)
    assert torch.equal(plate.indices, idx)
    for lead in ((), (3,), (40,)):  # 40 x 6 rows are more than the plate's 100
        u = draw(space, 6, *lead)
        expected = 2 * u[..., 0] - u[..., 0].exp() + log_normal(x, u[..., 0].exp(), 1.0)
        torch.testing.assert_close(space.log_joint(u, idx, x), expected, rtol=1e-10, atol=1e-10)
    space.require_unit_scale(idx, x)


# Arguments


def nested(batch: dict[str, Any], scales: Tensor, *, offsets: tuple[Tensor, list[Tensor]]) -> None:
    x = batch["x"]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), scales[0]))
        pyro.sample("x", dist.Normal(z + offsets[0] + offsets[1][0], scales[1]), obs=x)
        pyro.sample("y", dist.Normal(z * batch["name"], 1.0), obs=batch["deep"]["y"])


def test_nested_and_keyword_arguments_are_repeated() -> None:
    batch = {"x": X[:, 0], "name": 2.0, "deep": {"y": X[:, 1]}}
    args, kwargs = (batch, X.new_tensor([1.0, 0.5])), {"offsets": (X[:, 1], [X[:, 0] ** 2])}
    space = LatentSpace(nested, *args, **kwargs)
    u = draw(space, 5, 3)
    z = u[..., 0]
    expected = log_normal(z, 0.0, 1.0) + log_normal(X[:, 0], z + X[:, 1] + X[:, 0] ** 2, 0.5)
    expected = expected + log_normal(X[:, 1], 2 * z, 1.0)
    torch.testing.assert_close(space.log_joint(u, *args, **kwargs), expected)
    assert space.bind(*args, **kwargs).foldable


def test_batched_can_be_named() -> None:
    """A hyper-parameter with as many entries as there are rows."""
    scales = X.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    def model(x: Tensor, scales: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(5), scales).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = X[:, 0]
    with pytest.raises(BatchError, match="batched="):
        LatentSpace(model, x, scales)
    for args, kwargs, batched in (((x, scales), {}, (0,)), ((), {"x": x, "scales": scales}, ("x",))):
        space = LatentSpace(model, *args, batched=batched, **kwargs)
        u = draw(space, 5, 2)
        expected = log_normal(u, 0.0, scales).sum(-1) + log_normal(x, u.sum(-1), 1.0)
        torch.testing.assert_close(space.log_joint(u, *args, **kwargs), expected)


def test_one_row_beside_a_tensor_with_one_row() -> None:
    """B = 1, D = 1: the decoder's matrix has one row too."""

    def model(x: Tensor, weight: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    weight = X.new_ones(1, 2)
    with pytest.raises(BatchError, match="batched="):
        LatentSpace(model, X[:1], weight)
    space = LatentSpace(model, X[:1], weight, batched=(0,))
    u = draw(space, 1, 3)
    expected = log_normal(u, 0.0, 1.0).sum(-1) + log_normal(X[:1], u @ weight, 1.0).sum(-1)
    torch.testing.assert_close(space.log_joint(u, X[:1], weight), expected)


def test_fixed_size_plate() -> None:
    """The model closes over its number of rows: samples run one by one."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = X[:, 0]
    space = LatentSpace(model, x)
    u = draw(space, 5, 3)
    expected = 2 * u[..., 0] - u[..., 0].exp() + log_normal(x, u[..., 0].exp(), 1.0)
    torch.testing.assert_close(space.log_joint(u, x), expected)
    assert space.prior(4, x).shape == (4, 5, 1)


def test_the_data_may_be_in_a_closure() -> None:
    x = X[:, 0]

    def model() -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    space = LatentSpace(model)
    u = draw(space, 5, 3)
    expected = log_normal(u[..., 0], 0.0, 1.0) + log_normal(x, u[..., 0], 1.0)
    torch.testing.assert_close(space.log_joint(u), expected)


def test_plates_may_leave_a_dim_free() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("far", 2, dim=-3):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T.unsqueeze(-2))

    space = LatentSpace(model, X)
    u = draw(space, 5, 3)
    expected = (log_normal(u, 0.0, 1.0) + log_normal(X, u, 1.0)).sum(-1)
    torch.testing.assert_close(space.log_joint(u, X), expected)
    torch.testing.assert_close(space.unconstrain(space.constrain(u)), u)


# Joint mode

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=DOUBLE)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=DOUBLE)


def eight_schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, SIGMA), obs=y)


def eight_schools_by_hand(u: Tensor) -> Tensor:
    mu, tau, eta = u[..., 0], u[..., 1].exp(), u[..., 2:]
    prior = log_normal(mu, 0.0, 5.0) + log_normal(eta, 0.0, 1.0).sum(-1)
    prior = prior + math.log(2 / (5 * math.pi)) - (1 + (tau / 5) ** 2).log() + u[..., 1]
    return prior + log_normal(Y, mu.unsqueeze(-1) + tau.unsqueeze(-1) * eta, SIGMA).sum(-1)


def test_joint_mode_is_the_density_by_hand_and_vmap_is_the_loop() -> None:
    space = LatentSpace(eight_schools, Y, plate=None)
    assert space.dim == 10
    for lead in ((), (1,), (4,), (2, 3)):
        u = draw(space, 1, *lead)
        value = space.log_joint(u, Y)
        assert value.shape == (*lead, 1)
        torch.testing.assert_close(value, eight_schools_by_hand(u), rtol=1e-10, atol=1e-10)
    assert not space._warned, "vmap must not have fallen back"
    u = draw(space, 1, 4)
    torch.testing.assert_close(space.log_joint(u, Y), by_loop(space, u, Y), rtol=1e-12, atol=1e-12)


def test_joint_mode_warns_once_where_vmap_refuses() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        if z.item() > 1e9:  # vmap refuses to branch on values
            raise AssertionError
        pyro.sample("y", dist.Normal(z, 1.0).expand([8]).to_event(1), obs=y)

    space = LatentSpace(model, Y, plate=None)
    u = draw(space, 1, 3)
    expected = log_normal(u[..., 0], 0.0, 1.0) + log_normal(Y, u, 1.0).sum(-1)
    with pytest.warns(UserWarning, match="one by one"):
        torch.testing.assert_close(space.log_joint(u, Y), expected)


def test_joint_mode_round_trip() -> None:
    space = LatentSpace(eight_schools, Y, plate=None)
    for lead in ((), (1,), (4,)):
        u = draw(space, 1, *lead)
        values = space.constrain(u)
        assert values["mu"].shape == lead
        assert values["eta"].shape == (*lead, 8)
        torch.testing.assert_close(space.unconstrain(values), u)


def test_joint_mode_sums_discrete_latents_out() -> None:
    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(y.new_tensor([0.2, 0.8])))
        z = pyro.sample("z", dist.Normal(y.new_tensor([-1.0, 2.0])[k], 1.0))
        s = pyro.sample("s", dist.Gamma(y.new_tensor(2.0), 1.0))
        pyro.sample("y", dist.Normal(z + k, s), obs=y)

    y = X.new_tensor(0.3)
    space = LatentSpace(model, y, plate=None)
    u = draw(space, 1, 3)
    z, s = u[..., 0], u[..., 1].exp()
    terms = [
        math.log(weight) + log_normal(z, loc, 1.0) + log_normal(y, z + k, s)
        for k, (weight, loc) in enumerate(((0.2, -1.0), (0.8, 2.0)))
    ]
    expected = torch.stack(terms).logsumexp(0) + 2 * s.log() - s
    torch.testing.assert_close(by_loop(space, u, y), expected)
    torch.testing.assert_close(space.log_joint(u, y), expected)


def test_conditioning_on_globals_makes_a_local_model() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = X[:, 0]
    assert LatentSpace(model, x, plate=None).dim == 6
    local = poutine.block(poutine.condition(model, {"mu": X.new_tensor(0.7)}), hide=["mu"])
    space = LatentSpace(local, x)
    u = draw(space, 5, 2)
    expected = log_normal(u[..., 0], 0.7, 1.0) + log_normal(x, u[..., 0], 1.0)
    torch.testing.assert_close(space.log_joint(u, x), expected)


# Supports


def test_moving_support_is_scored_but_not_constrained() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(x.new_tensor(2.0), 1.0))
            b = pyro.sample("b", dist.Uniform(x.new_zeros(()), a))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = X[:, 0]
    space = LatentSpace(model, x)
    u = draw(space, 5, 2)
    a, r = u[..., 0].exp(), torch.sigmoid(u[..., 1])
    expected = 2 * u[..., 0] - a + r.log() + (1 - r).log() + log_normal(x, a * r, 1.0)
    torch.testing.assert_close(space.log_joint(u, x), expected)
    with pytest.raises(LatentError, match="support of site 'b'.*reparameterise"):
        space.constrain(u)


def test_bounds_expanded_by_the_plate_are_reduced() -> None:
    def model(x: Tensor) -> None:
        low, high = x.new_tensor([0.0, 1.0]), x.new_tensor([2.0, 5.0])
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(x.new_tensor(-1.0), x.new_tensor(3.0)))
            b = pyro.sample("b", dist.Uniform(low, high).to_event(1))
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    x = X[:, 0]
    space = LatentSpace(model, x)
    u = draw(space, 3, 7)  # another batch size
    values = space.constrain(u)
    torch.testing.assert_close(values["a"], -1 + 4 * u[..., 0].sigmoid())
    torch.testing.assert_close(values["b"][..., 1], 1 + 4 * u[..., 2].sigmoid())
    slope = (u.sigmoid() * (1 - u.sigmoid())).log().sum(-1)  # densities 1/width cancel the widths of the Jacobian
    likelihood = log_normal(x[:3], values["a"] + values["b"].sum(-1), 1.0)
    torch.testing.assert_close(space.log_joint(u, x[:3]), slope + likelihood)


def test_bounds_that_differ_between_data_are_no_fixed_support() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(x - 1, x + 1))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    space = LatentSpace(model, X[:, 0])
    with pytest.raises(LatentError, match="differs between data"):
        space.constrain(draw(space, 5))


# The prior


def test_prior_draws_have_the_priors_moments() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.LogNormal(x * 0 + 0.5, 2.0))
            with pyro.plate("inner", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(x, 1.0))
            pyro.sample("x", dist.Normal(a + b.sum(0), 1.0), obs=x)

    x = X[:3, 0]
    space = LatentSpace(model, x)
    u = space.prior(4000, x)
    assert u.shape == (4000, 3, 3)
    loc = torch.stack([torch.full_like(x, 0.5), x, x], -1)
    scale = x.new_tensor([2.0, 1.0, 1.0])
    assert ((u.mean(0) - loc).abs() < 4 * scale / math.sqrt(4000)).all()
    assert ((u.std(0) / scale - 1).abs() < 4 / math.sqrt(8000)).all()
    assert LatentSpace(eight_schools, Y, plate=None).prior(3, Y).shape == (3, 1, 10)


def test_prior_draws_under_per_datum_noise_do_not_depend_on_chunks() -> None:
    space = LatentSpace(scalars, X[:, 0])
    with noise.per_datum(3, range(5)):
        whole = space.prior(4, X[:, 0])
    with noise.per_datum(3, [4, 2]):
        part = space.prior(4, X[[4, 2], 0])
    assert torch.equal(whole[:, [4, 2]], part)


# What an evaluation leaves alone


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))

    def model(self, x: Tensor) -> None:
        pyro.module("net", self)
        bias = pyro.param("bias", lambda: torch.randn(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.layers(z) + bias, 1.0).to_event(1), obs=x)


class Plain:
    """The style of many tutorials: an object that is no module itself."""

    def __init__(self) -> None:
        self.net = Net()

    def model(self, x: Tensor) -> None:
        self.net.model(x)

    def __call__(self, x: Tensor) -> None:
        self.net.model(x)


def _programs() -> dict[str, tuple[Net, Callable[..., None]]]:
    net, closed, held, plain, called = Net(), Net(), Plain(), Plain(), Plain()
    return {
        "method": (net, net.model),
        "closure": (closed, lambda x: closed.model(x)),
        "closure over a plain object": (held.net, lambda x: held.model(x)),
        "conditioned": (net, poutine.condition(net.model, {"nothing": torch.zeros(())})),
        "plain object's method": (plain.net, plain.model),
        "plain callable": (called.net, called),
    }


@pytest.mark.parametrize("case", _programs())
def test_evaluation_changes_nothing(case: str) -> None:
    net, model = _programs()[case]
    net.layers[2].eval()  # a mixture of flags
    x = X.float()
    flags = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    rng = torch.get_rng_state()
    space = LatentSpace(model, x)
    space.require_unit_scale(x)
    space.read_plate(x)
    assert torch.equal(torch.get_rng_state(), rng)
    with noise.per_datum(0, range(5)):
        space.prior(2, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_construction_leaves_the_parameter_store_alone() -> None:
    pyro.param("other", torch.ones(1))
    LatentSpace(Net().model, X.float())
    assert set(pyro.get_param_store().keys()) == {"other"}


class Scaled(PyroModule):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(scale), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


def test_evaluating_two_models_with_equal_names_changes_neither() -> None:
    """Pyro copies a stored value over a `PyroParam` of the same name: the second model took the first one's scale."""
    x, models = X[:, 0].float(), [Scaled(1.0), Scaled(2.0)]
    for model, scale in zip(models, (1.0, 2.0), strict=True):
        space = LatentSpace(model, x)
        space.require_unit_scale(x)
        space.prior(2, x)
        u = torch.zeros(5, 1)
        expected = log_normal(u[:, 0], 0.0, 1.0) + log_normal(x, 0.0, scale)
        value = space.log_joint(u, x)
        torch.testing.assert_close(value.detach(), expected)
        assert model.scale.item() == pytest.approx(scale)
        value.sum().backward()
        assert model.scale_unconstrained.grad is not None
    assert not list(pyro.get_param_store().keys())


def test_trace_and_validation_of_the_caller_are_left_alone() -> None:
    space = LatentSpace(scalars, X[:, 0])
    with poutine.trace() as outer:
        space.log_joint(draw(space, 5, 2), X[:, 0])
        space.prior(2, X[:, 0])
    assert not [name for name, node in outer.trace.nodes.items() if node["type"] == "sample"]


def test_a_call_without_rows_leaves_later_calls_as_they_were() -> None:
    """A call whose data are not among its arguments must not change how the next batch is evaluated or drawn from."""
    stored = torch.tensor([0.5, -1.0, 2.0], dtype=torch.double)

    def model(x: Tensor | None = None) -> None:
        x = stored if x is None else x
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.0, 1.0], dtype=torch.double)
    unused, used = LatentSpace(model, x), LatentSpace(model)
    assert not used.bind().foldable
    assert used.bind(x).foldable
    with noise.per_datum(0, [0, 1]):
        expected = unused.prior(3, x)
    with noise.per_datum(0, [0, 1]):
        assert torch.equal(used.prior(3, x), expected)
    u = torch.randn(4, 3, 1, dtype=torch.double)
    loop = torch.stack([used.log_joint(one) for one in u])
    assert torch.allclose(used.log_joint(u), loop, atol=1e-12)
