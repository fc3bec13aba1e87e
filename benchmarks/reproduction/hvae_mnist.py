"""Hamiltonian and annealed chains (Caterini et al. 2018; Geffner & Domke 2021) against VAE and IWAE on MNIST."""

from __future__ import annotations

from functools import partial

from torch import nn

from pyrovae import guides, losses
from reproduction.experiment import Arm, Experiment, Preset, Setup
from reproduction.rme_omniglot import amortized, measure

__all__ = ["EXPERIMENT"]


def hvae(parts: Setup, num_steps: int, temperature: float) -> guides.HVAE:
    return guides.HVAE(amortized(parts), num_steps, dim=parts.dim, step_size=0.05, temperature=temperature)


def dais(parts: Setup, num_steps: int) -> guides.DAIS:
    return guides.DAIS(amortized(parts), num_steps, step_size=0.05)


EXPERIMENT = Experiment(
    name="hvae-mnist",
    title="Hamiltonian VAE and DAIS on dynamically binarised MNIST",
    paper="Caterini, Doucet & Sejdinovic (2018) and Geffner & Domke (2021)",
    data="mnist",
    binarization="dynamic",
    likelihood="bernoulli",
    baseline="VAE",
    activation=nn.Softplus,
    arms=(
        Arm("VAE", amortized, published=-89.78),
        Arm("IWAE-5 training", amortized, partial(losses.IWAE, 5)),
        Arm("IWAE-50 training", amortized, partial(losses.IWAE, 50), published=-86.82, presets=("paper",)),
        Arm("HVAE, K = 1", partial(hvae, num_steps=1, temperature=0.9)),
        Arm("HVAE, K = 4", partial(hvae, num_steps=4, temperature=0.9), published=-86.21),
        Arm("HVAE, K = 4, no tempering", partial(hvae, num_steps=4, temperature=1.0)),
        Arm("DAIS, K = 1", partial(dais, num_steps=1)),
        Arm("DAIS, K = 4", partial(dais, num_steps=4)),
        Arm("DAIS, K = 8", partial(dais, num_steps=8), presets=("paper",)),
        Arm("VAE, same time", amortized, as_long_as="DAIS, K = 4"),
        Arm("IWAE-5 training, same time", amortized, partial(losses.IWAE, 5), as_long_as="DAIS, K = 4"),
    ),
    presets={
        "quick": Preset(
            epochs=20,
            train_rows=20_000,
            test_rows=500,
            num_samples=1000,
            batch_size=100,
            learning_rate=1e-3,
            hidden=(300,),
            latent_dim=64,
        ),
        "paper": Preset(
            epochs=2000, validation_rows=10_000, num_samples=1000, batch_size=100, hidden=(300,), latent_dim=64
        ),
    },
    settings=(
        "784-300-64 nets with softplus, batch 100, Adam, a new binarisation of every mini-batch; step sizes of chains "
        "start at 0.05 standard deviations of the encoder's posterior and are learnt, with beta_0 and bridges"
    ),
    published="log p(x) as a public reimplementation obtained it (HVAE without tempering, 2000 epochs; 200 or 1000 "
    "samples)",
    remarks=(
        "Published numbers are those of the reproducibility table of a public reimplementation; in its HVAE the drift "
        "does not see the half kick, and the noise norms are dropped from the bound.",
        "Chains are judged by weights on their augmented space (u_0 and momenta drawn too): bounds of log p(x) as any, "
        "but with more variance for the same posterior. They have no KL of z alone.",
        '"Same time" arms trained until as many seconds had passed as DAIS with K = 4 took for its epochs.',
    ),
    measure=measure,
)
