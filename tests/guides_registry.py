"""Every guide as the tests build it; a new guide is tested by being added here (a test checks none is missing)."""

from __future__ import annotations

import torch

from pyrovae import flows, guides
from pyrovae.ascent import Ascent
from pyrovae.nets import MLP


def encoder(pixels: int, outputs: int, dtype=torch.float32):
    return MLP([pixels, 16, outputs], torch.nn.Tanh).to(dtype)


def amortized(model, pixels, dim, dtype=torch.float32, family="diagonal", outputs=None, **kw):
    return guides.Amortized(model, encoder(pixels, outputs or 2 * dim, dtype), family, **kw)


def _full(model, pixels, dim, dtype=torch.float32):
    return amortized(model, pixels, dim, dtype, "full-rank", 2 * dim + dim * (dim - 1) // 2)


def _low(model, pixels, dim, dtype=torch.float32):
    return amortized(model, pixels, dim, dtype, "low-rank", 2 * dim + dim * max(1, int(dim**0.5)))


def _mixture_family(model, pixels, dim, dtype=torch.float32):
    return amortized(model, pixels, dim, dtype, "mixture", 2 + 4 * dim)


def flow_guide(model, pixels, flow, dtype=torch.float32, **kw):
    return guides.Amortized(model, encoder(pixels, flow.num_params, dtype), flow.to(dtype), **kw)


def _householder(model, pixels, dim, dtype=torch.float32):
    return flow_guide(model, pixels, flows.Householder(dim, num_transforms=min(dim, 2)), dtype)


# One layer of bounded nets: after a test's 200 steps deeper or unbounded ones still have log-weights with a kurtosis of
# hundreds, and standard errors from 600 of those mean nothing. tests/test_flows.py has the deeper ones.
def _iaf(model, pixels, dim, dtype=torch.float32):
    flow = flows.IAF(dim, num_transforms=1, context=4, hidden=(16,), activation=torch.nn.Tanh)
    return flow_guide(model, pixels, flow, dtype)


def _spline(model, pixels, dim, dtype=torch.float32):
    flow = flows.Spline(dim, num_transforms=1, context=4, hidden=(16,), bins=6, activation=torch.nn.Tanh)
    return flow_guide(model, pixels, flow, dtype)


def _mixture(model, pixels, dim, dtype=torch.float32):
    return guides.Mixture([amortized(model, pixels, dim, dtype) for _ in range(3)])


def _recursive(model, pixels, dim, dtype=torch.float32):
    return guides.RecursiveMixture(model, encoder(pixels, 2 * dim, dtype), 3)


def _recursive_separate(model, pixels, dim, dtype=torch.float32):
    return guides.RecursiveMixture(model, encoder(pixels, 2 * dim, dtype), 2, trunk="separate")


def _semi(model, pixels, dim, dtype=torch.float32):
    return guides.SemiAmortized(amortized(model, pixels, dim, dtype), num_steps=3, step_size=0.05)


def _semi_mixture(model, pixels, dim, dtype=torch.float32):
    return guides.SemiAmortized(_mixture(model, pixels, dim, dtype), num_steps=2, step_size=0.05)


def _semi_detached(model, pixels, dim, dtype=torch.float32):
    return guides.SemiAmortized(amortized(model, pixels, dim, dtype), 2, 0.05, gradient="detached")


def _semi_svi(model, pixels, dim, dtype=torch.float32):
    return guides.SemiAmortized(_mixture(model, pixels, dim, dtype), 2, inner="svi", gradient="detached-kl")


def _local_svi(model, pixels, dim, dtype=torch.float32):  # few steps: tests call it thousands of times
    return guides.LocalSVI(model, max_steps=4)


def _local_svi_from_guide(model, pixels, dim, dtype=torch.float32):
    return guides.LocalSVI(model, base=amortized(model, pixels, dim, dtype), max_steps=2)


def _laplace(model, pixels, dim, dtype=torch.float32):
    return guides.Laplace(model, encoder(pixels, dim, dtype), num_steps=3)


def _laplace_averaged(model, pixels, dim, dtype=torch.float32):
    return guides.Laplace(model, encoder(pixels, dim, dtype), num_steps=2, num_draws=4)


def _short_run(model, pixels, dim, dtype=torch.float32):
    return guides.ShortRun(model, num_steps=5, step_size=0.2)


def _short_run_from_guide(model, pixels, dim, dtype=torch.float32):
    return guides.ShortRun(
        model, num_steps=3, step_size=0.1, kernel="hmc", init=amortized(model, pixels, dim, dtype), num_leapfrog=2
    )


def _boosted(model, pixels, dim, dtype=torch.float32):  # few steps: tests call it thousands of times
    few = {"restarts": 2, "num_steps": 2, "num_samples": 2, "num_draws": 8, "first": Ascent(max_steps=3, num_samples=2)}
    return guides.BoostedVI(model, 2, weights="fixed", **few)


def _dais(model, pixels, dim, dtype=torch.float32):
    return guides.DAIS(amortized(model, pixels, dim, dtype), num_steps=3)


def _dais_full(model, pixels, dim, dtype=torch.float32):
    return guides.DAIS(_full(model, pixels, dim, dtype), num_steps=2, step_size=0.3)


def _hvae(model, pixels, dim, dtype=torch.float32):
    return guides.HVAE(amortized(model, pixels, dim, dtype), num_steps=3)


def _density_short_run(model, pixels, dim, dtype=torch.float32):
    return guides.DensityShortRun(model, num_steps=3, step_size=0.05)


def _escalating(model, pixels, dim, dtype=torch.float32):
    first = amortized(model, pixels, dim, dtype)
    return guides.Escalating([first, guides.SemiAmortized(first, num_steps=2, step_size=0.05)], num_samples=50)


def exact(model, pixels, dim, dtype=torch.float32):
    return guides.Exact(model)


GUIDES = {
    "amortized": amortized,
    "amortized-full-rank": _full,
    "amortized-low-rank": _low,
    "amortized-mixture": _mixture_family,
    "amortized-householder": _householder,
    "amortized-iaf": _iaf,
    "amortized-spline": _spline,
    "mixture": _mixture,
    "recursive-mixture": _recursive,
    "recursive-mixture-separate": _recursive_separate,
    "boosted-mixture": _boosted,
    "semi-amortized": _semi,
    "semi-amortized-mixture": _semi_mixture,
    "semi-amortized-detached": _semi_detached,
    "semi-amortized-mixture-svi": _semi_svi,
    "local-svi": _local_svi,
    "local-svi-from-guide": _local_svi_from_guide,
    "laplace": _laplace,
    "laplace-averaged": _laplace_averaged,
    "short-run": _short_run,
    "short-run-hmc": _short_run_from_guide,
    "density-short-run": _density_short_run,
    "dais": _dais,
    "dais-full-rank": _dais_full,
    "hvae": _hvae,
    "escalating": _escalating,
}
TRAINED = {name: build for name, build in GUIDES.items() if name != "escalating"}
_CHAINS = ("dais", "hvae", "density", "escalating")
# Guides of models that have what they need alone: Exact is of those with a `posterior` (tests/guides/test_exact.py has
# its clauses), the others of one model each.
WITH_POSTERIOR = {"exact": exact}
DENSITY = {name: build for name, build in GUIDES.items() if not name.startswith("short-run")}
MARGINAL = {name: build for name, build in DENSITY.items() if not name.startswith(_CHAINS)}
