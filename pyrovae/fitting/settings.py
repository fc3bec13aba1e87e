"""What `pyrovae fit` can be asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pyrovae.data import BINARIZATIONS
from pyrovae.fitting.guides import GUIDES, NO_GUIDE
from pyrovae.fitting.material import TEXTS
from pyrovae.fitting.objectives import ENERGY_RATE, LOSSES, SCHEDULES
from pyrovae.fitting.recipes import (
    CHARTS,
    DIFFUSION,
    LADDERS,
    LANGUAGE_MODEL,
    MANIFOLDS,
    MODELS,
    PIECEWISE,
    TEXT_MODELS,
    TILTED,
    Variant,
)

__all__ = ["Settings"]

# What a run may change when it goes on; everything else must be as it was.
_FREE = ("out", "resume", "threads", "device", "num_samples", "num_data", "epochs")
_OWN_GUIDES = {LANGUAGE_MODEL: NO_GUIDE, CHARTS: "charts", DIFFUSION: "forward-process"}
_RATE, _FEW_WEIGHTS_RATE = 1e-3, 5e-3
_WARMUP = 10  # epochs, of models that tend to forget their latents
_QUICK = {"epochs": 10, "batch_size": 50, "num_samples": 100, "num_data": 100}


@dataclass(frozen=True)
class Settings:
    """What `pyrovae fit` was asked for.

    Attributes:
        model: one of `recipes.MODELS`.
        guide: one of `guides.GUIDES`; empty for "amortized", of charts "charts", of a diffusion "forward-process", of
            the language model "none".
        loss: one of `objectives.LOSSES`; empty for the guide's own (`losses.default_loss`).
        data: images or text by name, or the path of an .npz file.
        out: folder; empty for `runs/fit-<model>-<data>`.
        latent_dim: latents per datum, of ladders per group, coordinates of a chart; None for a number that suits the
            data.
        epochs: of training in all, at most 10 with `quick`.
        learning_rate: of Adam; by default 1e-3, of the few weights of a piecewise-affine net 5e-3.
        energy_rate: step size of a tilted prior's energy, as a share of `learning_rate`: the published share, 0.2. Too
            large a one runs away with many data.
        kl_warmup: epochs of a linear KL weight from 0.1 to 1, fewer than `epochs`; 0 for none. By default 10, at most
            half of all, for ladders and text, which else may never use their latents, and 0 for all others.
        schedule: one of `recipes.SCHEDULES`.
        binarization: "static", "dynamic" or "none" (grey values, with a Gaussian likelihood; of pixel decoders,
            256 levels); empty for "none" where the model or the colours ask for it, else "static".
        patience: epochs without a better objective on held-out training data until training stops; 0 never stops.
        num_samples: importance draws per datum, at least 25.
        num_data: test data evaluated, from the first.
        classes: of `vlac`: "collapsed", or "enumerated" (sites of their own, which Pyro sums out).
        manifold: of `vae`: "plane", or where its latents are directions, "torus" (pairs of them, each an angle) or
            "sphere".
        quick: 2,000 training data, few epochs, few draws: shows everything, proves nothing.
        resume: go on from the checkpoint in `out`.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """

    model: str = "vae"
    guide: str = ""
    loss: str = ""
    data: str = "digits"
    out: str = ""
    latent_dim: int | None = None
    epochs: int = 50
    batch_size: int = 128
    learning_rate: float | None = None
    energy_rate: float = ENERGY_RATE
    kl_warmup: int | None = None
    schedule: str = "none"
    binarization: str = ""
    patience: int = 0
    num_samples: int = 1000
    num_data: int = 1000
    classes: Literal["collapsed", "enumerated"] = "collapsed"
    manifold: Literal["plane", "torus", "sphere"] = "plane"
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    quick: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        guide = self.guide or _OWN_GUIDES.get(self.model, "amortized")
        for name, value, known in (
            ("model", self.model, MODELS), ("guide", guide, GUIDES), ("loss", self.loss or "elbo", LOSSES),
            ("schedule", self.schedule, SCHEDULES), ("binarization", self.binarization or "none", BINARIZATIONS),
            ("classes", self.classes, ("collapsed", "enumerated")), ("manifold", self.manifold, MANIFOLDS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("latent_dim", 1), ("num_samples", 25), ("num_data", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: pass at least {least}")
        self._require_latents()
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", _FEW_WEIGHTS_RATE if self.model == PIECEWISE else _RATE)
        if not self.rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: pass a positive one")
        if self.model not in TILTED and self.energy_rate != ENERGY_RATE:
            raise ValueError(
                f"{self.model} has no energy: leave --energy-rate out, or choose --model {' or '.join(TILTED)}"
            )
        if not self.energy_rate > 0:
            raise ValueError(f"energy_rate is {self.energy_rate}: pass a positive one")
        if self.patience < 0 or (self.kl_warmup or 0) < 0 or self.seed < 0:
            raise ValueError("patience, kl_warmup and seed must not be negative")
        if self.quick:
            for name, most in _QUICK.items():
                object.__setattr__(self, name, min(most, getattr(self, name)))
        warmup = self._default_warmup() if self.kl_warmup is None else self.kl_warmup
        object.__setattr__(self, "kl_warmup", min(warmup, self.epochs - 1) if self.quick else warmup)
        if self.warmup >= self.epochs:
            raise ValueError(
                f"a KL weight that rises for {self.warmup} epochs is not at 1 when {self.epochs} epochs end: pass "
                f"--kl-warmup {self.epochs - 1} or less, or more --epochs"
            )
        object.__setattr__(self, "guide", guide)
        if not self.out:
            from pathlib import Path

            object.__setattr__(self, "out", f"runs/fit-{self.model}-{Path(self.data).stem}")

    def _require_latents(self) -> None:
        """Raise `ValueError` for a number of latents that the model cannot have."""
        dim = self.latent_dim
        if dim is None:
            return
        if self.model == "lossy" and dim == 1:
            raise ValueError("the prior of a lossy autoencoder is a flow of at least two latents: pass --latent-dim 2")
        if self.model == PIECEWISE and dim > 2:
            raise ValueError(
                f"the exact posterior is known for 1 or 2 latents, not for {dim}: pass --latent-dim 2, or --model vae"
            )
        if self.model == DIFFUSION:
            raise ValueError("the latents of a diffusion have the shape of the data: leave --latent-dim out")
        if self.manifold == "torus" and dim % 2:
            raise ValueError(f"a torus has two latents for each circle, not {dim} in all: pass --latent-dim {dim + 1}")
        if self.manifold == "sphere" and dim < 2:
            raise ValueError("a sphere has at least two latents (then it is a circle): pass --latent-dim 2")

    def _default_warmup(self) -> int:
        # A chain without density has no KL, and under a weight an importance-weighted bound is none.
        if self.model not in (*LADDERS, "text") or self.guide == "short-run" or self.loss == "iwae":
            return 0
        return min(_WARMUP, self.epochs // 2)

    @property
    def warmup(self) -> int:
        """Epochs of KL warm-up, once the default is known."""
        return self.kl_warmup or 0

    @property
    def rate(self) -> float:
        """The learning rate, once the default is known."""
        return self.learning_rate or 0.0

    @property
    def variant(self) -> Variant:
        """What the model comes in."""
        return Variant(self.classes, self.manifold)

    @property
    def is_text(self) -> bool:
        """Whether the data are sentences."""
        return self.data in TEXTS

    @property
    def wants_text(self) -> bool:
        """Whether the model reads sentences."""
        return self.model in TEXT_MODELS

    @property
    def held_out(self) -> bool:
        """Whether a part of the training data is kept back while training looks on."""
        return self.patience > 0 or self.schedule == "aggressive"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def require_same(self, before: dict[str, Any]) -> None:
        """Raise `ValueError` when a run with the settings `before` cannot go on with these."""
        free = set(_FREE)
        if self.model == "vlac" or self.schedule == "deep-first":  # their stages are shares of all epochs
            free.remove("epochs")
        if "epochs" not in free and self.epochs != before["epochs"]:
            raise ValueError(
                f"{self.out} holds a run of {before['epochs']} epochs, whose stages are shares of them: go on with "
                "as many, or pass another --out"
            )
        if self.epochs < before["epochs"]:
            raise ValueError(
                f"{self.out} holds a run of {before['epochs']} epochs: pass as many or more, or another --out"
            )
        for field in (field for field in fields(self) if field.name not in _FREE):
            name = field.name
            ours, theirs = getattr(self, name), before.get(name, field.default)  # runs of before there was an option
            if ours != theirs:
                raise ValueError(
                    f"{self.out} holds a run with {name.replace('_', ' ')} {theirs!r}, not {ours!r}: go on with the "
                    "same, or pass another --out"
                )
