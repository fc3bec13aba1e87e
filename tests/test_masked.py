"""Masked convolutions by autograd, and the discretised logistic mixture level by level."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyrovae.discretised_logistic import DiscretisedLogisticMixture
from pyrovae.nets import LocalPixelCNN, MaskedConv2d, PixelCNN
from pyrovae.nets.masked import GreyContext


def jacobian(net, channels, side, features=0):
    """|d logits / d image| summed over channels, `[pixels out, pixels in]` in raster order."""
    maps = torch.randn(1, features, side, side).double()

    def run(image):
        x = image.view(1, channels, side, side)
        return net(x, maps).sum(1).flatten() if features else net(x).sum(1).flatten()

    image = torch.randn(channels * side * side).double()
    full = torch.autograd.functional.jacobian(run, image).abs()
    return full.view(side * side, channels, side * side).sum(1)


@pytest.mark.parametrize(
    ("make", "channels", "features"),
    [(lambda: PixelCNN(1, 1, kernel_sizes=(5, 3, 3)), 1, 4), (lambda: PixelCNN(2, 4, 3, kernel_sizes=(3,)), 2, 3),
     (lambda: LocalPixelCNN(1, 1, above=1, aside=2), 1, 4), (lambda: LocalPixelCNN(3, 3, 2), 3, 2),
     (lambda: GreyContext(LocalPixelCNN(1, 20, 2)), 3, 2),
     (lambda: GreyContext(PixelCNN(1, 20, 2, width=8, kernel_sizes=(3, 3))), 3, 2)],
)  # fmt: skip
def test_pixels_see_earlier_ones_alone(make, channels, features):
    torch.manual_seed(0)
    found = jacobian(make().double(), channels, 6, features)
    assert not torch.triu(found).any()  # the diagonal, too
    assert torch.tril(found, -1).any()


def test_receptive_field_and_blind_spot():
    """One A and five B layers of 3 x 3: 69 pixels; j rows up columns -6 to +j."""
    side, row, column = 21, 12, 10
    layers = [MaskedConv2d(1, 1, 3, "A"), *[MaskedConv2d(1, 1, 3, "B") for _ in range(5)]]
    net = nn.Sequential(*layers).double()
    for layer in layers:
        nn.init.constant_(layer.weight, 0.1)
    seen = (jacobian(net, 1, side)[row * side + column] > 0).view(side, side)
    assert int(seen.sum()) == 69
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[row, column - 6 : column] = True
    for j in range(1, 7):
        expected[row - j, column - 6 : column + j + 1] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("layers", "number"), [(1, 4), (2, 11), (4, 34), (6, 69)])
def test_the_stacked_window(layers, number):
    """L columns to the left; j rows up, for j = 1 .. L, columns -L to +j: L + L (L + 1) + L (L + 1) / 2 pixels."""
    torch.manual_seed(0)
    side, row, column = 2 * layers + 5, layers + 2, layers + 2
    net = PixelCNN(1, 1, features=2, width=8, kernel_sizes=(3,) * layers).double()
    seen = (jacobian(net, 1, side, 2)[row * side + column] > 0).view(side, side)
    assert int(seen.sum()) == number == layers + layers * (layers + 1) + layers * (layers + 1) // 2
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[row, column - layers : column] = True
    for j in range(1, layers + 1):
        expected[row - j, column - layers : column + j + 1] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("above", "aside"), [(0, 0), (0, 1), (1, 1), (2, 3)])
def test_the_window_is_exact(above, aside):
    torch.manual_seed(0)
    side, row, column = 11, 6, 5
    net = LocalPixelCNN(1, 1, above=above, aside=aside).double()
    seen = (jacobian(net, 1, side, 4)[row * side + column] > 0).view(side, side)
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[row, column - aside : column] = True
    expected[row - above : row, column - aside : column + aside + 1] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [LocalPixelCNN, lambda *sizes: PixelCNN(*sizes, width=8, kernel_sizes=(3, 3, 3))])
def test_a_grey_context_shows_no_colours(make, dtype):
    """Other colours of the same grey move nothing; another grey moves what comes later, as far as the window goes."""
    torch.manual_seed(0)
    net = GreyContext(make(1, 20, 2)).to(dtype)
    x, maps = torch.rand(2, 3, 7, 7, dtype=dtype) - 0.5, torch.randn(2, 2, 7, 7, dtype=dtype)
    before = net(x, maps)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=dtype)
    moved = torch.randn(2, 3, 7, 7, dtype=dtype)
    moved = moved - (luma.view(3, 1, 1) * moved).sum(1, keepdim=True)  # the luma of (1, 1, 1) is 1
    assert moved.abs().amin(1).median() > 0.1
    rounding = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(net(x + moved, maps), before, rtol=0, atol=rounding)
    lighter = x.clone()
    lighter[0, :, 3, 2] += 0.3
    change = (net(lighter, maps) - before).abs().amax(1)
    assert (change[0, 3, 3:5] > 1e-4).all()
    assert (change[0, 4, 2:4] > 1e-4).all()
    assert not change[0, :3].any()
    assert not change[0, 3, :3].any()
    assert not change[1].any()
    expected = net.net((luma.view(3, 1, 1) * x).sum(1, keepdim=True), maps)
    torch.testing.assert_close(before, expected, rtol=0, atol=rounding)


def test_features_of_the_latents_are_seen_whole():
    torch.manual_seed(0)
    net = PixelCNN(1, 1, features=2, kernel_sizes=(3,)).double()
    x, maps = torch.zeros(1, 1, 5, 5).double(), torch.zeros(1, 2, 5, 5).double().requires_grad_()
    (found,) = torch.autograd.grad(net(x, maps)[0, 0, 2, 2], maps)
    assert (found[0].abs().sum(0)[1:4, 1:4] > 0).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: MaskedConv2d(1, 1, 4, "A"), "odd"), (lambda: MaskedConv2d(1, 1, 3, "C"), "kind"),
     (lambda: PixelCNN(1, 1, kernel_sizes=()), "one layer"), (lambda: LocalPixelCNN(1, 1, above=-1), "negative"),
     (lambda: GreyContext(LocalPixelCNN(1, 1))(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, 4)), "3 colours"),
     (lambda: DiscretisedLogisticMixture(torch.zeros(12, 2, 2)), "multiple of 10"),
     (lambda: DiscretisedLogisticMixture(torch.zeros(10, 2, 2), channels=2), "1 or 3")],
)  # fmt: skip
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


LEVELS = torch.arange(256).double() / 127.5 - 1


@pytest.mark.parametrize("log_scale", [0.0, -3.0, -7.0])
@pytest.mark.parametrize("mean", [-1.2, 0.0031, 0.9])
def test_levels_sum_to_one(log_scale, mean):
    parameters = torch.tensor([0.0, mean, log_scale]).double().view(3, 1, 1)
    q = DiscretisedLogisticMixture(parameters, channels=1)
    total = q.expand(torch.Size([256])).log_prob(LEVELS.view(256, 1, 1, 1)).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-9)


def test_colours_sum_to_one_and_follow_one_another():
    """Two components: sums over blue given the others; and the mean of green moves with red by tanh(c0)."""
    torch.manual_seed(0)
    parameters = torch.randn(20, 1, 1).double()
    parameters[8:14] -= 3.0
    q = DiscretisedLogisticMixture(parameters)
    red, green = LEVELS[200], LEVELS[31]
    joint = torch.stack([torch.stack([red, green, blue]) for blue in LEVELS]).view(256, 3, 1, 1)
    with_blue = q.expand(torch.Size([256])).log_prob(joint).exp().sum()
    log_w = torch.log_softmax(parameters[:2, 0, 0], 0)
    means, scales = parameters[2:8, 0, 0].view(3, 2), parameters[8:14, 0, 0].view(3, 2)
    c0 = parameters[14:16, 0, 0].tanh()

    def mass(x, mean, log_scale):
        up, down = ((x - mean + s / 255) / log_scale.exp() for s in (1, -1))
        return up.sigmoid() - down.sigmoid()

    by_hand = (log_w.exp() * mass(red, means[0], scales[0]) * mass(green, means[1] + c0 * red, scales[1])).sum()
    assert float(with_blue) == pytest.approx(float(by_hand), rel=1e-9)


def test_draws_follow_the_masses():
    torch.manual_seed(0)
    parameters = torch.tensor([0.3, -0.4, -0.5, 0.4, -2.0, -1.5]).double().view(6, 1, 1)
    q = DiscretisedLogisticMixture(parameters, channels=1)
    draws = q.sample(torch.Size([20_000]))
    assert draws.shape == (20_000, 1, 1, 1)
    masses = q.expand(torch.Size([256])).log_prob(LEVELS.view(256, 1, 1, 1)).exp()
    mean, square = (float((masses * LEVELS**k).sum()) for k in (1, 2))
    assert abs(float(draws.mean()) - mean) < 4 * ((square - mean**2) / 20_000) ** 0.5
    index = ((draws.flatten() + 1) * 127.5).round().long()
    torch.testing.assert_close(index.double() / 127.5 - 1, draws.flatten())
    blocks = torch.bincount(index // 32, minlength=8).double() / 20_000
    expected = masses.view(8, 32).sum(1)
    assert ((blocks - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-4).all()


def test_shapes_dtypes_and_far_tails():
    for dtype in (torch.float32, torch.float64):
        parameters = torch.randn(5, 30, 4, 4, dtype=dtype)
        q = DiscretisedLogisticMixture(parameters)
        x = q.sample()
        assert x.shape == (5, 3, 4, 4)
        assert q.sample(torch.Size([2])).shape == (2, 5, 3, 4, 4)
        assert q.log_prob(x).shape == (5,)
        assert q.log_prob(x).dtype == dtype
    far = torch.tensor([0.0, 5.0, -7.0]).view(3, 1, 1).requires_grad_()
    value = DiscretisedLogisticMixture(far, channels=1).log_prob(torch.full((1, 1, 1), 64 / 127.5 - 1))
    (gradient,) = torch.autograd.grad(value, far)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
