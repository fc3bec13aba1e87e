"""References and samplers, against closed forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems
from guides_registry import GUIDES
from torch import nn

from pyrovae import reference
from pyrovae.errors import QuadratureError, ReferenceRefused, ScaleError
from pyrovae.reference.grid import enclose
from pyrovae.reference.posterior import status_of
from pyrovae.samplers import hmc, init, langevin


def normal_normal(prior, noise):
    """z ~ N(0, prior^2), x | z ~ N(z, noise^2): posterior and evidence in closed form."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), prior))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    return model


@pytest.mark.parametrize(
    ("prior", "noise", "x"),
    [(1.0, 1.0, [0.3, -2.0]), (1.0, 1e-5, [0.3333, 2.0]), (3000.0, 1.0, [1000.0, -0.5]), (1e5, 1e-2, [8e4, 1.0]),
     (50.0, 40.0, [1e3, 0.0])],
)  # fmt: skip
def test_quadrature_in_one_dimension(prior, noise, x):
    """Ordinary, narrow, far away, far and narrow, wide; two data of different scale share one grid search."""
    x = torch.tensor(x, dtype=torch.double)
    truth = reference.exact(normal_normal(prior, noise), x, num_samples=20_000)
    variance = 1 / (1 / prior**2 + 1 / noise**2)
    mean, sd = variance * x / noise**2, math.sqrt(variance)
    evidence = dist.Normal(0.0, math.hypot(prior, noise)).log_prob(x)
    scale = max(1.0, float(-evidence.min()))
    torch.testing.assert_close(truth.log_evidence, evidence.double(), rtol=0, atol=1e-6 * scale)
    assert ((truth.mean[:, 0] - mean).abs() < 1e-6 * sd).all()
    assert (truth.sd[:, 0] / sd - 1).abs().max() < 1e-6
    draws = truth.pooled[:, :, 0]
    assert ((draws.mean(0) - mean).abs() < 4 * sd / 20_000**0.5).all()
    assert ((draws.std(0) / sd - 1).abs() < 4 / 40_000**0.5).all()
    assert truth.status == ("ok", "ok")


