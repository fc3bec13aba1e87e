"""What a comparison was asked for and what it found; the table, the JSON and the page are views of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from pyrovae import diagnose, reference
from pyrovae.comparison.recipes import GUIDES
from pyrovae.data.images import Binarization
from pyrovae.evidence import Estimate
from pyrovae.guides.base import Guide
from pyrovae.models import VAE
from pyrovae.provenance import Provenance
from pyrovae.table import Row
from pyrovae.training import FitResult

__all__ = ["Outcome", "Settings", "no_density"]


@dataclass(frozen=True)
class Settings:
    """What `pyrovae compare` was asked for."""

    data: str = "digits"
    guides: tuple[str, ...] = tuple(GUIDES)
    latent_dim: int = 8
    epochs: int = 50
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: str = "runs/compare"
    quick: bool = False
    binarization: Binarization = "static"
    batch_size: int = 100
    learning_rate: float = 1e-3
    num_samples: int = 1000
    num_reference: int = 20
    num_gaps: int = 50
    num_simulated: int = 1000
    resume: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.guides if name not in GUIDES]
        if unknown or not self.guides:
            raise ValueError(f"unknown guides {unknown}: choose from {', '.join(GUIDES)}")
        if self.latent_dim < 1 or self.epochs < 1:
            raise ValueError("latent_dim and epochs must be at least 1")

    @property
    def tune_epochs(self) -> int:
        """Epochs for which guides are tuned to the frozen decoder."""
        return max(1, self.epochs // 6)


@dataclass
class Outcome:
    """Everything the job found; the report and the JSON are views of it."""

    settings: Settings
    data: Any
    provenance: Provenance
    frozen_from: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    fits: dict[str, FitResult] = field(default_factory=dict)
    models: dict[str, VAE] = field(default_factory=dict)
    guides: dict[str, Guide] = field(default_factory=dict)
    frozen_guides: dict[str, Guide] = field(default_factory=dict)
    end_to_end: list[Row] = field(default_factory=list)
    frozen: list[Row] = field(default_factory=list)
    references: dict[str, reference.Reference] = field(default_factory=dict)
    draws: dict[str, Tensor] = field(default_factory=dict)
    khats: dict[str, Tensor] = field(default_factory=dict)
    gaps: dict[str, diagnose.Gaps] = field(default_factory=dict)
    calibration: diagnose.Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `comparison.json`."""
        return {
            "settings": asdict(self.settings),
            "provenance": self.provenance.to_dict(),
            "seconds_by_phase": self.phases,
            "frozen_decoder": self.frozen_from,
            "end_to_end": [row.to_dict() for row in self.end_to_end],
            "frozen": [row.to_dict() for row in self.frozen],
            "references": {
                name: {
                    "kind": r.kind, "rhat": _finite(r.rhat), "ess": _finite(r.ess), "status": list(r.status),
                    "divergences": r.divergences, "seconds": r.seconds, "chains_by_draws": list(r.draws.shape[:2]),
                }
                for name, r in self.references.items()
            },
            "gaps": {
                name: {
                    "approximation": _number(g.approximation), "amortization": _number(g.amortization),
                    "inference": _number(g.inference), "num_data": len(g.status), "flagged": int(g.flagged.sum()),
                }
                for name, g in self.gaps.items()
            },
            "training": {
                name: {"objective": f.objective, "curve": f.curve, "steps": f.steps, "seconds": f.seconds}
                for name, f in self.fits.items()
            },
        }  # fmt: skip


def no_density(outcome: Outcome) -> str:
    """Why some cells have no bound, in words."""
    names = [name for name, guide in outcome.guides.items() if not guide.traits.has_density]
    if not names:
        return ""
    return f"{', '.join(names)}: draws without a density, trained on E_q log p(x,z), which is not a bound of log p(x)."


def _number(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.mean, "se": estimate.mean_se, "kind": estimate.kind}


def _finite(values: Tensor) -> list[float | None]:
    """For JSON, which has no nan (the R-hat of a stuck chain)."""
    return [float(value) if math.isfinite(value) else None for value in values]
