"""MixtureOfNormals: density, expansion, and unbiased gradients under stock Trace_ELBO, however it is emitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import Normal, constraints, transform_to

from pyrovae.emission import emit
from pyrovae.handlers import anneal
from pyrovae.latents import LatentSpace
from pyrovae.mixture import MixtureOfNormals

DOUBLE = torch.float64


def some(rows: int = 2, components: int = 3, dim: int = 4) -> MixtureOfNormals:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, components, dim)
    logits = torch.randn(rows, components, dtype=DOUBLE, generator=generator)
    locs, scales = (torch.randn(shape, dtype=DOUBLE, generator=generator) for _ in range(2))
    return MixtureOfNormals(logits, locs, scales.exp())


def test_log_prob_by_hand() -> None:
    q, z = some(), torch.randn(5, 2, 4, dtype=DOUBLE)
    for b in range(2):
        total = torch.zeros(5, dtype=DOUBLE)
        for m in range(3):
            quadratic = ((z[:, b] - q.locs[b, m]) / q.scales[b, m]) ** 2
            log_norm = -q.scales[b, m].log().sum() - 2 * math.log(2 * math.pi)
            total += q.logits[b].softmax(-1)[m] * (log_norm - 0.5 * quadratic.sum(-1)).exp()
        torch.testing.assert_close(q.log_prob(z)[:, b], total.log())


def test_expand() -> None:
    q = some()
    wide = q.expand([5, 2])
    assert isinstance(wide, MixtureOfNormals)
    assert (wide.batch_shape, wide.event_shape) == ((5, 2), (4,))
    z = wide.rsample((3,))
    assert z.shape == (3, 5, 2, 4)
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z))
    torch.testing.assert_close(wide.mean, q.mean.expand(5, 2, 4))
    assert len(wide.rsample().flatten().unique()) == 40  # rows are drawn independently


def test_validation() -> None:
    logits, locs, scales = torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="scales"):
        MixtureOfNormals(logits, locs, -scales, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        MixtureOfNormals(logits, locs, scales, validate_args=True).log_prob(torch.full((3,), math.nan))


# The setting of contracts_evidence section 5, with a target whose ELBO has an exact gradient.
#
# E_q[f] = sum_m w_m E_{N_m}[f], f = log p - log q. log p is quadratic, so its expectation is closed. With diagonal
# components that differ only in their means along one direction, log q is a sum of D - 1 normal log-densities and a
# function of one coordinate, and its expectation a quadrature in one dimension.

D, SD, MODES = 8, 0.4, (-1.0, 1.5)


def exact_elbo(logits: Tensor, locs: Tensor, log_p: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The ELBO for `locs: [2, D]`, equal isotropic scales SD. `log_p(mean, var)` is E[log p] under a component.

    The Jacobian of a constrained site is the same on both sides and cancels.
    """
    weights = logits.softmax(-1)
    value = sum(weights[m] * log_p(locs[m], torch.full_like(locs[m], SD**2)) for m in range(2))
    # Along the line through the means: a two-component mixture in one dimension; D - 1 normals across it.
    gap = (locs[1] - locs[0]).norm()
    t, w = hermite(60)
    entropy = (D - 1) * (0.5 * math.log(2 * math.pi * math.e) + math.log(SD))
    for m, centre in enumerate((torch.zeros_like(gap), gap)):
        y = centre + SD * t
        parts = [weights[k].log() + Normal(c, SD).log_prob(y) for k, c in enumerate((torch.zeros_like(gap), gap))]
        entropy = entropy - weights[m] * (w * torch.stack(parts).logsumexp(0)).sum()
    return value + entropy


