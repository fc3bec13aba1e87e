"""Families: shapes, moments of draws, entropy, second derivatives, blocks, clamps and marginals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyrovae.families import (
    FAMILIES,
    DiagonalNormal,
    Family,
    FullRankNormal,
    LowRankNormal,
    MixtureOfNormals,
    get_family,
    marginal,
)

DIM = 3
CASES = {
    "diagonal": DiagonalNormal(DIM),
    "full-rank": FullRankNormal(DIM),
    "low-rank": LowRankNormal(DIM, rank=2),
    "mixture": MixtureOfNormals(DIM, num_components=3),
    "one dim": FullRankNormal(1),
    "one component": MixtureOfNormals(DIM, num_components=1),
}
every_family = pytest.mark.parametrize("family", CASES.values(), ids=CASES.keys())


def parameters(family: Family, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.7 * torch.randn(rows, family.num_params, dtype=torch.float64, generator=generator).to(dtype)


def moments(family: Family, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[B, D]` and covariance `[B, D, D]`, straight from the definition of `lam`."""
    parts = {name: lam[:, block] for name, block in family.blocks.items()}
    if isinstance(family, DiagonalNormal):
        return parts["loc"], torch.diag_embed(parts["log_var"].exp())
    if isinstance(family, FullRankNormal):
        root = torch.zeros(len(lam), family.dim, family.dim, dtype=lam.dtype)
        entry = 0
        for i in range(family.dim):
            root[:, i, i] = parts["log_diag"][:, i].exp()
            for j in range(i):
                root[:, i, j] = parts["lower"][:, entry]
                entry += 1
        return parts["loc"], root @ root.mT
    if isinstance(family, LowRankNormal):
        factor = parts["factor"].reshape(-1, family.dim, family.rank)
        return parts["loc"], factor @ factor.mT + torch.diag_embed(parts["log_var"].exp())
    assert isinstance(family, MixtureOfNormals)
    shape = (len(lam), family.num_components, family.dim)
    weights, locs = parts["logits"].softmax(-1), parts["locs"].reshape(shape)
    mean = torch.einsum("bm,bmd->bd", weights, locs)
    second = torch.einsum("bm,bmd,bme->bde", weights, locs, locs)
    within = torch.einsum("bm,bmd->bd", weights, parts["log_vars"].reshape(shape).exp())
    return mean, second + torch.diag_embed(within) - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def assert_moments(draws: Tensor, mean: Tensor, covariance: Tensor, weights: Tensor | None = None) -> None:
    """`draws: [S, B, D]`; every entry of both moments within 4.5 standard errors (some 50 entries are looked at)."""
    centred = draws - mean
    for terms, expected in (
        (centred, torch.zeros_like(mean)),
        (centred.unsqueeze(-1) * centred.unsqueeze(-2), covariance),
    ):
        se = terms.std(0) / math.sqrt(len(terms))
        assert ((terms.mean(0) - expected).abs() <= 4.5 * se).all()


@every_family
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(family: Family, rows: int, dtype: torch.dtype) -> None:
    for lam in (parameters(family, rows, dtype), family.init(rows, dtype=dtype)):
        q = family(lam)
        assert (q.batch_shape, q.event_shape) == ((rows,), (family.dim,))
        assert q.has_rsample
        u = family.sample(lam, torch.randn(5, rows, family.noise_dim, dtype=dtype))
        for draws in (u, q.rsample((5,))):
            assert (draws.shape, draws.dtype) == ((5, rows, family.dim), dtype)
        assert (q.log_prob(u).shape, q.log_prob(u).dtype) == ((5, rows), dtype)
        entropy = family.entropy(lam)
        assert entropy is None or (entropy.shape, entropy.dtype) == ((rows,), dtype)


@every_family
def test_blocks_tile_lam(family: Family) -> None:
    stops = [0]
    for block in family.blocks.values():
        assert block.start == stops[-1]
        stops.append(block.stop)
    assert stops[-1] == family.num_params == family.init(2).shape[1]


@every_family
def test_draws_and_distribution_have_the_moments_of_lam(family: Family) -> None:
    lam = parameters(family, 2)
    mean, covariance = moments(family, lam)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(20_000, 2, family.noise_dim, dtype=lam.dtype, generator=generator)
    assert_moments(family.sample(lam, noise), mean, covariance)
    torch.manual_seed(3)
    assert_moments(family(lam).rsample((20_000,)), mean, covariance)
    torch.testing.assert_close(family(lam).mean, mean)
    torch.testing.assert_close(family(lam).variance, covariance.diagonal(dim1=-2, dim2=-1))


@every_family
def test_density_integrates_and_entropy_is_its_expectation(family: Family) -> None:
    lam = parameters(family, 2)
    q = family(lam)
    torch.manual_seed(4)
    mean, covariance = moments(family, lam)
    wide = torch.distributions.MultivariateNormal(mean, 4 * covariance)
    z = wide.sample((20_000,))
    ratio = (q.log_prob(z) - wide.log_prob(z)).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(len(z))).all()
    entropy = family.entropy(lam)
    if entropy is not None:
        terms = -q.log_prob(q.sample((20_000,)))
        assert ((terms.mean(0) - entropy).abs() < 3 * terms.std(0) / math.sqrt(len(terms))).all()


