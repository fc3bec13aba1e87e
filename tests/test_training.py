"""`fit`: resuming, stopping, the parameter store, and what its numbers are."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from guides_registry import GUIDES
from pyro.distributions import constraints
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyrovae import checkpoint, fit, guides, handlers, losses
from pyrovae.errors import (
    CheckpointError,
    DataError,
    IncompatibleError,
    ParameterCollision,
    TrainingDiverged,
)
from pyrovae.models import PPCA, VAE
from pyrovae.nets import MLP, LinearHeadDecoder

PIXELS, DIM, ROWS, BATCH = 5, 2, 33, 10  # four steps per epoch, the last one ragged


def binary(rows=ROWS, seed=0):
    return torch.bernoulli(torch.rand(rows, PIXELS, generator=torch.Generator().manual_seed(seed)),
                           generator=torch.Generator().manual_seed(seed + 1))  # fmt: skip


def pair(seed=1, likelihood="bernoulli", hidden=6):
    torch.manual_seed(seed)
    vae = VAE(LinearHeadDecoder(DIM, [hidden], (PIXELS,)), DIM, likelihood)
    return vae, guides.Amortized(vae, MLP([PIXELS, hidden, 2 * DIM]))


def quiet(*args, **options):
    return fit(*args, **{"progress": False, "batch_size": BATCH, **options})


class WithBare(nn.Module):
    """A VAE-like model with two parameters that no module owns, one of them constrained."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(DIM, PIXELS)

    def forward(self, x):
        pyro.module("decoder", self.decoder)
        shift = pyro.param("shift", lambda: torch.randn(PIXELS))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + shift, scale).to_event(1), obs=x)


def bare_pair():
    torch.manual_seed(1)
    model = WithBare()
    return model, guides.Amortized(model, MLP([PIXELS, 6, 2 * DIM]))


def function_pair():
    torch.manual_seed(1)
    decoder = nn.Linear(DIM, PIXELS)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    model.decoder = decoder
    return model, guides.Amortized(model, MLP([PIXELS, 6, 2 * DIM]))


def mixture_pair():
    vae, _ = pair()
    torch.manual_seed(2)
    return vae, GUIDES["mixture"](vae, PIXELS, DIM)


def short_run_pair():
    vae, _ = pair()
    return vae, guides.ShortRun(vae, num_steps=3)


def exponential():
    return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.8})


CASES = {
    "plain": (pair, {}),
    "scheduler": (pair, {"optimizer": exponential}),
    "kl-schedule": (pair, {"kl_weight": handlers.LinearSchedule(60, start=0.1)}),
    "early-stopping": (pair, {"validation": binary(17, 5), "patience": 50}),
    "dynamic": (pair, {"transform": torch.bernoulli, "data": torch.rand(ROWS, PIXELS)}),
    "clipped": (pair, {"max_norm": 0.5}),
    "bare": (bare_pair, {"data": torch.randn(ROWS, PIXELS)}),
    "function": (function_pair, {}),
    "mixture": (mixture_pair, {}),
    "short-run": (short_run_pair, {}),
}


def everything(build, path, options, *lengths):
    """Train for each of `lengths` steps in turn, every time with fresh objects; the state and the last checkpoint."""
    for steps in lengths:
        pyro.clear_param_store()
        model, guide = build()
        given = dict(options)
        optimizer = given.pop("optimizer", lambda: pyro.optim.Adam({"lr": 1e-2}))()
        data = given.pop("data", binary())
        given.setdefault("validation", data[:7].round())
        result = quiet(model, guide, data, max_steps=steps, checkpoint=path, optimizer=optimizer, **given)
    return result, checkpoint.load(path)


