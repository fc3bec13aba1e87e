"""Reproductions of published results: one experiment a file, run by `benchmarks/reproduce.py`."""

from reproduction import (
    collapse_text,
    collapse_text_ptb,
    energy_mnist,
    exact_em,
    exact_uses,
    gaps_mnist,
    hvae_mnist,
    infovae_mnist,
    ladder_mnist,
    laplace_quality,
    lossy_mnist,
    lossy_omniglot,
    mae_omniglot,
    rme_omniglot,
    savae_mnist,
    savae_omniglot,
    savae_omniglot_pixelcnn,
    short_run_ladder,
    short_run_ptb,
    short_run_snli,
    topology,
    vlac_mnist,
    vlae_mnist,
    vlae_mnist_bernoulli,
)

__all__ = ["EXPERIMENTS", "GROUPS"]

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        vlae_mnist,
        laplace_quality,
        vlae_mnist_bernoulli,
        savae_mnist,
        savae_omniglot,
        gaps_mnist,
        rme_omniglot,
        hvae_mnist,
        lossy_mnist,
        lossy_omniglot,
        mae_omniglot,
        savae_omniglot_pixelcnn,
        ladder_mnist,
        vlac_mnist,
        infovae_mnist,
        collapse_text,
        collapse_text_ptb,
        short_run_ptb,
        short_run_snli,
        short_run_ladder,
        energy_mnist,
        exact_em,
        exact_uses,
    )
}
EXPERIMENTS |= {experiment.name: experiment for experiment in topology.EXPERIMENTS}

GROUPS = {"topology": tuple(experiment.name for experiment in topology.EXPERIMENTS)}
"""Names under which several experiments are run, one after another."""
