"""The fast `Laplace` against the published algorithm at equal epochs: speed counts only at equal quality."""

from __future__ import annotations

from pyrovae import guides
from reproduction.experiment import Arm, Experiment, Preset, Setup, published_start
from reproduction.vlae_mnist import amortized, damped, laplace

__all__ = ["EXPERIMENT"]


def exact(parts: Setup) -> guides.Laplace:
    return guides.Laplace(parts.model, parts.encoder(parts.dim), num_steps=4, num_probes=0)


def envelope(parts: Setup) -> guides.Laplace:
    return guides.Laplace(parts.model, parts.encoder(parts.dim), num_steps=4, gradient="envelope")


EXPERIMENT = Experiment(
    name="laplace-quality",
    title="Fast and published Laplace at equal epochs",
    paper="Park, Kim & Kim (2019)",
    data="mnist",
    preprocessing="logit",
    likelihood="gaussian",
    baseline="damped as published",
    start=published_start,
    arms=(
        Arm("damped as published", damped),
        Arm("Newton", laplace),
        Arm("Newton, exact gradient", exact),
        Arm("Newton, envelope", envelope),
        Arm("VAE", amortized),
    ),
    presets={
        "quick": Preset(epochs=3, train_rows=20_000, validation_rows=1000, test_rows=1000, num_samples=1000),
        "paper": Preset(epochs=30, validation_rows=5000, test_rows=1000, num_samples=1000),
    },
    settings="as in vlae-mnist",
    published="",
    remarks=(
        "The published algorithm (T = 4 damped steps, five explicit curvatures, everything differentiated) is the "
        "baseline; the other arms are `Laplace` with line-searched Newton-CG, differentiated implicitly, the "
        "covariance through products and probes (the default), as a matrix, or not at all.",
    ),
)
