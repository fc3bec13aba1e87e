"""The models of `pyrovae fit`, their nets sized to the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast

from torch import nn

from pyrovae import models
from pyrovae.comparison.recipes import hidden_width
from pyrovae.errors import DataError
from pyrovae.nets import MLP, LadderDecoder, LadderEncoder, LinearHeadDecoder, LSTMDecoder, LSTMEncoder, PixelCNN
from pyrovae.runtime import seeded

__all__ = [
    "LADDERS", "LANGUAGE_MODEL", "MODELS", "NUM_CLUSTERS", "PIXEL_MODELS", "TEXT_MODELS", "Form", "build_model",
    "encoder_of",
]  # fmt: skip

LANGUAGE_MODEL = "language-model"
LADDERS = ("ladder", "vlac")
PIXEL_MODELS = ("pixelcnn", "lossy")  # their likelihood takes pixels one after another
TEXT_MODELS = ("text", LANGUAGE_MODEL)
NUM_CLUSTERS = 10  # of every group of a VLAC
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


def _vae(form: Form, dim: int, classes: str) -> nn.Module:
    width = hidden_width(form.pixels)
    return models.VAE(LinearHeadDecoder(dim, [width, width], (form.pixels,)), dim, cast(Any, form.likelihood))


def _ppca(form: Form, dim: int, classes: str) -> nn.Module:
    weight = nn.init.normal_(nn.Linear(dim, form.pixels).weight.detach(), std=0.1)
    return models.PPCA(weight, noise=0.3)


def _ladder_decoder(form: Form, dim: int) -> tuple[LadderDecoder, list[int]]:
    # Small images have no room for three depths.
    sizes = [dim] * (2 if form.small else 3)
    return LadderDecoder(sizes, (form.pixels,), hidden_width(form.pixels)), sizes


def _ladder(form: Form, dim: int, classes: str) -> nn.Module:
    return models.LadderVAE(*_ladder_decoder(form, dim), cast(Any, form.likelihood))


def _vlac(form: Form, dim: int, classes: str) -> nn.Module:
    decoder, sizes = _ladder_decoder(form, dim)
    return models.VLAC(
        decoder, sizes, [NUM_CLUSTERS] * len(sizes), cast(Any, form.likelihood), classes=cast(Any, classes)
    )


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


def _pixelcnn(form: Form, dim: int, classes: str) -> nn.Module:
    features, pixels, outputs = _pixel_parts(form, dim)
    sizes = (3, 3, 3) if form.small else (5, 5, 3, 3)
    net = PixelCNN(form.image[0], outputs, _FEATURES, width=16 if form.small else 24, kernel_sizes=sizes)
    return models.PixelCNNVAE(features, net, dim, channels=form.image[0], pixels=pixels)


def _lossy(form: Form, dim: int, classes: str) -> nn.Module:
    features, pixels, outputs = _pixel_parts(form, dim)
    return models.LossyVAE(
        features, dim, num_features=_FEATURES, channels=form.image[0], pixels=pixels, outputs=outputs,
        width=16 if form.small else 32,
    )  # fmt: skip


def _text(form: Form, dim: int, classes: str) -> nn.Module:
    decoder = LSTMDecoder(form.vocabulary, dim, embedding=64, hidden=128)
    return models.TextVAE(decoder, dim, max_length=min(form.longest, _LONGEST))


def _language_model(form: Form, dim: int, classes: str) -> nn.Module:
    return models.LanguageModel(LSTMDecoder(form.vocabulary, 0, embedding=64, hidden=128),
                                max_length=min(form.longest, _LONGEST))  # fmt: skip


MODELS: dict[str, Callable[[Form, int, str], nn.Module]] = {
    "vae": _vae, "ppca": _ppca, "ladder": _ladder, "vlac": _vlac, "pixelcnn": _pixelcnn, "lossy": _lossy,
    "text": _text, LANGUAGE_MODEL: _language_model,
}  # fmt: skip


def default_dim(name: str, form: Form) -> int:
    """Latents per datum, of ladders per group, where nobody asked for a number."""
    if name in LADDERS:
        return 4
    return 8 if form.image and form.small else 16


def build_model(
    name: str, form: Form, *, latent_dim: int | None = None, classes: str = "collapsed", seed: int = 0,
    device: str = "cpu",
) -> Any:  # fmt: skip
    """A model by name; the same weights for the same seed.

    Raises:
        DataError: images that this model cannot make.
        ValueError: too few latents for it.
    """
    with seeded(seed):
        found = MODELS[name](form, latent_dim or default_dim(name, form), classes)
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
