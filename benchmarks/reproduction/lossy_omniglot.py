"""The variational lossy autoencoder (Chen et al. 2017) on OMNIGLOT; arms as in lossy_mnist."""

from __future__ import annotations

from reproduction.experiment import Experiment
from reproduction.lossy_mnist import REMARKS, SETTINGS, arms, presets

__all__ = ["EXPERIMENT"]

EXPERIMENT = Experiment(
    name="lossy-omniglot",
    title="Lossy autoencoder on OMNIGLOT",
    paper="Chen et al. (2017)",
    data="omniglot",
    binarization="dynamic",
    likelihood="bernoulli",
    pictures=True,
    baseline="PixelCNN with a code",
    arms=arms(-95.02, None, -90.98),
    pairs=(("with a code, AF prior", "with a code, IAF posterior"),),
    presets=presets(2000),
    settings=SETTINGS,
    published="log p(x), 4,096 samples",
    remarks=REMARKS,
    missing=(
        "OMNIGLOT of the paper: the images and the split of Burda, Grosse & Salakhutdinov (2015) are not at hand.",
    ),
)
