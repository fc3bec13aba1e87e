"""`pyrovae.optim.Adam`: torch's numbers, one optimiser for all parameters, state that comes and goes."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyrovae import checkpoint, fit, guides, losses
from pyrovae.models import VAE
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.optim import Adam

PIXELS, DIM, STEPS = 5, 2, 50
SHAPES = {"a": (3, 4), "b": (4,), "c": (), "d": (70, 3)}


@pytest.fixture(autouse=True)
def _store():
    with pyro.get_param_store().scope():
        yield


def parameters(dtype, names=SHAPES):
    """Parameters in Pyro's store, and copies of them for torch."""
    draw = torch.Generator().manual_seed(0)
    ours = {name: pyro.param(name, torch.randn(SHAPES[name], generator=draw, dtype=dtype)) for name in names}
    return ours, {name: value.detach().clone().requires_grad_() for name, value in ours.items()}


def gradient(step, name, dtype):
    """One of a fixed sequence, so that rounding in the parameters is not fed back."""
    draw = torch.Generator().manual_seed(1000 * step + ord(name))
    return torch.randn(SHAPES[name], generator=draw, dtype=dtype) * 3.0 ** (step % 3)


def give(params, step, dtype, names=None):
    for name in params if names is None else names:
        params[name].grad = gradient(step, name, dtype)


def assert_close(ours, theirs, lr, dtype, steps=STEPS):
    """Worst-case rounding of both.

    An update is at most 3.2 lr in size (default betas). A step rounds theta to a unit in the last place, and the update
    by 10 eps from the first mean (memory of 10 steps), `steps` eps from the root of the second, some 20 for the rest.
    """
    for name, value in ours.items():
        size = float(value.detach().abs().max()) + 3.2 * lr * steps
        bound = steps * torch.finfo(dtype).eps * (size + (30 + steps) * 3.2 * lr)
        assert (value - theirs[name]).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.1, "betas": (0.5, 0.9)}, {"weight_decay": 0.1, "eps": 1e-4}, {"amsgrad": True}],
)
def test_numbers_are_torchs(options, dtype):
    ours, theirs = parameters(dtype)
    optimizer, reference = Adam(**options), torch.optim.Adam(list(theirs.values()), **options)
    start = {name: value.detach().clone() for name, value in ours.items()}
    for step in range(STEPS):
        give(ours, step, dtype)
        give(theirs, step, dtype)
        optimizer(set(ours.values()))
        reference.step()
    assert_close(ours, theirs, options.get("lr", 1e-3), dtype)
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in ours.items())


def test_one_fused_optimiser_for_all_parameters():
    ours, _ = parameters(torch.float64)
    ours["e"] = pyro.param("e", torch.ones(2, dtype=torch.float32))
    optimizer = Adam()
    for value in ours.values():
        value.grad = torch.ones_like(value)
    optimizer(ours.values())
    (shared,) = {id(item): item for item in optimizer.optim_objs.values()}.values()
    (group,) = shared.param_groups
    assert len(group["params"]) == len(ours)
    assert group["fused"]
    assert all(value.grad is None for value in ours.values())


def test_parameters_that_appear_later_count_their_own_steps():
    dtype = torch.float64
    ours, theirs = parameters(dtype)
    optimizer = Adam(lr=0.01)
    references = {name: torch.optim.Adam([value], lr=0.01) for name, value in theirs.items()}
    for step in range(STEPS):
        present = [name for name in ours if step >= {"a": 0, "b": 10, "c": 10, "d": 30}[name]]
        give(ours, step, dtype, present)
        give(theirs, step, dtype, present)
        optimizer([ours[name] for name in present])
        for name in present:
            references[name].step()
    assert_close(ours, theirs, 0.01, dtype)
    steps = {name: int(state["state"][0]["step"]) for name, state in optimizer.get_state().items()}
    assert steps == {"a": 50, "b": 40, "c": 40, "d": 20}


def test_only_what_it_is_called_with_moves():
    """Pyro calls with the parameters of this step; another's gradient stays for its own step."""
    dtype = torch.float64
    ours, _ = parameters(dtype)
    optimizer = Adam(lr=0.1)
    give(ours, 0, dtype)
    optimizer(ours.values())
    give(ours, 1, dtype)
    before = {name: value.detach().clone() for name, value in ours.items()}
    optimizer([ours["a"]])
    assert not torch.equal(ours["a"], before["a"])
    for name in ("b", "c", "d"):
        assert torch.equal(ours[name], before[name])
        assert torch.equal(ours[name].grad, gradient(1, name, dtype))


