r"""Do generated data lie on the data's manifold, and do they reach all of it?

.. math::
    \mathrm{unfaithfulness} = \frac1S \sum_s \min_n |y_s - x_n|, \qquad
    \mathrm{coverage} = \frac1N \#\{n : x_n \text{ is the datum nearest to some } y_s\}

for generated y and data x (Schonsheck, Chen & Lai 2019). Neither is 0 or 1 at its best: S fresh data have an
unfaithfulness of the data's own spacing, and reach a share of about 1 - exp(-S / N) or less, so compare with the same
numbers of held-out data.

:func:`cycle_residuals` asks the charts of an atlas whether they agree where they overlap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.errors import DataError, IncompatibleError

__all__ = ["CycleResiduals", "coverage", "cycle_residuals", "unfaithfulness"]

_BLOCK = 1 << 22  # distances at once


def unfaithfulness(generated: Tensor, data: Tensor) -> Tensor:
    """Distance of each generated datum to the nearest one of the data, `[S]`; its mean is the published number.

    Args:
        generated: `[S, *event]`.
        data: `[N, *event]`.

    Raises:
        DataError: shapes that do not match, or no rows.
    """
    return _nearest(generated, data)[0]


def coverage(generated: Tensor, data: Tensor) -> float:
    """Share of the data that are nearest to some generated datum; arguments as in :func:`unfaithfulness`."""
    return len(_nearest(generated, data)[1].unique()) / len(data)


def _nearest(generated: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Distance `[S]` and index `[S]` of the nearest datum, in float64."""
    if generated.shape[1:] != data.shape[1:] or not len(generated) or not len(data):
        raise DataError(
            f"generated data and data must be rows of one shape, got {list(generated.shape)} and {list(data.shape)}"
        )
    flat = data.flatten(1).double()
    parts = [
        # Not by matrix products: their rounding hides small distances.
        torch.cdist(some, flat, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        for some in generated.flatten(1).double().split(max(1, _BLOCK // len(data)))
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


class CycleResiduals(NamedTuple):
    """How far a point is from itself after a way through another chart and back.

    Attributes:
        values: |z_a - T_ba(T_ab(z_a))| for every datum and ordered pair of charts that both hold it, `[P]`; the cube's
            side is 1.
        datum, start, via: which datum and charts, `[P]`.
    """

    values: Tensor
    datum: Tensor
    start: Tensor
    via: Tensor


def cycle_residuals(guide: Any, x: Tensor, *, tau: float = 0.1) -> CycleResiduals:
    """Cycle residuals of the charts' transition maps, where two charts overlap.

    Args:
        guide: a `guides.Charts`.
        x: data, `[N, *event]`.
        tau: a chart holds a datum where its predicted probability is above this.

    Raises:
        IncompatibleError: a guide without charts.
    """
    if not hasattr(guide, "transition"):
        raise IncompatibleError(f"{type(guide).__name__} has no charts: cycle residuals are of guides.Charts")
    if not 0 <= tau < 0.5:
        raise ValueError(f"two charts hold a datum together only for tau below 1/2, got {tau}")
    held = guide.predict(x) > tau  # [N, C]
    both = held.unsqueeze(2) & held.unsqueeze(1) & ~torch.eye(held.shape[1], dtype=torch.bool, device=x.device)
    datum, start, via = both.nonzero(as_tuple=True)
    z = guide.coordinates(x)[datum, start]
    back = guide.transition(guide.transition(z, start, via), via, start)
    return CycleResiduals(torch.linalg.vector_norm(z - back, dim=-1), datum, start, via)
