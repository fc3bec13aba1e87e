"""Approximation and amortization gaps (Cremer, Li & Duvenaud 2018) on statically binarised MNIST.

Each arm trains its own decoder. Its posteriors, as trained and refined afterwards without further training, are then
held against the best member of their family, datum by datum, on training and on test images.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyrovae import diagnose, guides
from pyrovae.guides.base import Guide
from reproduction.evaluation import number
from reproduction.experiment import Arm, Experiment, Preset, Setup, Split

__all__ = ["EXPERIMENT"]

PUBLISHED = {("VAE", "training", "as trained"): "-92.57: 1.43 + 1.34 = 2.77"}


def amortized(parts: Setup) -> guides.Amortized:
    return guides.Amortized(parts.model, parts.encoder(2 * parts.dim))


def trained_refined(parts: Setup) -> guides.SemiAmortized:
    return guides.SemiAmortized(amortized(parts), num_steps=20, step_size=0.03, momentum=0.5, max_norm=None)


def refined(base: guides.Amortized) -> guides.SemiAmortized:
    """Refinement of an encoder that was trained without; single draws and steps of 0.03 end below its own ELBO."""
    return guides.SemiAmortized(
        base, num_steps=20, step_size=0.01, momentum=0.5, num_samples=2, antithetic=True, max_norm=None
    )


def laplace(parts: Setup) -> guides.Laplace:
    return guides.Laplace(parts.model, parts.encoder(parts.dim), num_steps=4)


def posteriors(guide: Guide) -> dict[str, Guide]:
    """The guide as it was trained, and others on the same decoder and encoder."""
    if isinstance(guide, guides.SemiAmortized):
        return {"as trained": guide, "its encoder alone": guide.base}
    if isinstance(guide, guides.Amortized):
        return {
            "as trained": guide,
            "refined by 20 SA steps": refined(guide),
            "refined by Laplace, T = 4": guides.Laplace(guide.model, guide.encoder, num_steps=4),
        }
    return {"as trained": guide}


def measure(guide: Guide, split: Split, preset: Preset, progress: bool, arm: str) -> list[dict[str, Any]]:
    """Gaps on the first training and test images."""
    rows = []
    for part, images in (("training", split.train), ("test", split.test)):
        x: Tensor = images[: preset.extra_rows]
        for name, posterior in posteriors(guide).items():
            found = diagnose.gaps(
                posterior.model, posterior, x, num_samples=preset.num_samples, local={"max_steps": preset.extra_steps},
                progress=f"{arm}, gaps, {part}, {name}" if progress else None,
            )  # fmt: skip
            rows.append({
                "table": f"Gaps on {len(x)} {part} images",
                "posterior": name,
                "ELBO": number(found.elbo.values),
                "log p(x)": number(found.log_evidence.values),
                "approximation": number(found.approximation.values),
                "amortization": number(found.amortization.values),
                "inference": number(found.inference.values),
                "q* in": found.family,
                "flagged": f"{int(found.flagged.sum())} of {len(x)}",
                "published ELBO: gaps": PUBLISHED.get((arm, part, name), ""),
            })  # fmt: skip
    return rows


EXPERIMENT = Experiment(
    name="gaps-mnist",
    title="Approximation and amortization gaps on statically binarised MNIST",
    paper="Cremer, Li & Duvenaud (2018)",
    data="mnist",
    binarization="static",
    likelihood="bernoulli",
    baseline="VAE",
    activation=nn.ELU,
    measure=measure,
    arms=(
        Arm("VAE", amortized),
        Arm("SA-VAE, K = 20, step 0.03", trained_refined),
        Arm("Laplace", laplace),
    ),
    presets={
        "quick": Preset(
            epochs=8,
            test_rows=500,
            num_samples=1000,
            batch_size=100,
            learning_rate=1e-3,
            adam_eps=1e-4,
            hidden=(200, 200),
            extra_rows=100,
            extra_steps=2000,
        ),
        "paper": Preset(
            epochs=3280,
            test_rows=None,
            num_samples=5000,
            batch_size=100,
            learning_rate=1e-4,
            adam_eps=1e-4,
            hidden=(200, 200),
            extra_rows=1000,
            extra_steps=20_000,
        ),
    },
    settings="784-200-200-50 ELU nets, batch 100, Adam with eps 1e-4, fixed binarisation",
    remarks=(
        "Published numbers are recalled, not checked against the paper.",
        "Published, fully factorised Gaussian, 1,000 training images, 784-200-200-50 nets, 3,280 epochs: log p(x) "
        "-89.80, ELBO of q* -91.23, ELBO -92.57; approximation gap 1.43, amortization gap 1.34, inference gap 2.77. "
        "SA and Laplace rows have no published counterpart.",
        "log p(x) here is the better of two importance-weighted bounds, the published one the better of IWAE-5000 and "
        "AIS: gaps that contain it are lower bounds.",
        "The refined VAE takes 20 steps of 0.01 along gradients from two antithetic draws, chosen on 300 images that "
        "had no part in a short training run. The single draws and steps of 0.03 with which the SA-VAE arm is trained "
        "made the posterior of that model, trained without them, worse by 12 nats.",
        "q* of a Laplace posterior is sought among full-rank normals, of the others among diagonal ones: approximation "
        "gaps of the two are those of different families.",
        "The paper preset trains at the constant step 1e-4 of the released code's options, quick at 1e-3 throughout.",
        "The binarisation is fixed but is our own draw, not the published file.",
    ),
    missing=(
        "The fixed binarisation of Larochelle & Murray: not at hand; a fixed draw of our own stands in.",
        "Auxiliary-flow (AF) columns: this family is not in the library.",
        "The CIFAR-10 column: 4,000 images are at hand, no full training set.",
    ),
)
