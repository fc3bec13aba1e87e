"""A semi-amortized VAE against what it costs (Kim, Wiseman, Miller, Sontag & Rush 2018), on binarised MNIST.

The published numbers of the paper are for text and for a PixelCNN; the target here is a run of the same settings in
bare PyTorch. Two arms train for as many seconds as the semi-amortized one took: same time instead of same epochs.
"""

from __future__ import annotations

from pyrovae import guides, losses
from reproduction.experiment import Arm, Experiment, Preset, Setup

__all__ = ["EXPERIMENT"]

SA = "SA-VAE, K = 20, step 0.03"


def amortized(parts: Setup) -> guides.Amortized:
    return guides.Amortized(parts.model, parts.encoder(2 * parts.dim))


def refined(parts: Setup, num_steps: int, step_size: float) -> guides.SemiAmortized:
    return guides.SemiAmortized(amortized(parts), num_steps, step_size, momentum=0.5, max_norm=None)


EXPERIMENT = Experiment(
    name="savae-mnist",
    title="Semi-amortized VAE on dynamically binarised MNIST",
    paper="Kim, Wiseman, Miller, Sontag & Rush (2018)",
    data="mnist",
    binarization="dynamic",
    likelihood="bernoulli",
    baseline="VAE",
    arms=(
        Arm("VAE", amortized, published=-127.9),
        Arm("IWAE-5 training", amortized, loss=lambda: losses.IWAE(5), published=-124.6),
        Arm("SA-VAE, K = 4, step 0.1", lambda p: refined(p, 4, 0.1), published=-117.5),
        Arm(SA, lambda p: refined(p, 20, 0.03), published=-109.2),
        Arm("VAE, same time", amortized, as_long_as=SA),
        Arm("IWAE-5 training, same time", amortized, loss=lambda: losses.IWAE(5), as_long_as=SA),
    ),
    presets={
        "quick": Preset(epochs=5, train_rows=20_000, test_rows=500, num_samples=1000),
        "paper": Preset(epochs=100, validation_rows=5000, num_samples=1000),
    },
    settings=(
        "784-500-500-50 ReLU nets, K steps on (loc, log var) of each datum with momentum 0.5, batch 128, Adam 5e-4, "
        "Bernoulli likelihood, a new binarisation of every mini-batch"
    ),
    published="IWAE-1000 on 500 test images after 5 epochs on 20,000 images, bare PyTorch (se 1.3, paired)",
    remarks=(
        "The published numbers are not the paper's, which are for text and for a PixelCNN decoder: they are a run of "
        "these settings in bare PyTorch, and hold for the quick preset only.",
        "The paper preset is the same comparison at 100 epochs on all images, selected on 5,000 of them.",
        '"Same time" arms trained until as many seconds had passed as the K = 20 arm took for its epochs. So early in '
        "training, semi-amortized steps pay by the epoch and not by the clock: while they took five epochs, the plain "
        "VAE took sixty and went far ahead.",
    ),
)