def test_a_parameter_without_gradient_stays():
    dtype = torch.float64
    ours, _ = parameters(dtype)
    optimizer = Adam(lr=0.1)
    give(ours, 0, dtype)
    optimizer(ours.values())
    before = ours["b"].detach().clone()
    give(ours, 1, dtype, ["a", "c", "d"])
    optimizer(ours.values())
    assert torch.equal(ours["b"], before)
    assert int(optimizer.get_state()["b"]["state"][0]["step"]) == 1
    optimizer([])  # nothing to do is no error


@pytest.mark.parametrize("order", [("stock", "ours"), ("ours", "stock"), ("ours", "ours")])
def test_state_goes_on_in_either_optimiser(order, tmp_path):
    """25 + 25 steps by way of a file equal 50 of torch's; options come with the state."""
    dtype = torch.float64
    made = {"ours": lambda lr: Adam(lr=lr), "stock": lambda lr: pyro.optim.Adam({"lr": lr})}
    ours, theirs = parameters(dtype)
    reference = torch.optim.Adam(list(theirs.values()), lr=0.01)
    optimizer = made[order[0]](0.01)
    for step in range(STEPS):
        if step == 25:
            optimizer.save(tmp_path / "state.pt")
            optimizer = made[order[1]](1.0)
            optimizer.load(tmp_path / "state.pt")
        give(ours, step, dtype)
        give(theirs, step, dtype)
        optimizer(ours.values())
        reference.step()
    assert_close(ours, theirs, 0.01, dtype)


def test_another_optimisers_state_is_refused():
    ours, _ = parameters(torch.float64)
    stock = pyro.optim.SGD({"lr": 0.1, "momentum": 0.9})
    give(ours, 0, torch.float64)
    stock(ours.values())
    optimizer = Adam()
    optimizer.set_state(stock.get_state())
    with pytest.raises(ValueError, match=r"not Adam's.*go on with the optimiser that wrote it"):
        optimizer(ours.values())


def test_options_by_name():
    dtype = torch.float64
    ours, theirs = parameters(dtype)
    special = {"b": {"lr": 0.1}, "d": {"lr": 0.1}, "c": {"betas": (0.5, 0.9)}}
    asked = []

    def options(name):
        asked.append(name)
        return special.get(name, {})

    optimizer = Adam(lr=0.01, per_parameter=options)
    references = [torch.optim.Adam([value], **{"lr": 0.01, **special.get(n, {})}) for n, value in theirs.items()]
    for step in range(STEPS):
        give(ours, step, dtype)
        give(theirs, step, dtype)
        optimizer(ours.values())
        for reference in references:
            reference.step()
    assert_close(ours, theirs, 0.1, dtype)
    assert sorted(asked) == sorted(ours)
    groups = next(iter(optimizer.optim_objs.values())).param_groups
    assert sorted(len(group["params"]) for group in groups) == [1, 1, 2]


@pytest.mark.parametrize("wrong", [{"momentum": 0.9}, None])
def test_wrong_options_by_name(wrong):
    ours, _ = parameters(torch.float64)
    with pytest.raises(ValueError, match=r"per_parameter must return a dict with some of lr, betas.*for 'a'"):
        Adam(per_parameter=lambda name: wrong)([ours["a"]])


def test_max_norm_is_of_the_whole_gradient():
    dtype = torch.float64
    ours, theirs = parameters(dtype)
    optimizer, reference = Adam(lr=0.01, max_norm=0.5), torch.optim.Adam(list(theirs.values()), lr=0.01)
    for step in range(STEPS):
        give(ours, step, dtype)
        give(theirs, step, dtype)
        optimizer(set(ours.values()))
        assert torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5) > 0.5
        reference.step()
    assert_close(ours, theirs, 0.01, dtype)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"options by name, Adam\(lr=1e-3\)"):
        Adam({"lr": 1e-3})
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Adam(lr=-1.0)
    with pytest.raises(ValueError, match="max_norm must be positive"):
        Adam(max_norm=0.0)
    with pytest.raises(ValueError, match=r"shape \(2,\) is not in Pyro's store"):
        Adam()([torch.zeros(2, requires_grad=True)])


def test_a_scheduler_around_it_says_what_to_wrap():
    ours, _ = parameters(torch.float64)
    scheduler = pyro.optim.ExponentialLR({"optimizer": Adam, "optim_args": {"lr": 1e-3}, "gamma": 0.9})
    with pytest.raises(TypeError, match=r"a learning-rate schedule takes torch's own optimiser"):
        scheduler(ours.values())


def vae_pair(seed=1):
    torch.manual_seed(seed)
    vae = VAE(LinearHeadDecoder(DIM, [6], (PIXELS,)), DIM).double()
    return vae, guides.Amortized(vae, MLP([PIXELS, 6, 2 * DIM]).double())


def binary(rows=33):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(rows, PIXELS, generator=draw, dtype=torch.float64).round()


