"""Evaluation a thousand times over keeps nothing: no tensor more, no memory more."""

from __future__ import annotations

import gc
import resource

import pyro
import pytest
import torch
from torch import nn

from pyrovae import diagnose, evidence, guides, models, reference


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    vae = models.VAE(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6)), latent_dim=2)
    return vae, guides.Amortized(vae, nn.Linear(6, 4)), torch.bernoulli(torch.full((3, 6), 0.5))


EVALUATIONS = {
    "iwae": (1000, lambda vae, guide, x: evidence.iwae(vae, guide, x, num_samples=20)),
    "khat": (1000, lambda vae, guide, x: diagnose.khat(vae, guide, x, num_samples=50)),
    "information": (300, lambda vae, guide, x: diagnose.information(vae, guide, x, num_samples=10)),
    "ais": (20, lambda vae, guide, x: evidence.ais(vae, x, num_chains=4, num_temperatures=4)),
    "bdmc": (10, lambda vae, guide, x: evidence.bdmc(vae, x, num_chains=4, num_temperatures=4)),
    "calibrate": (30, lambda vae, guide, x: diagnose.calibrate(vae, guide, x, num_data=100, num_draws=19)),
    "gaps": (10, lambda vae, guide, x: diagnose.gaps(vae, guide, x, num_samples=50)),
    "hmc": (10, lambda vae, guide, x: reference.hmc(vae, x, target_ess=50, warmup=50, max_thin=1, progress=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_nothing_is_kept(name, pair):
    times, evaluate = EVALUATIONS[name]
    counts, peaks, objects = [], [], []
    for step in range(times):
        evaluate(*pair)
        if step + 1 in (times // 5, times):
            gc.collect()
            counts.append(sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects()))
            objects.append(len(gc.get_objects()))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
    assert counts[1] <= counts[0], "tensors are kept"
    assert objects[1] - objects[0] < 200, "objects are kept"
    assert peaks[1] - peaks[0] < 30_000, "memory grows"
    assert len(pyro.get_param_store()) == 0
