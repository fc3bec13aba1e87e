"""A finished run of `pyrovae compare`, read back: its data, models and guides as they were trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrovae import checkpoint
from pyrovae import data as datasets
from pyrovae.comparison.outcome import Settings
from pyrovae.comparison.recipes import build_guide, build_model
from pyrovae.guides.base import Guide
from pyrovae.models import VAE
from pyrovae.provenance import Provenance
from pyrovae.store import fresh

__all__ = ["Saved", "load"]


@dataclass(frozen=True)
class Saved:
    """The folder, its settings, held-out data `[B, X]`, and every guide with its own model."""

    folder: Path
    settings: Settings
    provenance: Provenance
    images: Any
    test: Tensor
    models: dict[str, VAE]
    guides: dict[str, Guide]

    def chosen(self, names: tuple[str, ...]) -> dict[str, Guide]:
        """Guides by name, all for an empty tuple.

        Raises:
            ValueError: a guide that the run did not train.
        """
        unknown = [name for name in names if name not in self.guides]
        if unknown:
            raise ValueError(f"{self.folder} has no guides {unknown}: choose from {', '.join(self.guides)}")
        return {name: self.guides[name] for name in names or self.guides}


def load(folder: str | Path) -> Saved:
    """Read a run.

    Raises:
        FileNotFoundError: no finished run lies there.
        CheckpointError: a checkpoint is damaged or of another architecture.
        ValueError: the data are not those of the run.
    """
    folder = Path(folder)
    path = folder / "comparison.json"
    if (folder / "results.json").exists() and not path.exists():
        raise FileNotFoundError(
            f"{folder} is a run of `pyrovae fit`, which has its numbers already: this takes one of `pyrovae compare`"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no finished run (no comparison.json): make one with `pyrovae compare --out {folder}`, or "
            "finish it with --resume"
        )
    content = json.loads(path.read_text())
    content["settings"]["guides"] = tuple(content["settings"]["guides"])
    settings, provenance = Settings(**content["settings"]), Provenance(**content["provenance"])
    images = datasets.load(settings.data, binarization=settings.binarization, seed=settings.seed)
    if images.fingerprint != provenance.fingerprint:
        raise ValueError(f"the data set {settings.data!r} is not the one of {folder}: put the old one back")
    test = images.test[: provenance.num_data].to(settings.device)
    models, guides = {}, {}
    for name in settings.guides:
        vae = build_model(
            images.event_shape[0], settings.latent_dim, provenance.likelihood, settings.seed, settings.device
        )
        guide = build_guide(name, vae, settings.seed, settings.device)
        _restore(vae, guide, folder / "checkpoints" / f"{name}.pt")
        models[name], guides[name] = vae, guide
    return Saved(folder, settings, provenance, images, test, models, guides)


def _restore(vae: VAE, guide: Guide, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `pyrovae compare --resume` again")
    with fresh():
        checkpoint.restore_modules(vae, guide, checkpoint.load(path)["state"])
