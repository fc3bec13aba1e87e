"""Cells: as many as there can be, none missing, each with the affine map of its points."""

from __future__ import annotations

import pytest
import torch
from bench.piecewise_nets import random_net

from pyrovae.piecewise import factors_at
from pyrovae.piecewise.cells import augmented


def seen(model, z):
    layers, _ = model.layers_and_noise()
    return torch.cat([q == 1 for q in factors_at(layers[:-1], model.leak, z)], -1)


@pytest.mark.parametrize("seed", range(5))
def test_one_hidden_layer_of_one_latent_has_a_cell_more_than_units(seed):
    cells = random_net([1, 8, 2], seed=seed).cells()
    assert len(cells) == 9
    assert len(torch.unique(cells.patterns, dim=0)) == 9
    assert (cells.edges.diff() > 0).all()


def test_deep_nets_of_one_latent():
    """A second layer of 8 units adds cells: at most one more per unit and cell, and some for every seed."""
    counts = [len(random_net([1, 8, 8, 2], seed=seed).cells()) for seed in range(10)]
    assert min(counts) > 9
    assert max(counts) <= 9 * 9
    assert len(set(counts)) > 3


@pytest.mark.parametrize("units", [3, 8])
def test_one_hidden_layer_of_two_latents_reaches_the_bound_in_a_large_square(units):
    """Lines in general position: 1 + H + H (H - 1) / 2 cells, all of them in a square that holds every crossing."""
    for seed in range(3):
        model = random_net([2, units, 2], seed=seed)
        assert len(model.cells(box=1e4)) == 1 + units + units * (units - 1) // 2
        assert len(model.cells(box=1.0)) < len(model.cells(box=1e4))


@pytest.mark.parametrize("sizes", [[1, 8, 2], [1, 8, 8, 2], [1, 6, 6, 6, 3], [2, 8, 2], [2, 6, 6, 2]])
def test_every_pattern_that_is_met_is_a_known_cell(sizes):
    model = random_net(sizes, seed=3)
    z = 2 * torch.randn(100_000, sizes[0], generator=torch.Generator().manual_seed(0), dtype=torch.double)
    cells = model.cells()
    known = {tuple(row) for row in cells.patterns.tolist()}
    met = seen(model, z)
    assert {tuple(row) for row in torch.unique(met, dim=0).tolist()} <= known
    assert len(known) == len(cells)
    assert torch.equal(cells.patterns[cells.locate(z)], met)
    maps = augmented(model.layers_and_noise()[0], cells.factors)[-1][cells.locate(z)]
    affine = maps[..., 0] + torch.einsum("nxd,nd->nx", maps[..., 1:], z)
    assert torch.allclose(affine, model.mean(z), rtol=0, atol=1e-11)


def test_polygons_tile_the_square():
    cells = random_net([2, 6, 6, 2], seed=1).cells(box=5.0)
    area = 0.0
    for corners in cells.vertices:
        following = corners.roll(-1, 0)
        part = 0.5 * float((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum())
        assert part > 0  # counter-clockwise
        area += part
    assert area == pytest.approx(100.0, abs=1e-9)


def test_units_that_are_constant_or_alike_cut_nothing():
    """A unit of zero weight, and one twice there."""
    for sizes, number in (([1, 4, 2], 3), ([2, 4, 2], 4)):
        model = random_net(sizes, seed=2)
        first = model.layers[0]
        first.weight[0] = 0.0
        first.weight[1], first.bias[1] = first.weight[2], first.bias[2]
        assert len(model.cells(box=1e4)) == number
