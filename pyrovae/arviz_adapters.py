"""From one nested dict of arrays to ArviZ, old (InferenceData, < 1) and new (DataTree, >= 1).

The dict is `{group: {variable: (dims, array)}}`. This file needs neither torch nor Pyro.
"""

from __future__ import annotations

from typing import Any

__all__ = ["to_datatree", "to_inference_data"]

Nested = dict[str, dict[str, tuple[tuple[str, ...], Any]]]


def _datasets(nested: Nested, coords: dict[str, Any]) -> dict[str, Any]:
    import xarray as xr

    found = {}
    for group, variables in nested.items():
        dims = {dim for names, _ in variables.values() for dim in names}
        sizes = {dim: size for names, array in variables.values() for dim, size in zip(names, array.shape, strict=True)}
        index = {dim: coords.get(dim, range(sizes[dim])) for dim in sorted(dims)}
        found[group] = xr.Dataset(variables, coords={dim: list(values) for dim, values in index.items()})
    return found


def to_inference_data(nested: Nested, coords: dict[str, Any]) -> Any:
    """ArviZ < 1: an `InferenceData`; groups beyond ArviZ's own (one per guide) are kept."""
    import arviz as az

    datasets = _datasets(nested, coords)
    known = {name: value for name, value in datasets.items() if not name.startswith(("posterior_", "sample_stats_"))}
    data = az.InferenceData(**known)
    custom = {name: value for name, value in datasets.items() if name not in known}
    if custom:
        data.add_groups(custom, warn_on_custom_groups=False)
    return data


def to_datatree(nested: Nested, coords: dict[str, Any]) -> Any:
    """ArviZ >= 1: an xarray `DataTree` with one node per group."""
    import xarray as xr

    return xr.DataTree.from_dict({f"/{name}": value for name, value in _datasets(nested, coords).items()})
