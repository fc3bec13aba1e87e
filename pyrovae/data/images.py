r"""Image data sets, and what binarisation means.

A grey image :math:`x \in [0, 1]^X` is not in the support of a Bernoulli likelihood. Three ways to read it:

* ``"none"``: the grey values themselves (for a continuous likelihood);
* ``"static"``: one draw :math:`b \sim \mathrm{Bernoulli}(x)` per image, made once from a seed and kept;
* ``"dynamic"``: a new draw for every mini-batch in training. The test set is drawn once, as in ``"static"``, so that
  a test number is one number.

They are three different data sets: a log-likelihood on one is not comparable with a log-likelihood on another, which
is why every :class:`ImageData` says which one it is (Salakhutdinov & Murray 2008 for static, Burda, Grosse &
Salakhutdinov 2015 for dynamic binarisation of MNIST). The same holds for the preprocessing of grey values, ``"logit"``
or ``"centred"``, of :mod:`pyrovae.data.preprocessing`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyrovae.data.preprocessing import PREPROCESSINGS, Preprocessing, from_logit, logit_log_det, pixel_mean, to_logit
from pyrovae.data.sources import check_range, read

__all__ = ["BINARIZATIONS", "Binarization", "ImageData", "binarize", "load"]

Binarization = Literal["none", "static", "dynamic"]
BINARIZATIONS: tuple[Binarization, ...] = ("none", "static", "dynamic")


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """An image data set, split, flattened and (unless it says otherwise) binarised.

    Args:
        name: Name of the data set.
        train: Training images ``[N, X]``, float32, in [0, 1] unless preprocessed. Grey for ``"none"`` and
            ``"dynamic"``.
        test: Test images ``[M, X]``, float32, in [0, 1] unless preprocessed. Grey for ``"none"`` only.
        train_labels: Classes ``[N]``, int64, or None.
        test_labels: Classes ``[M]``, int64, or None.
        event_shape: Shape of one datum as the model sees it, ``(X,)``.
        image_shape: Shape of one datum as the eye sees it, such as ``(8, 8)``.
        binarization: ``"none"``, ``"static"`` or ``"dynamic"``.
        seed: Seed of the binarisation or of the dequantisation, None where there is neither.
        split: How training and test set were separated, in words.
        preprocessing: ``"none"``, ``"logit"`` or ``"centred"``.
        mean: Training mean ``[X]`` that ``"centred"`` subtracted, else None.
        logit_lambda: The margin of ``"logit"``, else None.
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    event_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    binarization: Binarization
    seed: int | None
    split: str
    preprocessing: Preprocessing = "none"
    mean: Tensor | None = None
    logit_lambda: float | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the shapes and the bytes of the training and the test images."""
        digest = hashlib.sha256()
        for images in (self.train, self.test):
            digest.update(repr((tuple(images.shape), str(images.dtype))).encode())
            digest.update(images.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """What to do with each training mini-batch: a Bernoulli draw (torch's global generator), or None."""
        return torch.bernoulli if self.binarization == "dynamic" else None

    @cached_property
    def log_det(self) -> Tensor:
        """``[M]``, nats: what to add to the log-density of each test datum for one on intensities in [0, 1].

        Zero unless the preprocessing is ``"logit"``. A bound on the log-probability of the grey levels is a further
        ``X log L`` nats lower, with ``L`` grey levels (256 for 8-bit images, 17 for ``"digits"``).
        """
        if self.logit_lambda is None:
            return self.test.new_zeros(len(self.test))
        return logit_log_det(self.test, self.logit_lambda)

    def intensities(self, x: Tensor) -> Tensor:
        """Undoes the preprocessing, for pictures: ``[..., X]`` to ``[..., X]``.

        In [0, 1] for data (after ``"logit"``, with their dequantisation noise); a model's mean may lie outside.
        """
        if self.mean is not None:
            return x + self.mean.to(x)
        return x if self.logit_lambda is None else from_logit(x, self.logit_lambda)

    def split_validation(self, rows: int) -> tuple[ImageData, Tensor]:
        """Holds out the last ``rows`` training images, for `fit`'s ``validation``.

        They are drawn once where the binarisation is dynamic, as the test images are. The test set and, for
        ``"centred"``, the mean stay those of the whole training set, so that test numbers remain comparable in scale.

        Args:
            rows: Number of images to hold out.

        Returns:
            The data set with the remaining training images, and the held-out images ``[rows, X]``.

        Raises:
            ValueError: If no training or no validation image would be left.
        """
        if not 0 < rows < len(self.train):
            raise ValueError(f"cannot hold out {rows} of {len(self.train)} training images: keep at least one in each")
        held_out = self.train[-rows:]
        if self.binarization == "dynamic":
            held_out = binarize(held_out, _derived_seed(self.seed, "validation"))
        rest = replace(
            self,
            train=self.train[:-rows],
            train_labels=None if self.train_labels is None else self.train_labels[:-rows],
            split=f"{self.split}; last {rows} training images held out",
        )
        return rest, held_out

    def __repr__(self) -> str:
        preprocessing = "" if self.preprocessing == "none" else f"preprocessing={self.preprocessing!r}, "
        return (
            f"ImageData({self.name!r}, train={len(self.train)}, test={len(self.test)}, image_shape={self.image_shape}, "
            f"binarization={self.binarization!r}, {preprocessing}seed={self.seed})"
        )


def load(
    name: str | os.PathLike[str],
    *,
    binarization: Binarization = "static",
    preprocessing: Preprocessing = "none",
    logit_lambda: float = 0.05,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
) -> ImageData:
    """Loads an image data set by name, or from an ``.npz`` file.

    The split never depends on ``seed``; ``seed`` is that of the binarisation or the dequantisation only, and the test
    set is drawn from another seed derived from it. Images that are binary already stay as they are under every
    binarisation. Everything is read as it lies: nothing is written unless a download was asked for.

    Args:
        name: ``"digits"`` (8x8, 1,500 / 297, ships with scikit-learn), ``"mnist"`` and ``"fashion-mnist"`` (28x28,
            60,000 / 10,000; idx files, gzipped or not), ``"omniglot"`` (28x28, 24,345 / 8,115; labels are characters),
            ``"caltech-silhouettes"`` (28x28, binary, 4,100 / 2,307), ``"cifar10-subset"`` (32x32x3, 3,500 / 500), or a
            path to an ``.npz`` file with ``train`` and ``test`` (or ``train_images`` and ``test_images``), each
            ``[N, ...]``, uint8 (divided by 255) or float in [0, 1], and optionally ``train_labels`` and
            ``test_labels``. A relative path is looked up as it is, then below ``root``.
        binarization: ``"static"``, ``"dynamic"`` (training images stay grey and ``transform`` draws each mini-batch;
            the test images are drawn once) or ``"none"``.
        preprocessing: Of grey values, so with ``binarization="none"`` only: ``"logit"`` (dequantised once, then the
            logit of Papamakarios et al. 2017), ``"centred"`` (minus the mean training image) or ``"none"``.
        logit_lambda: Margin of the logit, in (0, 1/2); of no meaning for the others.
        seed: Seed of the binarisation or the dequantisation.
        root: Folder that holds ``MNIST/raw``, ``FashionMNIST/raw``, ``OMNIGLOT/omniglot_28x28.npz``,
            ``Caltech101Silhouettes/caltech101_silhouettes_28.npz``, ``CIFAR10/cifar10_first4000.npz``; the environment
            variable ``PYROVAE_DATA`` if not given. With ``PYROVAE_DOWNLOAD=1``, MNIST and Fashion-MNIST are downloaded
            into it when they are not there.

    Raises:
        ValueError: For an unknown name, binarisation or preprocessing, or two that do not go together.
        DataError: (A ValueError.) For images that are malformed; the sentence says where and how.
        FileNotFoundError: If the data are not on disk; says where they were looked for and how to get them.
    """
    if binarization not in BINARIZATIONS:
        raise ValueError(f"unknown binarization {binarization!r}: choose one of {', '.join(BINARIZATIONS)}")
    if preprocessing not in PREPROCESSINGS:
        raise ValueError(f"unknown preprocessing {preprocessing!r}: choose one of {', '.join(PREPROCESSINGS)}")
    if preprocessing != "none" and binarization != "none":
        raise ValueError(
            f"preprocessing {preprocessing!r} is for grey values, but binarization is {binarization!r}: "
            "pass binarization='none'"
        )
    if not 0 < logit_lambda < 0.5:
        raise ValueError(f"logit_lambda is {logit_lambda}: choose it between 0 and 1/2, 0.05 is usual")
    title, raw = read(name, _root(root))

    train, test, mean = _flatten(raw.train), _flatten(raw.test), None
    if preprocessing == "logit":
        parts = [(train, seed, "the training images"), (test, _derived_seed(seed), "the test images")]
        train, test = (
            to_logit(x, levels=raw.levels, logit_lambda=logit_lambda, seed=own, what=f"{what} of {title}")
            for x, own, what in parts
        )
    if preprocessing == "centred":
        mean = pixel_mean(train)
        train, test = train - mean, test - mean
    if binarization == "static":
        train = binarize(train, seed)
    if binarization != "none":
        test = binarize(test, _derived_seed(seed))
    return ImageData(
        name=title,
        train=train,
        test=test,
        train_labels=raw.train_labels,
        test_labels=raw.test_labels,
        event_shape=(train.shape[1],),
        image_shape=tuple(raw.train.shape[1:]),
        binarization=binarization,
        seed=None if binarization == "none" and preprocessing != "logit" else seed,
        split=raw.split,
        preprocessing=preprocessing,
        mean=mean,
        logit_lambda=logit_lambda if preprocessing == "logit" else None,
    )


def binarize(x: Tensor, seed: int) -> Tensor:
    """Draws ``Bernoulli(x)`` once, from a generator of its own (the global one is neither read nor moved).

    Args:
        x: Intensities in [0, 1], any shape.
        seed: Seed of the draw: the same seed gives the same images.

    Returns:
        Zeros and ones, of the shape and dtype of ``x``.

    Raises:
        DataError: If an intensity is outside [0, 1] or not finite.
    """
    check_range(x, "the images to binarise")
    return torch.bernoulli(x, generator=torch.Generator(device=x.device).manual_seed(seed))


def _flatten(images: Tensor) -> Tensor:
    return images.float().reshape(len(images), prod(images.shape[1:])).contiguous()


def _derived_seed(seed: int | None, part: str = "test") -> int:
    """A seed for another part that no other ``seed`` uses for its training set (up to hash collisions)."""
    return int.from_bytes(hashlib.sha256(f"pyrovae {part} {seed}".encode()).digest()[:7], "big")


def _root(root: str | os.PathLike[str] | None) -> Path | None:
    named = root if root is not None else os.environ.get("PYROVAE_DATA")
    return Path(named) if named else None
