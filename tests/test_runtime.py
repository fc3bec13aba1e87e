"""Flags and random state that an evaluation borrows."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from bench import problems
from pyro.nn import PyroModule

from pyrovae import evidence, fit, guides, reference, runtime
from pyrovae.nets import MLP


class OwnParameter(PyroModule):
    """Pyro switches requires_grad on when it registers a PyroModule's own parameter."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_what_was_frozen_stays_frozen_through_training_and_evaluation():
    x = 3 + torch.randn(40, 1)
    for model in (OwnParameter(), problems.ppca(rows=1)[0].float()):
        model.requires_grad_(False)
        before = {name: value.clone() for name, value in model.named_parameters()}
        pixels = 1 if isinstance(model, OwnParameter) else 30
        rows = x if pixels == 1 else torch.randn(40, 30)
        latents = 1 if pixels == 1 else 10
        guide = guides.Amortized(model, MLP([pixels, 2 * latents]))
        fit(model, guide, rows, max_steps=5, batch_size=20, optimizer=pyro.optim.Adam({"lr": 0.1}))
        evidence.iwae(model, guide, rows, num_samples=30)
        guide.posterior(rows)
        guide.sample(3, rows)
        reference.nuts(model, rows[:2], num_chains=1, num_samples=10, warmup=5)
        assert not any(p.requires_grad for p in model.parameters())
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
        pyro.clear_param_store()


def test_threads_are_one_for_small_nets_and_as_asked_otherwise():
    outer = torch.get_num_threads()
    assert runtime.threads() == 1
    assert runtime.threads(2) == 2
    assert torch.get_num_threads() == 2
    torch.set_num_threads(outer)
