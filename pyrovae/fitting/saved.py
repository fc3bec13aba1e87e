"""A finished run of `pyrovae fit`, read back: model and guide as they were trained, and their test data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrovae import checkpoint
from pyrovae.fitting.guides import build_guide
from pyrovae.fitting.material import Material, gather
from pyrovae.fitting.recipes import build_model
from pyrovae.fitting.settings import Settings
from pyrovae.store import fresh

__all__ = ["Saved", "load"]


@dataclass(frozen=True)
class Saved:
    """The folder, its settings, its data, model and guide, and what `results.json` says."""

    folder: Path
    settings: Settings
    material: Material
    model: Any
    guide: Any
    results: dict[str, Any]


def load(folder: str | Path) -> Saved:
    """Read a run.

    Raises:
        FileNotFoundError: no finished run lies there.
        CheckpointError: damaged weights.
        ValueError: the data are not those of the run.

    Example:
        `run = load("runs/fit-vae-digits"); run.guide.posterior(run.material.rows)`
    """
    folder = Path(folder)
    if not (folder / "results.json").exists() or not (folder / "weights.pt").exists():
        raise FileNotFoundError(
            f"{folder} holds no finished run (no results.json): make one with `pyrovae fit --out {folder}`, or finish "
            "it with --resume"
        )
    results = json.loads((folder / "results.json").read_text())
    settings = Settings(**results["settings"])
    material = gather(settings)
    if material.origin["fingerprint"] != results["provenance"]["fingerprint"]:
        raise ValueError(f"the data set {settings.data!r} is not the one of {folder}: put the old one back")
    model = build_model(settings.model, material.form, latent_dim=settings.latent_dim, variant=settings.variant,
                        seed=settings.seed, device=settings.device)  # fmt: skip
    guide = build_guide(settings.guide, model, material.form, seed=settings.seed, device=settings.device)
    with fresh():
        checkpoint.restore_modules(model, guide, checkpoint.load(folder / "weights.pt")["state"])
    return Saved(folder, settings, material, model, guide, results)
