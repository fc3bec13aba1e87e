"""Exchanged codes: a ladder whose groups are known, and attributes of drawn shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyrovae import guides
from pyrovae.diagnose import interventions
from pyrovae.diagnose.groups import image_slant, image_width, stroke_width
from pyrovae.models import LadderVAE


class Two(nn.Module):
    """Three pixels: the deep latent in the first, the shallow one in the second, both in the third."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]).double())

    def forward(self, z):
        return z @ self.weight.T


class Read(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, :1], x[:, 1:2] / 2, torch.full((len(x), 2), -20.0, dtype=x.dtype)], 1)


def test_each_group_moves_what_it_holds():
    """Codes are the data's own: E|z - z'| of two normals is 2 / sqrt(pi), of the sum's two columns alike."""
    torch.manual_seed(0)
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    z = torch.randn(4000, 2).double()
    x = z @ model.decoder.weight.T.detach()
    found = interventions(
        model, guides.Amortized(model, Read()), x,
        {"first": lambda x: x[:, 0], "second": lambda x: x[:, 1], "sum": lambda x: x[:, 2], "both": lambda x: x[:, :2]},
    )  # fmt: skip
    assert found.groups == ("z2", "z1")
    step = 2 / torch.pi**0.5
    truth = torch.tensor([[step, 0.0, step, step], [0.0, 2 * step, step, 2 * step]]).double()
    assert ((found.effect - truth).abs() <= 4 * found.se + 1e-3).all()
    torch.testing.assert_close(found.share.sum(0), torch.ones(4).double())
    assert found.share[0, 0] > 0.999
    assert "z2" in repr(found)
    assert "100%" in repr(found)


def test_attributes_of_bars():
    """A bar of 2 x 8 pixels: outline of its columns and rows, width sqrt((w^2 - 1) / 12); sheared, its slant."""
    image = torch.zeros(3, 1, 20, 20)
    image[0, 0, 6:14, 9:11] = 1
    image[1, 0, 6:14, 7:13] = 1
    for row in range(6, 14):
        image[2, 0, row, row - 1 : row + 1] = 1
    thin, wide, slanted = (float(v) for v in stroke_width(image))
    assert thin == pytest.approx(2 * 16 / (2 * 8 + 2 * 2))
    assert wide == pytest.approx(2 * 48 / (2 * 8 + 2 * 6))
    assert slanted < wide
    assert image_width(image)[0] == pytest.approx(0.5)
    assert image_width(image)[1] == pytest.approx(((36 - 1) / 12) ** 0.5)
    assert image_slant(image)[:2].tolist() == pytest.approx([0.0, 0.0])
    assert image_slant(image)[2] == pytest.approx(1.0)
    assert torch.equal(image_slant(image), image_slant(image[:, 0]))


def test_bad_input():
    model = LadderVAE(Two(), [1, 1], "gaussian", noise=0.1)
    guide = guides.Amortized(model, Read())
    with pytest.raises(ValueError, match="two data"):
        interventions(model, guide, torch.zeros(1, 3).double())
    with pytest.raises(ValueError, match="grey images"):
        interventions(model, guide, torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="not one row each"):
        interventions(model, guide, torch.zeros(4, 3).double(), {"all": lambda x: x.sum().view(1)})
