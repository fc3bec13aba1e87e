"""A guide held against a reference, every distance beside its noise floor.

The floor is the same distance between the first and the second half of the reference's own draws: below it a guide
cannot be told from the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.chunks import per_chunk
from pyrovae.diagnose.distance import sd_ratio, sliced_w2, standardized_mean_error
from pyrovae.errors import ReferenceRefused
from pyrovae.provenance import Provenance
from pyrovae.reference.posterior import Reference

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Distances of a guide to a reference posterior, per datum; nan where the reference is refused.

    Attributes:
        guide: its name.
        mean_error: `[B]`, largest |difference of means| over latents in reference sds.
        sd_ratio: `[B, D]`, guide sd over reference sd.
        sliced_w2: `[B]`, sliced 2-Wasserstein distance of standardised draws.
        mean_error_floor, sliced_w2_floor: `[B]`, the same between the halves of the reference.
        sd_ratio_floor: `[B, D]`, sd of one half over the other.
        refused: indices of data whose reference is not "ok".
        draws: the guide's draws, `[S, B, D]`, unconstrained.
        provenance: of the reference.
    """

    guide: str
    mean_error: Tensor
    sd_ratio: Tensor
    sliced_w2: Tensor
    mean_error_floor: Tensor
    sd_ratio_floor: Tensor
    sliced_w2_floor: Tensor
    refused: tuple[int, ...]
    draws: Tensor
    provenance: Provenance

    def summary(self) -> dict[str, float]:
        """Means over the data that were not refused."""
        values = {
            "mean_error": self.mean_error, "mean_error_floor": self.mean_error_floor,
            "sd_ratio": self.sd_ratio, "sd_ratio_floor": self.sd_ratio_floor,
            "sliced_w2": self.sliced_w2, "sliced_w2_floor": self.sliced_w2_floor,
        }  # fmt: skip
        return {name: float(value.nanmean()) for name, value in values.items()}

    def __repr__(self) -> str:
        s = self.summary()
        refused = f"; refused (their reference is not ok): {list(self.refused)}" if self.refused else ""
        return (
            f"{self.guide} against the reference, {len(self.mean_error)} data: standardised mean error "
            f"{s['mean_error']:.3f} (floor {s['mean_error_floor']:.3f}), sd ratio {s['sd_ratio']:.3f} (floor "
            f"{s['sd_ratio_floor']:.3f}), sliced W2 {s['sliced_w2']:.3f} (floor {s['sliced_w2_floor']:.3f}){refused}"
        )

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><td>{name}</td><td>{value:.3f}</td></tr>" for name, value in self.summary().items())
        return f"<table><caption>{self.guide} against the reference</caption>{cells}</table>"


def compare(
    guide: Any, reference: Reference, *args: Any, num_samples: int = 4000, seed: int = 0, **kwargs: Any
) -> Comparison:
    """Distances of the guide's posterior to the reference, on the data the reference was made for.

    Raises:
        ReferenceRefused: the reference is "ok" for none of the data.
        ValueError: other data than the reference's.
    """
    usable = reference.usable
    if not usable.any():
        raise ReferenceRefused(
            f"the reference is not ok for any of the {len(usable)} data ({reference.verdicts}; R-hat up to "
            f"{float(reference.rhat.max()):.2f}), so it cannot judge a guide: run more or longer chains, or use "
            "reference.exact"
        )
    reference.require(args, kwargs)
    draws = per_chunk(
        lambda *a, **k: guide.draws(num_samples, *a, **k), (guide.model, guide), args, kwargs,
        plate=guide.plate, batched=guide.batched, seed=seed, chunk=max(1, 64_000 // num_samples),
    )  # fmt: skip
    half = reference.draws.shape[1] // 2
    first, second = reference.draws[:, :half].flatten(0, 1), reference.draws[:, half:].flatten(0, 1)
    pooled, ok = reference.pooled, usable.to(reference.draws.device)

    def measured(metric: Any, a: Tensor, b: Tensor) -> Tensor:
        good = metric(a[:, ok], b[:, ok])
        out = torch.full((len(ok), *good.shape[1:]), torch.nan, dtype=good.dtype)
        out[ok] = good
        return out

    return Comparison(
        guide=guide.traits.name,
        mean_error=measured(standardized_mean_error, draws, pooled),
        sd_ratio=measured(sd_ratio, draws, pooled),
        sliced_w2=measured(sliced_w2, draws, pooled),
        mean_error_floor=measured(standardized_mean_error, first, second),
        sd_ratio_floor=measured(sd_ratio, first, second),
        sliced_w2_floor=measured(sliced_w2, first, second),
        refused=tuple(int(i) for i in (~usable).nonzero().flatten()),
        draws=draws,
        provenance=reference.provenance,
    )
