"""SemiAmortized: the base at K = 0, the contraction law, exact total gradients."""

from __future__ import annotations

import weakref

import pyro
import pytest
import torch
from bench import problems
from guides_registry import flow_guide
from pyro.infer import Trace_ELBO
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae import flows, guides
from pyrovae.families import get_family
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder, Table
from pyrovae.refine import Clip, Objective, climb


def linear_encoder(x, dim):
    torch.manual_seed(3)
    return MLP([x.shape[1], 2 * dim]).to(x.dtype)


def test_no_steps_is_the_base_bit_for_bit():
    model, x = problems.ppca()
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, num_steps=0)
    assert torch.equal(guide.lam(x), base.lam(x))
    losses, gradients = [], []
    for one in (base, guide):
        with pyro.get_param_store().scope():
            torch.manual_seed(0)
            losses.append(Trace_ELBO().loss_and_grads(model, one, x))
        gradients.append([p.grad.clone() for p in (*model.parameters(), *base.parameters())])
        for p in (*model.parameters(), *base.parameters()):
            p.grad = None
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_contracts_by_the_law_with_exact_inner_gradients(steps):
    """mu_K - m = (I - alpha Lambda)^K (mu_0 - m): antithetic pairs make the gradient of the location exact."""
    model, x = problems.ppca()
    base = guides.Amortized(model, linear_encoder(x, 10))
    alpha = 0.5 / float(torch.linalg.eigvalsh(model.precision().detach())[-1])
    guide = guides.SemiAmortized(base, steps, {"loc": alpha, "log_var": 1e-3}, 0.0, antithetic=True, max_norm=None)
    m = model.posterior(x).loc
    shrink = torch.linalg.matrix_power(torch.eye(10).double() - alpha * model.precision(), steps)
    expected = (base.lam(x)[:, :10] - m) @ shrink
    assert (guide.lam(x)[:, :10] - m - expected).abs().max() < 1e-10


def test_one_draw_per_step_does_not_contract_exactly():
    model, x = problems.ppca()
    base = guides.Amortized(model, linear_encoder(x, 10))
    alpha = 0.5 / float(torch.linalg.eigvalsh(model.precision().detach())[-1])
    guide = guides.SemiAmortized(base, 5, {"loc": alpha, "log_var": 1e-3}, 0.0, max_norm=None)
    m = model.posterior(x).loc
    shrink = torch.linalg.matrix_power(torch.eye(10).double() - alpha * model.precision(), 5)
    expected = (base.lam(x)[:, :10] - m) @ shrink
    assert (guide.lam(x)[:, :10] - m - expected).abs().max() > 1e-3


def test_log_variance_ends_at_the_inverse_diagonal():
    model, x = problems.ppca(rows=4)
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, 3000, 0.004, 0.0, num_samples=4, antithetic=True, max_norm=None)
    with torch.no_grad():
        log_var = guide.lam(x)[:, 10:]
    target = -model.precision().diagonal().log()
    # The end point jitters with the noise of one step; its mean over data and dims is tighter.
    assert abs(float((log_var - target).mean())) < 0.02


def dropout_vae():
    """In training mode: every run of the decoder draws a mask."""
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(
        LinearHeadDecoder(2, [6], (8,), torch.nn.Softplus), torch.nn.Dropout(0.4), torch.nn.Linear(8, 8)
    )
    return VAE(decoder.double(), 2, "gaussian"), torch.randn(3, 8, dtype=torch.double)


def small_vae():
    torch.manual_seed(0)
    vae = VAE(LinearHeadDecoder(2, [6], (8,), torch.nn.Softplus).double(), 2, "gaussian")
    return vae, torch.randn(3, 8, dtype=torch.double)


def base_guide(vae, family):
    outputs = {"diagonal": 4, "full-rank": 5, "low-rank": 6, "mixture": 10}
    if family in outputs:
        return guides.Amortized(vae, MLP([8, 5, outputs[family]], torch.nn.Tanh).double(), family)
    flow = {
        "householder": lambda: flows.Householder(2, 2),
        "iaf": lambda: flows.IAF(2, 2, context=3, hidden=(5,)),
        "coupling": lambda: flows.Coupling(2, 2, context=3, hidden=(5,), activation=torch.nn.Tanh),
    }[family]()
    return flow_guide(vae, 8, flow, torch.double)