@pytest.mark.parametrize("rho", [0.0, 0.9, -0.99])
def test_quadrature_in_two_dimensions(rho):
    """A correlated Gaussian posterior: evidence, means, sds, and the correlation of the draws."""
    covariance = torch.tensor([[1.0, rho * 2], [rho * 2, 4.0]], dtype=torch.double)
    gain = torch.tensor([[1.0, 0.5]], dtype=torch.double)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=torch.double), covariance))
            pyro.sample("x", dist.Normal(z @ gain.T, 0.8).to_event(1), obs=x)

    x = torch.tensor([[0.5], [-3.0]], dtype=torch.double)
    number = 20_000
    truth = reference.exact(model, x, num_samples=number)
    precision = covariance.inverse() + gain.T @ gain / 0.64
    exact = dist.MultivariateNormal((x @ gain / 0.64) @ precision.inverse(), precision_matrix=precision)
    evidence = dist.Normal(0.0, (gain @ covariance @ gain.T + 0.64).sqrt()).log_prob(x).squeeze(-1)
    torch.testing.assert_close(truth.log_evidence, evidence, rtol=0, atol=1e-6)
    torch.testing.assert_close(truth.mean, exact.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(truth.sd, exact.variance.sqrt(), rtol=1e-6, atol=0)
    r = exact.covariance_matrix[0, 0, 1] / exact.variance[0].prod().sqrt()
    for b in range(2):
        found = torch.corrcoef(truth.pooled[:, b].T)[0, 1]
        assert abs(found - r) < 4 * (1 - r**2) / number**0.5 + 1e-4  # jitter within a cell blurs by (cell / sd)^2 / 12


@pytest.mark.parametrize(("sd", "resolved"), [(2e-3, True), (2e-5, False)])
def test_narrow_modes_far_from_each_other_get_a_finer_grid(sd, resolved):
    """N(-7.1, sd^2) and N(7.1, sd^2): 4,001 points lie 0.004 apart, 64,001 are near enough for the first of two sds."""
    modes = dist.Normal(torch.tensor([-7.1, 7.1], dtype=torch.double), sd)

    def log_density(u):
        return torch.logsumexp(modes.log_prob(u), -1) - math.log(2)

    place = {"rows": 1, "dim": 1, "drop": 40.0, "dtype": torch.double, "device": "cpu"}
    if not resolved:
        with pytest.raises(ValueError, match="cannot resolve|could not be enclosed"):
            enclose(log_density, **place)
        return
    grid = enclose(log_density, **place)
    assert float(grid.log_integral()) == pytest.approx(0.0, abs=1e-9)
    weights = grid.values.softmax(0)
    assert float((weights * grid.u[..., 0].square()).sum()) == pytest.approx(7.1**2 + sd**2, rel=1e-9)


@pytest.mark.parametrize(
    ("dim", "sd", "resolved"),
    [(1, 2e-3, True), (1, 2e-4, True), (1, 1e-5, False), (2, 2e-2, True), (2, 2e-3, False), (2, 2e-4, False)],
)
def test_a_mode_between_grid_points_is_not_lost(dim, sd, resolved):
    """The first points lie 0.005 (0.067) apart, on one mode and beside the other: both are found, or it is told."""

    def log_density(u):
        modes = [dist.Normal(torch.full((dim,), at).double(), sd).log_prob(u).sum(-1) for at in (-1.0, 1.0025)]
        return torch.logaddexp(*modes) - math.log(2)

    place = {"rows": 2, "dim": dim, "drop": 40.0, "dtype": torch.double, "device": "cpu"}
    if not resolved:
        with pytest.raises(QuadratureError, match="cannot resolve"):
            enclose(log_density, **place)
        return
    found = enclose(log_density, **place).log_integral()
    torch.testing.assert_close(found, torch.zeros(2).double(), rtol=0, atol=1e-5)


def test_quadrature_refuses_what_its_grid_cannot_resolve():
    """Correlation 0.9999: the axis-aligned grid would be 0.2 nats off without a word."""
    covariance = torch.tensor([[1.0, 0.9999], [0.9999, 1.0]], dtype=torch.double)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=torch.double), covariance))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    with pytest.raises(ValueError, match=r"cannot resolve.*reference\.nuts"):
        reference.exact(model, torch.zeros(1, dtype=torch.double))


