"""What reads the files: idx files gzipped or not, the stored archives, their errors, and an untouched data folder."""

import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyrovae.data import ImageData, load
from pyrovae.data._torchvision import torchvision_datasets
from pyrovae.data.sources import NAMES

DATA = os.environ.get("PYROVAE_DATA")
STORED = {
    "omniglot": "OMNIGLOT/omniglot_28x28.npz",
    "caltech-silhouettes": "Caltech101Silhouettes/caltech101_silhouettes_28.npz",
    "cifar10-subset": "CIFAR10/cifar10_first4000.npz",
}
IDX = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def needs(file: str) -> pytest.MarkDecorator:
    there = DATA is not None and (Path(DATA) / file).is_file()
    return pytest.mark.skipif(not there, reason=f"PYROVAE_DATA does not name a folder with {file}")


def _bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def _small(seed: int = 0) -> dict[str, np.ndarray]:
    """The four arrays of a tiny data set under their idx names."""
    random = np.random.RandomState(seed)
    return {
        "train-images-idx3-ubyte": random.randint(0, 256, (11, 4, 5)).astype(np.uint8),
        "train-labels-idx1-ubyte": random.randint(0, 10, 11).astype(np.uint8),
        "t10k-images-idx3-ubyte": random.randint(0, 256, (3, 4, 5)).astype(np.uint8),
        "t10k-labels-idx1-ubyte": random.randint(0, 10, 3).astype(np.uint8),
    }


def _write(root: Path, directory: str, zipped: set[str], arrays: dict[str, np.ndarray] | None = None) -> Path:
    folder = root / directory / "raw"
    folder.mkdir(parents=True)
    for stem, array in (arrays or _small()).items():
        if stem in zipped:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(_bytes(array)))
        else:
            (folder / stem).write_bytes(_bytes(array))
    return folder