def assert_gradient_of_finite_differences(objective, parameters):
    for parameter in parameters:
        (gradient,) = torch.autograd.grad(objective(), parameter)
        flat, step = parameter.data.view(-1), 1e-6
        place = int(gradient.abs().argmax())
        flat[place] += step
        up = float(objective().detach())
        flat[place] -= 2 * step
        down = float(objective().detach())
        flat[place] += step
        exact = float(gradient.view(-1)[place])
        assert exact != 0
        assert abs((up - down) / (2 * step) - exact) < 1e-5 * (1 + abs(exact))


@pytest.mark.parametrize("family", ["diagonal", "full-rank", "mixture", "householder", "iaf", "coupling"])
@pytest.mark.parametrize(("steps", "memory"), [(4, "fast"), (6, "light")])
def test_total_gradient_is_that_of_finite_differences(family, steps, memory):
    """Encoder, decoder, noise scale and a flow's own weights; program (4 steps) and recorded graph (6)."""
    vae, x = small_vae()
    base = base_guide(vae, family)
    guide = guides.SemiAmortized(base, steps, 0.05, 0.5, max_norm=2.0, memory=memory)
    guide.space(x)

    def objective():
        torch.manual_seed(7)
        log_weights, u, log_q = guide.stratified(2, x)
        return (log_weights.exp() * (guide.space(x).bind(x)(u) - log_q)).sum()

    weights = [base.encoder[1].weight, vae.decoder.trunk[0].weight, vae.noise["log"]]
    if base.flow is not None:
        weights.append(next(weight for weight in base.flow.parameters() if weight.dim() == 2))
    assert_gradient_of_finite_differences(objective, weights)


@pytest.mark.parametrize(("steps", "memory"), [(3, "fast"), (6, "fast"), (6, "light")])
def test_dropout_masks_are_drawn_once_a_step_and_used_again_by_the_backward_pass(steps, memory):
    vae, x = dropout_vae()
    base = base_guide(vae, "diagonal")
    guide = guides.SemiAmortized(base, steps, 0.05, 0.5, max_norm=None, memory=memory)
    guide.space(x)
    assert vae.training

    def objective(seed=7):
        torch.manual_seed(seed)
        return (guide.lam(x).square() * torch.arange(1.0, 5.0)).sum()

    assert_gradient_of_finite_differences(
        objective, (base.encoder[1].weight, vae.decoder[0].trunk[0].weight, vae.decoder[2].weight)
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key):
        self.now -= self.sizes.pop(key)


def test_light_memory_gives_the_same_gradient_to_the_last_digit_and_does_not_grow_with_the_steps():
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(MLP([4, 64, 64, 100], torch.nn.Tanh), torch.nn.Dropout(0.2), torch.nn.Linear(100, 80))
    vae = VAE(decoder.double(), 4, "bernoulli")
    x = torch.bernoulli(torch.full((16, 80), 0.4, dtype=torch.double))
    base = guides.Amortized(vae, MLP([80, 16, 8], torch.nn.Tanh).double())
    parameters = [*vae.parameters(), *base.parameters()]

    def run(memory, steps):
        guide = guides.SemiAmortized(base, steps, 0.05, max_norm=3.0, memory=memory)
        guide.lam(x)  # space and recording are found
        torch.manual_seed(7)
        with LiveBytes() as live:
            loss = guide.lam(x).square().sum()
            held = live.now
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return gradients, held, live.most

    few = {memory: run(memory, 6) for memory in ("fast", "light")}
    many = {memory: run(memory, 24) for memory in ("fast", "light")}
    for found in (few, many):
        for ours, theirs in zip(found["light"][0], found["fast"][0], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    # lam, velocity and the clipped gradient's few [B, P] against every activation of the decoder.
    growth = {memory: [many[memory][i] - few[memory][i] for i in (1, 2)] for memory in ("fast", "light")}
    row = 16 * 8 * 8  # bytes of one [B, P]
    for fast, light in zip(growth["fast"], growth["light"], strict=True):
        assert light < 18 * 6 * row
        assert light < 0.1 * fast


def test_adjoint_recursion_is_double_backprop():
    """Kim et al.'s reverse recursion with exact Hessian-vector products, K = 6, momentum 0.5, against autograd."""
    torch.manual_seed(0)
    steps, alpha, gamma = 6, 0.1, 0.5
    vae = VAE(LinearHeadDecoder(3, [7], (9,), torch.nn.Tanh).double(), 3, "bernoulli")
    x = torch.bernoulli(torch.full((4, 9), 0.4, dtype=torch.double))
    table = Table(torch.randn(4, 6, dtype=torch.double))
    guide = guides.SemiAmortized(guides.Amortized(vae, table), steps, alpha, gamma, max_norm=None)
    theta = list(vae.parameters())
    family, log_joint = guide.family(x), guide.space(x).bind(x)

    def f(lam, eps):  # minus the ELBO, summed over data
        return -(log_joint(family.sample(lam, eps)).sum() + family.entropy(lam).sum())

    torch.manual_seed(7)
    path = [lam.detach() for lam in guide.path(x)]
    last = torch.randn(1, 4, 3, dtype=torch.double)
    torch.manual_seed(7)
    automatic = torch.autograd.grad(f(guide.lam(x), last), [table.rows, *theta])

    torch.manual_seed(7)
    draws = [torch.randn(1, 4, 3, dtype=torch.double) for _ in range(steps)]
    leaf = path[-1].clone().requires_grad_()
    lam_bar, *theta_bar = torch.autograd.grad(f(leaf, last), [leaf, *theta])
    velocity_bar = torch.zeros_like(lam_bar)
    for k in reversed(range(steps)):
        velocity_bar = velocity_bar + alpha * lam_bar
        leaf = path[k].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(leaf, draws[k]), leaf, create_graph=True)
        products = torch.autograd.grad((gradient * velocity_bar).sum(), [leaf, *theta])
        lam_bar = lam_bar - products[0]
        theta_bar = [bar - product for bar, product in zip(theta_bar, products[1:], strict=True)]
        velocity_bar = gamma * velocity_bar
    for ours, theirs in zip([lam_bar, *theta_bar], automatic, strict=True):
        assert (ours - theirs).abs().max() < 1e-12 * (1 + theirs.abs().max())
    # The path through the steps is there to be found.
    plain = torch.autograd.grad(f(path[-1].clone().requires_grad_(), last), theta)
    assert (plain[0] - automatic[1]).abs().max() > 1e-3 * automatic[1].abs().max()


