"""Toy data: moments in closed form, seeds, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from pyrovae.data import toy
from pyrovae.data.toys import TOYS

NUMBER = 40_000


def test_the_circle_has_radius_one_and_its_noise():
    x = toy("circle", NUMBER, noise=0.1)
    assert x.dtype == torch.float64
    assert x.shape == (NUMBER, 2)
    error = 4 / math.sqrt(NUMBER)
    assert (x.mean(0).abs() < 0.72 * error).all()  # Var = 1/2 + noise^2
    square = x.square().sum(-1)  # 1 + 2 noise n_r + noise^2 |n|^2
    assert float(square.mean()) == pytest.approx(1 + 2 * 0.1**2, abs=0.21 * error)
    assert float(square.std()) == pytest.approx(math.sqrt(4 * 0.1**2 + 4 * 0.1**4), rel=0.02)


def test_the_wave_is_a_cosine():
    x = toy("wave", NUMBER, noise=0.05)
    error = 4 / math.sqrt(NUMBER)
    assert float(x[:, 0].std()) == pytest.approx(math.sqrt(4 + 0.05**2), rel=error)
    # E cos(1.4 t) = exp(-1.4^2 Var(t) / 2)
    assert float(x[:, 1].mean()) == pytest.approx(math.exp(-(1.4**2) * 2), abs=0.72 * error)
    rest = x[:, 1] - torch.cos(1.4 * x[:, 0])  # noise of both coordinates, the first one's times the slope
    assert float(rest.var()) == pytest.approx(0.05**2 * (1 + 1.4**2 / 2), rel=0.05)


def test_the_mixture_has_ten_centres_that_no_seed_moves():
    tight = [toy("mixture", 4000, noise=1e-12, seed=seed) for seed in (0, 1)]
    centres = [x.round(decimals=8).unique(dim=0) for x in tight]
    assert centres[0].shape == (10, 2)
    assert torch.equal(*centres)
    assert centres[0].abs().max() <= 2
    x, at = toy("mixture", NUMBER, noise=0.02, seed=3), toy("mixture", NUMBER, noise=1e-12, seed=3)
    for centre in centres[0]:
        some = (x - at)[(at - centre).norm(dim=1) < 1e-6]
        assert abs(len(some) / NUMBER - 0.1) < 4 * 0.3 / math.sqrt(NUMBER)
        assert (some.std(0) > 0.02 * 0.95).all()
        assert (some.std(0) < 0.06 * 1.05).all()


@pytest.mark.parametrize("name", TOYS)
def test_seeds_and_the_caller_s_state(name):
    state = torch.get_rng_state()
    assert torch.equal(toy(name, 5, seed=1), toy(name, 5, seed=1))
    assert not torch.equal(toy(name, 5, seed=1), toy(name, 5, seed=2))
    assert torch.equal(state, torch.get_rng_state())


def test_refusals():
    with pytest.raises(ValueError, match="unknown toy data 'spiral': choose one of circle, wave, mixture"):
        toy("spiral", 5)
    for options in ({"num": 0}, {"num": 5, "noise": 0.0}):
        with pytest.raises(ValueError, match="num >= 1 and a positive noise"):
            toy("circle", **options)
