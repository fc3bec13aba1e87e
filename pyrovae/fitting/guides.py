"""The guides of `pyrovae fit`: those of `pyrovae compare` and more, for every model with latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyrovae import flows, guides
from pyrovae.comparison.recipes import GUIDES as COMPARED
from pyrovae.comparison.recipes import Net, Recipe
from pyrovae.fitting.recipes import Form, encoder_of
from pyrovae.guides.base import Guide
from pyrovae.models import no_latents
from pyrovae.nets import ChartMLP
from pyrovae.runtime import seeded

__all__ = ["GUIDES", "KINDS", "NO_GUIDE", "build_guide"]

NO_GUIDE = "none"
_STAGES = 3  # components of a recursive mixture


def _full_rank(model: Any, net: Net, start: nn.Module | None) -> Guide:
    dim = model.latent_dim
    return guides.Amortized(model, net(2 * dim + dim * (dim - 1) // 2), "full-rank")


def _iaf(model: Any, net: Net, start: nn.Module | None) -> Guide:
    flow = flows.IAF(model.latent_dim, num_transforms=2, context=16)
    return guides.Amortized(model, net(flow.num_params), flow)


def _base(model: Any, net: Net) -> guides.Amortized:
    return guides.Amortized(model, net(2 * model.latent_dim))


def _recursive(model: Any, net: Net, start: nn.Module | None) -> Guide:
    # Encoders of every kind: only plain sequences of layers could share all but the last.
    encoders = [net(2 * model.latent_dim) for _ in range(_STAGES)]
    return guides.RecursiveMixture(model, encoders, trunk="separate", weights=net(_STAGES - 1))


def _dais(model: Any, net: Net, start: nn.Module | None) -> Guide:
    return guides.DAIS(_base(model, net), num_steps=4)


def _hvae(model: Any, net: Net, start: nn.Module | None) -> Guide:
    return guides.HVAE(_base(model, net), num_steps=4)


def _exact(model: Any, net: Net, start: nn.Module | None) -> Guide:
    return guides.Exact(model)


def _charts(model: Any, net: Net, start: nn.Module | None) -> Guide:
    *_, features = sizes = model.charts.sizes  # from coordinates to features; the guide's maps go back
    maps = ChartMLP(model.num_charts, [features, *sizes[1:-1], 2 * model.latent_dim])
    return guides.Charts(model, net(features), maps, net(model.num_charts))


def _forward_process(model: Any, net: Net, start: nn.Module | None) -> Guide:
    return guides.ForwardProcess(model)


def _none(model: Any, net: Net, start: nn.Module | None) -> Any:
    return no_latents


GUIDES: dict[str, Recipe] = {
    "amortized": COMPARED["amortized"],
    "amortized-full-rank": _full_rank,
    "amortized-iaf": _iaf,
    **{name: recipe for name, recipe in COMPARED.items() if name != "amortized"},
    "recursive-mixture": _recursive,
    "dais": _dais,
    "hvae": _hvae,
    "exact": _exact,
    "charts": _charts,
    "forward-process": _forward_process,
    NO_GUIDE: _none,
}

# What each is, to be asked before there is a model to build it for.
KINDS: dict[str, Any] = {
    **{name: kind for name, kind in guides.REGISTRY.items() if name in GUIDES},
    "amortized-full-rank": guides.Amortized,
    "amortized-iaf": guides.Amortized,
    "charts": guides.Charts,
    "forward-process": guides.ForwardProcess,
}


def build_guide(name: str, model: Any, form: Form, *, seed: int = 0, device: str = "cpu") -> Any:
    """A guide by name; "none" is the empty one of a model without latents."""
    with seeded(seed):
        guide = GUIDES[name](model, encoder_of(model, form), None)
    return guide.to(torch.device(device)) if isinstance(guide, nn.Module) else guide