@pytest.mark.parametrize("family", ["diagonal", "full-rank", "low-rank", "mixture", "householder", "iaf"])
def test_small_steps_on_one_fixed_noise_set_raise_every_datum_s_elbo_monotonically(family):
    vae, x = small_vae()
    base = base_guide(vae, family)
    objective = Objective(base.family(x), base.space(x).bind(x))
    lam = base.lam(x).detach()
    eps = objective.noise(6, lam)
    options = {"step_size": torch.full((lam.shape[1],), 1e-3).double(), "momentum": 0.0}
    path, first = climb(objective, lam, [eps] * 15, clip=Clip(base.family(x), None, lam), **options)
    with torch.no_grad():
        values = torch.stack([objective(point, eps) for point in path])
    assert (values[1:] > values[:-1]).all()
    # To first order the gain is step * |gradient|^2: the step goes along the gradient, not against it.
    gain, predicted = values[1] - values[0], 1e-3 * first.square().sum(-1)
    assert ((gain / predicted - 1).abs() < 0.2).all()


def test_first_order_drops_the_path_through_the_steps():
    vae, x = small_vae()
    base = guides.Amortized(vae, MLP([8, 4]).double())
    gradients = []
    for kind in ("total", "first-order"):
        guide = guides.SemiAmortized(base, 4, 0.05, gradient=kind)
        torch.manual_seed(7)
        lam = guide.lam(x)
        gradients.append(torch.autograd.grad(lam.square().sum(), base.encoder[1].weight, retain_graph=True)[0])
        if kind == "first-order":
            assert not torch.autograd.grad(lam.sum(), list(vae.parameters()), allow_unused=True)[0]
            # d lam_K / d lam_0 is the identity
            pulled = torch.autograd.grad(base.lam(x), base.encoder[1].weight, 2 * lam.detach())[0]
            assert torch.allclose(gradients[-1], pulled, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*gradients)


def test_steps_improve_the_elbo_of_each_datum():
    """The sign: small steps with exact gradients raise every datum's own closed-form ELBO, step after step."""
    model, x = problems.ppca(rows=6)
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, 10, 0.002, 0.0, num_samples=50, antithetic=True, max_norm=None)
    exact, precision = model.posterior(x), model.precision()

    def kl(lam):  # KL(q || p) up to a constant, closed form
        loc, log_var = lam[:, :10], lam[:, 10:]
        gap = loc - exact.loc
        return 0.5 * ((gap @ precision * gap).sum(-1) + (log_var.exp() * precision.diagonal() - log_var).sum(-1))

    with torch.no_grad():
        values = torch.stack([kl(lam) for lam in guide.path(x)])
    assert (values[1:] < values[:-1]).all()