def leaves(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{prefix}.{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{prefix}.{i}").items()}
    return {prefix: tree}


def assert_identical(first, second):
    first, second = leaves(first), leaves(second)
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:the KL schedule takes")
def test_resumed_equals_unbroken(case, tmp_path):
    """100 = 50 + 50 = 50 + nothing + 50, where 50 lies in the middle of an epoch; bit for bit."""
    build, options = CASES[case]
    assert 50 % -(-ROWS // BATCH) != 0
    whole, one = everything(build, tmp_path / "whole.pt", options, 100)
    broken, two = everything(build, tmp_path / "broken.pt", options, 50, 50, 100)
    assert_identical(one, two)  # weights, bare parameters, optimiser, permutation, random states, early stopping
    assert one["at"]["step"] == 100
    assert one["optimizer"]
    assert whole.curve == broken.curve
    assert len(whole.curve) == 25
    assert whole.validation == broken.validation
    assert whole.kl_weight == broken.kl_weight
    assert_identical(whole.state["params"], broken.state["params"])


def test_the_state_handed_back_is_the_trained_one(tmp_path):
    """What a resumed run restores is in the caller's modules, not only in the file."""
    vae, guide = pair()
    quiet(vae, guide, binary(), max_steps=30, checkpoint=tmp_path / "a.pt")
    other_vae, other = pair(seed=9)
    quiet(other_vae, other, binary(), max_steps=30, checkpoint=tmp_path / "a.pt")
    assert_identical(vae.state_dict(), other_vae.state_dict())
    assert_identical(guide.state_dict(), other.state_dict())


def test_checkpoint_holds_no_objects_and_keys_by_state_dict_names(tmp_path):
    vae, guide = pair()
    quiet(vae, guide, binary(), epochs=1, checkpoint=tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    names = {f"model.{n}" for n, _ in vae.named_parameters()} | {f"guide.{n}" for n, _ in guide.named_parameters()}
    assert set(content["optimizer"]) == names
    assert not (tmp_path / "a.pt.tmp").exists()


def _another_architecture():
    return pair(hidden=7)


def _another_decoder_kind():
    torch.manual_seed(0)
    vae = VAE(nn.Linear(DIM, PIXELS), DIM)
    return vae, guides.Amortized(vae, MLP([PIXELS, 6, 2 * DIM]))


def _frozen_part():
    vae, guide = pair()
    vae.decoder.head.requires_grad_(False)
    return vae, guide


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (_another_architecture, {}, "another architecture"),
        (_another_decoder_kind, {}, "another architecture"),
        (function_pair, {}, "another architecture"),
        (pair, {"data": binary(seed=3)}, "another data"),
        (pair, {"seed": 1}, "another seed"),
        (pair, {"batch_size": 11}, "another batch size"),
        (_frozen_part, {}, "frozen weights"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_kept(build, options, message, tmp_path):
    path = tmp_path / "a.pt"
    quiet(*pair(), binary(), max_steps=6, checkpoint=path)
    written = path.read_bytes()
    model, guide = build()
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    options = dict(options)
    with pytest.raises(CheckpointError, match=message):
        quiet(model, guide, options.pop("data", binary()), max_steps=9, checkpoint=path, **options)
    assert path.read_bytes() == written
    assert_identical(before, guide.state_dict())
    quiet(model, guide, binary(), max_steps=3, checkpoint=path, resume=False)  # the way out the message names
    assert checkpoint.load(path)["at"]["step"] == 3


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_and_kept(keep, tmp_path):
    path = tmp_path / "a.pt"
    quiet(*pair(), binary(), max_steps=3, checkpoint=path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    written = path.read_bytes()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        quiet(*pair(), binary(), max_steps=6, checkpoint=path)
    assert path.read_bytes() == written


def test_other_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a PyroVAE checkpoint"):
        quiet(*pair(), binary(), max_steps=6, checkpoint=path)
    torch.save({"format": 1, "model": nn.Linear(1, 1)}, path)  # a pickled object
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        quiet(*pair(), binary(), max_steps=6, checkpoint=path)


_ONE_PROCESS = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_training import binary, pair, quiet
found = []
for seed in {seeds}:
    vae, guide = pair(seed)
    result = quiet(vae, guide, binary(seed=seed), max_steps=30, seed=seed, max_norm=1.0)
    weights = [p.double().sum().item() for m in (vae, guide) for p in m.parameters()]
    found.append([result.curve, weights])
print(json.dumps(found))
"""


def _process(seeds):
    code = _ONE_PROCESS.format(tests=str(Path(__file__).parent), seeds=seeds)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


def test_two_models_of_equal_names_train_as_in_two_processes():
    together = _process([1, 2])
    assert together == _process([1]) + _process([2])
    assert together[0] != together[1]


def test_stock_svi_without_scope_raises_for_the_second_model():
    for seed in (1, 2):
        vae, guide = pair(seed)
        svi = SVI(vae, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        if seed == 1:
            svi.step(binary())
        else:
            with pytest.raises(ParameterCollision, match=r"clear_param_store.*scope\(\)"):
                svi.step(binary())
            with pyro.get_param_store().scope():  # the cure it names
                svi.step(binary())


def test_fit_after_stock_svi_and_before_it():
    """The caller's store is neither read nor changed by the training of modules."""
    vae, guide = pair(1)
    svi = SVI(vae, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(binary())
    names = dict(pyro.get_param_store()._params)
    quiet(*pair(2), binary(), max_steps=3)
    assert dict(pyro.get_param_store()._params) == names
    svi.step(binary())


def test_bare_parameters_come_back_and_are_the_trained_ones():
    model, guide = bare_pair()
    x = torch.randn(ROWS, PIXELS)
    result = quiet(model, guide, x, max_steps=20, optimizer=pyro.optim.Adam({"lr": 0.1}))
    assert set(pyro.get_param_store().keys()) == {"shift", "scale"}
    scale = pyro.param("scale")
    assert scale > 0
    assert abs(scale - 0.7) > 0.01
    weights = guide.log_weights(3, x)
    pyro.clear_param_store()
    with result.activate():
        assert torch.equal(pyro.param("scale"), scale)
        torch.manual_seed(0)
        inside = guide.log_weights(3, x)
    torch.manual_seed(0)
    assert not torch.allclose(inside, guide.log_weights(3, x))  # outside the parameters start anew
    assert weights.shape == inside.shape
    assert "scale" not in pyro.get_param_store()


def test_a_taken_name_raises_before_training():
    pyro.param("shift", torch.zeros(PIXELS))
    model, guide = bare_pair()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ParameterCollision, match="shift"):
        quiet(model, guide, torch.randn(ROWS, PIXELS), max_steps=5)
    assert_identical(before, model.state_dict())
    assert torch.equal(pyro.param("shift"), torch.zeros(PIXELS))
    assert "scale" not in pyro.get_param_store()


class Explodes(nn.Module):
    """From call `at` on, the scale of site "x" is NaN (in value), or the gradient is."""

    def __init__(self, at, how):
        super().__init__()
        self.decoder, self.norm = nn.Linear(DIM, PIXELS), nn.BatchNorm1d(PIXELS)
        self.at, self.how, self.calls = at, how, 0

    def forward(self, x):
        pyro.module("decoder", self.decoder)
        pyro.module("norm", self.norm)
        tilt = pyro.param("tilt", torch.zeros(PIXELS))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            loc = self.norm(self.decoder(z)) + tilt
            if torch.is_grad_enabled():
                self.calls += 1
            scale = torch.ones(())
            if self.calls > self.at and self.how == "value":
                scale, loc = scale * torch.nan, loc * torch.nan
            if self.calls > self.at and self.how == "gradient":
                loc = loc + (tilt * 0).square().sum().sqrt()  # value 0, derivative 0 / 0
            pyro.sample("x", dist.Normal(loc, scale, validate_args=False).to_event(1), obs=x)


@pytest.mark.parametrize("how", ["value", "gradient"])
def test_nan_stop_names_site_and_step_and_keeps_the_last_good_state(how):
    x = torch.randn(ROWS, PIXELS)
    torch.manual_seed(0)
    reference = Explodes(10**9, how)
    guide = guides.Amortized(reference, MLP([PIXELS, 4, 2 * DIM]), batched=(0,))
    # Before the seventh step: steps 0..5 were taken.
    quiet(reference, guide, x, max_steps=6)
    expected, tilt = reference.state_dict(), pyro.param("tilt").clone()
    pyro.clear_param_store()
    calls_per_step = reference.calls // 6 if reference.calls % 6 == 0 else None
    assert calls_per_step == 1, "the test counts calls"
    torch.manual_seed(0)
    model = Explodes(6, how)
    other = guides.Amortized(model, MLP([PIXELS, 4, 2 * DIM]), batched=(0,))
    named = "site 'x' of the model" if how == "value" else "gradient of 'tilt'"
    with pytest.raises(TrainingDiverged, match=rf"step 6: .*{named}.*before this step"):
        quiet(model, other, x, max_steps=20)
    assert_identical(expected, model.state_dict())  # BatchNorm's buffers, too
    assert_identical(guide.state_dict(), other.state_dict())
    assert torch.equal(pyro.param("tilt"), tilt)  # bare parameters are handed back as they were
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_early_stopping_keeps_the_best_weights():
    """With a rate that overshoots, the held-out objective falls; what is kept is the best epoch's."""
    torch.manual_seed(0)
    vae, guide = pair(3, hidden=32)
    train, held_out = binary(12, 8), binary(40, 9)  # twelve data: it overfits
    result = quiet(vae, guide, train, epochs=400, batch_size=12, validation=held_out, patience=15,
                   optimizer=pyro.optim.Adam({"lr": 2e-2}))  # fmt: skip
    values = dict(result.validation)
    assert result.epochs < 400
    assert result.best_epoch == max(values, key=values.get)
    assert result.epochs == result.best_epoch + 15
    again, same = pair(3, hidden=32)
    quiet(again, same, train, epochs=result.best_epoch, batch_size=12, optimizer=pyro.optim.Adam({"lr": 2e-2}))
    assert_identical(again.state_dict(), vae.state_dict())
    assert_identical(same.state_dict(), guide.state_dict())


def test_validation_without_patience_keeps_the_last_weights():
    vae, guide = pair(3, hidden=32)
    train, held_out = binary(12, 8), binary(40, 9)
    result = quiet(vae, guide, train, epochs=60, batch_size=12, validation=held_out,
                   optimizer=pyro.optim.Adam({"lr": 5e-2}))  # fmt: skip
    values = dict(result.validation)
    assert max(values, key=values.get) < 60
    assert result.best_epoch == 60


def test_early_stopping_waits_for_the_schedule():
    """A step so large that every epoch is worse: it stops `patience` epochs after the schedule's end, not before."""
    options = {"epochs": 60, "batch_size": ROWS, "validation": binary(20, 4), "patience": 2}
    vae, guide = pair()
    free = quiet(vae, guide, binary(), optimizer=pyro.optim.Adam({"lr": 1.0}), **options)
    assert free.epochs < 25
    vae, guide = pair()
    held = quiet(vae, guide, binary(), optimizer=pyro.optim.Adam({"lr": 1.0}),
                 kl_weight=handlers.LinearSchedule(25), **options)  # fmt: skip
    assert held.epochs >= 26
    assert held.best_epoch >= 25
    assert len(held.validation) == held.epochs


def test_held_out_objective_has_fixed_noise():
    vae, guide = pair()
    frozen = pyro.optim.Adam({"lr": 0.0})
    result = quiet(vae, guide, binary(), epochs=3, validation=binary(23, 7), optimizer=frozen)
    assert len({value for _, value in result.validation}) == 1
    exact = torch.stack([losses.ELBO().per_datum(vae, guide, binary(23, 7)) for _ in range(400)]).mean(1)
    one = torch.stack([losses.ELBO().per_datum(vae, guide, binary(23, 7)).mean() for _ in range(50)]).std()
    assert abs(result.validation[0][1] - exact.mean()) < 4 * one


def test_seed_repeats_and_matters():
    runs = []
    for seed in (0, 0, 1):
        vae, guide = pair()
        runs.append(quiet(vae, guide, binary(), epochs=2, seed=seed).curve)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_random_state_of_the_caller():
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    vae, guide = pair()
    before = states()
    quiet(vae, guide, binary(), epochs=2, validation=binary(5))
    after = states()
    assert torch.equal(before[0], after[0])
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]
    quiet(vae, guide, binary(), epochs=1, seed=None)
    assert not torch.equal(before[0], torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "objective"),
    [("amortized", "ELBO"), ("semi-amortized", "ELBO"), ("laplace", "ELBO"), ("mixture", "ELBO"),
     ("amortized-mixture", "ELBO"), ("short-run", "E_q log p(x,z)")],
)  # fmt: skip
def test_objective_says_what_it_is(name, objective):
    vae, _ = pair()
    guide = GUIDES[name](vae, PIXELS, DIM)
    assert quiet(vae, guide, binary(), max_steps=1).objective == objective


@pytest.mark.parametrize(
    ("loss", "name", "guide"),
    [(losses.IWAE(5), "IWAE-5", "amortized"), (Trace_ELBO(), "ELBO", "amortized"),
     (TraceMeanField_ELBO(), "ELBO", "amortized"), (RenyiELBO(num_particles=2), "RenyiELBO", "amortized"),
     (Trace_ELBO(), "E_q log p(x,z)", "short-run")],
)  # fmt: skip
def test_objective_of_a_chosen_loss(loss, name, guide):
    vae, _ = pair()
    assert quiet(vae, GUIDES[guide](vae, PIXELS, DIM), binary(), max_steps=1, loss=loss).objective == name


def test_final_kl_weight_is_recorded():
    assert quiet(*pair(), binary(), max_steps=3).kl_weight == 1.0
    assert quiet(*pair(), binary(), max_steps=3, kl_weight=0.25).kl_weight == 0.25
    assert quiet(*pair(), binary(), max_steps=11, kl_weight=handlers.LinearSchedule(10)).kl_weight == 1.0
    with pytest.warns(UserWarning, match=r"takes 100 steps but training stops at step 5, with a KL weight of 0\.04"):
        result = quiet(*pair(), binary(), max_steps=5, kl_weight=handlers.LinearSchedule(100))
    assert result.kl_weight == pytest.approx(0.04)


def test_kl_weight_changes_what_is_trained():
    """At weight 0 the guide is not held to the prior: its KL ends larger than at weight 4."""
    kls = []
    for beta in (0.0, 4.0):
        vae, guide = pair(likelihood="gaussian")
        quiet(vae, guide, binary(), epochs=60, kl_weight=beta, optimizer=pyro.optim.Adam({"lr": 2e-2}))
        q = guide.posterior(binary())
        kls.append(float(torch.distributions.kl_divergence(
            q, dist.MultivariateNormal(torch.zeros(DIM), torch.eye(DIM)) if isinstance(q, dist.MultivariateNormal)
            else dist.Normal(torch.zeros(DIM), 1.0).to_event(1)).mean()))  # fmt: skip
    assert kls[0] > 2 * kls[1] + 0.1


def test_max_norm_bounds_the_whole_gradient():
    """With plain gradient descent of rate 1 the step's norm is the clipped gradient's."""
    moved = {}
    for limit in (None, 0.25):
        vae, guide = pair()
        before = [p.detach().clone() for m in (vae, guide) for p in m.parameters()]
        quiet(vae, guide, binary(), max_steps=1, max_norm=limit, optimizer=pyro.optim.SGD({"lr": 1.0}))
        after = [p.detach() for m in (vae, guide) for p in m.parameters()]
        moved[limit] = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert moved[None].norm() > 1
    assert float(moved[0.25].norm()) == pytest.approx(0.25, rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(moved[None], moved[0.25], dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_scheduler_steps_once_per_epoch():
    optimizer = exponential()
    quiet(*pair(), binary(), epochs=3, optimizer=optimizer)
    assert all(s.get_last_lr() == [pytest.approx(1e-2 * 0.8**3)] for s in optimizer.optim_objs.values())
    plateau = pyro.optim.ReduceLROnPlateau({
        "optimizer": torch.optim.Adam, "optim_args": {"lr": 0.0}, "patience": 1, "factor": 0.5, "eps": 0.0,
    })  # fmt: skip
    quiet(*pair(), binary(), epochs=3, optimizer=plateau, validation=binary(9))
    assert all(s.num_bad_epochs == 0 or s.best < 0 or s.last_epoch == 3 for s in plateau.optim_objs.values())
    assert all(s.last_epoch == 3 for s in plateau.optim_objs.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"max_steps": -1}, ValueError, "max_steps"),
        ({"patience": 0, "validation": binary(3)}, ValueError, "patience"),
        ({"patience": 3}, ValueError, "held-out"),
        ({"max_norm": 0.0}, ValueError, "max_norm"),
        ({"max_norm": -1.0}, ValueError, "max_norm"),
        ({"checkpoint_every": 5}, ValueError, "checkpoint="),
        ({"checkpoint_every": 0, "checkpoint": "never.pt"}, ValueError, "checkpoint_every"),
        ({"kl_weight": lambda step: 1.0}, TypeError, "LinearSchedule"),
        ({"kl_weight": -1.0}, ValueError, "negative"),
        ({"validation": torch.full((3, PIXELS), torch.nan)}, DataError, "validation has NaN"),
        ({"loss": losses.ExpectedLogJoint()}, IncompatibleError, "losses.ELBO"),
        ({"loss": losses.IWAE(3), "kl_weight": 0.5}, ValueError, "not a bound"),
    ],
)
def test_bad_arguments(options, error, message):
    vae, guide = pair()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(error, match=message):
        quiet(vae, guide, binary(), **{"max_steps": 3, **options})
    assert_identical(before, vae.state_dict())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([1.0], TypeError, "tensor"),
        ((), TypeError, "tensor"),
        (torch.tensor(1.0), TypeError, "tensor"),
        (torch.zeros(0, PIXELS), DataError, "positive number of rows"),
        ((torch.zeros(3, PIXELS), torch.zeros(4)), DataError, "same, positive"),
        (torch.full((3, PIXELS), torch.inf), DataError, "NaN or infinite"),
    ],
)
def test_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        quiet(*pair(), data, max_steps=3)


def test_a_used_optimiser_is_refused():
    optimizer = pyro.optim.Adam({"lr": 1e-2})
    quiet(*pair(), binary(), max_steps=2, optimizer=optimizer)
    with pytest.raises(ValueError, match="fresh"):
        quiet(*pair(), binary(), max_steps=2, optimizer=optimizer)


def test_curve_is_in_nats_per_datum():
    """At the exact posterior every draw of log w is log p(x): the curve is its mean, without noise."""
    generator = torch.Generator().manual_seed(0)
    model = PPCA(torch.randn(PIXELS, DIM, generator=generator, dtype=torch.double), noise=0.8)
    x = torch.randn(ROWS, PIXELS, generator=generator, dtype=torch.double)
    guide = guides.Laplace(model, nn.Linear(PIXELS, DIM).double(), num_steps=2)  # exact on linear-Gaussian models
    result = quiet(model, guide, x, epochs=2, loss=losses.IWAE(1), optimizer=pyro.optim.Adam({"lr": 0.0}))
    assert result.curve == pytest.approx([float(model.log_evidence(x).mean())] * 2, rel=1e-6)


class Subsampled(nn.Module):
    """x_n | z_n ~ N(z_n, 1), z_n ~ N(0, 1), with the plate's rows given, of `size`."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x, index):
        with pyro.plate("data", self.size, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_curve_is_in_nats_per_datum_under_a_subsampling_plate(kind):
    """The posterior N(x / 2, 1 / 2) as guide: log w = log N(x; 0, 2) for every draw; N / B is 20 or more."""
    x = torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(0))
    index, model = torch.arange(ROWS) + 7, Subsampled(200)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return torch.cat([self.slope * x, torch.full_like(x, 0.5).log()], -1)

    net = Half()

    def stock(x, index):
        pyro.module("net", net)
        with pyro.plate("data", 200, subsample=index):
            pyro.sample("z", dist.Normal(net.slope * x, 0.5**0.5).to_event(1))

    guide = guides.Amortized(model, net) if kind == "ours" else stock
    result = quiet(model, guide, (x, index), epochs=1, loss=Trace_ELBO(), validation=(x[:9], index[:9]),
                   optimizer=pyro.optim.Adam({"lr": 0.0}))  # fmt: skip
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert result.curve == pytest.approx([float(evidence.mean())], rel=1e-5)
    assert result.validation[0][1] == pytest.approx(float(evidence[:9].mean()), rel=1e-5)


def test_joint_mode_takes_all_data_as_one_datum():
    x = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def start(dim):
        from pyrovae.families import DiagonalNormal

        return DiagonalNormal(dim)

    guide = guides.Amortized(model, None, start, plate=None, example=(x,))
    with pytest.raises(ValueError, match="batch_size=12"):
        quiet(model, guide, x, max_steps=1)
    with torch.no_grad():  # the exact posterior N(sum x / 13, 1 / 13)
        guide.constant.copy_(torch.tensor([[float(x.sum()) / 13, -torch.tensor(13.0).log()]]))
    covariance = torch.eye(12, dtype=torch.double) + 1
    evidence = dist.MultivariateNormal(torch.zeros(12).double(), covariance).log_prob(x)
    for loss in (Trace_ELBO(), losses.IWAE(3)):
        result = quiet(model, guide, x, epochs=2, batch_size=12, loss=loss, validation=x,
                       optimizer=pyro.optim.Adam({"lr": 0.0}))  # fmt: skip
        assert result.curve == pytest.approx([float(evidence)] * 2, rel=1e-6)
        assert result.validation[0][1] == pytest.approx(float(evidence), rel=1e-6)


def test_dynamic_binarisation_draws_every_batch_anew():
    seen = []

    def draw(x):
        seen.append(torch.bernoulli(x))
        return seen[-1]

    quiet(*pair(), torch.full((4, PIXELS), 0.5), epochs=8, batch_size=4, transform=draw)
    assert len({tuple(batch.sum(0).tolist()) for batch in seen[1:]}) > 1
    assert len(seen) == 9  # one to create parameters
