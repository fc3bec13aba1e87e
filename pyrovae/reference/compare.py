"""A guide held against a reference, every distance beside its noise floor.

The floor is the same distance between the first and the second half of the reference's own draws: below it a guide
cannot be told from the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.chunks import per_chunk
from pyrovae.diagnose.distance import correlation_error, sd_ratio, sliced_w2, standardized_mean_error, w1
from pyrovae.diagnose.two_sample import c2st, mmd2
from pyrovae.errors import ReferenceRefused
from pyrovae.provenance import Provenance
from pyrovae.reference.posterior import Reference

__all__ = ["Comparison", "compare"]


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_error": standardized_mean_error,
    "sd_ratio": sd_ratio,
    "correlation_error": correlation_error,
    "w1": w1,
    "sliced_w2": sliced_w2,
}
_LABELS = {
    "mean_error": "standardised mean error", "sd_ratio": "sd ratio", "correlation_error": "correlation error",
    "w1": "W1", "sliced_w2": "sliced W2", "mmd2": "MMD^2", "c2st": "classifier",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Distances of a guide to a reference posterior, per datum; nan where the reference is refused.

    Attributes:
        guide: its name.
        mean_error: `[B]`, largest |difference of means| over latents in reference sds.
        sd_ratio: `[B, D]`, guide sd over reference sd.
        correlation_error: `[B]`, Frobenius norm of the difference of the correlation matrices.
        w1: `[B, D]`, 1-Wasserstein distance of every latent, in reference sds.
        sliced_w2: `[B]`, sliced 2-Wasserstein distance of standardised draws.
        mean_error_floor, ..., sliced_w2_floor: the same between the halves of the reference.
        mmd2, mmd2_pvalue, c2st: `[B]`, the two-sample tests where they were asked for, else None.
        mmd2_floor, c2st_floor: of the halves.
        refused: indices of data whose reference is not "ok".
        draws: the guide's draws, `[S, B, D]`, unconstrained.
        provenance: of the reference.
    """

    guide: str
    mean_error: Tensor
    sd_ratio: Tensor
    correlation_error: Tensor
    w1: Tensor
    sliced_w2: Tensor
    mean_error_floor: Tensor
    sd_ratio_floor: Tensor
    correlation_error_floor: Tensor
    w1_floor: Tensor
    sliced_w2_floor: Tensor
    refused: tuple[int, ...]
    draws: Tensor
    provenance: Provenance
    mmd2: Tensor | None = None
    mmd2_pvalue: Tensor | None = None
    mmd2_floor: Tensor | None = None
    c2st: Tensor | None = None
    c2st_floor: Tensor | None = None

    def summary(self) -> dict[str, float]:
        """Means over the data that were not refused, each distance before its floor."""
        found = {}
        for name in (*_DISTANCES, "mmd2", "c2st"):
            for key in (name, f"{name}_floor"):
                value = getattr(self, key)
                if value is not None:
                    found[key] = float(value.nanmean())
        return found

    def __repr__(self) -> str:
        s = self.summary()
        words = [
            f"{label} {s[name]:.3f} (floor {s[f'{name}_floor']:.3f})" for name, label in _LABELS.items() if name in s
        ]
        if self.mmd2_pvalue is not None:
            told = int((self.mmd2_pvalue < 0.01).sum())
            words.append(f"p < 0.01 for {told} of {int(self.mmd2_pvalue.isfinite().sum())}")
        refused = f"; refused (their reference is not ok): {list(self.refused)}" if self.refused else ""
        return f"{self.guide} against the reference, {len(self.mean_error)} data: {', '.join(words)}{refused}"

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><td>{name}</td><td>{value:.3f}</td></tr>" for name, value in self.summary().items())
        return f"<table><caption>{self.guide} against the reference</caption>{cells}</table>"


def compare(
    guide: Any, reference: Reference, *args: Any, num_samples: int = 4000, tests: bool = False, seed: int = 0,
    **kwargs: Any,
) -> Comparison:  # fmt: skip
    """Distances of the guide's posterior to the reference, on the data the reference was made for.

    Args:
        guide, reference: and the arguments both are about.
        num_samples: draws of the guide per datum.
        tests: also the two-sample tests, `diagnose.mmd2` and `diagnose.c2st` (a tenth of a second a datum).
        seed: of the guide's draws, directions, reassignments and folds.

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
    reference.require(guide.model, args, kwargs)
    draws = per_chunk(
        lambda *a, **k: guide.draws(num_samples, *a, **k), (guide.model, guide), args, kwargs,
        plate=guide.plate, batched=guide.batched, seed=seed, chunk=max(1, 64_000 // num_samples),
    )  # fmt: skip
    half = reference.draws.shape[1] // 2
    first, second = reference.draws[:, :half].flatten(0, 1), reference.draws[:, half:].flatten(0, 1)
    pooled, ok = reference.pooled, usable.to(reference.draws.device)

    def spread(good: Tensor) -> Tensor:
        out = torch.full((len(ok), *good.shape[1:]), torch.nan, dtype=good.dtype, device=good.device)
        out[ok] = good
        return out

    found: dict[str, Tensor] = {}
    for name, distance in _DISTANCES.items():
        found[name] = spread(distance(draws[:, ok], pooled[:, ok]))
        found[f"{name}_floor"] = spread(distance(first[:, ok], second[:, ok]))
    if tests:
        value, p = mmd2(draws[:, ok], pooled[:, ok], seed=seed)
        found["mmd2"], found["mmd2_pvalue"] = spread(value), spread(p)
        found["mmd2_floor"] = spread(mmd2(first[:, ok], second[:, ok], num_permutations=1, seed=seed)[0])
        found["c2st"] = spread(c2st(draws[:, ok], pooled[:, ok], seed=seed))
        found["c2st_floor"] = spread(c2st(first[:, ok], second[:, ok], seed=seed))
    return Comparison(
        guide=guide.traits.name, refused=tuple(int(i) for i in (~usable).nonzero().flatten()), draws=draws,
        provenance=reference.provenance, **found,
    )  # fmt: skip
