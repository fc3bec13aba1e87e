"""The models of `pyrovae fit`, their nets sized to the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pyrovae import models
from pyrovae.comparison.recipes import hidden_width
from pyrovae.errors import DataError
from pyrovae.nets import (
    MLP,
    ChartMLP,
    LadderDecoder,
    LadderEncoder,
    LinearHeadDecoder,
    LSTMDecoder,
    LSTMEncoder,
    PixelCNN,
    TimeMLP,
)
from pyrovae.runtime import seeded

__all__ = [
    "CHARTS", "DIFFUSION", "GREY_MODELS", "LADDERS", "LANGUAGE_MODEL", "MANIFOLDS", "MODELS", "NUM_CLUSTERS",
    "PIECEWISE", "PIXEL_MODELS", "PLAIN", "TEXT_MODELS", "TILTED", "Form", "Variant", "build_model", "encoder_of",
]  # fmt: skip

LANGUAGE_MODEL = "language-model"
CHARTS, DIFFUSION, PIECEWISE = "charts", "diffusion", "piecewise-affine"
TILTED = ("energy-prior", "joint-energy", "hierarchical-energy")
LADDERS = ("ladder", "vlac", "joint-energy", "hierarchical", "hierarchical-energy")  # latents in several groups
GREY_MODELS = ("ppca", PIECEWISE, CHARTS, DIFFUSION)  # a Gaussian of grey values
PIXEL_MODELS = ("pixelcnn", "lossy")  # their likelihood takes pixels one after another
TEXT_MODELS = ("text", LANGUAGE_MODEL)
MANIFOLDS = ("plane", "torus", "sphere")
NUM_CLUSTERS = 10  # of every group of a VLAC
_NUM_CHARTS, _CHART_WIDTH, _CHART_FEATURES = 10, 32, 16
_UNITS = {1: 32, 2: 8}  # hidden ones by latents: 33 intervals or some 40 polygons, each an integral for every datum
_ENERGY_WIDTH = 64
_STEPS, _BETAS, _AVERAGE = 100, (1e-3, 0.2), 0.999  # of a diffusion: a tenth of the usual steps, ten times as large
_SMALL = 256  # pixels
_FEATURES = 4  # maps that a code becomes before a pixel decoder
_COMPONENTS = 5  # of a mixture of discretised logistics
_LONGEST = 60  # words of a generated sentence, at most


@dataclass(frozen=True)
class Form:
    """What nets must fit.

    Attributes:
        image: (channels, height, width) as the eye sees a datum; of sentences empty.
        vocabulary: number of words; of images 0.
        longest: words and end of the longest training sentence.
        likelihood: "bernoulli", "gaussian", "logistic" (256 levels in [-1, 1]) or "words".
    """

    image: tuple[int, ...] = ()
    vocabulary: int = 0
    longest: int = 0
    likelihood: str = "bernoulli"

    @property
    def pixels(self) -> int:
        """Values of one image."""
        return prod(self.image)

    @property
    def small(self) -> bool:
        """Whether one thread and narrow nets do."""
        return self.pixels <= _SMALL


@dataclass(frozen=True)
class Variant:
    """What some models come in.

    Attributes:
        classes: of a VLAC, "collapsed" or "enumerated".
        manifold: of a VAE's latents, one of `MANIFOLDS`.
    """

    classes: Literal["collapsed", "enumerated"] = "collapsed"
    manifold: Literal["plane", "torus", "sphere"] = "plane"


PLAIN = Variant()  # what is built where nobody asked for another


def _decoder(form: Form, dim: int) -> LinearHeadDecoder:
    width = hidden_width(form.pixels)
    return LinearHeadDecoder(dim, [width, width], (form.pixels,))


def _energy(dim: int) -> nn.Module:
    return MLP([dim, _ENERGY_WIDTH, _ENERGY_WIDTH, 1], nn.LeakyReLU)


def _vae(form: Form, dim: int, variant: Variant) -> nn.Module:
    return models.VAE(_decoder(form, dim), dim, cast(Any, form.likelihood), manifold=variant.manifold)


def _energy_prior(form: Form, dim: int, variant: Variant) -> nn.Module:
    return models.EnergyPriorVAE(_decoder(form, dim), dim, _energy(dim), cast(Any, form.likelihood))


def _ppca(form: Form, dim: int, variant: Variant) -> nn.Module:
    weight = nn.init.normal_(nn.Linear(dim, form.pixels).weight.detach(), std=0.1)
    return models.PPCA(weight, noise=0.3)


def _piecewise_affine(form: Form, dim: int, variant: Variant) -> nn.Module:
    return models.PiecewiseAffineVAE([dim, _UNITS[dim], form.pixels], noise=0.3)


def _sizes(form: Form, dim: int) -> list[int]:
    # Small images have no room for three depths.
    return [dim] * (2 if form.small else 3)


def _ladder_decoder(form: Form, dim: int) -> tuple[LadderDecoder, list[int]]:
    sizes = _sizes(form, dim)
    return LadderDecoder(sizes, (form.pixels,), hidden_width(form.pixels)), sizes


def _ladder(form: Form, dim: int, variant: Variant) -> nn.Module:
    return models.LadderVAE(*_ladder_decoder(form, dim), cast(Any, form.likelihood))


def _joint_energy(form: Form, dim: int, variant: Variant) -> nn.Module:
    decoder, sizes = _ladder_decoder(form, dim)
    return models.JointEnergyPrior(decoder, sizes, _energy(sum(sizes)), cast(Any, form.likelihood))


class _Conditional(nn.Module):
    """(mu, log s) of a layer given the one above, |log s| < 2: under an energy a scale that explodes in the layer above
    sends the prior's chain to infinity."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.net = MLP(sizes)

    def forward(self, above: Tensor) -> Tensor:
        loc, raw = self.net(above).chunk(2, -1)
        return torch.cat([loc, 2 * torch.tanh(raw / 2)], -1)