def test_quadrature_of_a_constrained_site():
    """s ~ Gamma(3, 2), k | s ~ Poisson(s): posterior Gamma(3 + k, 3), a negative binomial evidence."""

    def model(k):
        with pyro.plate("data", len(k)):
            s = pyro.sample("s", dist.Gamma(torch.tensor(3.0, dtype=torch.double), 2.0))
            pyro.sample("k", dist.Poisson(s), obs=k)

    k = torch.tensor([0.0, 1.0, 12.0], dtype=torch.double)
    truth = reference.exact(model, k, num_samples=20_000)
    evidence = (
        torch.lgamma(3 + k) - math.lgamma(3) - torch.lgamma(k + 1) + 3 * math.log(2.0) - (3 + k) * math.log(3.0)
    )
    torch.testing.assert_close(truth.log_evidence, evidence, rtol=0, atol=1e-7)
    s = truth.samples()["s"][0]
    assert s.shape == (20_000, 3)
    exact = dist.Gamma(3 + k, 3.0)
    assert ((s.mean(0) - exact.mean).abs() < 4 * exact.stddev / 20_000**0.5).all()
    torch.testing.assert_close(truth.mean[:, 0], torch.digamma(3 + k) - math.log(3.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(truth.sd[:, 0] ** 2, torch.polygamma(1, 3 + k), rtol=1e-6, atol=0)


def test_exact_says_when_there_is_no_exact_answer():
    def three(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"at most 2 latents.*has 3.*reference\.nuts"):
        reference.exact(three, torch.zeros(2))

    def improper(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("flat", 0.5 * z**2)
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    with pytest.raises(ValueError, match="improper"):
        reference.exact(improper, torch.zeros(1, dtype=torch.double))

    def scaled(x):
        with pyro.poutine.scale(scale=2.0):
            normal_normal(1.0, 1.0)(x)

    for make in (reference.exact, reference.nuts):
        with pytest.raises(ScaleError, match="scale 2"):
            make(scaled, torch.zeros(2))


def test_closed_form_is_used_where_the_model_has_one():
    model, x = problems.ppca(rows=3, latent=4)
    truth = reference.exact(model, x, num_samples=4000)
    torch.testing.assert_close(truth.log_evidence, model.log_evidence(x).detach())
    torch.testing.assert_close(truth.mean, model.posterior(x).mean.detach())
    assert ((truth.pooled.mean(0) - truth.mean).abs() < 4.5 * truth.sd / 4000**0.5).all()


def test_references_are_repeatable_and_leave_random_state_alone():
    model, x = normal_normal(1.0, 1.0), torch.tensor([0.3, -1.0])
    for make in (reference.exact, lambda *a, **k: reference.nuts(*a, num_samples=30, warmup=20, **k)):
        before = torch.get_rng_state()
        first, again, other = (make(model, x, seed=seed) for seed in (5, 5, 6))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(first.draws, again.draws)
        assert not torch.equal(first.draws, other.draws)


def test_nuts_finds_moments_and_flags():
    """Means and sds within 4 standard errors by the reference's own ESS; too few draws and no mixing told apart."""
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.double)
    truth = reference.nuts(normal_normal(2.0, 1.0), x, num_samples=400, warmup=150)
    sd = math.sqrt(0.8)
    assert ((truth.mean[:, 0] - 0.8 * x).abs() < 4 * sd / truth.ess.sqrt()).all()
    assert ((truth.sd[:, 0] / sd - 1).abs() < 4 / (2 * truth.ess).sqrt()).all()
    assert truth.status == ("ok",) * 3
    assert truth.lp.shape == (2, 400, 3)
    expected = dist.Normal(0.0, 2.0).log_prob(truth.draws[..., 0]) + dist.Normal(truth.draws[..., 0], 1.0).log_prob(x)
    torch.testing.assert_close(truth.lp, expected)
    assert "3 ok" in repr(truth)
    few = reference.nuts(normal_normal(2.0, 1.0), x, num_samples=60, warmup=100)
    assert "not enough draws" in few.status
    assert few.usable.tolist() == [status == "ok" for status in few.status]


def test_status_of_chains():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 1000, 3, 2, generator=generator)
    draws[1, :, 1] += 5  # two chains in two places
    draws[:, :, 2] = draws[:, :1, 2]  # stuck chains
    rhat, bulk, tail, status = status_of(draws)
    assert status == ("ok", "did not mix", "did not mix")
    assert rhat[0] < 1.02
    assert rhat[1] > 1.5
    assert bulk[0] > 1500
    assert tail[0] > 1500
    fine = draws[:, :, :1].expand(-1, -1, 3, -1)
    divergent, ebfmi = torch.tensor([True, False, True]), torch.tensor([1.0, 0.2, 0.2])
    assert status_of(fine, divergent=divergent, ebfmi=ebfmi)[-1] == ("divergent", "did not mix", "did not mix")
    slow = fine.clone()
    slow[1] += 0.6  # R-hat between 1.05 and 1.1
    assert status_of(slow)[-1] == ("not enough draws",) * 3


@pytest.mark.parametrize("options", [{"num_chains": 0}, {"num_samples": 3}, {"warmup": -1},
                                     {"init": torch.zeros(1, 2, 1)}, {"init": torch.zeros(2, 2, 3)}])  # fmt: skip
def test_nuts_refuses_bad_budgets(options):
    with pytest.raises(ValueError, match=r"nuts needs|init must have shape"):
        reference.nuts(normal_normal(1.0, 1.0), torch.zeros(2), **options)


def _pair():
    model, x = problems.ppca(rows=4, latent=3)
    torch.manual_seed(0)
    return model, x, GUIDES["amortized"](model, 30, 3, torch.float64)


def test_compare_of_the_truth_with_itself_is_at_the_floor():
    """An exact guide: distances are those of independent draws, below 3 floors for every datum."""
    from pyrovae import guides

    model, x, bad = _pair()
    truth = reference.exact(model, x, num_samples=4000)
    good = guides.Laplace(model, nn.Linear(30, 3).double(), num_steps=2)
    near, far = (reference.compare(guide, truth, x, tests=True) for guide in (good, bad))
    assert (near.mean_error < 3 * near.mean_error_floor.clamp_min(0.02)).all()
    assert (near.sliced_w2 < 3 * near.sliced_w2_floor).all()
    assert ((near.sd_ratio - 1).abs() < 5 / 4000**0.5).all()
    assert (far.sliced_w2 > 5 * near.sliced_w2).all()
    assert (near.w1 < 3 * near.w1_floor.clamp_min(0.02)).all()
    assert (near.correlation_error < 3 * near.correlation_error_floor.clamp_min(0.05)).all()
    assert (near.mmd2_pvalue > 0.005).all()
    assert (far.mmd2_pvalue < 0.01).all()
    assert (near.mmd2.abs() < 0.02).all()
    # Accuracies of 1,000 draws of each: standard error 0.011.
    for chance in (near.c2st, near.c2st_floor, far.c2st_floor):
        assert ((chance - 0.5).abs() < 0.05).all()
    assert (far.c2st > 0.6).all()
    # The floor of two halves of 2,000 draws: |difference of means| ~ sd * sqrt(2 / 2000), largest of 3 latents.
    assert (near.mean_error_floor < 5 * (2 / 2000) ** 0.5).all()
    assert ((near.sd_ratio_floor - 1).abs() < 5 / 2000**0.5).all()
    again = reference.compare(good, truth, x)
    assert torch.equal(again.draws, near.draws)
    assert "floor" in repr(near)
    assert "p < 0.01 for 0 of 4" in repr(near)
    assert again.mmd2 is None
    assert "MMD" not in repr(again)
    assert "mean_error" in near._repr_html_()


def test_compare_refuses_other_data_and_unmixed_references():
    model, x, guide = _pair()
    truth = reference.exact(model, x, num_samples=200)
    for other in (x + 1, x[:2], x.flip(0)):
        with pytest.raises(ValueError, match="other data"):
            reference.compare(guide, truth, other, num_samples=50)
    some = replace(truth, status=("ok", "did not mix", "not enough draws", "ok"))
    result = reference.compare(guide, some, x, num_samples=50, tests=True)
    assert result.c2st.isnan().tolist() == [False, True, True, False]
    assert result.refused == (1, 2)
    assert result.mean_error.isnan().tolist() == [False, True, True, False]
    assert result.sd_ratio_floor.isnan().all(-1).tolist() == [False, True, True, False]
    assert "refused" in repr(result)
    assert math.isfinite(result.summary()["sliced_w2"])
    with pytest.raises(ReferenceRefused, match="4 did not mix"):
        reference.compare(guide, replace(truth, status=("did not mix",) * 4), x)


SCALES = torch.tensor([0.5, 2.0], dtype=torch.double)


def gaussian(u):
    return dist.Normal(0.0, SCALES).log_prob(u).sum(-1)


def test_metropolis_corrected_hmc_leaves_a_gaussian_invariant():
    """Started in the target, 50 coarse steps on: moments of 40,000 independent chains within 4 se."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    chains = 40_000
    corrected = free = init(gaussian, SCALES * normal(chains, 2))
    accepted = []
    for _ in range(50):
        velocity = normal(chains, 2)
        uniform = torch.rand(chains, generator=generator, dtype=torch.double)
        corrected, info = hmc.step(corrected, gaussian, 0.8, 3, velocity, uniform=uniform)
        free, _ = hmc.step(free, gaussian, 0.8, 3, velocity)
        accepted.append(float(info.accept_prob.mean()))
    assert 0.5 < sum(accepted) / 50 < 0.98  # coarse enough to matter
    z = corrected.u / SCALES
    assert (z.mean(0).abs() < 4 / chains**0.5).all()
    assert ((z.var(0) - 1).abs() < 4 * (2 / chains) ** 0.5).all()
    assert abs(float(z[:, 0] @ z[:, 1]) / chains) < 4 / chains**0.5
    assert (free.u / SCALES).var(0).sub(1).abs().max() > 0.05  # without the correction it is not
    torch.testing.assert_close(corrected.log_density, gaussian(corrected.u))
    torch.testing.assert_close(corrected.gradient, -corrected.u / SCALES**2)


def test_leapfrog_energy_error_falls_as_the_square_and_reverses():
    def quartic(u):
        return -(u**4).sum(-1) / 4

    u = torch.tensor([[0.7, -1.1], [1.3, 0.2]], dtype=torch.double)
    v = torch.tensor([[0.4, 0.9], [-1.0, 0.3]], dtype=torch.double)
    errors = []
    for number in (20, 40, 80, 160):
        _, info = hmc.step(init(quartic, u), quartic, 1.0 / number, number, v)
        errors.append(info.energy_error.abs())
    for coarse, fine in itertools.pairwise(errors):
        assert ((coarse / fine - 4).abs() < 0.2).all()
    state, end = hmc.leapfrog(init(quartic, u), quartic, v, 0.1, 10)
    back, _ = hmc.leapfrog(state, quartic, -end, 0.1, 10)
    torch.testing.assert_close(back.u, u)


def test_divergent_trajectories_are_rejected_and_flagged():
    u = torch.full((3, 2), 1.0, dtype=torch.double)
    state = init(gaussian, u)
    kept, info = hmc.step(state, gaussian, 50.0, 20, torch.ones_like(u), uniform=torch.full((3,), 0.999).double())
    assert info.diverging.all()
    assert torch.equal(kept.u, u)


def test_langevin_is_pure_and_has_the_stationary_variance_of_its_formula():
    """AR(1) for a Gaussian: variance s^2-biased to (1 / lam) / (1 - step^2 lam / 4)."""
    generator = torch.Generator().manual_seed(0)
    chains, step = 40_000, 0.6
    state = init(gaussian, SCALES * torch.randn(chains, 2, generator=generator, dtype=torch.double))
    eps = torch.randn(chains, 2, generator=generator, dtype=torch.double)
    copies = [t.clone() for t in state]
    first, info = langevin.step(state, gaussian, step, eps)
    again, _ = langevin.step(state, gaussian, step, eps)
    assert torch.equal(first.u, again.u)
    assert all(torch.equal(a, b) for a, b in zip(copies, state, strict=True))
    assert (info.accept_prob == 1).all()
    torch.testing.assert_close(first.u, state.u - 0.5 * step**2 * state.u / SCALES**2 + step * eps)
    cold, _ = langevin.step(state, gaussian, step, eps, temperature=0.0)
    torch.testing.assert_close(cold.u, state.u + 0.5 * step**2 * state.gradient)
    for _ in range(120):
        state, _ = langevin.step(
            state, gaussian, step, torch.randn(chains, 2, generator=generator, dtype=torch.double)
        )
    variance = SCALES**2 / (1 - step**2 / SCALES**2 / 4)
    assert ((state.u.var(0) / variance - 1).abs() < 4 * (2 / chains) ** 0.5).all()


def test_per_datum_step_sizes():
    u = torch.ones(5, 3, 2, dtype=torch.double)
    eps = torch.zeros_like(u)
    sizes = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.double)
    together, _ = langevin.step(init(gaussian, u), gaussian, sizes, eps)
    for b in range(3):
        alone, _ = langevin.step(init(gaussian, u[:, b]), gaussian, float(sizes[b]), eps[:, b])
        torch.testing.assert_close(together.u[:, b], alone.u)


def test_nuts_runs_models_with_branches():
    """z^2 / 2 on either side, reached through a branch on the value."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = z if float(z.detach().sum()) > 1e9 else z + 0.0
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    truth = reference.nuts(model, torch.tensor([1.0, -1.0], dtype=torch.double), num_samples=200, warmup=100)
    assert ((truth.mean[:, 0] - torch.tensor([0.5, -0.5])).abs() < 4 * 0.71 / truth.ess.sqrt()).all()
