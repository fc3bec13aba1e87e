"""Autoregressive decoders and priors: normalised, drawn in raster order, equal to an inverse flow on eps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from pyrovae import evidence, fit, guides, losses
from pyrovae.autoregressive import AutoregressiveFlow, AutoregressiveImages
from pyrovae.errors import DataError
from pyrovae.models import LossyVAE, PixelCNNVAE
from pyrovae.nets import LinearHeadDecoder, LocalPixelCNN, PixelCNN
from pyrovae.nets.masked import GreyContext
from pyrovae.optim import Adam

D = 3


def small(kind="pixelcnn", dtype=torch.float32, side=5):
    torch.manual_seed(0)
    features = LinearHeadDecoder(D, [8], (4, side, side))
    if kind == "pixelcnn":
        model = PixelCNNVAE(features, PixelCNN(1, 1, width=8, kernel_sizes=(3, 3)), D)
    else:
        model = LossyVAE(features, D, width=8, num_transforms=0 if kind == "gaussian" else 2, hidden=(8,))
    return model.to(dtype), nn.Sequential(nn.Flatten(), nn.Linear(side * side, 2 * D)).to(dtype)


def test_binary_images_are_normalised():
    """2 x 3 pixels: the 64 images sum to one, for two feature maps at once."""
    torch.manual_seed(0)
    net = PixelCNN(1, 1, features=2, width=8, kernel_sizes=(3, 3)).double()
    q = AutoregressiveImages(net, torch.randn(2, 2, 2, 3).double())
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).double().view(64, 1, 1, 2, 3)
    total = q.log_prob(images).exp()
    assert total.shape == (64, 2)
    torch.testing.assert_close(total.sum(0), torch.ones(2).double())


def test_draws_follow_the_probabilities():
    """Frequencies of the 16 images of 2 x 2 pixels, within 4.5 standard errors."""
    torch.manual_seed(0)
    net = PixelCNN(1, 1, features=2, width=8, kernel_sizes=(3, 3)).double()
    with torch.no_grad():
        net.first.weight.mul_(6)
    q = AutoregressiveImages(net, torch.randn(2, 2, 2).double())
    draws = q.sample(torch.Size([8000])).flatten(1).long()
    index = (draws * torch.tensor([8, 4, 2, 1])).sum(1)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double().view(16, 1, 2, 2)
    p = q.log_prob(images).exp().detach()
    found = torch.bincount(index, minlength=16).double() / 8000
    assert ((found - p).abs() < 4.5 * (p * (1 - p) / 8000).sqrt()).all()


def test_colour_images():
    torch.manual_seed(0)
    net = PixelCNN(3, 20, features=2, width=8, kernel_sizes=(3,))
    q = AutoregressiveImages(net, torch.randn(2, 2, 3, 3), channels=3, pixels="logistic")
    x = q.sample()
    assert x.shape == (2, 3, 3, 3)
    assert q.log_prob(x).shape == (2,)
    model = PixelCNNVAE(LinearHeadDecoder(2, [4], (2, 3, 3)), net, 2, channels=3, pixels="logistic")
    guide = guides.Amortized(model, nn.Sequential(nn.Flatten(), nn.Linear(27, 4)))
    assert guide.log_weights(3, x).shape == (3, 2)


@pytest.mark.parametrize("kind", ["pixelcnn", "lossy", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4])
def test_models_train_with_guides(kind, dtype, rows):
    model, encoder = small(kind, dtype)
    x = torch.bernoulli(torch.full((rows, 1, 5, 5), 0.5, dtype=dtype))
    amortized = guides.Amortized(model, encoder)
    for guide in (amortized, guides.SemiAmortized(amortized, num_steps=2, step_size=0.05)):
        for parameter in model.parameters():
            parameter.grad = None
        losses.FreeBits(0.5).loss_and_grads(model, guide, x)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert guide.log_weights(3, x).dtype == dtype
    assert guides.ShortRun(model, num_steps=2, step_size=0.1).draws(2, x).shape == (2, rows, D)
    assert model(None, size=2).shape == (2, 1, 5, 5)


def test_prior_flow_is_a_density_and_its_posterior_an_inverse_flow():
    """log p(z) = log N(eps) + log |d eps / dz|, by autograd; z = f^{-1}(eps) gives eps back."""
    torch.manual_seed(0)
    flow = AutoregressiveFlow(4, num_transforms=3, hidden=(16,)).double()
    eps = torch.randn(6, 4).double()
    z = flow.from_noise(eps).detach()
    torch.testing.assert_close(flow.to_noise(z)[0], eps)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: flow.to_noise(v)[0], row) for row in z])
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum(-1) + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(flow.distribution().log_prob(z), expected)


def test_scoring_the_prior_takes_one_pass_and_drawing_it_d():
    torch.manual_seed(0)
    flow = AutoregressiveFlow(5, num_transforms=2, hidden=(8,))
    calls = []
    for step in flow.steps:
        step.register_forward_hook(lambda *_: calls.append(1))
    flow.distribution().log_prob(torch.randn(3, 5))
    assert len(calls) == 2
    calls.clear()
    flow.distribution().sample(torch.Size([3]))
    assert len(calls) == 10


def test_simulation_draws_whole_images():
    """Bidirectional Monte Carlo on images of the model's own: pixels of a draw follow one another."""
    model, _ = small("pixelcnn", side=3)
    x = torch.bernoulli(torch.full((4, 1, 3, 3), 0.5))
    found = evidence.bdmc(model, x, num_chains=8, num_temperatures=60)
    assert (found.width > -1).all()
    assert float(found.width.mean()) < 1.0