def _conditionals(form: Form, sizes: list[int]) -> list[nn.Module]:
    width = hidden_width(form.pixels)
    return [_Conditional([above, width, 2 * below]) for below, above in itertools.pairwise(sizes)]


def _hierarchical(form: Form, dim: int, variant: Variant) -> nn.Module:
    sizes = _sizes(form, dim)
    return models.HierarchicalVAE(_decoder(form, dim), sizes, _conditionals(form, sizes), cast(Any, form.likelihood))


def _hierarchical_energy(form: Form, dim: int, variant: Variant) -> nn.Module:
    sizes = _sizes(form, dim)
    return models.HierarchicalEnergyPrior(
        _decoder(form, dim), sizes, _conditionals(form, sizes), [_energy(size) for size in sizes],
        cast(Any, form.likelihood),
    )  # fmt: skip


def _vlac(form: Form, dim: int, variant: Variant) -> nn.Module:
    decoder, sizes = _ladder_decoder(form, dim)
    return models.VLAC(
        decoder, sizes, [NUM_CLUSTERS] * len(sizes), cast(Any, form.likelihood), classes=variant.classes
    )


def _charts(form: Form, dim: int, variant: Variant) -> nn.Module:
    maps = ChartMLP(_NUM_CHARTS, [dim, _CHART_WIDTH, _CHART_FEATURES])
    return models.ChartAutoencoder(maps, MLP([_CHART_FEATURES, hidden_width(form.pixels), form.pixels]))


def _diffusion(form: Form, dim: int, variant: Variant) -> nn.Module:
    width = 2 * hidden_width(form.pixels)
    net = TimeMLP((form.pixels,), hidden=(width, width))
    return models.Diffusion(net, (form.pixels,), _STEPS, betas=_BETAS, average=_AVERAGE)


