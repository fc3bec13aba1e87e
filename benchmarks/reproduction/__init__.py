"""Reproductions of published results: one experiment a file, run by `benchmarks/reproduce.py`."""

from reproduction import (
    gaps_mnist,
    hvae_mnist,
    laplace_quality,
    rme_omniglot,
    savae_mnist,
    savae_omniglot,
    vlae_mnist,
    vlae_mnist_bernoulli,
)

__all__ = ["EXPERIMENTS"]

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
    )
}
