"""What a run of `pyrovae fit` found; terminal, JSON and page are views of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyrovae.diagnose import Clustering
from pyrovae.evidence.estimate import LOWER
from pyrovae.fitting.settings import Settings
from pyrovae.provenance import Provenance
from pyrovae.table import Number
from pyrovae.training import FitResult

__all__ = ["Findings", "Group", "Outcome"]


@dataclass
class Group:
    """One latent group of a ladder.

    Attributes:
        name: its site; z1 is the shallowest.
        size: latents.
        kl: nats per datum, or why it is unknown.
        active: latents whose posterior mean moves with the data.
        probe: accuracy of a linear probe on this group alone, or why there is none.
        clusters: cluster of each datum `[N]`, of a VLAC.
        clustering: clusters against labels, where there are any.
    """

    name: str
    size: int
    kl: Number | str
    active: int
    probe: Number | str
    clusters: Tensor | None = None
    clustering: Clustering | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "site": self.name, "size": self.size, "KL": _json(self.kl), "active": self.active,
            "linear probe": _json(self.probe),
        }  # fmt: skip
        if self.clusters is not None:
            found["clusters used"] = len(self.clusters.unique())
        if self.clustering is not None:
            c = self.clustering
            found |= {
                "Hungarian accuracy": c.hungarian, "many-to-one accuracy": c.many_to_one, "NMI": c.nmi, "ARI": c.ari,
                "clusters": len(c.table), "classes": c.table.shape[1],
            }  # fmt: skip
        return found


@dataclass
class Findings:
    """Numbers on test data.

    Attributes:
        numbers: measure -> value with its standard error over data, or why there is none.
        kind: of the ELBO and the importance-weighted numbers, what statement on log p(x) they are
            (`evidence.Estimate.kind`).
        groups: of a ladder, shallowest first.
        centre: posterior means `[N, D]`, or None of a model without latents.
        khat: `[N]`, or None.
    """

    numbers: dict[str, Number | str] = field(default_factory=dict)
    kind: str = LOWER
    groups: list[Group] = field(default_factory=list)
    centre: Tensor | None = None
    khat: Tensor | None = None

    @property
    def score(self) -> tuple[str, Number] | None:
        """The best that is known of log p(x): its name and value."""
        for start in ("log p(x), exact", "IWAE", "ELBO"):
            for name, value in self.numbers.items():
                if name.startswith(start) and isinstance(value, Number):
                    return name, value
        return None


@dataclass
class Outcome:
    """Everything the run found.

    Attributes:
        settings, provenance: of all numbers.
        model, guide: as they were trained.
        fits: stages of the training, by name.
        findings: on test data.
        log_z: of a tilted prior, as it was measured, or why it was not; None of other models.
        phases: seconds by phase.
        told: remarks a reader needs.
    """

    settings: Settings
    provenance: Provenance
    model: Any
    guide: Any
    objective: str = ""
    fits: dict[str, FitResult] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    log_z: Number | str | None = None
    phases: dict[str, float] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def curve(self) -> list[float]:
        """Training objective of every epoch of all stages, nats per datum."""
        return [value for found in self.fits.values() for value in found.curve]

    @property
    def fit(self) -> FitResult:
        """The last stage."""
        return list(self.fits.values())[-1]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(epoch, held-out objective) over all stages."""
        found, before = [], 0
        for one in self.fits.values():
            found += [(before + epoch, value) for epoch, value in one.validation]
            before += one.epochs
        return found

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return {
            "settings": self.settings.to_dict(),
            "provenance": self.provenance.to_dict(),
            "remarks": self.told,
            "numbers": {name: _json(value) for name, value in self.findings.numbers.items()},
            "kind": self.findings.kind,
            "groups": [group.to_dict() for group in self.findings.groups],
            "training": {
                "objective": self.objective, "curve": self.curve, "validation": [list(v) for v in self.validation],
                "epochs": sum(found.epochs for found in self.fits.values()),
                "steps": sum(found.steps for found in self.fits.values()),
                "best_epoch": self.fit.best_epoch, "kl_weight": self.fit.kl_weight,
                "stages": {name: found.epochs for name, found in self.fits.items()},
            },
            "seconds_by_phase": self.phases,
        }  # fmt: skip


def _json(value: Number | str) -> dict[str, Any]:
    return {"reason": value} if isinstance(value, str) else {"value": value.to_dict()["value"], "se": value.se}