def hermite(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal's expectation."""
    t, w = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(t), torch.from_numpy(w / math.sqrt(2 * math.pi))


def gaussian_target(mean: Tensor, var: Tensor) -> Tensor:
    """E[log N(z; 0.3, I) + log N(2; z_i, 1)] for z_i ~ N(mean_i, var_i)."""
    prior = Normal(0.3, 1.0).log_prob(mean) - 0.5 * var
    likelihood = Normal(2.0, 1.0).log_prob(mean) - 0.5 * var
    return (prior + likelihood).sum()


class Parameters:
    """Free parameters shared by all rows; `mixture(rows)` is q."""

    def __init__(self) -> None:
        self.logits = torch.tensor([0.3, -0.2], dtype=DOUBLE, requires_grad=True)
        locs = torch.tensor(MODES, dtype=DOUBLE).unsqueeze(-1).expand(2, D) + 0.1 * torch.arange(D)
        self.locs = locs.clone().requires_grad_()

    def mixture(self, rows: int) -> MixtureOfNormals:
        scales = torch.full((2, D), SD, dtype=DOUBLE)
        return MixtureOfNormals(
            self.logits.expand(rows, 2), self.locs.expand(rows, 2, D), scales.expand(rows, 2, D)
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.logits, self.locs


def plain_vector(rows: int) -> None:
    with pyro.plate("data", rows):
        z = pyro.sample("z", dist.Normal(torch.full((D,), 0.3, dtype=DOUBLE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.full((rows, D), 2.0, dtype=DOUBLE))


def two_sites(rows: int) -> None:
    """The same joint density of u, but its first 3 coordinates are the logs of a positive site."""
    with pyro.plate("data", rows):
        a = pyro.sample("a", dist.LogNormal(torch.full((3,), 0.3, dtype=DOUBLE), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.full((D - 3,), 0.3, dtype=DOUBLE), 1.0).to_event(1))
        u = torch.cat([a.log(), z], -1)
        pyro.sample("x", dist.Normal(u, 1.0).to_event(1), obs=torch.full((rows, D), 2.0, dtype=DOUBLE))


def two_sites_subsampled(rows: int) -> None:
    with pyro.plate("data", 50 * rows, subsample=torch.arange(rows)):
        a = pyro.sample("a", dist.LogNormal(torch.full((3,), 0.3, dtype=DOUBLE), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.full((D - 3,), 0.3, dtype=DOUBLE), 1.0).to_event(1))
        u = torch.cat([a.log(), z], -1)
        pyro.sample("x", dist.Normal(u, 1.0).to_event(1), obs=torch.full((rows, D), 2.0, dtype=DOUBLE))


def inner_plate_model(rows: int) -> None:
    """Joint mode: the positive site lies in a plate of the model."""
    with pyro.plate("inner", 3):
        a = pyro.sample("a", dist.LogNormal(torch.tensor(0.3, dtype=DOUBLE), 1.0))
        pyro.sample("xa", dist.Normal(a.log(), 1.0), obs=torch.full((3,), 2.0, dtype=DOUBLE))
    z = pyro.sample("z", dist.Normal(torch.full((D - 3,), 0.3, dtype=DOUBLE), 1.0).to_event(1))
    pyro.sample("xz", dist.Normal(z, 1.0).to_event(1), obs=torch.full((D - 3,), 2.0, dtype=DOUBLE))


def guide_for(model: Callable[..., None], free: Parameters, plate: str | None) -> Callable[[int], None]:
    spaces: dict[int, LatentSpace] = {}

    def guide(rows: int) -> None:
        pyro.param("any", torch.zeros(()))  # Trace_ELBO calls backward only where it sees a parameter
        if rows not in spaces:
            spaces[rows] = LatentSpace(model, rows, plate=plate)
        space = spaces[rows]
        q = free.mixture(1 if plate is None else rows)
        if plate is None:
            emit(space.structure, q)
            return
        opened = space.read_plate(rows)
        assert opened is not None
        with opened.open():
            emit(space.structure, q)

    return guide


def estimates(
    model: Any, plate: str | None, rows: int, particles: int, repeats: int, beta: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Independent estimates of the ELBO and of its gradients, per datum and particle."""
    free = Parameters()
    guide = guide_for(model, free, plate)
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    values, gradients = [], []
    torch.manual_seed(1)
    for _ in range(repeats):
        for leaf in free.leaves:
            leaf.grad = None
        with anneal(beta):
            value = -loss.loss_and_grads(model, guide, rows)
        values.append(value / rows)
        gradients.append([-leaf.grad.flatten() / rows for leaf in free.leaves])
    return torch.tensor(values, dtype=DOUBLE), [torch.stack(column) for column in zip(*gradients, strict=True)]


CASES: dict[str, tuple[Any, str | None, int, int, int, float]] = {
    # model, plate, rows, particles, repeats, scale of the loss per datum
    "direct": (plain_vector, "data", 200, 1, 60, 1.0),
    "direct, particles": (plain_vector, "data", 20, 10, 60, 1.0),
    "packed": (two_sites, "data", 200, 1, 60, 1.0),
    "packed, particles": (two_sites, "data", 20, 10, 60, 1.0),
    "packed, subsampled": (two_sites_subsampled, "data", 200, 1, 60, 50.0),
    "packed, subsampled, particles": (two_sites_subsampled, "data", 20, 10, 60, 50.0),
    "packed, joint": (inner_plate_model, None, 1, 1, 1500, 1.0),
    "packed, joint, particles": (inner_plate_model, None, 1, 200, 60, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_unbiased(case: str) -> None:
    """Value and every gradient within 3.5 standard errors (18 are looked at); the errors are 3 to 8 per cent."""
    model, plate, rows, particles, repeats, scale = CASES[case]
    free = Parameters()
    exact = exact_elbo(free.logits, free.locs, gaussian_target)
    exact_gradients = torch.autograd.grad(exact, free.leaves)
    values, gradients = estimates(model, plate, rows, particles, repeats)
    se = values.std() / math.sqrt(repeats)
    assert abs(values.mean() - scale * exact) < 3.5 * se
    for found, expected in zip(gradients, exact_gradients, strict=True):
        se = found.std(0) / math.sqrt(repeats)
        assert ((found.mean(0) - scale * expected.flatten()).abs() < 3.5 * se).all()
    logit = exact_gradients[0][0]
    assert (gradients[0].std(0) / math.sqrt(repeats)).max() < 0.1 * scale * logit.abs()  # the test can see a bias


def test_packed_gradient_is_unbiased_when_annealed() -> None:
    beta = 0.3
    free = Parameters()

    def likelihood(mean: Tensor, var: Tensor) -> Tensor:
        return (Normal(2.0, 1.0).log_prob(mean) - 0.5 * var).sum()

    whole = exact_elbo(free.logits, free.locs, gaussian_target)
    weights = free.logits.softmax(-1)
    expected_likelihood = sum(
        weights[m] * likelihood(free.locs[m], torch.full((D,), SD**2, dtype=DOUBLE)) for m in range(2)
    )
    exact = beta * whole + (1 - beta) * expected_likelihood
    exact_gradients = torch.autograd.grad(exact, free.leaves)
    for model in (plain_vector, two_sites):
        values, gradients = estimates(model, "data", 200, 1, 60, beta)
        assert abs(values.mean() - exact) < 3.5 * values.std() / math.sqrt(60)
        for found, expected in zip(gradients, exact_gradients, strict=True):
            se = found.std(0) / math.sqrt(60)
            assert ((found.mean(0) - expected.flatten()).abs() < 3.5 * se).all()


def test_stock_pyro_alone_would_be_biased_when_packed() -> None:
    """What the gradient-only term of the factor is for: without it the logits' gradient misses."""
    free = Parameters()
    exact = torch.autograd.grad(exact_elbo(free.logits, free.locs, gaussian_target), free.logits)[0]
    guide = guide_for(two_sites, free, "data")

    def naive(rows: int) -> None:
        with _DetachedFactor():
            guide(rows)

    torch.manual_seed(1)
    gradients = []
    for _ in range(60):
        free.logits.grad = free.locs.grad = None
        Trace_ELBO(max_plate_nesting=1).loss_and_grads(two_sites, naive, 200)
        assert free.logits.grad is not None
        gradients.append(-free.logits.grad / 200)
    found = torch.stack(gradients)
    assert ((found.mean(0) - exact).abs() > 5 * found.std(0) / math.sqrt(60)).all()


class _DetachedFactor(poutine.messenger.Messenger):
    """Takes the gradient out of `_log_det` (the Jacobian's own part does not depend on the logits)."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == "_log_det":
            msg["fn"] = dist.Unit(msg["fn"].log_factor.detach(), has_rsample=True)


def test_the_factors_value_is_the_jacobian() -> None:
    free = Parameters()
    trace = poutine.trace(guide_for(two_sites, free, "data")).get_trace(4)
    trace.compute_log_prob()
    u = trace.nodes["_u"]["value"]
    torch.testing.assert_close(trace.nodes["_log_det"]["log_prob"], -u[:, :3].sum(-1))
    torch.testing.assert_close(trace.nodes["a"]["value"], transform_to(constraints.positive)(u[:, :3]))
    assert trace.nodes["z"]["log_prob_sum"] == 0


def test_score_parts() -> None:
    free = Parameters()
    q = free.mixture(3)
    parts = q.score_parts(q.rsample())
    torch.testing.assert_close(parts.score_function, parts.log_prob)
    by_logits, by_locs = torch.autograd.grad(parts.score_function.sum(), free.leaves, allow_unused=True)
    assert by_locs is None
    assert by_logits.abs().max() > 0