def test_clipping_is_per_datum_and_block():
    model, x = problems.ppca(rows=5)
    base = guides.Amortized(model, linear_encoder(x, 10))
    guide = guides.SemiAmortized(base, 1, 1.0, 0.0, max_norm={"loc": 0.1, "log_var": 0.2})
    step = guide.path(x)[1] - guide.path(x)[0]
    assert torch.allclose(step[:, :10].norm(dim=-1), torch.full((5,), 0.1).double(), atol=1e-9)
    assert torch.allclose(step[:, 10:].norm(dim=-1), torch.full((5,), 0.2).double(), atol=1e-9)


def test_clipping_leaves_short_gradients_alone():
    model, x = problems.ppca(rows=5)
    base = guides.Amortized(model, linear_encoder(x, 10))
    lams = []
    for limit in (None, 1e9, {"loc": 1e9, "log_var": 1e-9}):
        torch.manual_seed(0)
        lams.append(guides.SemiAmortized(base, 2, 0.01, max_norm=limit).lam(x))
    assert torch.equal(lams[0], lams[1])
    assert (lams[2][:, 10:] - base.lam(x)[:, 10:]).norm(dim=-1).max() < 1e-10
    ones = torch.ones(2, 2).double()  # a family with an empty block
    assert torch.equal(Clip(get_family("full-rank", 1), 1.0, ones)(ones), ones)


@pytest.mark.parametrize("optimizer", [None, lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9)])
@pytest.mark.parametrize("family", ["diagonal", "mixture", "iaf"])
def test_inner_svi_steps_a_torch_optimizer(family, optimizer):
    """Against the loop written out; 6 steps, so that the recorded log-joint serves."""
    vae, x = small_vae()
    base = base_guide(vae, family)
    guide = guides.SemiAmortized(base, 6, inner="svi", optimizer=optimizer, num_samples=2, max_norm=None)
    torch.manual_seed(7)
    path = guide.path(x)
    torch.manual_seed(7)
    objective = Objective(base.family(x), base.space(x).bind(x))
    draws = [objective.noise(2, path[0]) for _ in range(6)]
    lam = base.lam(x).detach().clone().requires_grad_()
    stepper = torch.optim.Adam([lam], lr=0.05) if optimizer is None else optimizer([lam])
    for k, eps in enumerate(draws):
        assert torch.allclose(path[k], lam, rtol=0, atol=1e-12)
        stepper.zero_grad()
        (-objective(lam, eps).sum()).backward()
        stepper.step()
    assert torch.allclose(path[-1], lam, rtol=0, atol=1e-12)
    assert not path[-1].requires_grad
    assert guide.gradient == "detached"


def test_works_under_no_grad_and_gives_the_training_path():
    model, x = problems.ppca(rows=3)
    guide = guides.SemiAmortized(guides.Amortized(model, linear_encoder(x, 10)), 4, 0.01)
    torch.manual_seed(0)
    trained = guide.lam(x)
    torch.manual_seed(0)
    with torch.no_grad():
        evaluated = guide.lam(x)
    assert not evaluated.requires_grad
    assert torch.allclose(trained, evaluated, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": -1},
        {"num_samples": 0},
        {"momentum": 1.0},
        {"step_size": -0.1},
        {"max_norm": 0.0},
        {"max_norm": {"loc": 1.0, "log_var": -1.0}},
        {"step_size": {"loc": 0.1, "x": 1}},
        {"gradient": "second-order"},
        {"memory": "small"},
        {"inner": "adam"},
        {"inner": "svi", "gradient": "total"},
        {"inner": "svi", "gradient": "first-order"},
        {"inner": "svi", "step_size": 0.1},
        {"inner": "svi", "momentum": 0.5},
        {"optimizer": torch.optim.Adam},
    ],
)
def test_bad_options_raise(options):
    model, x = problems.ppca(rows=2)
    base = guides.Amortized(model, linear_encoder(x, 10))
    expected = r"needs|positive|each block|must be|carry no graph|the optimizer's|steps only"
    with pytest.raises(ValueError, match=expected):
        guides.SemiAmortized(base, **options).lam(x)


def test_antithetic_mixture_raises_and_so_does_a_base_without_family():
    model, x = problems.ppca(rows=2)
    base = guides.Amortized(model, MLP([30, 42]).double(), "mixture")
    with pytest.raises(ValueError, match="symmetric noise"):
        guides.SemiAmortized(base, antithetic=True).lam(x)
    with pytest.raises(TypeError, match="a guide with a family"):
        guides.SemiAmortized(guides.ShortRun(model))
