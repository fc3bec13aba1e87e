"""Entropy by nearest neighbours against normal distributions."""

from __future__ import annotations

import math

import pytest
import torch

from pyrovae.entropy import entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "sd", "away"), [(1, 0.1, 3.0), (1, 0.3, 2.0), (3, 1.0, 0.0), (8, 1e-3, 3.0)])
def test_normal_draws_wherever_they_lie(dtype, dim, sd, away):
    """Draws close to each other and far from the origin keep their distances in either precision."""
    generator = torch.Generator().manual_seed(0)
    draws = (away + sd * torch.randn(1000, 20, dim, generator=generator, dtype=torch.double)).to(dtype)
    truth = 0.5 * dim * math.log(2 * math.pi * math.e * sd**2)
    found = entropy(draws)
    assert found.dtype == dtype
    assert found.shape == (20,)
    assert (found - truth).mean().abs() < 0.05 + 0.1 * (dim == 8)  # 1,000 draws in 8 dimensions have a bias


def test_too_few_draws():
    with pytest.raises(ValueError, match="more than 3 draws"):
        entropy(torch.randn(3, 2, 1))
