r"""Image data sets with intensities in [0, 1], and what binarisation means.

A grey image :math:`x \in [0, 1]^X` is not in the support of a Bernoulli likelihood. Three ways to read it:

* ``"none"``: the grey values themselves (for a continuous likelihood);
* ``"static"``: one draw :math:`b \sim \mathrm{Bernoulli}(x)` per image, made once from a seed and kept;
* ``"dynamic"``: a new draw for every mini-batch in training. The test set is drawn once, as in ``"static"``, so that
  a test number is one number.

They are three different data sets: a log-likelihood on one is not comparable with a log-likelihood on another, which
is why every :class:`ImageData` says which one it is (Salakhutdinov & Murray 2008 for static, Burda, Grosse &
Salakhutdinov 2015 for dynamic binarisation of MNIST).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyrovae.data._torchvision import torchvision_datasets
from pyrovae.errors import DataError

__all__ = ["BINARIZATIONS", "Binarization", "ImageData", "binarize", "load"]

Binarization = Literal["none", "static", "dynamic"]
BINARIZATIONS: tuple[Binarization, ...] = ("none", "static", "dynamic")
NAMES = ("digits", "mnist")


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """An image data set, split, flattened and (unless it says otherwise) binarised.

    Args:
        name: Name of the data set.
        train: Training images ``[N, X]``, float32 in [0, 1]. Grey for ``"none"`` and ``"dynamic"``.
        test: Test images ``[M, X]``, float32 in [0, 1]. Grey for ``"none"`` only.
        train_labels: Classes ``[N]``, int64, or None.
        test_labels: Classes ``[M]``, int64, or None.
        event_shape: Shape of one datum as the model sees it, ``(X,)``.
        image_shape: Shape of one datum as the eye sees it, such as ``(8, 8)``.
        binarization: ``"none"``, ``"static"`` or ``"dynamic"``.
        seed: Seed of the binarisation, None where there is none.
        split: How training and test set were separated, in words.
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

    def __repr__(self) -> str:
        return (
            f"ImageData({self.name!r}, train={len(self.train)}, test={len(self.test)}, "
            f"image_shape={self.image_shape}, binarization={self.binarization!r}, seed={self.seed})"
        )


def load(
    name: str | os.PathLike[str],
    *,
    binarization: Binarization = "static",
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
) -> ImageData:
    """Loads an image data set by name, or from an ``.npz`` file.

    The split never depends on ``seed``; ``seed`` is that of the binarisation only, and the test set is drawn from
    another seed derived from it. Images that are binary already stay as they are under every binarisation.

    Args:
        name: ``"digits"`` (8x8, 1,500 / 297, ships with scikit-learn), ``"mnist"`` (28x28, 60,000 / 10,000), or a path
            to an ``.npz`` file with ``train`` and ``test`` (or ``train_images`` and ``test_images``), each
            ``[N, ...]``, uint8 (divided by 255) or float in [0, 1], and optionally ``train_labels`` and
            ``test_labels``. A relative path is looked up as it is, then below ``root``.
        binarization: ``"static"``, ``"dynamic"`` (training images stay grey and ``transform`` draws each mini-batch;
            the test images are drawn once) or ``"none"``.
        seed: Seed of the binarisation.
        root: Folder that holds ``MNIST/raw``; the environment variable ``PYROVAE_DATA`` if not given. With
            ``PYROVAE_DOWNLOAD=1`` MNIST is downloaded into it when it is not there.

    Raises:
        ValueError: For an unknown name or binarisation.
        DataError: (A ValueError.) For images that are malformed; the sentence says where and how.
        FileNotFoundError: If the data are not on disk; says where they were looked for and how to get them.
    """
    if binarization not in BINARIZATIONS:
        raise ValueError(f"unknown binarization {binarization!r}: choose one of {', '.join(BINARIZATIONS)}")
    folder = _root(root)
    if str(name).endswith(".npz"):
        title, raw = Path(name).stem, _npz(Path(name), folder)
    elif name == "digits":
        title, raw = "digits", _digits()
    elif name == "mnist":
        title, raw = "mnist", _mnist(folder)
    else:
        raise ValueError(
            f"unknown data set {str(name)!r}: choose one of {', '.join(NAMES)}, or give the path of an .npz file"
        )

    train, test = _flatten(raw.train), _flatten(raw.test)
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
        seed=None if binarization == "none" else seed,
        split=raw.split,
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
    _check_range(x, "the images to binarise")
    return torch.bernoulli(x, generator=torch.Generator(device=x.device).manual_seed(seed))


@dataclass(frozen=True, eq=False)
class _Raw:
    """Grey images ``[N, *image_shape]`` as they were found."""

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    split: str