def _listing(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here downloads, and none leaves anything in the real data folder."""
    monkeypatch.delenv("PYROVAE_DOWNLOAD", raising=False)
    before = _listing(Path(DATA)) if DATA else {}
    yield
    assert (_listing(Path(DATA)) if DATA else {}) == before


@pytest.mark.parametrize(("name", "directory"), IDX.items())
@pytest.mark.parametrize("zipped", [set(), set(_small()), {"train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"}])
def test_idx_files_are_read_as_they_lie(tmp_path: Path, name: str, directory: str, zipped: set[str]) -> None:
    arrays = _small()
    _write(tmp_path, directory, zipped)
    before = _listing(tmp_path)
    data = load(name, binarization="none", root=tmp_path)
    assert _listing(tmp_path) == before
    assert (data.name, data.split, data.image_shape, data.event_shape) == (name, "official", (4, 5), (20,))
    assert data.train.dtype == data.test.dtype == torch.float32
    # k / 255 to float32's rounding
    for part, prefix in ((data.train, "train"), (data.test, "t10k")):
        expected = arrays[f"{prefix}-images-idx3-ubyte"].reshape(len(part), 20) / 255
        np.testing.assert_allclose(part.numpy(), expected, rtol=2**-23, atol=0)
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert data.train_labels.dtype == torch.int64
    assert data.train_labels.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    assert data.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    data.train[0, 0] = 0.5  # memory of its own, not a read-only view of the file


def test_a_decompressed_file_goes_before_its_archive(tmp_path: Path) -> None:
    folder = _write(tmp_path, "FashionMNIST", set(_small()))
    other = _small(seed=1)
    for stem, array in other.items():
        (folder / stem).write_bytes(_bytes(array))
    data = load("fashion-mnist", binarization="none", root=tmp_path)
    np.testing.assert_allclose(data.test.numpy(), other["t10k-images-idx3-ubyte"].reshape(3, 20) / 255, atol=1e-7)


def test_files_at_hand_are_never_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def door() -> None:
        raise AssertionError("torchvision was asked for")

    monkeypatch.setattr("pyrovae.data.sources.torchvision_datasets", door)
    monkeypatch.setenv("PYROVAE_DOWNLOAD", "1")
    folder = _write(tmp_path, "FashionMNIST", set(_small()))
    assert len(load("fashion-mnist", root=tmp_path).train) == 11
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(AssertionError, match="torchvision was asked for"):
        load("fashion-mnist", root=tmp_path)


def test_a_download_of_fashion_mnist_asks_for_its_own_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Fake:
        data, targets = torch.full((2, 28, 28), 51, dtype=torch.uint8), torch.tensor([1, 2])

        def __init__(self, root: str, train: bool, download: bool) -> None:
            calls.append((root, train, download))

    fakes = type("datasets", (), {"FashionMNIST": Fake})
    monkeypatch.setattr("pyrovae.data.sources.torchvision_datasets", lambda: fakes)
    monkeypatch.setenv("PYROVAE_DOWNLOAD", "1")
    data = load("fashion-mnist", root=tmp_path, binarization="none")
    assert float(data.test.max()) == pytest.approx(51 / 255, rel=1e-6)
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]


def test_missing_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    how = r"PYROVAE_DATA at the folder that holds FashionMNIST/raw, and set PYROVAE_DOWNLOAD=1"
    with pytest.raises(FileNotFoundError, match=f"Fashion-MNIST is not on disk .no folder was given.: .*{how}"):
        load("fashion-mnist")
    folder = _write(tmp_path, "FashionMNIST", set(_small()))
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    where = re.escape(f"looked for {folder}/*-ubyte and {folder}/*-ubyte.gz")
    with pytest.raises(FileNotFoundError, match=f"{where}.*{how}"):
        load("fashion-mnist", root=tmp_path)


GOOD = _bytes(_small()["t10k-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t10k-images-idx3-ubyte", b"", r"is not an idx file of bytes with 3 dimension\(s\)"),
        ("t10k-images-idx3-ubyte", GOOD[:10], r"is not an idx file of bytes with 3 dimension\(s\)"),
        ("t10k-images-idx3-ubyte", b"\x00\x00\x0d" + GOOD[3:], r"is not an idx file of bytes"),  # 0x0d is float
        ("t10k-labels-idx1-ubyte", GOOD, r"is not an idx file of bytes with 1 dimension\(s\)"),
        ("t10k-images-idx3-ubyte", GOOD[:-1], r"holds 59 values but promises \(3, 4, 5\)"),
        ("t10k-images-idx3-ubyte", GOOD + b"\x00", r"holds 61 values but promises \(3, 4, 5\)"),
        ("t10k-images-idx3-ubyte.gz", GOOD, "ubyte.gz is not a readable gzip file: Not a gzipped file"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(GOOD)[:-12], "ubyte.gz is not a readable gzip file"),
        ("t10k-labels-idx1-ubyte", _bytes(np.zeros(4, np.uint8)), r"'test_labels' in .*raw .* the 3 images"),
        ("t10k-images-idx3-ubyte", _bytes(np.zeros((3, 5, 4), np.uint8)), r"different shapes \(4, 5\) and \(5, 4\)"),
        ("t10k-images-idx3-ubyte", _bytes(np.zeros((0, 4, 5), np.uint8)), r"'test' in .*raw has shape \(0, 4, 5\)"),
    ],
    ids=["empty", "cut header", "floats", "images as labels", "one short", "one more", "not zipped", "cut zip",
         "labels", "transposed", "no images"],
)  # fmt: skip
def test_damaged_idx_files(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    folder = _write(tmp_path, "MNIST", set())
    (folder / file.removesuffix(".gz")).unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("mnist", root=tmp_path)


def test_a_broken_gzip_stream(tmp_path: Path) -> None:
    folder = _write(tmp_path, "MNIST", set(_small()))
    file = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[10] = 0xFF  # a block type that does not exist
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not a readable gzip file: .*get it again"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize(("name", "file"), STORED.items())
def test_missing_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str) -> None:
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=f"not on disk .no folder was given.: .*holds {file}; it cannot be"):
        load(name)
    with pytest.raises(FileNotFoundError, match=f"not on disk .looked for {tmp_path}/{file}.: point root= or"):
        load(name, root=tmp_path)


def _archive(root: Path, name: str, **arrays: Any) -> np.ndarray:
    """A stored set of 30 + 20 images; its first pixel is its label."""
    path = root / STORED[name]
    path.parent.mkdir()
    images = np.random.RandomState(0).randint(0, 256, (50, 3, 3)).astype(np.uint8)
    images[:, 0, 0] = np.arange(50)
    labels = np.arange(50, dtype=np.uint16)
    np.savez(path, **{
        "train_images": images[:30], "test_images": images[30:], "train_labels": labels[:30],
        "test_labels": labels[30:], "alphabet_names": np.array(["Greek"]), **arrays,
    })  # fmt: skip
    return images


@pytest.mark.parametrize("name", STORED)
def test_archives_keep_every_image_with_its_label(tmp_path: Path, name: str) -> None:
    images = _archive(tmp_path, name)
    data = load(name, binarization="none", root=tmp_path)
    assert (data.name, data.image_shape, data.train.dtype) == (name, (3, 3), torch.float32)
    parts = [(data.train, data.train_labels, images[:30]), (data.test, data.test_labels, images[30:])]
    for part, labels, expected in parts:
        assert labels is not None
        assert labels.dtype == torch.int64
        got = (part * 255).round()
        assert torch.equal(got[:, 0], labels.float())  # every label is its image's own
        np.testing.assert_array_equal(got[labels.argsort()].numpy(), expected.reshape(-1, 9))
        in_order = labels.tolist() == sorted(labels.tolist())
        assert in_order == (name == "cifar10-subset")  # the others are stored class by class
    again = load(name, binarization="none", seed=7, root=tmp_path)
    assert again.fingerprint == data.fingerprint


def test_a_malformed_archive(tmp_path: Path) -> None:
    _archive(tmp_path, "omniglot", test_labels=np.arange(3))
    with pytest.raises(ValueError, match=r"'test_labels' in .*omniglot_28x28\.npz is int64 of shape \(3,\)"):
        load("omniglot", root=tmp_path)


def test_splits_say_what_they_are(tmp_path: Path) -> None:
    for name in STORED:
        _archive(tmp_path, name)
    split = {name: load(name, root=tmp_path).split for name in STORED}
    assert all(sentence.startswith("30 train / 20 test, ") for name, sentence in split.items() if "cifar" not in name)
    assert "a random split with the training size of, but not the members of, Burda et al. 2016's" in split["omniglot"]
    assert "a random split with the sizes of, but not the members of, Marlin" in split["caltech-silhouettes"]
    assert "not the official test set" in split["cifar10-subset"]


def test_names() -> None:
    assert set(NAMES) == {"digits", *IDX, *STORED}


@needs("FashionMNIST/raw/train-images-idx3-ubyte.gz")
def test_fashion_mnist() -> None:
    data = load("fashion-mnist", binarization="none", root=DATA)
    assert data.train.shape == (60_000, 784)
    assert data.test.shape == (10_000, 784)
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert data.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert data.test_labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    assert float(data.train.mean()) == pytest.approx(0.2860, abs=5e-5)  # the well-known mean and standard deviation
    assert float(data.train.std()) == pytest.approx(0.3530, abs=5e-5)


@needs("MNIST/raw/train-images-idx3-ubyte")
def test_mnist_is_what_torchvision_reads() -> None:
    data = load("mnist", binarization="none", root=DATA)
    for part, images, labels in ((True, data.train, data.train_labels), (False, data.test, data.test_labels)):
        theirs = torchvision_datasets().MNIST(root=DATA, train=part, download=False)
        assert torch.equal(images, (theirs.data / 255.0).flatten(1))
        assert labels is not None
        assert torch.equal(labels, theirs.targets)


@needs(STORED["omniglot"])
def test_omniglot() -> None:
    data = load("omniglot", root=DATA)
    grey = load("omniglot", binarization="none", root=DATA)
    assert grey.train.shape == (24_345, 784)
    assert grey.test.shape == (8_115, 784)
    assert data.train_labels is not None
    assert data.test_labels is not None
    both = torch.cat([data.train_labels, data.test_labels])
    assert torch.bincount(both).tolist() == [20] * 1623  # twenty drawings of every character
    assert float(torch.cat([grey.train, grey.test]).mean()) == pytest.approx(0.083, abs=5e-4)
    # The last thousand rows are a fair sample: their mean label is that of all, within 4 standard errors of the mean of
    # 1,000 drawn without replacement.
    labels = data.train_labels.double()
    error = float(labels.std()) * ((1 - 1000 / 24_345) / 1000) ** 0.5
    assert abs(float(labels[-1000:].mean() - labels.mean())) < 4 * error
    assert data.split.startswith("24345 train / 8115 test, a random split")
    # 19 million independent pixels: the mean's standard error is below 0.5 / sqrt(19e6).
    assert abs(float(data.train.mean() - grey.train.mean())) < 4 * 0.5 / grey.train.numel() ** 0.5 + 1e-6


@needs(STORED["caltech-silhouettes"])
@pytest.mark.parametrize("binarization", ["none", "static", "dynamic"])
def test_silhouettes_are_binary(binarization: Any) -> None:
    data: ImageData = load("caltech-silhouettes", binarization=binarization, root=DATA)
    assert data.train.shape == (4_100, 784)
    assert data.test.shape == (2_307, 784)
    assert all(bool(((x == 0) | (x == 1)).all()) for x in (data.train, data.test))
    assert data.train_labels is not None
    assert len(data.train_labels.unique()) == 101


@needs(STORED["cifar10-subset"])
def test_cifar10_subset() -> None:
    data = load("cifar10-subset", binarization="none", root=DATA)
    assert (data.train.shape, data.test.shape, data.image_shape) == ((3500, 3072), (500, 3072), (32, 32, 3))
    assert data.train_labels is not None
    assert data.train_labels[:5].tolist() == [6, 9, 9, 4, 1]  # the official order
