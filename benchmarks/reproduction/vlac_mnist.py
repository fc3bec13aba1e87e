"""Clusters at every depth (Willetts, Roberts & Holmes 2019) on MNIST, under three factorisations of the posterior.

B    q(z | x) p(y | z), classes summed out        C    q(z | x) q(y | x)        A    q(y | x) q(z | x, y), one group
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

from pyrovae import diagnose, fit, generate, guides
from pyrovae.models import VLAC, LadderVAE
from pyrovae.nets import MLP, LadderDecoder, LadderEncoder
from pyrovae.optim import Adam
from reproduction.evaluation import plain
from reproduction.experiment import Arm, Experiment, Preset, Setup, Split

__all__ = ["EXPERIMENT"]

ONE, TWO = (10,), (5, 5)  # latents of each group, shallowest first
WARM_UP, KL_IN_WARM_UP = 3, 0.1  # epochs of a ladder without clusters, at this KL weight

ENUMERATED = partial(TraceEnum_ELBO, max_plate_nesting=1)


def vlac(preset: Preset, split: Split, *, sizes: tuple[int, ...], number: int, classes: Any = "collapsed") -> VLAC:
    decoder = LadderDecoder(sizes, split.event_shape, preset.hidden[0])
    return VLAC(decoder, sizes, [number] * len(sizes), classes=classes)


def _encoder(parts: Setup) -> LadderEncoder:
    return LadderEncoder(parts.model.sizes, parts.split.event_shape, parts.preset.hidden[0])


def _classifier(parts: Setup) -> MLP:
    return MLP([parts.split.event_shape.numel(), parts.preset.hidden[0], sum(parts.model.num_clusters)])


class ForEveryClass(nn.Module):
    """q(z | x, y): the encoder's Gaussian, moved by a vector of each class's own; to `[B, 2 K D]`."""

    def __init__(self, encoder: LadderEncoder, number: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.shift = nn.Parameter(torch.zeros(number, sum(encoder.sizes)))

    def forward(self, x: Tensor) -> Tensor:
        loc, log_var = self.encoder(x).chunk(2, -1)
        locs = loc.unsqueeze(1) + self.shift
        return torch.cat([locs.flatten(1), log_var.repeat(1, len(self.shift))], -1)


def b(parts: Setup) -> guides.Amortized:
    return guides.Amortized(parts.model, _encoder(parts))


def c(parts: Setup) -> guides.Classified:
    return guides.Classified(parts.model, _encoder(parts), _classifier(parts), "C")


def a(parts: Setup) -> guides.Classified:
    encoder = ForEveryClass(_encoder(parts), parts.model.num_clusters[0])
    return guides.Classified(parts.model, encoder, _classifier(parts), "A")


def place_clusters(parts: Setup, guide: Any, seed: int) -> None:
    """Train decoder and encoder as a ladder first, and put the components where its codes are."""
    model: VLAC = parts.model
    encoder = guide.encoder.encoder if isinstance(guide.encoder, ForEveryClass) else guide.encoder
    ladder = LadderVAE(model.decoder, model.sizes)
    first = guides.Amortized(ladder, encoder)
    fit(ladder, first, parts.split.train, epochs=WARM_UP, batch_size=parts.preset.batch_size, kl_weight=KL_IN_WARM_UP,
        optimizer=Adam(lr=parts.preset.learning_rate), seed=seed, progress=False)  # fmt: skip
    codes = generate.centre(ladder, first, parts.split.train[:10_000], 10)
    model.start_clusters(codes, seed=seed)


def measure(guide: Any, split: Split, preset: Preset, progress: bool, arm: str) -> list[dict[str, Any]]:
    """Clusters of the test images against their digits, group by group."""
    model, x, y = guide.model, split.wide, split.wide_labels
    if x is None or y is None:
        return []
    rows = []
    for level, number in enumerate(model.num_clusters):
        if isinstance(guide, guides.Classified):
            shares = guide.clusters(x, level)
        else:
            shares = model.responsibilities(generate.centre(model, guide, x, 20), level)
        found = diagnose.clustering(shares.argmax(-1).cpu(), y, num_clusters=number)
        measures = {
            "Hungarian %": 100 * found.hungarian, "many-to-one %": 100 * found.many_to_one, "NMI": found.nmi,
            "ARI": found.ari, "used": found.used,
        }  # fmt: skip
        rows.append({
            "table": f"Clusters of {len(x)} test images against their digits (names found on the same images)",
            "group": f"z{level + 1}", "of": str(number),
            **{name: plain(value) for name, value in measures.items()},
        })  # fmt: skip
    return rows


def _arm(name: str, build: Any, sizes: tuple[int, ...], number: int, **options: Any) -> Arm:
    classes, loss = ("collapsed", None) if build is b else ("enumerated", ENUMERATED)
    model = partial(vlac, sizes=sizes, number=number, classes=classes)
    return Arm(name, build, loss, model=model, prepare=place_clusters, **options)


EXPERIMENT = Experiment(
    name="vlac-mnist",
    title="A mixture prior on every group of a ladder: clusters of MNIST under three factorisations",
    paper="Willetts, Roberts & Holmes (2019); metrics after Falck et al. (2021)",
    data="mnist",
    binarization="static",
    likelihood="bernoulli",
    pictures=True,
    baseline="B, one group",
    arms=(
        _arm("B, one group", b, ONE, 10),
        _arm("A, one group", a, ONE, 10),
        _arm("C, one group", c, ONE, 10),
        _arm("B, two groups", b, TWO, 10),
        _arm("C, two groups", c, TWO, 10),
        _arm("B, two groups of 25", b, TWO, 25),
    ),
    pairs=(("B, one group", "C, one group"), ("B, two groups", "C, two groups"), ("A, one group", "C, one group")),
    presets={
        "quick": Preset(epochs=6, train_rows=10_000, validation_rows=1000, test_rows=300, num_samples=100,
                        batch_size=100, learning_rate=1e-3, hidden=(256,), latent_dim=10, kl_epochs=3,
                        extra_rows=5000),
        "paper": Preset(epochs=200, validation_rows=2000, num_samples=1000, batch_size=512, learning_rate=5e-4,
                        hidden=(500,), latent_dim=10, kl_epochs=20, extra_rows=10_000),
    },
    seeds=(0, 1, 2, 3, 4),
    settings=(
        "D = 10 in one group or 5 + 5 in two, 10 or 25 components in every group with uniform weights, placed by a "
        f"Gaussian mixture on the codes of a ladder trained for {WARM_UP} epochs at a KL weight of {KL_IN_WARM_UP:g}, "
        "Bernoulli pixels, batch 100, Adam, KL weight from 0.1 to 1, weights of the best epoch on validation images"
    ),
    remarks=(
        "No number of the paper could be checked. Its successor's (MFCVAE, two groups of 5 latents, 25 + 25 "
        "components, Gaussian pixels, 400 epochs, 10 seeds): many-to-one accuracy 92.02 ± 3.02 %. Many-to-one accuracy "
        "rises with the number of components; Hungarian accuracy is only meaningful with about as many as classes.",
        "Names of clusters are found on the images they are judged by, as published.",
        "A: q(z | x, y) is the encoder's Gaussian moved by a vector of each class's own. A and C read clusters off the "
        "classifier, B off the responsibilities at the posterior mean.",
    ),
    missing=("SVHN, the paper's data, is not at hand.",),
    measure=measure,
)  # fmt: skip
