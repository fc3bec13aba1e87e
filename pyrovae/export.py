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
from pyrovae.drawn import Drawn, drawn
from pyrovae.latents import LatentSpace
from pyrovae.pointwise import log_likelihood
from pyrovae.reference.posterior import Reference

__all__ = ["Drawn", "drawn", "log_likelihood", "nested", "save", "to_arviz"]


def nested(
    reference: Reference | None = None,
    guides: Mapping[str, Tensor | Drawn] | None = None,
    observed: Mapping[str, Tensor] | None = None,
    *,
    space: LatentSpace | None = None,
    pointwise: Mapping[str, Tensor] | None = None,
) -> Nested:
    """Everything as `{group: {variable: (dims, array)}}`, without ArviZ.

    Args:
        reference: becomes `posterior`, and `sample_stats` with lp and, from batched HMC, energy and diverging.
        guides: name -> unconstrained draws `[S, B, D]` (`guide.draws`), or `drawn(guide, ...)`. Each becomes a group
            `posterior_<name>` and, where it was `drawn`, `sample_stats_<name>` with lp, log_q and khat; a single guide
            without a reference becomes `posterior` and `sample_stats` themselves.
        observed: site -> data `[B, ...]` (joint mode: `[...]`), becomes `observed_data`.
        space: needed when there is no reference.
        pointwise: site -> `[C, S, *batch]` from `log_likelihood`, becomes `log_likelihood` (for `az.loo`).
    """
    space = space or (reference.space if reference is not None else None)
    if space is None:
        raise ValueError("pass a reference, or the guide's latent space: space=guide.space(x)")
    groups: Nested = {}
    if reference is not None:
        groups["posterior"] = _sites(space, reference.draws)
        if stats := _reference_stats(reference):
            groups["sample_stats"] = stats
    guides = guides or {}
    for name, found in guides.items():
        alone = reference is None and len(guides) == 1
        suffix = "" if alone else f"_{_identifier(name)}"
        if f"posterior{suffix}" in groups:
            raise ValueError(
                f"two guides would both be called {'posterior' + suffix!r}: give them names that differ in letters"
            )
        groups[f"posterior{suffix}"] = _sites(space, (found.u if isinstance(found, Drawn) else found).unsqueeze(0))
        if isinstance(found, Drawn):
            dims = ("chain", "draw", _plate(space))
            groups[f"sample_stats{suffix}"] = {
                "lp": (dims, _array(found.lp.unsqueeze(0))), "log_q": (dims, _array(found.log_q.unsqueeze(0))),
                "khat": ((_plate(space),), _array(found.khat)),
            }  # fmt: skip
    if pointwise:
        groups["log_likelihood"] = {
            site: (("chain", "draw", *(f"{site}_dim_{i}" for i in range(value.dim() - 2))), _array(value))
            for site, value in pointwise.items()
        }
    if observed:
        rows = () if space.plate is None else (space.plate,)
        groups["observed_data"] = {
            site: (
                (*rows, *(f"{site}_dim_{i}" for i in range(value.dim() - len(rows)))),
                _array(value),
            )
            for site, value in observed.items()
        }
    return groups


def to_arviz(
    reference: Reference | None = None,
    guides: Mapping[str, Tensor | Drawn] | None = None,
    observed: Mapping[str, Tensor] | None = None,
    *,
    space: LatentSpace | None = None,
    pointwise: Mapping[str, Tensor] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Any:
    """The same as ArviZ's own object: `InferenceData` (ArviZ < 1) or `DataTree` (>= 1)."""
    import arviz as az

    groups = nested(reference, guides, observed, space=space, pointwise=pointwise)
    adapter = to_inference_data if int(az.__version__.split(".")[0]) < 1 else to_datatree
    return adapter(groups, dict(coords or {}))


def save(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Write `to_arviz(...)` as netCDF; `az.from_netcdf` reads it."""
    to_arviz(*args, **kwargs).to_netcdf(str(path), engine="h5netcdf")


def _reference_stats(reference: Reference) -> dict[str, tuple[tuple[str, ...], Any]]:
    rows = ("chain", "draw", _plate(reference.space))
    found = {"lp": reference.lp}
    if reference.chains is not None:
        found |= {"energy": reference.chains.energy, "diverging": reference.chains.diverging}
    return {name: (rows, _array(value)) for name, value in found.items() if value is not None}


def _array(value: Tensor) -> Any:
    return value.detach().cpu().numpy()


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
        found[site.name] = (("chain", "draw", *inner, *rows, *events), _array(value))
    return found
