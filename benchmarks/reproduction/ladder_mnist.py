"""The variational ladder autoencoder (Zhao, Song & Ermon 2017) on MNIST: what each depth holds."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor

from pyrovae import diagnose, guides
from pyrovae.models import VAE, LadderVAE
from pyrovae.nets import LadderDecoder, LadderEncoder
from pyrovae.schedules import DeepFirst
from reproduction.classifier import classifier, names
from reproduction.evaluation import plain
from reproduction.experiment import Arm, Experiment, Preset, Setup, Split

__all__ = ["EXPERIMENT"]

SIZES = (2, 2, 2)  # shallowest first


def ladder(preset: Preset, split: Split, *, architecture: Any = "mlp") -> LadderVAE:
    decoder = LadderDecoder(SIZES, split.event_shape, preset.hidden[0], architecture=architecture)
    return LadderVAE(decoder, SIZES)


def flat(preset: Preset, split: Split) -> VAE:
    """All latents at the depth of the deepest group."""
    size = sum(SIZES)
    return VAE(LadderDecoder((size,), split.event_shape, preset.hidden[0]), size)


def flat_guide(parts: Setup) -> guides.Amortized:
    return guides.Amortized(parts.model, LadderEncoder((sum(SIZES),), parts.split.event_shape, parts.preset.hidden[0]))


def guide(parts: Setup, *, architecture: Any = "mlp") -> guides.Amortized:
    encoder = LadderEncoder(SIZES, parts.split.event_shape, parts.preset.hidden[0], architecture=architecture)
    return guides.Amortized(parts.model, encoder)


def deep_first(preset: Preset, split: Split) -> DeepFirst:
    """A sixth of training for each of the first two groups alone."""
    steps = preset.epochs * -(-len(split.train) // preset.batch_size)
    return DeepFirst(stage=max(1, steps // 6), fade=max(1, steps // 6))


def measure(guide: Any, split: Split, preset: Preset, progress: bool, arm: str) -> list[dict[str, Any]]:
    """Probe matrix, interventions and KL of each group, on test images."""
    model, x, y = guide.model, split.wide, split.wide_labels
    if x is None:
        return []
    known = diagnose.group_information(model, guide, x, num_samples=20)
    moved = diagnose.interventions(model, guide, x)
    rows = []
    accuracy: dict[str, dict[str, Any]] = {}
    if y is not None and len(y.unique()) < len(x) // 4:
        accuracy = _accuracies(model, guide, x, y)
        moved_label = diagnose.interventions(model, guide, x, {"digit": partial(names, classifier(split))})
    for row, name in enumerate(known.groups):
        rows.append({
            "table": "Groups, deepest first: KL in nats, accuracy of probes on the group alone in %, and its share in "
                     "% of what an exchange of codes moves",
            "group": name, "KL": {"mean": float(known.kl[row]), "se": float(known.se[row])},
            "active": f"{int(known.active[row])} of {known.sizes[row]}", **accuracy.get(name, {}),
            **_shares(moved, row), **(_shares(moved_label, row) if accuracy else {}),
        })  # fmt: skip
    return rows


def _shares(moved: Any, row: int) -> dict[str, dict[str, Any]]:
    """Of what a group moves; of an attribute that no group moves there are none."""
    shares = zip(moved.attributes, moved.share[row].tolist(), strict=True)
    return {f"moves {what}": plain(100 * share) for what, share in shares if not math.isnan(share)}


def _accuracies(model: Any, guide: Any, x: Tensor, y: Tensor) -> dict[str, dict[str, Any]]:
    found = diagnose.probe_groups(model, guide, x, y)
    return {
        name: {f"{kind} probe": {"mean": 100 * float(found.accuracy[row, k]), "se": 100 * float(found.se[row, k])}
               for k, kind in enumerate(found.kinds)}
        for row, name in enumerate(found.groups)
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="ladder-mnist",
    title="Variational ladder autoencoder on MNIST: local factors shallow, global ones deep",
    paper="Zhao, Song & Ermon (2017)",
    data="mnist",
    binarization="static",
    likelihood="bernoulli",
    pictures=True,
    model=ladder,
    baseline="ladder",
    arms=(
        Arm("ladder", guide),
        Arm("ladder, deep first", guide, schedule=deep_first, kl_epochs=0),
        Arm("ladder, convolutional", partial(guide, architecture="conv"), model=partial(ladder, architecture="conv")),
        Arm("flat", flat_guide, model=flat),
    ),
    presets={
        "quick": Preset(epochs=20, train_rows=20_000, validation_rows=1000, test_rows=500, num_samples=100,
                        batch_size=100, learning_rate=1e-3, hidden=(256,), latent_dim=sum(SIZES), kl_epochs=5,
                        extra_rows=2000),
        "paper": Preset(epochs=200, validation_rows=2000, num_samples=1000, batch_size=100, learning_rate=2e-4,
                        hidden=(1024,), latent_dim=sum(SIZES), kl_epochs=20, extra_rows=10_000),
    },
    settings=(
        "three groups of two latents, gated injection (a learned gate that starts at 0.1), layers normalised datum by "
        "datum, Bernoulli pixels, batch 100, Adam, KL weight from 0.1 to 1 in the first epochs, weights of the best "
        "epoch on validation images"
    ),
    remarks=(
        "The paper has no likelihood table: what matters are the matrices below. It found stroke width in the "
        "shallowest group (z1), width and slant in the middle, identity in the deepest (z3).",
        '"Moves": E|change| of an attribute of the picture when one group\'s codes are exchanged between two images, '
        "as a share over groups; \"digit\" is the label a small classifier gives.",
        "The published likelihood is a Laplace one of scale 1/8 on grey values; ours is Bernoulli on binary pixels.",
    ),
    measure=measure,
)  # fmt: skip
