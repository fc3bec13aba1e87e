"""PyroVAE: guides, ground truth and diagnostics for deep latent-variable models in Pyro.

Generative models are Pyro programs, inference methods are Pyro guides, training is stock `pyro.infer.SVI`.
The import is light: a room is loaded when its name is first used, and plotting, torchvision and ArviZ only
by the functions that need them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = (
    "data", "diagnose", "evidence", "export", "families", "flows", "generate", "guides", "handlers", "latents",
    "losses", "models", "nets", "optim", "piecewise", "plots", "reference", "runtime", "samplers", "schedules",
)  # fmt: skip
_NAMES = {
    "LatentSpace": "pyrovae.latents",
    "Provenance": "pyrovae.provenance",
    "compatible": "pyrovae.compat",
    "fit": "pyrovae.training",
}

__all__ = [*_ROOMS, *_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"pyrovae.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'pyrovae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