def lossy_colours(dtype=torch.float32, side=4, **options):
    torch.manual_seed(0)
    features = LinearHeadDecoder(D, [8], (4, side, side))
    model = LossyVAE(features, D, channels=3, pixels="logistic", outputs=20, width=8, hidden=(8,), num_transforms=2,
                     **options)  # fmt: skip
    return model.to(dtype), nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 2 * D)).to(dtype)


WINDOWS = [{"window": window, "context": context} for window in ("exact", "stacked") for context in ("colour", "grey")]


@pytest.mark.parametrize("options", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_window_trains_and_draws_in_raster_order(options, dtype, rows):
    """A pixel of a draw came from the parameters that the whole image gives it."""
    model, encoder = lossy_colours(dtype, **options)
    calls = []
    handle = model.net.register_forward_hook(lambda net, inputs, output: calls.append(output))
    x = model(None, size=rows)
    handle.remove()
    assert x.shape == (rows, 3, 4, 4)
    assert x.dtype == dtype
    assert len(calls) == 16
    guide = guides.Amortized(model, encoder)
    losses.FreeBits(0.5).loss_and_grads(model, guide, x)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert guide.log_weights(3, x).shape == (3, rows)

    torch.manual_seed(1)
    maps = torch.randn(rows, 4, 4, 4, dtype=dtype)
    q = AutoregressiveImages(model.net, maps, channels=3, pixels="logistic")
    calls.clear()
    model.net.register_forward_hook(lambda net, inputs, output: calls.append(output))
    x = q.sample()
    drawn_from = torch.stack([calls[i][..., i // 4, i % 4] for i in range(16)], -1).view(rows, 20, 4, 4)
    torch.testing.assert_close(q.parameters(x), drawn_from)


@pytest.mark.parametrize("window", ["exact", "stacked"])
def test_a_grey_context_leaves_colours_to_the_code(window):
    """Other colours of the same grey in all pixels: no parameter moves; in a colour context the last pixel's do."""
    moved = torch.tensor([0.587, -0.299, 0.0], dtype=torch.double).view(3, 1, 1)
    for context, same in (("grey", True), ("colour", False)):
        model, _ = lossy_colours(torch.double, window=window, context=context)
        maps, x = torch.randn(1, 4, 4, 4).double(), torch.rand(1, 3, 4, 4).double() - 0.5
        q = AutoregressiveImages(model.net, maps, channels=3, pixels="logistic")
        change = (q.parameters(x + 0.5 * moved) - q.parameters(x)).abs().amax(1)[0]
        assert bool((change < 1e-13).all()) is same
        if not same:
            assert change[-1, -1] > 1e-4


def test_binary_colours_in_a_grey_context_are_normalised():
    """1 x 2 pixels of three channels: the 64 images sum to one."""
    torch.manual_seed(0)
    q = AutoregressiveImages(GreyContext(LocalPixelCNN(1, 3, 2, width=8)).double(), torch.randn(2, 1, 2).double(), 3)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).double().view(64, 3, 1, 2)
    assert q.log_prob(images).exp().sum().item() == pytest.approx(1.0)
    other = images.clone()
    other[..., 0] = 1 - other[..., 0]
    assert not torch.allclose(q.parameters(images)[..., 1], q.parameters(other)[..., 1])  # it does look


def test_stacked_layers_see_their_triangle():
    features = LinearHeadDecoder(D, [8], (4, 15, 15))
    for layers, number in ((None, 69), (3, 21)):
        torch.manual_seed(0)
        model = LossyVAE(features, D, window="stacked", layers=layers, width=8, num_transforms=0).double()
        x = torch.zeros(1, 1, 15, 15).double().requires_grad_()
        (found,) = torch.autograd.grad(model.net(x, torch.randn(1, 4, 15, 15).double())[0, 0, 8, 7], x)
        assert int((found != 0).sum()) == number


class Bits(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, features * 8))
        self.features = features

    def forward(self, z):
        return self.net(z).view(-1, self.features, 1, 8)


@pytest.mark.parametrize(("aside", "floor"), [(0, None), (1, None), (1, 0.5)])
def test_information_goes_through_the_code_where_the_window_does_not_show_it(aside, floor):
    """One fair bit copied eight times: a factorised decoder needs z (KL >= ln 2); a window of one does not; free bits
    pin the KL."""
    torch.manual_seed(0)
    bits = torch.randint(2, (512, 1, 1, 1)).float().expand(512, 1, 1, 8).contiguous()
    model = PixelCNNVAE(Bits(2), LocalPixelCNN(1, 1, 2, above=0, aside=aside, width=16), 1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    guide = guides.Amortized(model, encoder)
    loss = losses.ELBO() if floor is None else losses.FreeBits(floor)
    fit(model, guide, bits, loss=loss, max_steps=1500, batch_size=128, optimizer=Adam(lr=3e-3), progress=False)
    with torch.no_grad():
        q = guide.posterior(bits).base_dist
        kl = float((0.5 * (q.scale**2 + q.loc**2 - 1) - q.scale.log()).sum(-1).mean())
        value = -float(losses.ELBO(num_particles=20).per_datum(model, guide, bits).mean())
    if aside == 0:
        assert kl > 0.69
        assert 0.69 < value < 2.0
    elif floor is None:
        assert kl < 0.3
        assert value == pytest.approx(0.693, abs=0.04)
    else:
        assert kl == pytest.approx(0.5, abs=0.06)


def test_bad_input():
    model, _ = small()
    with pytest.raises(DataError, match="the decoder makes"):
        model(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="at least 2 latents"):
        AutoregressiveFlow(1)
    with pytest.raises(ValueError, match="the prior has 3"):
        PixelCNNVAE(LinearHeadDecoder(2, [4], (4, 3, 3)), PixelCNN(1, 1), 2, prior=AutoregressiveFlow(3))
    for options, words in (
        ({"window": "round"}, "window must be"), ({"context": "blue"}, "context must be"),
        ({"context": "grey"}, "3 channels"), ({"layers": 3}, "stacked window"),
        ({"window": "stacked", "above": 3}, "exact"), ({"window": "stacked", "layers": 0}, "at least one layer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            LossyVAE(LinearHeadDecoder(2, [4], (4, 3, 3)), 2, **options)
    with pytest.raises(ValueError, match="pixels"):
        AutoregressiveImages(PixelCNN(1, 1), torch.zeros(4, 3, 3), pixels="poisson")
    model, encoder = small()
    with pytest.raises(DataError, match="binarise"):
        guides.Amortized(model, encoder).log_weights(2, torch.full((2, 1, 5, 5), 0.3))


def test_values_between_the_levels_are_refused():
    """Of images in [0, 1] the 256 values lie half a level apart: their probabilities would sum to two."""
    torch.manual_seed(0)
    net = PixelCNN(1, 6, features=2, width=8, kernel_sizes=(3,))
    model = PixelCNNVAE(LinearHeadDecoder(2, [4], (2, 3, 3)), net, 2, pixels="logistic")
    images = torch.randint(0, 256, (5, 1, 3, 3)) / 255
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    guide = guides.Amortized(model, encoder)
    with pytest.raises(DataError, match=r"2 \* x - 1"):
        fit(model, guide, images, max_steps=1, progress=False)
    assert math.isfinite(fit(model, guide, 2 * images - 1, epochs=1, progress=False).curve[0])
    one = AutoregressiveImages(net.double(), torch.randn(2, 1, 1).double(), pixels="logistic")
    levels = (torch.arange(256).double() / 127.5 - 1).view(256, 1, 1, 1)
    assert float(torch.logsumexp(one.log_prob(levels), 0).detach()) == pytest.approx(0.0, abs=1e-4)
    assert one.support.check(levels).all()
    assert not one.support.check(levels[1:] - 1 / 255).any()


def test_a_net_with_other_outputs_than_channels_is_refused():
    net = PixelCNN(1, 2, features=2, width=8, kernel_sizes=(3,))
    images = AutoregressiveImages(net, torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="outputs=1"):
        images.log_prob(torch.zeros(1, 1, 3, 3))
