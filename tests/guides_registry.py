"""Every guide as the tests build it; a new guide is tested by being added here (a test checks none is missing)."""

from __future__ import annotations

import torch

from pyrovae import guides
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


def _mixture(model, pixels, dim, dtype=torch.float32):
    return guides.Mixture([amortized(model, pixels, dim, dtype) for _ in range(3)])


def _semi(model, pixels, dim, dtype=torch.float32):
    return guides.SemiAmortized(amortized(model, pixels, dim, dtype), num_steps=3, step_size=0.05)


def _semi_mixture(model, pixels, dim, dtype=torch.float32):
    return guides.SemiAmortized(_mixture(model, pixels, dim, dtype), num_steps=2, step_size=0.05)


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


GUIDES = {
    "amortized": amortized,
    "amortized-full-rank": _full,
    "amortized-low-rank": _low,
    "amortized-mixture": _mixture_family,
    "mixture": _mixture,
    "semi-amortized": _semi,
    "semi-amortized-mixture": _semi_mixture,
    "laplace": _laplace,
    "laplace-averaged": _laplace_averaged,
    "short-run": _short_run,
    "short-run-hmc": _short_run_from_guide,
}
DENSITY = {name: build for name, build in GUIDES.items() if not name.startswith("short-run")}