def _digits() -> _Raw:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # RandomState's stream is frozen across numpy versions, so the split is the same everywhere.
    order = np.random.RandomState(0).permutation(len(images))
    x = torch.from_numpy(images[order] / 16.0).float().reshape(-1, 8, 8)
    y = torch.from_numpy(labels[order]).long()
    split = "1500 train / 297 test by numpy.random.RandomState(0).permutation(1797)"
    return _Raw(x[:1500], x[1500:], y[:1500], y[1500:], split)


def _mnist(folder: Path | None) -> _Raw:
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    download = False
    if folder is None or not all((folder / "MNIST" / "raw" / stem).is_file() for stem in stems):
        download = os.environ.get("PYROVAE_DOWNLOAD") == "1"
        if folder is None or not download:
            where = "no folder was given" if folder is None else f"looked for {folder / 'MNIST' / 'raw'}/*-ubyte"
            raise FileNotFoundError(
                f"MNIST is not on disk ({where}): point root= or the environment variable PYROVAE_DATA at the folder "
                "that holds MNIST/raw, and set PYROVAE_DOWNLOAD=1 to have it downloaded there"
            )
    datasets = torchvision_datasets()
    train = datasets.MNIST(root=str(folder), train=True, download=download)
    test = datasets.MNIST(root=str(folder), train=False, download=download)
    return _Raw(train.data / 255.0, test.data / 255.0, train.targets.long(), test.targets.long(), "official")


def _npz(path: Path, folder: Path | None) -> _Raw:
    places = [path] if folder is None or path.is_absolute() else [path, folder / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        tried = " and ".join(str(place) for place in places)
        raise FileNotFoundError(f"no data file at {tried}: give the path of an existing .npz file")
    arrays: dict[str, np.ndarray] = {}
    try:
        with np.load(found, allow_pickle=False) as file:
            for part in ("train", "test"):
                key = next((key for key in (part, f"{part}_images") if key in file.files), None)
                if key is not None:
                    arrays[part] = file[key]
                if f"{part}_labels" in file.files:
                    arrays[f"{part}_labels"] = file[f"{part}_labels"]
    # numpy reports a damaged or pickled file in any of these ways
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise DataError(f"{found} is not a readable .npz file of plain arrays: {error}") from error
    for part in ("train", "test"):
        if part not in arrays:
            raise DataError(f"{found} has no array '{part}' or '{part}_images': save the images under one of them")

    images = {part: _images(arrays[part], f"'{part}' in {found}") for part in ("train", "test")}
    if images["train"].shape[1:] != images["test"].shape[1:]:
        shapes = f"{tuple(images['train'].shape[1:])} and {tuple(images['test'].shape[1:])}"
        raise DataError(f"training and test images in {found} have different shapes {shapes}: save equal ones")
    labels: dict[str, Tensor | None] = {"train": None, "test": None}
    for part in ("train", "test"):
        values = arrays.get(f"{part}_labels")
        if values is None:
            continue
        if values.shape != (len(images[part]),) or values.dtype.kind not in "iu":
            raise DataError(
                f"'{part}_labels' in {found} is {values.dtype} of shape {values.shape}: "
                f"save one integer for each of the {len(images[part])} images"
            )
        labels[part] = torch.from_numpy(values.astype(np.int64))
    return _Raw(images["train"], images["test"], labels["train"], labels["test"], f"as stored in {found.name}")


def _images(array: np.ndarray, what: str) -> Tensor:
    """uint8, bool or float ``[N, ...]`` to float32 in [0, 1]."""
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{what} has shape {array.shape}: give a non-empty array [N, ...] of images")
    if array.dtype == np.uint8:
        return torch.from_numpy(array).float() / 255.0
    if array.dtype.kind not in "fb":
        raise DataError(f"{what} is of type {array.dtype}: give uint8 (0 to 255) or float in [0, 1]")
    images = torch.from_numpy(array.astype(np.float32))
    _check_range(images, what)
    return images


def _check_range(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise DataError(f"NaN or infinite values in {what}: remove them, intensities must be finite")
    if x.numel() > 0 and (x.min() < 0 or x.max() > 1):
        raise DataError(f"values from {float(x.min()):g} to {float(x.max()):g} in {what}: rescale them to [0, 1]")


def _flatten(images: Tensor) -> Tensor:
    return images.float().reshape(len(images), prod(images.shape[1:])).contiguous()


def _derived_seed(seed: int) -> int:
    """A seed for the test set that no other ``seed`` uses for its training set (up to hash collisions)."""
    return int.from_bytes(hashlib.sha256(f"pyrovae test {seed}".encode()).digest()[:7], "big")


def _root(root: str | os.PathLike[str] | None) -> Path | None:
    named = root if root is not None else os.environ.get("PYROVAE_DATA")
    return Path(named) if named else None
