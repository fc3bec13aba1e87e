"""Newton-CG, curvature as products: against matrices, finite differences and closed forms."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems

from pyrovae.curvature import Curvature
from pyrovae.latents import LatentSpace
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.newton import conjugate_gradient, find_mode


def _systems(rows=6, dim=5):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(rows, dim, dim, generator=generator, dtype=torch.double)
    matrix = root @ root.mT + torch.eye(dim, dtype=torch.double)
    return matrix, torch.randn(rows, dim, generator=generator, dtype=torch.double)


def _times(matrix):
    return lambda p: (matrix @ p.unsqueeze(-1)).squeeze(-1)


def test_conjugate_gradient_solves_in_as_many_steps_as_dimensions():
    matrix, target = _systems()
    exact = torch.linalg.solve(matrix, target)
    found = conjugate_gradient(_times(matrix), target, num_steps=5, tolerance=1e-14)
    assert (found - exact).abs().max() < 1e-10
    close = torch.linalg.cholesky(matrix)
    found = conjugate_gradient(
        _times(matrix), target, num_steps=1, precondition=lambda r: torch.cholesky_solve(r[..., None], close)[..., 0]
    )
    assert (found - exact).abs().max() < 1e-12


def test_a_row_of_conjugate_gradient_does_not_depend_on_the_others():
    matrix, target = _systems()
    together = conjugate_gradient(_times(matrix), target, num_steps=3)
    for row in range(len(target)):
        alone = conjugate_gradient(_times(matrix[row : row + 1]), target[row : row + 1], num_steps=3)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-12, atol=1e-12)


def test_negative_curvature_gives_the_gradient():
    matrix, target = _systems()
    matrix[2] = -matrix[2]
    found = conjugate_gradient(_times(matrix), target, num_steps=20, tolerance=1e-12)
    bend = (target[2] * (matrix[2] @ target[2])).sum()
    torch.testing.assert_close(found[2], target[2] * target[2].square().sum() / bend.abs())
    assert (found[3] - torch.linalg.solve(matrix[3], target[3])).abs().max() < 1e-9


def test_a_preconditioned_row_with_negative_curvature_goes_back_to_its_start():
    matrix, target = _systems()
    close = torch.linalg.cholesky(matrix)
    matrix = matrix.clone()
    matrix[2] = matrix[2] - 3.0 * matrix[2].diagonal().mean() * torch.eye(5, dtype=torch.double)

    def solve(r):
        return torch.cholesky_solve(r[..., None], close)[..., 0]

    found = conjugate_gradient(_times(matrix), target, num_steps=30, tolerance=1e-12, precondition=solve)
    assert torch.linalg.eigvalsh(matrix[2]).min() < 0
    torch.testing.assert_close(found[2], solve(target)[2])
    assert (found[3] - torch.linalg.solve(matrix[3], target[3])).abs().max() < 1e-9


def _models():
    torch.manual_seed(0)
    x = torch.randn(4, 9, dtype=torch.double)
    binary = (x > 0).double()
    yield "head, Gram", VAE(LinearHeadDecoder(3, [7], (9,), torch.nn.Tanh).double(), 3, "gaussian"), x
    yield "head, Bernoulli", VAE(LinearHeadDecoder(3, [7], (9,), torch.nn.Tanh).double(), 3), binary
    yield "no head", VAE(MLP([3, 7, 9], torch.nn.Tanh).double(), 3, "gaussian"), x
    yield "two sites", problems.gamma_normal, x[:, :3]
    yield "Hessian only", _student, x[:, :2]


def _student(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.StudentT(4.0, z.sin() + z, 0.7).to_event(1), obs=x)


CASES = list(_models())


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize(("model", "x"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_operator_is_the_matrix(model, x, beta):
    bound = LatentSpace(model, x).bind(x)
    u = 0.3 * torch.randn(len(x), bound.space.dim, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    curvature = Curvature(bound, beta=beta, floor=0.0)
    here, operator = curvature.at(u), curvature.operator(u)
    torch.testing.assert_close(operator.log_joint, here.log_joint, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.gradient, here.gradient, rtol=1e-10, atol=1e-10)
    p = torch.randn(u.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    usable = ~here.floored
    assert usable.any()
    product = (here.precision @ p.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(operator.product(p)[usable], product[usable], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize(("model", "x"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_products_are_those_of_the_matrix_with_its_gradient(model, x, beta):
    bound = LatentSpace(model, x).bind(x)
    dim = bound.space.dim
    generator = torch.Generator().manual_seed(1)
    u = (0.3 * torch.randn(len(x), dim, dtype=torch.double, generator=generator)).requires_grad_()
    p, weight = torch.randn(2, 5, len(x), dim, dtype=torch.double, generator=generator)
    curvature = Curvature(bound, beta=beta, floor=0.0)
    precision, floored = curvature.precision(u, create_graph=True)
    expected = (precision @ p.unsqueeze(-1)).squeeze(-1)[:, ~floored]
    found = curvature.products(u)(p)[:, ~floored]
    assert found.numel()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    parameters = [*model.parameters()] if isinstance(model, torch.nn.Module) else []
    weight = weight[:, ~floored]
    gradients = [
        torch.autograd.grad((weight * value).sum(), [u, *parameters], allow_unused=True) for value in (found, expected)
    ]
    assert (gradients[0][0] != 0).any()
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None or ours.abs().max() == 0) if theirs is None else True
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_find_mode_is_exact_on_ppca_and_no_datum_depends_on_its_batch():
    model, x = problems.ppca()
    bound = LatentSpace(model, x).bind(x)
    start = torch.randn(len(x), 10, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    found = find_mode(Curvature(bound), bound, start, 12, num_cg=10, tolerance=0.0)
    assert (found - model.posterior(x).loc).abs().max() < 1e-7
    single = bound.space.bind(x[3:4])
    alone = find_mode(Curvature(single), single, start[3:4], 2, num_cg=3, tolerance=0.0)
    together = find_mode(Curvature(bound), bound, start, 2, num_cg=3, tolerance=0.0)
    torch.testing.assert_close(alone[0], together[3], rtol=1e-9, atol=1e-9)


def test_find_mode_gets_away_from_sharp_negative_curvature():
    """A far outlier of a narrow StudentT: gradients of hundreds at negative curvature; and a row without a gradient."""
    weight = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.double)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.StudentT(3.0, z @ weight, 0.01).to_event(1), obs=x)

    x = 3 * torch.randn(6, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    bound = LatentSpace(model, x).bind(x)
    values = [bound(torch.zeros(6, 2, dtype=torch.double))]
    for steps in (4, 20, 100):
        values.append(bound(find_mode(Curvature(bound), bound, 0 * x, steps, num_cg=5, tolerance=1e-9)))
    for before, after in itertools.pairwise(values):
        assert (after >= before - 1e-9).all()
    assert (values[1] > values[0]).all()
    assert (values[-1] > values[1] + 1.0).any()


def test_a_row_without_gradient_stands_still():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs().sqrt(), 1.0).to_event(1), obs=x)

    x = torch.full((3, 2), 2.0, dtype=torch.double)
    start = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 0.2]], dtype=torch.double)
    bound = LatentSpace(model, x).bind(x)
    found = find_mode(Curvature(bound, hessian=True), bound, start, 5, num_cg=5, tolerance=1e-9)
    assert found.isfinite().all()
    assert torch.equal(found[1], start[1])
    assert (bound(found)[[0, 2]] > bound(start)[[0, 2]]).all()


def test_find_mode_climbs_where_the_curvature_is_negative():
    """Between the modes of z^2 = 2.25 + noise the log-joint is convex: the search must leave, and find a mode."""
    x = torch.tensor([2.25, 2.25], dtype=torch.double)
    bound = LatentSpace(problems.bimodal, x).bind(x)
    start = torch.tensor([[0.05], [-0.3]], dtype=torch.double)
    found = find_mode(Curvature(bound), bound, start, 40, num_cg=5, tolerance=1e-12)
    # d/dz log p = -z + 2 z (x - z^2) / s^2 = 0  =>  z^2 = x - s^2 / 2
    root = (2.25 - 0.25**2 / 2) ** 0.5
    assert (found.flatten() - torch.tensor([root, -root], dtype=torch.double)).abs().max() < 1e-5
