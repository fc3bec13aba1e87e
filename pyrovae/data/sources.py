"""Where images come from: one reader for each kind of file, all giving grey images in [0, 1].

The idx files of MNIST and Fashion-MNIST are read as they lie, gzipped or not; nothing is ever written into the data
folder unless a download was asked for. OMNIGLOT and the silhouettes are stored sorted by class; both parts of them are
put in one fixed random order, so that the first or the last thousand images are a fair sample.
"""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.data._torchvision import torchvision_datasets
from pyrovae.errors import DataError

__all__ = ["NAMES", "Raw", "check_range", "read"]


@dataclass(frozen=True, eq=False)
class Raw:
    """Grey images as they were found.

    Attributes:
        train, test: ``[N, *image_shape]``, float32 in [0, 1].
        train_labels, test_labels: ``[N]``, int64, or None.
        split: how the two were separated, in words.
        levels: number of grey levels.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    split: str
    levels: int = 256


@dataclass(frozen=True)
class _Stored:
    """A known ``.npz`` file below the data folder."""

    title: str
    file: str
    split: str
    levels: int = 256
    sorted_by_class: bool = False


# Folder and title of the sets in torchvision's layout; the folder is also the name of torchvision's class.
_IDX = {"mnist": ("MNIST", "MNIST"), "fashion-mnist": ("FashionMNIST", "Fashion-MNIST")}
_STORED = {
    "omniglot": _Stored(
        "OMNIGLOT", "OMNIGLOT/omniglot_28x28.npz",
        "a random split with the training size of, but not the members of, Burda et al. 2016's", sorted_by_class=True,
    ),
    "caltech-silhouettes": _Stored(
        "Caltech-101 Silhouettes", "Caltech101Silhouettes/caltech101_silhouettes_28.npz",
        "a random split with the sizes of, but not the members of, Marlin et al. 2010's split1; no validation part",
        levels=2, sorted_by_class=True,
    ),
    "cifar10-subset": _Stored(
        "The CIFAR-10 subset", "CIFAR10/cifar10_first4000.npz",
        "images 0 to 3499 / 3500 to 3999 of the official training set, not the official test set",
    ),
}  # fmt: skip
NAMES = ("digits", *_IDX, *_STORED)


def read(name: str | os.PathLike[str], folder: Path | None) -> tuple[str, Raw]:
    """Reads a data set by name, or an ``.npz`` file by path.

    Returns:
        The data set's name (of a file: its stem) and its images.

    Raises:
        ValueError: For an unknown name.
        DataError: For a file that is damaged or does not hold images.
        FileNotFoundError: If the data are not on disk.
    """
    if str(name).endswith(".npz"):
        return Path(name).stem, _npz_at(Path(name), folder)
    if name == "digits":
        return "digits", _digits()
    if name in _IDX:
        return str(name), _idx(*_IDX[str(name)], folder)
    if name in _STORED:
        return str(name), _stored(_STORED[str(name)], folder)
    raise ValueError(
        f"unknown data set {str(name)!r}: choose one of {', '.join(NAMES)}, or give the path of an .npz file"
    )


def check_range(x: Tensor, what: str) -> None:
    """Raises `DataError` for values that are no intensities in [0, 1]."""
    if not torch.isfinite(x).all():
        raise DataError(f"NaN or infinite values in {what}: remove them, intensities must be finite")
    if x.numel() > 0 and (x.min() < 0 or x.max() > 1):
        raise DataError(f"values from {float(x.min()):g} to {float(x.max()):g} in {what}: rescale them to [0, 1]")


def _digits() -> Raw:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # RandomState's stream is frozen across numpy versions, so the split is the same everywhere.
    order = np.random.RandomState(0).permutation(len(images))
    x = torch.from_numpy(images[order] / 16.0).float().reshape(-1, 8, 8)
    y = torch.from_numpy(labels[order]).long()
    split = "1500 train / 297 test by numpy.random.RandomState(0).permutation(1797)"
    return Raw(x[:1500], x[1500:], y[:1500], y[1500:], split, levels=17)


def _idx(directory: str, title: str, folder: Path | None) -> Raw:
    """The four files of torchvision's layout, each gzipped or not; downloaded when asked for."""
    stems = {
        f"{part}{kind}": f"{prefix}-{file}-ubyte"
        for part, prefix in (("train", "train"), ("test", "t10k"))
        for kind, file in (("", "images-idx3"), ("_labels", "labels-idx1"))
    }
    place = None if folder is None else folder / directory / "raw"
    found: dict[str, Path] = {}
    if place is not None:
        for key, stem in stems.items():
            file = next((file for file in (place / stem, place / f"{stem}.gz") if file.is_file()), None)
            if file is not None:
                found[key] = file
    if place is not None and len(found) == len(stems):
        arrays = {key: _idx_file(file, 1 if key.endswith("_labels") else 3) for key, file in found.items()}
        return _assemble(arrays, str(place), "official")
    if folder is None or os.environ.get("PYROVAE_DOWNLOAD") != "1":
        where = "no folder was given" if place is None else f"looked for {place}/*-ubyte and {place}/*-ubyte.gz"
        raise FileNotFoundError(
            f"{title} is not on disk ({where}): point root= or the environment variable PYROVAE_DATA at the folder "
            f"that holds {directory}/raw, and set PYROVAE_DOWNLOAD=1 to have it downloaded there"
        )
    kind = getattr(torchvision_datasets(), directory)
    train, test = (kind(root=str(folder), train=part, download=True) for part in (True, False))
    return Raw(train.data / 255.0, test.data / 255.0, train.targets.long(), test.targets.long(), "official")


