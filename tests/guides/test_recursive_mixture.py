"""Recursive mixtures: the weights of the recursion, one objective a block, and two modes found by two components."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from bench import problems
from pyro.infer import SVI
from torch import nn

from pyrovae import fit, guides, losses
from pyrovae.errors import IncompatibleError, TrainingDiverged
from pyrovae.models import PPCA, VAE
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.optim import Adam
from pyrovae.schedules import RecursiveSchedule

PIXELS, DIM = 6, 2


def vae(dtype=torch.double):
    torch.manual_seed(1)
    return VAE(LinearHeadDecoder(DIM, [8], (PIXELS,)).to(dtype), DIM, "gaussian")


def build(number=3, trunk="shared", model=None, seed=0, **options):
    model = vae() if model is None else model
    torch.manual_seed(seed)
    return guides.RecursiveMixture(model, MLP([PIXELS, 8, 2 * DIM], nn.Tanh).double(), number, trunk=trunk, **options)


def data(rows=5):
    return torch.randn(rows, PIXELS, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def gradients(loss, guide, x, seed=3):
    parameters = {**dict(guide.named_parameters()), **{f"model.{k}": p for k, p in guide.model.named_parameters()}}
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(seed)
    with pyro.get_param_store().scope():
        value = loss.loss_and_grads(guide.model, guide, x)
    return value, {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in parameters.items()}


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_the_weights_are_those_of_the_recursion(trunk):
    x, guide = data(), build(4, trunk)
    with torch.no_grad():
        guide.weights.weight.normal_()
    parts = guide.stages(x)
    new, old = parts.log_new.exp(), parts.log_old.exp()
    alpha = torch.ones(1, 5, dtype=torch.double)
    for m in range(1, 4):
        alpha = torch.cat([alpha * old[m], new[m : m + 1]])
        assert torch.allclose(parts.log_weights()[m, : m + 1].exp(), alpha)
    assert torch.allclose(guide.posterior(x).log_weights.exp(), alpha.T)
    assert torch.allclose(old + new, torch.ones_like(old) + (torch.arange(4) == 0).double().unsqueeze(-1))


def test_components_begin_with_equal_weights_and_different_places():
    q = build(4).posterior(data())
    assert torch.allclose(q.log_weights.exp(), torch.full((5, 4), 0.25, dtype=torch.double))
    apart = torch.cdist(q.locs, q.locs) + 10 * torch.eye(4)
    assert apart.mean(0).min() > 0.1


def test_the_weights_stay_away_from_zero_and_one():
    guide = build(2, smallest=0.05)
    for value, expected in ((100.0, 0.95), (-100.0, 0.05)):
        with torch.no_grad():
            guide.weights.bias.fill_(value)
        weights = guide.posterior(data()).log_weights.exp()
        assert torch.allclose(weights[:, 1], torch.tensor(expected, dtype=torch.double))


@pytest.mark.parametrize("form", ["sample", "example", "log"])
def test_one_component_has_the_elbo_and_its_gradient(form):
    x, guide = data(), build(1)
    value, found = gradients(losses.RecursiveELBO(5.0, form), guide, x)
    plain, expected = gradients(losses.ELBO("stratified"), guide, x)
    assert value == pytest.approx(plain, rel=1e-12)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name


def test_the_value_is_the_stratified_elbo_of_the_mixture():
    x, guide = data(), build(3)
    value, _ = gradients(losses.RecursiveELBO(), guide, x)
    assert value == pytest.approx(gradients(losses.ELBO("stratified"), guide, x)[0], rel=1e-12)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("form", ["sample", "example", "log"])
def test_every_block_gets_the_gradient_of_its_own_objective(trunk, form):
    """One pass writes what the single objectives, each differentiated by itself, write to their blocks."""
    x, guide = data(), build(3, trunk)
    loss = losses.RecursiveELBO(0.7, form, num_particles=2)
    torch.manual_seed(7)
    eps = torch.randn(2, 5, 3 * DIM, dtype=torch.double)

    def gradients_at(objective):
        with pytest.MonkeyPatch.context() as patch:
            from pyrovae import noise

            def normal(number, rows, dim, *, like):
                start = 0 if objective.block in (None, "weights", "model") else objective.block * DIM
                return eps[..., start : start + dim]

            patch.setattr(noise, "normal", normal)
            return gradients(objective, guide, x)[1]

    together = gradients_at(loss)
    *components, weights = guide.blocks()
    names = {id(p): name for name, p in guide.named_parameters()}
    for block, parameters in [*enumerate(components), ("weights", weights)]:
        alone = gradients_at(loss.for_block(block))
        assert parameters
        for parameter in parameters:
            name = names[id(parameter)]
            assert alone[name].abs().sum() > 0, name
            assert torch.allclose(together[name], alone[name], rtol=1e-8, atol=1e-10), (block, name)
    alone = gradients_at(loss.for_block("model"))
    for name in (name for name in together if name.startswith("model.")):
        assert torch.allclose(together[name], alone[name], rtol=1e-8, atol=1e-10), name
    assert all(not alone[name].any() for name in names.values()), "the model's block holds the guide still"
    assert not gradients_at(loss.for_block("weights"))["model.decoder.head.weight"].any()


def test_later_components_do_not_disturb_a_shared_trunk():
    x, guide = data(), build(3)
    before = gradients(losses.RecursiveELBO().for_block(0), guide, x)[1]
    for block in (1, 2, "weights"):
        found = gradients(losses.RecursiveELBO().for_block(block), guide, x)[1]
        assert not found["trunk.1.weight"].any()
    assert before["trunk.1.weight"].any()
    ordinary = gradients(losses.ELBO("stratified"), guide, x)[1]  # end to end, everything is trained
    assert ordinary["trunk.1.weight"].any()


def test_the_objective_of_a_stage_is_flat_where_the_mixture_is_the_posterior():
    """pPCA with orthogonal columns: q_0 = posterior, so log p(x, u) - log Q_0(u) is log p(x) at every u."""
    weight = torch.linalg.qr(torch.randn(PIXELS, DIM, dtype=torch.double))[0] * torch.tensor([2.0, 1.0])
    model, x = PPCA(weight, noise=0.5), data()
    exact = model.posterior(x)
    variance = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1)
    torch.manual_seed(0)
    encoder = MLP([PIXELS, 2 * DIM]).double()
    with torch.no_grad():
        precision = weight.T @ weight / 0.25 + torch.eye(DIM, dtype=torch.double)
        encoder[1].weight[:DIM] = torch.linalg.solve(precision, weight.T / 0.25)
        encoder[1].bias[:DIM], encoder[1].weight[DIM:] = 0.0, 0.0
        encoder[1].bias[DIM:] = variance[0].log()
    guide = guides.RecursiveMixture(model, encoder, 2, trunk="separate")
    loss = losses.RecursiveELBO(math.inf).for_block(1)
    values = loss.per_datum(model, guide, x)
    assert torch.allclose(values, model.log_evidence(x), atol=1e-9)
    for _ in range(3):
        found = gradients(loss, guide, x)[1]
        assert max(gradient.abs().max() for name, gradient in found.items() if "components.1" in name) < 1e-9


def bimodal_data(rows, seed):
    z = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed))
    return z**2 + 0.25 * torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed + 1))


def bimodal_gap(number, trunk, loss, schedule=None):
    """Mean gap of a mixture trained for 700 steps, against quadrature; the guide as well."""
    torch.manual_seed(0)

    def model(x):
        problems.bimodal(x.squeeze(-1))

    guide = guides.RecursiveMixture(model, MLP([1, 32, 32, 2], nn.Tanh), number, trunk=trunk)
    x = bimodal_data(700 * 128, 10)
    fit(model, guide, x, loss=loss, schedule=schedule, optimizer=Adam(lr=1e-2), epochs=1, progress=False)
    test = bimodal_data(500, 20)
    z = torch.linspace(-7, 7, 8001, dtype=torch.double)
    log_joint = -0.5 * z**2 - 0.5 * ((test.double() - z**2) / 0.25) ** 2 - math.log(0.25) - math.log(2 * math.pi)
    evidence = torch.logsumexp(log_joint, -1) + math.log(float(z[1] - z[0]))
    with torch.no_grad():
        gaps = evidence - guide.log_weights(200, test).mean(0)
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5), guide


@pytest.mark.parametrize("schedule", [None, RecursiveSchedule()])
@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_two_components_find_two_modes(trunk, schedule):
    gap, se, guide = bimodal_gap(2, trunk, losses.RecursiveELBO(5.0), schedule)
    assert gap < 0.25
    assert se < 0.05
    locs = guide.posterior(torch.tensor([[2.25]])).locs.flatten().sort().values
    assert torch.allclose(locs, torch.tensor([-1.5, 1.5]), atol=0.2)


def test_without_a_bound_the_new_component_runs_away():
    """What the bound is for: documented, not hoped for."""
    gap, _, guide = bimodal_gap(2, "separate", losses.RecursiveELBO(math.inf))
    assert gap > 1.5
    locs = guide.posterior(torch.tensor([[2.25]])).locs.flatten().abs().sort().values
    assert abs(locs[0] - 1.5) < 0.2
    assert locs[1] > 2.2


def test_blocks_in_turn_are_not_blocks_at_once():
    """The second block sees what the first has become."""
    x = data(16)
    found = []
    for schedule in (None, RecursiveSchedule()):
        guide = build(2)
        result = fit(guide.model, guide, x, loss=losses.RecursiveELBO(), schedule=schedule, max_steps=3, progress=False)
        assert result.objective == "ELBO"
        found.append({name: p.detach().clone() for name, p in guide.named_parameters()})
    assert not torch.equal(found[0]["components.1.weight"], found[1]["components.1.weight"])


def test_a_head_start_holds_the_weights_still():
    x, guide = data(16), build(3)
    before = guide.weights.bias.detach().clone()
    schedule = RecursiveSchedule(head_start=3)
    fit(guide.model, guide, x, schedule=schedule, max_steps=3, progress=False)
    assert torch.equal(guide.weights.bias, before)
    fit(guide.model, guide, x, schedule=RecursiveSchedule(), max_steps=1, progress=False)
    assert not torch.equal(guide.weights.bias, before)


def test_a_resumed_run_in_turn_equals_an_unbroken_one(tmp_path):
    x, ends = data(20), []
    for breaks in ((6,), (2, 6)):
        guide = build(2)
        for steps in breaks:
            fit(guide.model, guide, x, schedule=RecursiveSchedule(head_start=1), batch_size=8, max_steps=steps,
                checkpoint=tmp_path / f"{len(breaks)}.pt", progress=False)  # fmt: skip
        ends.append(torch.cat([p.detach().flatten() for p in (*guide.parameters(), *guide.model.parameters())]))
    assert torch.equal(*ends)


def test_stock_svi_is_one_step_of_every_block():
    x, guide = data(16), build(3, "separate")
    svi = SVI(guide.model, guide, Adam(lr=1e-2), losses.RecursiveELBO())
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    svi.step(x)
    assert all(not torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_encoders_may_be_given_one_by_one():
    nets = [MLP([PIXELS, 8, 2 * DIM]).double() for _ in range(2)]
    guide = guides.RecursiveMixture(vae(), nets, trunk="separate", weights=MLP([PIXELS, 1]).double())
    x = data()
    assert guide.num_components == 2
    assert torch.allclose(guide.posterior(x).locs[:, 1], nets[1](x)[:, :DIM])
    found = gradients(losses.RecursiveELBO(), guide, x)[1]
    assert found["weights.1.weight"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(2, trunk="none"), "trunk must be"),
        (lambda: build(0), "num_components >= 1"),
        (lambda: build(2, smallest=0.5), "smallest must lie"),
        (lambda: guides.RecursiveMixture(vae(), [MLP([6, 4]), MLP([6, 4])]), "no trunk in common"),
        (lambda: guides.RecursiveMixture(vae(), nn.Tanh(), 2), "nn.Sequential with an nn.Linear"),
        (lambda: build(2, weights=nn.Linear(PIXELS, 3).double()).posterior(data()), "one logit for each component"),
        (lambda: guides.RecursiveMixture(vae(), MLP([PIXELS, 5]).double(), 2).posterior(data()), "4 outputs"),
        (lambda: losses.RecursiveELBO(0.0), "must be positive"),
        (lambda: losses.RecursiveELBO(form="none"), "form must be"),
        (lambda: RecursiveSchedule(head_start=-1), "head_start"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_of_stages_needs_stages():
    model = vae()
    plain = guides.Amortized(model, MLP([PIXELS, 2 * DIM]).double())
    with pytest.raises(IncompatibleError, match=r"losses\.RecursiveELBO"):
        fit(model, plain, data(), schedule=RecursiveSchedule(), progress=False)
    with pytest.raises(IncompatibleError, match="not built up in stages"):
        fit(model, plain, data(), loss=losses.RecursiveELBO(), schedule=RecursiveSchedule(), progress=False)


def test_a_nan_within_a_step_says_what_has_moved():
    guide = build(2)
    guide.components[1].weight.register_hook(lambda gradient: gradient * torch.nan)
    first = guide.components[0].weight.detach().clone()
    with pytest.raises(TrainingDiverged, match="before this block of the step"):
        fit(guide.model, guide, data(), schedule=RecursiveSchedule(), max_steps=1, progress=False)
    assert not torch.equal(guide.components[0].weight, first)  # its turn came before
