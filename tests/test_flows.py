"""Flows: densities against closed forms and autograd Jacobians, structure, cost, frozen parameters and memory."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyrovae import flows, guides
from pyrovae.families import DiagonalNormal, get_family
from pyrovae.splines import rational_quadratic

DIM = 4
SMALL = {"context": 3, "hidden": (8,), "activation": nn.Tanh}
BUILD: dict[str, Callable[[int, int], flows.Flow]] = {
    "householder": lambda dim, layers: flows.Householder(dim, layers),
    "iaf": lambda dim, layers: flows.IAF(dim, layers, **SMALL),
    "coupling": lambda dim, layers: flows.Coupling(dim, layers, **SMALL),
    "spline": lambda dim, layers: flows.Spline(dim, layers, **SMALL),
}
every_flow = pytest.mark.parametrize("name", BUILD)
with_nets = pytest.mark.parametrize("name", ["iaf", "coupling", "spline"])


def build(name: str, dim: int = DIM, layers: int = 3, dtype: torch.dtype = torch.float64) -> flows.Flow:
    """A flow away from its calm start."""
    torch.manual_seed(1)
    flow = BUILD[name](dim, layers).to(dtype)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return flow


def parameters(flow: flows.Flow, rows: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, flow.num_params, dtype=torch.float64, generator=generator).to(dtype)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


class Passes:
    """Counts the calls of a flow's nets."""

    def __init__(self, flow: flows.Flow) -> None:
        self.count = 0
        for layer in flow.layers:
            layer.nn.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1

    def read(self) -> int:
        count, self.count = self.count, 0
        return count


# Shapes, starts and messages


@every_flow
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(name: str, rows: int, dtype: torch.dtype) -> None:
    flow = build(name, dtype=dtype)
    for lam in (parameters(flow, rows, dtype), flow.init(rows, dtype=dtype)):
        q = flow(lam)
        assert (q.batch_shape, q.event_shape, q.has_rsample) == ((rows,), (DIM,), True)
        u, log_q = flow.rsample_and_log_prob(lam, noise(7, rows, DIM, dtype=dtype))
        for draws, density in ((u, log_q), (q.rsample((7,)), q.log_prob(u))):
            assert (draws.shape, draws.dtype) == ((7, rows, DIM), dtype)
            assert (density.shape, density.dtype) == ((7, rows), dtype)
        assert torch.equal(flow.sample(lam, noise(7, rows, DIM, dtype=dtype)), u)
    stops = [0]
    for block in flow.blocks.values():
        assert block.start == stops[-1]
        stops.append(block.stop)
    assert stops[-1] == flow.num_params


@every_flow
def test_starts_close_to_the_standard_normal(name: str) -> None:
    torch.manual_seed(0)
    flow = BUILD[name](DIM, 2)
    draws = flow.sample(flow.init(1), noise(20_000, 1, DIM, dtype=torch.float32))[:, 0]
    assert draws.mean(0).abs().max() < 0.1
    assert ((draws.std(0) > 0.9) & (draws.std(0) < 1.1)).all()


@pytest.mark.parametrize("name", ["householder", "iaf", "spline"])
def test_one_dimension(name: str) -> None:
    flow = build(name, dim=1, layers=1)
    lam, eps = parameters(flow), noise(50, 3, 1)
    u, log_q = flow.rsample_and_log_prob(lam, eps)
    torch.testing.assert_close(flow(lam).log_prob(u), log_q, rtol=0, atol=1e-12)
    order = eps[:, 0, 0].argsort()
    steps = u[order, 0, 0].diff()
    assert (steps > 0).all() or (name == "householder" and (steps < 0).all())  # one reflection of R turns it round


