"""The variational lossy autoencoder (Chen et al. 2017): what a PixelCNN with a small window leaves to the code."""

from __future__ import annotations

from functools import partial

from pyrovae import losses
from pyrovae.models import VAE
from pyrovae.nets import LinearHeadDecoder
from reproduction.experiment import Arm, Experiment, Preset, Split
from reproduction.pixel_decoders import amortized, iaf, models, without_latents

__all__ = ["EXPERIMENT", "arms", "presets"]

# Six masked layers of 12 filters: a pixel sees 69 of those before it.
WITH_CODE, ALONE = models(width=12, kernel_sizes=(3,) * 6)
WITH_FLOW = partial(WITH_CODE, transforms=4)
FLOOR = 7.84  # nats: 0.01 for each pixel


def factorised(preset: Preset, split: Split) -> VAE:
    """Every pixel by itself given z."""
    return VAE(LinearHeadDecoder(preset.latent_dim, preset.hidden, split.event_shape), preset.latent_dim)


def arms(alone: float, gaussian: float | None, flow: float | None) -> tuple[Arm, ...]:
    """The arms, with the published numbers of some."""
    return (
        Arm("PixelCNN with a code", amortized, model=WITH_CODE, published=gaussian),
        Arm("PixelCNN alone", without_latents, model=ALONE, published=alone),
        Arm("with a code, AF prior", amortized, model=WITH_FLOW, published=flow),
        Arm("with a code, IAF posterior", iaf, model=WITH_CODE),
        Arm("with a code, AF prior, free bits", amortized, partial(losses.FreeBits, FLOOR, "total"), model=WITH_FLOW),
        Arm("with a code, AF prior, soft free bits", amortized,
            partial(losses.FreeBits, FLOOR, "total", soft=True), model=WITH_FLOW),
        Arm("factorised decoder", amortized, model=factorised),
    )  # fmt: skip


def presets(validation_rows: int) -> dict[str, Preset]:
    common = {"batch_size": 100, "learning_rate": 2e-3, "hidden": (300, 300), "latent_dim": 32}
    return {
        "quick": Preset(epochs=10, train_rows=10_000, validation_rows=1000, test_rows=500, num_samples=100,
                        **common),
        "paper": Preset(epochs=500, validation_rows=validation_rows, num_samples=4096,
                        **{**common, "latent_dim": 64, "hidden": (640, 640)}),
    }  # fmt: skip


SETTINGS = (
    "six masked 3x3 layers of 12 gated filters (69 pixels in view) beside 4 feature maps of z, MLPs for encoder and "
    "feature maps, an autoregressive prior of 4 steps, batch 100, Adam 2e-3, weights of the best epoch on validation "
    "images"
)
REMARKS = (
    "Published: a residual encoder, 64 latents, weight normalisation with data-dependent starts, Adamax and Polyak "
    "averaging, hundreds of epochs, 4,096 importance samples. The order of the first three arms and their KL (10.6 and "
    "11.7 nats on dynamic MNIST) are what a short run can be held against.",
    f"Free bits: a floor of {FLOOR:g} nats under the whole KL, 0.01 for each pixel as published.",
    "The factorised decoder has no masked layers: all that a pixel knows of others goes through the code.",
    "What the quick preset (1,000 steps) cannot show: gains of half a nat, such as that of the flow prior, and the KL "
    "of 10 to 12 nats, which codes have not reached by then unless a floor holds them up.",
)

EXPERIMENT = Experiment(
    name="lossy-mnist",
    title="Lossy autoencoder on MNIST: a PixelCNN with a small window, and an autoregressive prior",
    paper="Chen et al. (2017)",
    data="mnist",
    binarization="dynamic",
    likelihood="bernoulli",
    pictures=True,
    baseline="PixelCNN with a code",
    arms=arms(-87.55, -79.48, -78.94),
    pairs=(("with a code, AF prior", "with a code, IAF posterior"),),
    presets=presets(2000),
    settings=SETTINGS,
    published="log p(x), 4,096 samples, dynamic MNIST",
    remarks=REMARKS,
)