@every_family
def test_antithetic_draws_mirror_at_the_mean(family: Family) -> None:
    lam, noise = parameters(family, 2), torch.randn(6, 2, family.noise_dim, dtype=torch.float64)
    mirrored = family.sample(lam, noise) + family.sample(lam, -noise)
    same = torch.allclose(mirrored, 2 * moments(family, lam)[0].expand_as(mirrored))
    assert same == family.symmetric or family is CASES["one component"]


@every_family
def test_second_derivatives(family: Family) -> None:
    """Of a function of reparameterised draws, of their density and of the entropy, with respect to lam."""
    lam = parameters(family, 2).requires_grad_()
    noise = torch.randn(2, 2, family.noise_dim, dtype=torch.float64)

    def objective(lam: Tensor) -> Tensor:
        u = family.sample(lam, noise)
        entropy = family.entropy(lam)
        value = u.sin().sum(-1) - family(lam).log_prob(u)
        return value.sum(0) if entropy is None else value.sum(0) + entropy**2

    assert torch.autograd.gradcheck(objective, (lam,))
    assert torch.autograd.gradgradcheck(objective, (lam,))


@every_family
def test_rsample_is_twice_differentiable(family: Family) -> None:
    lam = parameters(family, 2).requires_grad_()

    def objective(lam: Tensor) -> Tensor:
        torch.manual_seed(5)
        q = family(lam)
        return q.log_prob(q.rsample((3,))).sum()

    assert torch.autograd.gradgradcheck(objective, (lam,))


@every_family
@pytest.mark.parametrize("far", [-30.0, 30.0])
def test_log_scales_are_clamped_in_value_not_in_gradient(family: Family, far: float) -> None:
    name = next(name for name in family.blocks if name.startswith("log_"))
    lam = parameters(family, 2)
    limit, beyond = lam.clone(), lam.clone()
    limit[:, family.blocks[name]] = math.copysign(10.0, far)
    beyond[:, family.blocks[name]] = far
    noise = torch.randn(3, 2, family.noise_dim, dtype=lam.dtype)
    gradients = []
    for value in (limit, beyond):
        value.requires_grad_()
        gradients.append(torch.autograd.grad(family.sample(value, noise).sum(), value)[0])
    torch.testing.assert_close(family.sample(beyond, noise), family.sample(limit, noise))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert (gradients[1][:, family.blocks[name]] != 0).any()


@every_family
def test_marginal_has_the_moments_of_the_part(family: Family) -> None:
    lam = parameters(family, 2)
    mean, covariance = moments(family, lam)
    for part in (slice(0, 1), slice(max(0, family.dim - 2), family.dim)):
        q = marginal(family(lam), part)
        assert q is not None
        assert q.batch_shape == (2,)
        torch.testing.assert_close(q.mean, mean[:, part])
        torch.manual_seed(6)
        assert_moments(q.rsample((20_000,)), mean[:, part], covariance[:, part, part])


def test_marginal_of_anything_else_is_none() -> None:
    gamma = torch.distributions.Independent(torch.distributions.Gamma(torch.ones(2, 3), 1.0), 1)
    assert marginal(gamma, slice(0, 1)) is None


@every_family
def test_stratified_draws_are_exact_in_the_weights(family: Family) -> None:
    lam = parameters(family, 2)
    noise = torch.randn(4000, 2, family.strata_noise_dim, dtype=lam.dtype)
    log_weights, u = family.stratified(lam, noise)
    assert log_weights.shape == u.shape[:2]
    torch.testing.assert_close(log_weights.exp().sum(0), torch.ones(2, dtype=lam.dtype))
    mean, covariance = moments(family, lam)
    strata = len(u) // 4000  # one draw per component for each noise
    weighted = log_weights.exp().unsqueeze(-1) * 4000
    first = (weighted * (u - mean)).reshape(4000, strata, 2, -1).sum(1)
    second = (weighted * (u - mean) ** 2).reshape(4000, strata, 2, -1).sum(1)
    for terms, expected in ((first, 0.0), (second, covariance.diagonal(dim1=-2, dim2=-1))):
        assert ((terms.mean(0) - expected).abs() < 4 * terms.std(0) / math.sqrt(4000)).all()


def test_one_step_in_the_fixed_coordinates() -> None:
    """One step of 0.1 on E[-z^2 / 2 ...] from sd = 1: 0.928 needs log-variance (0.741 would be log-sd)."""
    family = DiagonalNormal(1)
    lam = torch.zeros(1, 2, requires_grad=True)
    log_joint = -0.5 * 4 * (lam[:, 0] ** 2 + family(lam).variance[:, 0])  # a normal target of precision 4
    (gradient,) = torch.autograd.grad(log_joint.sum() + family.entropy(lam).sum(), lam)
    moved = family(lam + 0.1 * gradient).stddev.item()
    assert moved == pytest.approx(0.928, abs=5e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_starts(name: str) -> None:
    family = get_family(name, DIM)
    assert repr(family) == f"{FAMILIES[name].__name__}(dim={DIM})"
    lam = family.init(2)
    torch.testing.assert_close(lam[0], lam[1])
    scale = family(lam).stddev
    assert ((scale > 0.5) & (scale < 2)).all()
    assert get_family(FAMILIES[name], DIM).num_params == family.num_params
    assert get_family(family, DIM) is family
