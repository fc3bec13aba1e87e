"""Export to ArviZ: a reference, guides' draws and the data as one object with named dimensions.

Plates become dimensions under their own names ("data", ...); event dims are called `<site>_dim_<i>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrovae.arviz_adapters import Nested, to_datatree, to_inference_data
from pyrovae.latents import LatentSpace
from pyrovae.reference.posterior import Reference

__all__ = ["nested", "save", "to_arviz"]


def nested(
    reference: Reference | None = None,
    guides: Mapping[str, Tensor] | None = None,
    observed: Mapping[str, Tensor] | None = None,
    *,
    space: LatentSpace | None = None,
) -> Nested:
    """Everything as `{group: {variable: (dims, array)}}`, without ArviZ.

    Args:
        reference: becomes `posterior` (and `sample_stats`, where it has log-densities).
        guides: name -> unconstrained draws `[S, B, D]` (`guide.draws`). Each becomes a group `posterior_<name>`; a
            single guide without a reference becomes `posterior` itself.
        observed: site -> data `[B, ...]` (joint mode: `[...]`), becomes `observed_data`.
        space: needed when there is no reference.
    """
    space = space or (reference.space if reference is not None else None)
    if space is None:
        raise ValueError("pass a reference, or the guide's latent space: space=guide.space(x)")
    groups: Nested = {}
    if reference is not None:
        groups["posterior"] = _sites(space, reference.draws)
        if reference.lp is not None:
            groups["sample_stats"] = {"lp": (("chain", "draw", _plate(space)), reference.lp.cpu().numpy())}
    guides = guides or {}
    for name, draws in guides.items():
        alone = reference is None and len(guides) == 1
        group = "posterior" if alone else f"posterior_{_identifier(name)}"
        if group in groups:
            raise ValueError(f"two guides would both be called {group!r}: give them names that differ in letters")
        groups[group] = _sites(space, draws.unsqueeze(0))
    if observed:
        rows = () if space.plate is None else (space.plate,)
        groups["observed_data"] = {
            site: (
                (*rows, *(f"{site}_dim_{i}" for i in range(value.dim() - len(rows)))),
                value.detach().cpu().numpy(),
            )
            for site, value in observed.items()
        }
    return groups


def to_arviz(
    reference: Reference | None = None,
    guides: Mapping[str, Tensor] | None = None,
    observed: Mapping[str, Tensor] | None = None,
    *,
    space: LatentSpace | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Any:
    """The same as ArviZ's own object: `InferenceData` (ArviZ < 1) or `DataTree` (>= 1)."""
    import arviz as az

    groups = nested(reference, guides, observed, space=space)
    adapter = to_inference_data if int(az.__version__.split(".")[0]) < 1 else to_datatree
    return adapter(groups, dict(coords or {}))


def save(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Write `to_arviz(...)` as netCDF; `az.from_netcdf` reads it."""
    to_arviz(*args, **kwargs).to_netcdf(str(path), engine="h5netcdf")


def _plate(space: LatentSpace) -> str:
    return space.plate or "datum"


def _identifier(name: str) -> str:
    """The name with everything but letters and digits as single underscores: an attribute of the ArviZ object."""
    return re.sub(r"\W+", "_", name).strip("_")


def _sites(space: LatentSpace, draws: Tensor) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Draws `[C, S, B, D]` in the model's own space, with dimension names."""
    found = {}
    for site in space.sites:
        value = space.constrain(draws)[site.name]
        frames = {dim: name for name, _, dim in site.frames}
        rows = () if space.plate is None else (space.plate,)
        width = len(site.inner) + len(rows)
        inner = [frames.get(i - width, f"{site.name}_batch_{i}") for i in range(len(site.inner))]
        events = [f"{site.name}_dim_{i}" for i in range(site.event_dim)]
        found[site.name] = (("chain", "draw", *inner, *rows, *events), value.detach().cpu().numpy())
    return found