def train(optimizer, loss):
    vae, guide = vae_pair()
    svi = SVI(vae, guide, optimizer, loss)
    torch.manual_seed(3)
    values = [svi.step(binary()) for _ in range(STEPS)]
    return values, [*vae.parameters(), *guide.parameters()]


@pytest.mark.parametrize("loss", [losses.ELBO, Trace_ELBO])
def test_stock_svi_takes_the_steps_of_pyros_adam(loss):
    """In float64 rounding (1e-16 a step) stays far below 1e-10 over fifty steps of a small net."""
    with pyro.get_param_store().scope():
        curve, ours = train(Adam(lr=0.01), loss())
    with pyro.get_param_store().scope():
        expected, theirs = train(pyro.optim.Adam({"lr": 0.01}), loss())
    assert torch.allclose(torch.tensor(curve), torch.tensor(expected), rtol=1e-10, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_names_are_those_of_the_modules():
    vae, guide = vae_pair()
    names = set()
    svi = SVI(vae, guide, Adam(per_parameter=lambda name: names.add(name) or {}), losses.ELBO())
    svi.step(binary())
    assert names == {n for n, _ in vae.named_parameters()} | {f"guide.{n}" for n, _ in guide.named_parameters()}


def slow_decoder(name):
    return {"lr": 1e-3} if name.startswith("decoder") else {}


def run(path, *lengths, optimizer):
    for steps in lengths:
        model, guide = vae_pair()
        fit(model, guide, binary(), max_steps=steps, checkpoint=path, optimizer=optimizer(steps), batch_size=10,
            progress=False)  # fmt: skip
    return {**model.state_dict(), **guide.state_dict()}, checkpoint.load(path)


def test_resumed_equals_unbroken(tmp_path):
    """100 = 50 + nothing + 50, where 50 is not the end of an epoch; bit for bit, optimiser state included."""

    def optimizer(_):
        return Adam(lr=0.01, per_parameter=slow_decoder, max_norm=5.0)

    whole, one = run(tmp_path / "whole.pt", 100, optimizer=optimizer)
    broken, two = run(tmp_path / "broken.pt", 50, 50, 100, optimizer=optimizer)
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    assert one["optimizer"].keys() == two["optimizer"].keys()
    for name, state in one["optimizer"].items():
        other = two["optimizer"][name]
        assert state["param_groups"] == other["param_groups"]
        assert all(torch.equal(value, other["state"][0][key]) for key, value in state["state"][0].items())
        assert int(state["state"][0]["step"]) == 100
        assert state["param_groups"][0]["lr"] == (1e-3 if "decoder" in name else 0.01)


def test_a_checkpoint_of_pyros_adam_is_continued(tmp_path):
    def stock(_):
        return pyro.optim.Adam({"lr": 0.01})

    expected, _ = run(tmp_path / "stock.pt", 100, optimizer=stock)
    ours, _ = run(tmp_path / "mixed.pt", 50, 100, optimizer=lambda steps: stock(0) if steps == 50 else Adam(lr=0.01))
    for name, value in expected.items():
        assert torch.allclose(value, ours[name], rtol=1e-9, atol=1e-11), name


def test_a_parameter_of_a_branch_not_taken():
    """A parameter that registers in a later step only, in stock SVI."""

    def model(late):
        loc = pyro.param("loc", torch.tensor(0.5))
        shift = pyro.param("shift", torch.tensor(0.0)) if late else 0.0
        pyro.sample("x", dist.Normal(loc + shift, 1.0), obs=torch.tensor(1.0))

    def guide(late):
        pass

    optimizer = Adam(lr=0.1)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for late in (False, False, True, False):
        svi.step(late)
    steps = {name: int(state["state"][0]["step"]) for name, state in optimizer.get_state().items()}
    assert steps == {"loc": 4, "shift": 1}
    assert pyro.param("shift").item() == pytest.approx(0.1, rel=1e-5)  # the first step of Adam is lr in size


def test_clearing_the_objects_starts_afresh():
    """What `pyrovae.checkpoint` does before it hands a state back."""
    ours, _ = parameters(torch.float64)
    optimizer = Adam(lr=0.1)
    give(ours, 0, torch.float64)
    optimizer(ours.values())
    optimizer.optim_objs.clear()
    give(ours, 1, torch.float64)
    optimizer(ours.values())
    assert {int(state["state"][0]["step"]) for state in optimizer.get_state().values()} == {1}


def test_frozen_parameters_stay_frozen():
    vae, guide = vae_pair()
    vae.decoder.requires_grad_(False)
    before = [p.detach().clone() for p in vae.parameters()]
    fit(vae, guide, binary(), max_steps=5, optimizer=Adam(lr=0.1), progress=False)
    assert all(torch.equal(p, old) for p, old in zip(vae.parameters(), before, strict=True))