def _idx_file(path: Path, ndim: int) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8, ``ndim``, the sizes as big-endian int32, then the values."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not a readable gzip file: {error}; get it again") from error
    start = 4 + 4 * ndim
    if len(data) < start or data[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(f"{path} is not an idx file of bytes with {ndim} dimension(s): get it again")
    shape = tuple(int(size) for size in np.frombuffer(data, ">i4", ndim, offset=4))
    if len(data) - start != prod(shape):
        raise DataError(f"{path} holds {len(data) - start} values but promises {shape}: get it again")
    return np.frombuffer(bytearray(data), np.uint8, offset=start).reshape(shape)  # a copy that may be written to


def _stored(known: _Stored, folder: Path | None) -> Raw:
    if folder is None or not (folder / known.file).is_file():
        where = "no folder was given" if folder is None else f"looked for {folder / known.file}"
        raise FileNotFoundError(
            f"{known.title} is not on disk ({where}): point root= or the environment variable PYROVAE_DATA at the "
            f"folder that holds {known.file}; it cannot be downloaded"
        )
    raw = _npz(folder / known.file)
    split = f"{len(raw.train)} train / {len(raw.test)} test, {known.split}"
    raw = replace(raw, split=split, levels=known.levels)
    return _shuffled(raw) if known.sorted_by_class else raw


def _shuffled(raw: Raw) -> Raw:
    """Training and test images each in a fixed random order, their labels with them."""
    first, second = (np.random.RandomState(0).permutation(len(part)) for part in (raw.train, raw.test))
    return replace(
        raw,
        train=raw.train[first],
        test=raw.test[second],
        train_labels=None if raw.train_labels is None else raw.train_labels[first],
        test_labels=None if raw.test_labels is None else raw.test_labels[second],
    )


def _npz_at(path: Path, folder: Path | None) -> Raw:
    places = [path] if folder is None or path.is_absolute() else [path, folder / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        tried = " and ".join(str(place) for place in places)
        raise FileNotFoundError(f"no data file at {tried}: give the path of an existing .npz file")
    return _npz(found)


def _npz(found: Path) -> Raw:
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
    return _assemble(arrays, str(found), f"as stored in {found.name}")


def _assemble(arrays: dict[str, np.ndarray], where: str, split: str) -> Raw:
    """Arrays ``train``, ``test`` and perhaps ``train_labels``, ``test_labels``, checked against each other."""
    images = {part: _images(arrays[part], f"'{part}' in {where}") for part in ("train", "test")}
    if images["train"].shape[1:] != images["test"].shape[1:]:
        shapes = f"{tuple(images['train'].shape[1:])} and {tuple(images['test'].shape[1:])}"
        raise DataError(f"training and test images in {where} have different shapes {shapes}: save equal ones")
    labels: dict[str, Tensor | None] = {"train": None, "test": None}
    for part in ("train", "test"):
        values = arrays.get(f"{part}_labels")
        if values is None:
            continue
        if values.shape != (len(images[part]),) or values.dtype.kind not in "iu":
            raise DataError(
                f"'{part}_labels' in {where} is {values.dtype} of shape {values.shape}: "
                f"save one integer for each of the {len(images[part])} images"
            )
        labels[part] = torch.from_numpy(values.astype(np.int64))
    levels = 2 if all(arrays[part].dtype == np.bool_ for part in ("train", "test")) else 256
    return Raw(images["train"], images["test"], labels["train"], labels["test"], split, levels)


def _images(array: np.ndarray, what: str) -> Tensor:
    """uint8, bool or float ``[N, ...]`` to float32 in [0, 1]."""
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{what} has shape {array.shape}: give a non-empty array [N, ...] of images")
    if array.dtype == np.uint8:
        return torch.from_numpy(array).float() / 255.0
    if array.dtype.kind not in "fb":
        raise DataError(f"{what} is of type {array.dtype}: give uint8 (0 to 255) or float in [0, 1]")
    images = torch.from_numpy(array.astype(np.float32))
    check_range(images, what)
    return images