def test_bad_arguments_are_said_in_one_sentence() -> None:
    for call, message in (
        (lambda: flows.Coupling(1), "needs two dimensions to couple: use Spline"),
        (lambda: flows.IAF(5, hidden=(4,)), r"over 5 dimensions need hidden layers of at least 5 units, got \(4,\)"),
        (lambda: flows.IAF(5, hidden=()), "at least one hidden layer"),
        (lambda: flows.Spline(2, context=0), "context must be at least 1, got 0"),
        (lambda: flows.Spline(2, bins=1), "at least 2 bins"),
        (lambda: flows.Spline(2, bins=100), "at most 50 bins"),
        (lambda: flows.Householder(2, -1), "num_transforms >= 0, got -1"),
        (lambda: flows.IAF(0), "at least one dimension"),
        (lambda: flows.IAF(2)(torch.zeros(1, 3)), r"takes lam with 20 columns \(loc, log_var, context\), got 3"),
        (lambda: flows.IAF(2)(torch.zeros(1, 20).double()), r"float32 weights but got torch.float64 .* call \.to\("),
        (lambda: get_family(flows.IAF(2), 3), r"IAF\(dim=2, .* was given for a model with 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.warns(UserWarning, match="3 reflections in 2 dimensions"):
        flows.Householder(2, 3)


@pytest.mark.parametrize("family", ["householder", "iaf", "coupling", "spline", flows.IAF])
def test_a_flow_that_is_named_but_not_built_is_refused(family: object) -> None:
    """Made on the first call, its weights would be in no state dict, and nobody's to train before that."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"pass the flow itself, family=pyrovae\.flows\.[A-Za-z]+\(dim=D\)"):
        guides.Amortized(model, nn.Linear(2, 4), family)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="pass the flow itself"):
        guides.Amortized(model, nn.Linear(2, 4), lambda dim: flows.IAF(dim)).posterior(torch.zeros(4, 2))


# Densities


@every_flow
def test_density_is_the_base_density_over_the_jacobian(name: str) -> None:
    flow = build(name)
    lam, eps = parameters(flow), noise(4, 3, DIM)
    _, log_q = flow.rsample_and_log_prob(lam, eps)
    base = dist.Normal(torch.zeros_like(eps), 1.0).log_prob(eps).sum(-1)
    for s in range(4):
        for b in range(3):
            row = lam[b : b + 1]
            jacobian = torch.autograd.functional.jacobian(
                lambda e, r=row: flow.sample(r, e.view(1, 1, -1))[0, 0], eps[s, b]
            )
            expected = base[s, b] - torch.linalg.slogdet(jacobian)[1]
            assert abs(log_q[s, b] - expected) < 1e-12


@every_flow
def test_every_way_to_the_density_gives_the_same(name: str) -> None:
    flow = build(name)
    lam = parameters(flow)
    u, log_q = flow.rsample_and_log_prob(lam, noise(6, 3, DIM))
    q = flow(lam)
    v = q.rsample((6,))
    for found, expected in (
        (q.log_prob(v), flow(lam).log_prob(v.clone())),  # remembered, inverted
        (flow(lam).log_prob(u), log_q),
        (flow.frozen_log_prob(lam, u), log_q),
        (q.expand((5, 3)).log_prob(u[:5]), log_q[:5]),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    log_weights, w, strata = flow.stratified_and_log_prob(lam, noise(6, 3, DIM))
    assert torch.equal(w, u)
    assert torch.equal(strata, log_q)
    torch.testing.assert_close(log_weights.exp().sum(0), torch.ones(3).double())


@every_flow
def test_density_integrates_to_one(name: str) -> None:
    flow = build(name)
    lam = parameters(flow)
    with torch.no_grad():
        u = flow.sample(lam, noise(20_000, 3, DIM))
        centred = u - u.mean(0)
        covariance = torch.einsum("sbi,sbj->bij", centred, centred) / len(u)
        wide = MultivariateNormal(u.mean(0), 3 * covariance)
        z = wide.sample((20_000,))
        ratio = (flow(lam).log_prob(z) - wide.log_prob(z)).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(len(z))).all()


@every_flow
def test_without_transforms_it_is_the_diagonal_normal(name: str) -> None:
    flow, diagonal = BUILD[name](DIM, 0).double(), DiagonalNormal(DIM)
    assert flow.num_params == diagonal.num_params
    lam, eps = parameters(flow), noise(5, 3, DIM)
    assert torch.equal(flow.sample(lam, eps), diagonal.sample(lam, eps))
    u, log_q = flow.rsample_and_log_prob(lam, eps)
    assert torch.equal(flow(lam).log_prob(u), diagonal(lam).log_prob(u))
    torch.testing.assert_close(log_q, diagonal(lam).log_prob(u), rtol=0, atol=1e-13)
    assert torch.equal(flow.entropy(lam), flow.base(lam).entropy())
    torch.testing.assert_close(flow.entropy(lam), diagonal.entropy(lam), rtol=0, atol=1e-13)


# Householder


def reflections(flow: flows.Householder, lam: Tensor) -> Tensor:
    """U, `[B, D, D]`, from the definition."""
    v, eye = lam[:, flow.blocks["v"]], torch.eye(flow.dim, dtype=lam.dtype)
    product = eye.expand(len(lam), -1, -1)
    for linear in [None, *flow.maps]:
        v = v if linear is None else v @ linear.weight.T + linear.bias
        product = (eye - 2 * v.unsqueeze(-1) * v.unsqueeze(-2) / v.square().sum(-1)[:, None, None]) @ product
    return product


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_householder_is_the_rotated_normal(layers: int) -> None:
    flow = build("householder", layers=layers)
    assert isinstance(flow, flows.Householder)
    lam, eps = parameters(flow, 5), noise(9, 5, DIM)
    rotation, base = reflections(flow, lam), flow.base(lam).base_dist
    assert (rotation @ rotation.mT - torch.eye(DIM)).abs().max() < 1e-14
    covariance = rotation @ torch.diag_embed(base.variance) @ rotation.mT
    full = MultivariateNormal((rotation @ base.loc.unsqueeze(-1)).squeeze(-1), covariance)
    u, log_q = flow.rsample_and_log_prob(lam, eps)
    q = flow(lam)
    for found, expected in (
        (log_q, full.log_prob(u)),
        (q.log_prob(eps), full.log_prob(eps)),
        (q.mean, full.mean),
        (q.variance, full.variance),
        (q.entropy(), full.entropy()),
        (flow.entropy(lam), full.entropy()),
    ):
        assert (found - expected).abs().max() < 1e-13 * (1 + expected.abs().max())
    mirrored = u + flow.sample(lam, -eps)
    assert (mirrored - 2 * full.mean).abs().max() < 1e-13


@pytest.mark.parametrize("layers", [1, 3])
def test_householder_leaves_the_divergence_from_the_standard_normal(layers: int) -> None:
    flow = build("householder", layers=layers)
    lam = parameters(flow, 5)
    standard = dist.Normal(torch.zeros(DIM).double(), 1.0).to_event(1)
    before = kl_divergence(flow.base(lam), standard)
    torch.testing.assert_close(kl_divergence(flow(lam), standard), before, rtol=1e-14, atol=1e-14)
    prior = dist.Normal(noise(DIM), noise(DIM).exp()).to_event(1)  # any other diagonal prior sees the rotation
    base, rotation = flow.base(lam).base_dist, reflections(flow, lam)
    full = MultivariateNormal(
        (rotation @ base.loc.unsqueeze(-1)).squeeze(-1), rotation @ torch.diag_embed(base.variance) @ rotation.mT
    )
    expected = kl_divergence(full, MultivariateNormal(prior.mean, torch.diag_embed(prior.variance)))
    for q in (flow(lam), flow(lam).expand((2, 5))):
        torch.testing.assert_close(kl_divergence(q, prior).broadcast_to(2, 5)[0], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError):
        kl_divergence(flow(lam), dist.Laplace(torch.zeros(DIM).double(), 1.0).to_event(1))


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-13, 1e10])
def test_a_reflection_of_any_length_is_orthogonal(size: float) -> None:
    flow = flows.Householder(3, 1)
    lam = torch.zeros(2, flow.num_params)
    lam[:, flow.blocks["v"]] = size * torch.tensor([1.0, -2.0, 0.5])
    lam.requires_grad_()
    u, log_q = flow.rsample_and_log_prob(lam, noise(8, 2, 3, dtype=torch.float32))
    norm = noise(8, 2, 3, dtype=torch.float32).norm(dim=-1)
    torch.testing.assert_close(u.norm(dim=-1), norm, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(u.square().sum() + log_q.sum(), lam)
    assert torch.isfinite(gradient).all()


# Structure of the others


def test_iaf_layers_are_gated_and_autoregressive_in_alternating_order() -> None:
    flow = build("iaf")
    lam, z = parameters(flow, 1), noise(DIM)
    context = lam[:, flow.blocks["context"]]
    for number, (module, layer) in enumerate(zip(flow.layers, flow._layers(lam), strict=True)):
        jacobian = torch.autograd.functional.jacobian(lambda x, f=layer: f(x.unsqueeze(0))[0], z)
        ordered = jacobian if number % 2 == 0 else jacobian.flip(0, 1)
        assert torch.equal(ordered, ordered.tril()), "a coordinate may see only those before it"
        assert (ordered.tril(-1)[tuple(torch.tril_indices(DIM, DIM, -1))] != 0).all()
        shift, logit = module.nn(z.unsqueeze(0), context=context)
        gate = torch.sigmoid(logit + 2.0)
        torch.testing.assert_close(layer(z.unsqueeze(0)), gate * z + (1 - gate) * shift)
        torch.testing.assert_close(jacobian.diagonal(), gate[0], rtol=1e-12, atol=1e-12)


@with_nets
def test_every_layer_sees_the_context(name: str) -> None:
    """The published IAF baseline masked it out: only its base Gaussian depended on the data."""
    flow = build(name, layers=4)
    z = noise(1, DIM)
    context = parameters(flow, 1)[:, flow.blocks["context"]]
    for number, module in enumerate(flow.layers):
        jacobian = torch.autograd.functional.jacobian(lambda c, m=module: m.condition(c)(z)[0], context)[:, 0]
        moved = jacobian if name != "coupling" else jacobian[DIM // 2 :]
        assert (moved.abs() > 1e-6).all(), number


def test_two_couplings_move_every_coordinate() -> None:
    flow = build("coupling", dim=5, layers=2)
    lam, eps = parameters(flow, 1), noise(5)
    jacobian = torch.autograd.functional.jacobian(lambda e: flow.sample(lam, e.view(1, 1, -1))[0, 0], eps)
    _, scale = flow._normal._parts(lam[:, :10])
    assert ((jacobian.diagonal() - scale[0]).abs() > 1e-6).all()


def test_splines_are_monotone_and_inverted_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)

    def logits(width: int) -> Tensor:
        return 1.5 * torch.randn(500, width, dtype=torch.float64, generator=generator)

    shape = logits(8), logits(8), logits(7)
    x = torch.linspace(-4, 4, 401, dtype=torch.float64).repeat(500, 1).requires_grad_()
    wide = tuple(part.unsqueeze(1).expand(-1, 401, -1) for part in shape)
    y, log_slope = rational_quadratic(x, *wide, 3.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-9)
    assert (y.diff(dim=-1) > 0).all()
    back, log_inverse = rational_quadratic(y, *wide, 3.0, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_inverse, -log_slope, rtol=0, atol=1e-8)
    outside = x.abs() >= 3.0
    assert torch.equal(y[outside], x[outside])
    assert (log_slope[outside] == 0).all()
    edge = torch.full((500,), 3.0 - 1e-9, dtype=torch.float64)
    torch.testing.assert_close(rational_quadratic(edge, *shape, 3.0)[1], torch.zeros(500).double(), rtol=0, atol=1e-6)
    flat = tuple(torch.zeros_like(part) for part in wide)
    torch.testing.assert_close(rational_quadratic(x, *flat, 3.0)[0], x, rtol=0, atol=1e-14)


def test_spline_inverse_does_not_cancel() -> None:
    """Before a knot of slope 1e4 one of the two forms of the root loses half the digits of single precision."""
    y = torch.linspace(-0.7, -0.05, 300)
    equal, slopes = torch.zeros(300, 8), torch.zeros(300, 7)
    slopes[:, 3] = 1e4
    exact, _ = rational_quadratic(y.double(), equal.double(), equal.double(), slopes.double(), 3.0, inverse=True)
    found, _ = rational_quadratic(y, equal, equal, slopes, 3.0, inverse=True)
    assert (found - exact).abs().max() < 1e-6


def test_points_outside_a_spline_cannot_spoil_its_gradients() -> None:
    slopes = torch.zeros(2, 7)
    slopes[:, 6] = 3e38  # the last piece's formula overflows at a point beyond the box
    slopes.requires_grad_()
    equal = torch.zeros(2, 8, requires_grad=True)
    y, log_slope = rational_quadratic(torch.tensor([0.3, 100.0]), equal, equal, slopes, 3.0)
    assert y[1] == 100.0
    for gradient in torch.autograd.grad(y.sum() + log_slope.sum(), (equal, slopes)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("size", [1.0, 20.0])
def test_steep_splines_in_single_precision_stay_finite(size: float) -> None:
    """Pyro's own inverse stops here with a bare AssertionError."""
    torch.manual_seed(0)
    flow = flows.Spline(3, 2, context=4, hidden=(16,))
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    lam = size * parameters(flow, 200, torch.float32)
    eps = 4 * noise(20, 200, 3, dtype=torch.float32)
    eps[0], eps[1], eps[2] = 6.0, -6.0, 100.0
    lam.requires_grad_()
    u, log_q = flow.rsample_and_log_prob(lam, eps)
    (first,) = torch.autograd.grad((u.sin().sum(-1) - log_q).mean(), lam, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), lam)
    point = u.detach().requires_grad_()
    frozen = flow.frozen_log_prob(lam, point)
    (path,) = torch.autograd.grad(frozen.sum(), point)
    for found in (u, log_q, first, second, frozen, path):
        assert torch.isfinite(found).all()


# Derivatives, cost and memory


@every_flow
def test_twice_differentiable_in_lam(name: str) -> None:
    flow = build(name, dim=2, layers=2)
    lam, eps = parameters(flow, 2).requires_grad_(), noise(2, 2, 2)

    def drawn(lam: Tensor) -> Tensor:
        u, log_q = flow.rsample_and_log_prob(lam, eps)
        return (u.sin().sum(-1) - log_q).sum(0)

    def scored(lam: Tensor) -> Tensor:
        u = flow.sample(lam, eps)
        return (u.sin().sum(-1) - flow(lam).log_prob(u)).sum(0)

    for objective in (drawn, scored):
        assert torch.autograd.gradcheck(objective, (lam,))
        assert torch.autograd.gradgradcheck(objective, (lam,))


@every_flow
def test_frozen_density_has_a_gradient_through_the_draw_alone(name: str) -> None:
    flow = build(name)
    lam, eps = parameters(flow).requires_grad_(), noise(4, 3, DIM)
    everything = [lam, *flow.parameters()]
    u, _ = flow.rsample_and_log_prob(lam, eps)
    found = torch.autograd.grad(flow.frozen_log_prob(lam, u).sum(), everything, retain_graph=True)
    point = u.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: flow.frozen_log_prob(lam, value), (point,))
    (by_u,) = torch.autograd.grad(flow(lam.detach()).log_prob(point).sum(), point)
    expected = torch.autograd.grad(u, everything, by_u)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    detached = flow.frozen_log_prob(lam, u.detach())
    assert not detached.requires_grad
    assert all(weight.requires_grad for weight in flow.parameters())


@with_nets
def test_draws_with_their_density_cost_one_pass_of_every_net(name: str) -> None:
    flow = build(name)
    lam, passes = parameters(flow), Passes(flow)
    u, _ = flow.rsample_and_log_prob(lam, noise(5, 3, DIM))
    assert passes.read() == 3
    q = flow(lam)
    q.log_prob(q.rsample((5,)))
    assert passes.read() == 3
    flow.stratified_and_log_prob(lam, noise(5, 3, DIM))
    assert passes.read() == 3
    q.log_prob(u)
    assert passes.read() == (3 if name == "coupling" else 3 * DIM)


@every_flow
def test_draws_are_freed_without_the_garbage_collector(name: str) -> None:
    """Pyro's own gated transform holds itself in a cycle: 65,536 x 50 draws a block would pile up."""
    flow = build(name)
    lam = parameters(flow)
    gc.collect()
    gc.disable()
    try:
        for draw in (lambda: flow.rsample_and_log_prob(lam, noise(5, 3, DIM))[0], lambda: flow(lam).rsample((5,))):
            u = draw()
            alive = weakref.ref(u)
            del u
            assert alive() is None
    finally:
        gc.enable()
