"""Ways over an atlas: geodesics on an exact one, pairs that nothing joins, the guide's own method."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyro
import pytest
import torch
from torch import nn

from pyrovae.atlas import ways
from pyrovae.guides import Charts
from pyrovae.models import ChartAutoencoder
from pyrovae.nets import ChartMLP


class Arcs:
    """An exact atlas of the unit circle, as far as `ways` asks: two arcs of 3/4 of it, around the angles 0 and pi."""

    def __init__(self):
        self.model = SimpleNamespace(mean=self.mean)

    def predict(self, x):
        return torch.softmax(1000 * torch.stack([x[:, 0], -x[:, 0]], -1), -1)

    def coordinates(self, x):
        angle = torch.atan2(x[:, 1], x[:, 0])
        turns = [torch.remainder(angle - centre + math.pi, 2 * math.pi) - math.pi for centre in (0, math.pi)]
        return (torch.stack(turns, 1) / (1.5 * math.pi) + 0.5).clamp(0, 1).unsqueeze(-1)

    def mean(self, z, c):
        angle = 1.5 * math.pi * (z[..., 0] - 0.5) + math.pi * c
        return torch.stack([angle.cos(), angle.sin()], -1)

    def reconstruct(self, x):
        return x


def on_circle(angle):
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_ways_over_an_exact_atlas_are_geodesics():
    """Inside a chart and from chart to chart: on the circle, the shorter way round, evenly spaced, end to end."""
    known = on_circle(torch.linspace(0, 2 * math.pi, 2001).double()[:-1])
    start, end = (torch.tensor(angles).double() for angles in ([-0.4, 0.3, 0.3, 2.0], [0.5, 2.9, -2.7, 4.0]))
    found, joined = ways(Arcs(), on_circle(start), on_circle(end), known, steps=33, within=1e-6)
    assert joined.all()
    assert found.shape == (33, 4, 2)
    angle = torch.atan2(found[..., 1], found[..., 0])
    turn = torch.remainder(angle.diff(dim=0) + math.pi, 2 * math.pi) - math.pi
    truth = torch.remainder(end - start + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(found[0], on_circle(start))
    torch.testing.assert_close(found[-1], on_circle(end))
    torch.testing.assert_close(turn, (truth / 32).expand(32, 4), rtol=0.02, atol=0)


def test_what_no_chain_of_charts_joins_is_cross_faded():
    known = on_circle(torch.linspace(0, 2 * math.pi, 100).double()[:-1])
    a, b = on_circle(torch.zeros(1).double()), on_circle(torch.full((1,), math.pi).double())
    found, joined = ways(Arcs(), a, b, known[known[:, 0].abs() > 0.8], steps=3, within=1e-6)
    assert not joined.any()
    torch.testing.assert_close(found[:, 0], torch.stack([a[0], (a[0] + b[0]) / 2, b[0]]))


def test_a_way_does_not_depend_on_the_other_pairs():
    """Data are known where the arcs overlap above: the ends of the second pair, below, would be a shorter way round."""
    known = on_circle(torch.linspace(1, 2, 50).double())
    start, end = (on_circle(torch.tensor(angles).double()) for angles in ([0.3, -1.5], [-2.7, -1.6]))
    whole = ways(Arcs(), start, end, known, steps=7, within=1e-6)
    alone = ways(Arcs(), start[:1], end[:1], known, steps=7, within=1e-6)
    torch.testing.assert_close(alone.x[:, 0], whole.x[:, 0])
    assert (whole.x[1:-1, 0, 1] > -0.5).all()  # above


def test_a_datum_is_joined_to_itself():
    x = on_circle(torch.tensor([0.3]).double())
    found, joined = ways(Arcs(), x, x, on_circle(torch.arange(5).double()), steps=4, within=1e-6)
    assert joined.all()
    torch.testing.assert_close(found, x.expand(4, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_charts_interpolate_between_what_they_redraw(dtype, rows):
    """Images of any shape; ends are those of the charts, nothing is trained or registered."""
    torch.manual_seed(0)
    model = ChartAutoencoder(ChartMLP(3, [2, 8, 4]), nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))))
    guide = Charts(
        model, nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), ChartMLP(3, [4, 8, 4]),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 3)),
    ).to(dtype)  # fmt: skip
    model.to(dtype)
    known, before = torch.randn(40, 2, 3, dtype=dtype), [p.clone() for p in guide.parameters()]
    x, other = known[:rows], known[rows : 2 * rows]
    found, joined = guide.interpolate(x, other, known, steps=5)
    assert found.shape == (5, rows, 2, 3)
    assert found.dtype == dtype
    assert joined.shape == (rows,)
    every, z = torch.arange(3).unsqueeze(1), [guide.coordinates(ends).movedim(1, 0) for ends in (x, other)]
    for end, places in zip((found[0], found[-1]), z, strict=True):
        with torch.no_grad():
            redrawn = model.mean(places, every)
        assert (redrawn - end).flatten(2).norm(dim=-1).amin(0).max() < 1e-5
    assert not list(pyro.get_param_store())
    assert all(map(torch.equal, guide.parameters(), before))


def test_bad_ends():
    x = on_circle(torch.zeros(2).double())
    with pytest.raises(ValueError, match="at least its two ends"):
        ways(Arcs(), x, x, x, steps=1)
    with pytest.raises(ValueError, match="must have one shape"):
        ways(Arcs(), x, x[:1], x, steps=3)