def _pixel_parts(form: Form, dim: int) -> tuple[nn.Module, Literal["bernoulli", "logistic"], int]:
    """Feature maps of a code, the law of the pixels, and its parameters for each."""
    channels, *sides = form.image
    if channels not in (1, 3):
        raise DataError(f"a pixel decoder takes 1 or 3 channels, these images have {channels}: pass --model vae")
    width = hidden_width(form.pixels)
    features = LinearHeadDecoder(dim, [width], (_FEATURES, *sides))
    if form.likelihood == "logistic":
        return features, "logistic", _COMPONENTS * (10 if channels == 3 else 3)
    return features, "bernoulli", channels


def _pixelcnn(form: Form, dim: int, variant: Variant) -> nn.Module:
    features, pixels, outputs = _pixel_parts(form, dim)
    sizes = (3, 3, 3) if form.small else (5, 5, 3, 3)
    net = PixelCNN(form.image[0], outputs, _FEATURES, width=16 if form.small else 24, kernel_sizes=sizes)
    return models.PixelCNNVAE(features, net, dim, channels=form.image[0], pixels=pixels)


def _lossy(form: Form, dim: int, variant: Variant) -> nn.Module:
    features, pixels, outputs = _pixel_parts(form, dim)
    return models.LossyVAE(
        features, dim, num_features=_FEATURES, channels=form.image[0], pixels=pixels, outputs=outputs,
        width=16 if form.small else 32,
    )  # fmt: skip


def _text(form: Form, dim: int, variant: Variant) -> nn.Module:
    decoder = LSTMDecoder(form.vocabulary, dim, embedding=64, hidden=128)
    return models.TextVAE(decoder, dim, max_length=min(form.longest, _LONGEST))


def _language_model(form: Form, dim: int, variant: Variant) -> nn.Module:
    return models.LanguageModel(LSTMDecoder(form.vocabulary, 0, embedding=64, hidden=128),
                                max_length=min(form.longest, _LONGEST))  # fmt: skip


MODELS: dict[str, Callable[[Form, int, Variant], nn.Module]] = {
    "vae": _vae, "ppca": _ppca, PIECEWISE: _piecewise_affine, "energy-prior": _energy_prior, "ladder": _ladder,
    "joint-energy": _joint_energy, "hierarchical": _hierarchical, "hierarchical-energy": _hierarchical_energy,
    "vlac": _vlac, "pixelcnn": _pixelcnn, "lossy": _lossy, CHARTS: _charts, DIFFUSION: _diffusion, "text": _text,
    LANGUAGE_MODEL: _language_model,
}  # fmt: skip


def default_dim(name: str, form: Form) -> int:
    """Latents per datum, of ladders per group, where nobody asked for a number."""
    if name in LADDERS:
        return 4
    if name in (PIECEWISE, CHARTS):
        return 2
    return 8 if form.image and form.small else 16


def build_model(
    name: str, form: Form, *, latent_dim: int | None = None, variant: Variant = PLAIN, seed: int = 0,
    device: str = "cpu",
) -> Any:  # fmt: skip
    """A model by name; the same weights for the same seed.

    Raises:
        DataError: images that this model cannot make.
        ValueError: too few latents for it.
    """
    with seeded(seed):
        found = MODELS[name](form, latent_dim or default_dim(name, form), variant)
    return found.to(device)


def encoder_of(model: Any, form: Form) -> Callable[[int], nn.Module]:
    """What makes an encoder with so many outputs; a ladder's, of one diagonal normal, reads each group at its depth."""
    sizes = getattr(model, "sizes", None)

    def net(outputs: int) -> nn.Module:
        if form.vocabulary:
            return LSTMEncoder(form.vocabulary, outputs, embedding=64, hidden=128)
        width = hidden_width(form.pixels)
        if sizes is not None and outputs == 2 * sum(sizes):
            return LadderEncoder(sizes, (form.pixels,), width)
        return MLP([form.pixels, width, width, outputs])

    return net
