"""The data of a run in the shape that its model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.data import ImageData, Sentences, Vocabulary
from pyrovae.errors import DataError
from pyrovae.fitting.recipes import DIFFUSION, GREY_MODELS, PIXEL_MODELS, Form

__all__ = ["COLOUR", "TEXTS", "Material", "gather"]

TEXTS = ("ptb", "snli", "yahoo")
COLOUR = ("cifar10-subset",)  # image sets by name whose pixels are not near black and white
_MOST_WORDS = 20_000
_HELD_OUT, _AT_MOST = 0.1, 5000  # share of the training data that early stopping looks at
_QUICK_WORDS = 2000
_QUICK = 2000  # training data of a quick run
_LEVELS = 255
_MAPS = 64  # that a pixel decoder holds for every pixel


@dataclass(frozen=True)
class Material:
    """What is trained on and judged by.

    Attributes:
        train, test: tensors `[N, *event]`, or sentences.
        validation: a part of the training data that is held out, or None.
        labels: classes of `test`, or None.
        form: what nets must fit.
        signed: pixels lie in [-1, 1], not in [0, 1].
        transform: of every training batch, or None.
        vocabulary: of sentences.
        origin: name, fingerprint, binarization and preprocessing, for a provenance.
        told: what a person should know about the split.
    """

    train: Any
    test: Any
    validation: Any
    labels: Tensor | None
    form: Form
    signed: bool
    transform: Callable[[Tensor], Tensor] | None
    vocabulary: Vocabulary | None
    origin: dict[str, Any]
    told: str

    @property
    def width(self) -> int:
        """Values that the largest layer of a decoder holds for one code."""
        if self.vocabulary is not None:
            return self.rows.shape[1] * len(self.vocabulary)
        return self.form.pixels * _MAPS if self.rows.dim() > 2 else self.form.pixels

    @property
    def rows(self) -> Tensor:
        """The test data as one tensor."""
        return cast(Tensor, getattr(self.test, "tokens", self.test))

    def planes(self, x: Tensor) -> Tensor:
        """Pictures `[K, C, H, W]`, in the range that screens have: a Gaussian's mean may pass it."""
        return x.reshape(-1, *self.form.image).clamp(-1.0 if self.signed else 0.0, 1.0)

    def to(self, device: str) -> Material:
        """The same on another device."""
        held_out = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=held_out)


def gather(settings: Any) -> Material:
    """Load, split and shape the data that `fitting.Settings` name.

    Raises:
        ValueError, FileNotFoundError: as `pyrovae.data.load` and `load_text` do.
        DataError: too few data to hold any out.
    """
    found = _text(settings) if settings.is_text else _images(settings)
    if len(found.test) < 2:
        raise DataError(f"{settings.data} has {len(found.test)} test data: at least 2 are needed for a standard error")
    return found.to(settings.device)


def _text(settings: Any) -> Material:
    text = datasets.load_text(settings.data, max_words=_QUICK_WORDS if settings.quick else _MOST_WORDS)
    train, held_out = text.train, text.valid[:_AT_MOST] if settings.held_out else None
    if settings.quick:
        train, held_out = train[:_QUICK], None if held_out is None else held_out[:_QUICK]
    return Material(
        train=train, test=_trimmed(text.test[: settings.num_data]), validation=held_out, labels=None,
        form=Form(vocabulary=len(text.vocabulary), longest=int(train.lengths.max()), likelihood="words"), signed=False,
        transform=None, vocabulary=text.vocabulary,
        origin={"data": text.name, "fingerprint": text.fingerprint, "binarization": "",
                "preprocessing": f"a vocabulary of {len(text.vocabulary)} words"}, told=text.split,
    )  # fmt: skip


def _trimmed(sentences: Sentences) -> Sentences:
    """Without columns that are padding in every row."""
    return Sentences(sentences.tokens[:, : int(sentences.lengths.max())], sentences.lengths)


def _images(settings: Any) -> Material:
    binarization = settings.binarization or (
        "none" if settings.model in GREY_MODELS or settings.data in COLOUR else "static"
    )
    images = datasets.load(settings.data, binarization=cast(Any, binarization), seed=settings.seed)
    fingerprint, held_out = images.fingerprint, None
    if settings.quick:
        images = replace(images, train=images.train[:_QUICK], train_labels=None)
    if settings.held_out:
        if len(images.train) < 4:
            raise DataError(f"{len(images.train)} training images leave none to hold out: leave --patience out")
        images, held_out = images.split_validation(min(_AT_MOST, max(2, round(_HELD_OUT * len(images.train)))))
    grey, pixelwise = binarization == "none", settings.model in PIXEL_MODELS
    likelihood = ("logistic" if pixelwise else "gaussian") if grey else "bernoulli"
    form = Form(image=_planes(images), likelihood=likelihood)
    centred = settings.model == DIFFUSION  # whose last step is a standard normal

    def shaped(x: Tensor) -> Tensor:
        if images.image_shape[-1] == 3 and len(images.image_shape) == 3:
            x = x.unflatten(1, images.image_shape).movedim(-1, 1).flatten(1)  # colours in front
        if grey and pixelwise:
            x = (x * _LEVELS).round() / (_LEVELS / 2) - 1
        if centred:
            x = 2 * x - 1
        return x.unflatten(1, form.image) if pixelwise else x

    labels = images.test_labels
    return Material(
        train=shaped(images.train), test=shaped(images.test[: settings.num_data]),
        validation=None if held_out is None else shaped(held_out),
        labels=None if labels is None else labels[: settings.num_data], form=form,
        signed=centred or (grey and pixelwise),
        transform=torch.bernoulli if binarization == "dynamic" else None, vocabulary=None,
        origin={"data": images.name, "fingerprint": fingerprint, "binarization": binarization,
                "preprocessing": "256 levels in [-1, 1]" if grey and pixelwise else "scaled to [-1, 1]" if centred
                else images.preprocessing},
        told=images.split,
    )  # fmt: skip


def _planes(images: ImageData) -> tuple[int, ...]:
    """(channels, height, width); what is no picture is a strip of one row."""
    shape = images.image_shape
    if len(shape) == 3:
        return (shape[2], *shape[:2]) if shape[2] == 3 else shape
    return (1, *shape) if len(shape) == 2 else (1, 1, images.event_shape[0])
