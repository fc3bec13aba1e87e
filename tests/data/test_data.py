"""Data sets: what is in them, what binarisation does, and that nothing malformed gets in."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyrovae.data import BINARIZATIONS, ImageData, binarize, load
from pyrovae.data._torchvision import torchvision_datasets

MNIST_FILE = Path("MNIST", "raw", "train-images-idx3-ubyte")
DATA = os.environ.get("PYROVAE_DATA")
needs_mnist = pytest.mark.skipif(
    not DATA or not (Path(DATA) / MNIST_FILE).is_file(), reason="PYROVAE_DATA does not name a folder with MNIST/raw"
)


def _binary(x: torch.Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def _grey(n: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    values = np.random.RandomState(0).randint(0, 256, size=(n, *shape))
    return values.astype(np.uint8) if dtype is np.uint8 else (values / 255).astype(dtype)


def test_digits() -> None:
    data = load("digits", binarization="none")
    assert data.train.shape == (1500, 64)
    assert data.test.shape == (297, 64)
    assert data.train.dtype == data.test.dtype == torch.float32
    assert data.event_shape == (64,)
    assert data.image_shape == (8, 8)
    assert (data.binarization, data.seed, data.transform) == ("none", None, None)
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert data.train_labels.dtype == torch.int64
    assert data.train_labels.shape == (1500,)
    assert data.test_labels.shape == (297,)
    both = torch.cat([data.train, data.test])
    assert (float(both.min()), float(both.max())) == (0.0, 1.0)
    assert torch.equal(both * 16, (both * 16).round())  # intensities 0 .. 16

    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # A permutation: every image with its label, once.
    rows = {(*map(int, row), int(label)) for row, label in zip(images, labels, strict=True)}
    got_labels = torch.cat([data.train_labels, data.test_labels])
    got = {(*map(int, row), int(label)) for row, label in zip((both * 16).tolist(), got_labels, strict=True)}
    assert got == rows
    assert torch.bincount(data.test_labels).min() >= 15  # no class is missing from a random test set of 297


def test_split_does_not_depend_on_the_seed() -> None:
    first, second = load("digits", seed=0), load("digits", seed=1)
    assert first.train_labels is not None
    assert second.train_labels is not None
    assert torch.equal(first.train_labels, second.train_labels)
    grey = load("digits", binarization="none").train
    outside = (grey == 0) | (grey == 1)  # black and white pixels stay under every seed
    assert torch.equal(first.train[outside], grey[outside])
    assert torch.equal(second.train[outside], grey[outside])
    assert not torch.equal(first.train, second.train)


def test_static_binarisation_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # type: ignore[index]
    data = load("digits", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]
    torch.rand(10)
    again = load("digits", seed=3)
    assert torch.equal(data.train, again.train)
    assert torch.equal(data.test, again.test)
    assert _binary(data.train)
    assert _binary(data.test)
    assert (data.binarization, data.seed, data.transform) == ("static", 3, None)


def test_binarize_has_the_right_mean() -> None:
    x = torch.full((200_000,), 0.3)
    draw = binarize(x, seed=0)
    assert _binary(draw)
    assert abs(float(draw.mean()) - 0.3) < 4 * (0.3 * 0.7 / 200_000) ** 0.5
    assert not torch.equal(draw, binarize(x, seed=1))
    assert binarize(x.double(), seed=0).dtype == torch.float64


def test_training_and_test_noise_are_not_the_same(tmp_path: Path) -> None:
    grey = np.full((50, 40), 0.5)
    path = _save(tmp_path / "half.npz", train=grey, test=grey)
    data = load(path, seed=0)
    # 2,000 fair coins agree with 2,000 others in half the places, with standard deviation sqrt(2000) / 2.
    for other in (data.train, load(path, seed=1).train, load(path, seed=1).test):
        agree = int((data.test == other).sum())
        assert abs(agree - 1000) < 4 * 2000**0.5 / 2


def test_dynamic_draws_every_batch_anew() -> None:
    data = load("digits", binarization="dynamic", seed=2)
    grey = load("digits", binarization="none")
    assert torch.equal(data.train, grey.train)
    assert _binary(data.test)
    assert torch.equal(data.test, load("digits", seed=2).test)  # the test set is the static one
    assert data.transform is not None
    batch = data.train[:100]
    torch.manual_seed(0)
    first, second = data.transform(batch), data.transform(batch)
    assert _binary(first)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(data.transform(batch), first)
    draws = torch.stack([data.transform(batch) for _ in range(400)])
    error = (batch * (1 - batch) / 400).sqrt()
    # 6,400 pixels, so the largest of their z-values is allowed 6 standard errors.
    assert ((draws.mean(0) - batch).abs() <= 6 * error).all()


def test_fingerprint_and_repr() -> None:
    one, same, other = load("digits"), load("digits"), load("digits", seed=1)
    assert len(one.fingerprint) == 64
    assert one.fingerprint == same.fingerprint != other.fingerprint
    fields = {name: getattr(one, name) for name in one.__dataclass_fields__}
    moved = ImageData(**{**fields, "train": one.train[:-1], "test": torch.cat([one.train[-1:], one.test])})
    assert moved.fingerprint != one.fingerprint  # the same bytes, split elsewhere
    assert repr(one) == ("ImageData('digits', train=1500, test=297, image_shape=(8, 8), binarization='static', seed=0)")


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        load("digits").seed = 5  # type: ignore[misc]


@pytest.mark.parametrize("names", [("train", "test"), ("train_images", "test_images")])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz_round_trip(tmp_path: Path, names: tuple[str, str], dtype: type) -> None:
    train, test = _grey(7, 4, 5, 3, dtype=dtype), _grey(6, 4, 5, 3, dtype=dtype)
    path = _save(
        tmp_path / "colour.npz", **{names[0]: train, names[1]: test}, train_labels=np.arange(7, dtype=np.uint8)
    )
    data = load(path, binarization="none")
    assert data.name == "colour"
    assert data.image_shape == (4, 5, 3)
    assert data.event_shape == (60,)
    unit = 255 if dtype is np.uint8 else 1
    # Reading is exact to float32's rounding.
    np.testing.assert_allclose(data.train.numpy().reshape(train.shape), train / unit, rtol=0, atol=1e-7)
    np.testing.assert_allclose(data.test.numpy().reshape(test.shape), test / unit, rtol=0, atol=1e-7)
    assert data.train_labels is not None
    assert data.train_labels.tolist() == list(range(7))
    assert data.test_labels is None
    assert load(str(path), binarization="none").fingerprint == data.fingerprint
    assert load("colour.npz", binarization="none", root=tmp_path).fingerprint == data.fingerprint


@pytest.mark.parametrize("binarization", BINARIZATIONS)
def test_binary_images_stay_as_they_are(tmp_path: Path, binarization: str) -> None:
    images = _grey(9, 3, 3) > 100
    data = load(_save(tmp_path / "b.npz", train=images, test=images), binarization=binarization)  # type: ignore[arg-type]
    assert np.array_equal(data.train.numpy(), images.reshape(9, 9))
    assert np.array_equal(data.test.numpy(), images.reshape(9, 9))


GOOD = _grey(4, 3, 3, dtype=np.float32)
NAN, INF = GOOD.copy(), GOOD.copy()
NAN[1, 2, 0] = np.nan
INF[1, 2, 0] = np.inf


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": GOOD}, "has no array 'test' or 'test_images'"),
        ({"images": GOOD}, "has no array 'train' or 'train_images'"),
        ({"train": NAN, "test": GOOD}, "NaN or infinite values in 'train'"),
        ({"train": GOOD, "test": INF}, "NaN or infinite values in 'test'"),
        ({"train": GOOD * 255, "test": GOOD}, r"values from .* in 'train' .*rescale them to \[0, 1\]"),
        ({"train": GOOD - 1, "test": GOOD}, r"values from -.* in 'train'"),
        ({"train": _grey(4, 3).astype(np.int64), "test": GOOD}, "'train' .* is of type int64"),
        ({"train": GOOD, "test": GOOD[:, :2]}, r"different shapes \(3, 3\) and \(2, 3\)"),
        ({"train": GOOD[:, 0, 0], "test": GOOD}, r"'train' .* has shape \(4,\)"),
        ({"train": GOOD[:0], "test": GOOD}, r"'train' .* has shape \(0, 3, 3\)"),
        ({"train": GOOD, "test": GOOD, "test_labels": np.arange(3)}, r"'test_labels' .* one integer .* the 4 images"),
        ({"train": GOOD, "test": GOOD, "train_labels": np.ones(4)}, "'train_labels' .* is float64"),
        ({"train": np.array([None]), "test": GOOD}, "not a readable .npz file of plain arrays"),
    ],
)
def test_malformed_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(_save(tmp_path / "bad.npz", **arrays))


def test_damaged_npz(tmp_path: Path) -> None:
    path = _save(tmp_path / "whole.npz", train=_grey(50, 8, 8), test=_grey(50, 8, 8))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.npz is not a readable \.npz file"):
        load(cut)
    with pytest.raises(FileNotFoundError, match=r"no data file at .*none\.npz and .*none\.npz"):
        load("none.npz", root=tmp_path)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'cifar': choose one of digits, mnist, .*omniglot, .*\.npz"):
        load("cifar")
    with pytest.raises(ValueError, match="unknown binarization 'threshold': choose one of none, static, dynamic"):
        load("digits", binarization="threshold")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown preprocessing 'centered': choose one of none, logit, centred"):
        load("digits", preprocessing="centered")  # type: ignore[arg-type]


def test_binarize_refuses_what_is_no_probability() -> None:
    for values in ([0.2, 1.2], [-0.1, 0.5]):
        with pytest.raises(ValueError, match=r"rescale them to \[0, 1\]"):
            binarize(torch.tensor(values), seed=0)
    with pytest.raises(ValueError, match="NaN or infinite values in the images to binarise"):
        binarize(torch.tensor([0.2, float("nan")]), seed=0)


def test_missing_mnist_says_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYROVAE_DOWNLOAD", raising=False)
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    how = r"PYROVAE_DATA at the folder .*MNIST/raw.*PYROVAE_DOWNLOAD=1"
    with pytest.raises(FileNotFoundError, match=f"no folder was given.*{how}"):
        load("mnist")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/MNIST/raw.*{how}"):
        load("mnist", root=tmp_path)
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/MNIST/raw"):
        load("mnist")
    monkeypatch.setenv("PYROVAE_DOWNLOAD", "1")
    monkeypatch.delenv("PYROVAE_DATA")
    with pytest.raises(FileNotFoundError, match="no folder was given"):
        load("mnist")


def test_download_is_asked_for_only_when_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Fake:
        data, targets = torch.full((2, 28, 28), 255, dtype=torch.uint8), torch.tensor([1, 2])

        def __init__(self, root: str, train: bool, download: bool) -> None:
            calls.append((root, train, download))

    monkeypatch.setattr("pyrovae.data.sources.torchvision_datasets", lambda: type("datasets", (), {"MNIST": Fake}))
    monkeypatch.setenv("PYROVAE_DOWNLOAD", "1")
    assert load("mnist", root=tmp_path).train.shape == (2, 784)
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]


@needs_mnist
def test_mnist_from_the_folder_in_the_environment() -> None:
    data = load("mnist", binarization="none")
    assert data.train.shape == (60_000, 784)
    assert data.test.shape == (10_000, 784)
    assert data.image_shape == (28, 28)
    assert data.train_labels is not None
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert float(data.train.mean()) == pytest.approx(0.1307, abs=5e-5)  # the well-known mean of the training set
    assert (float(data.train.min()), float(data.train.max())) == (0.0, 1.0)
    state = torch.get_rng_state()
    static = load("mnist", root=DATA)
    assert torch.equal(torch.get_rng_state(), state)
    assert _binary(static.train)
    # 47 million independent pixels: the mean's standard error is below 0.5 / sqrt(47e6).
    assert abs(float(static.train.mean()) - float(data.train.mean())) < 4 * 0.5 / (60_000 * 784) ** 0.5 + 1e-6


# The import trap, played through in a fresh interpreter: a torchvision of three files.
FAKE_TORCHVISION = {
    "__init__.py": "from torchvision import _meta_registrations, datasets\n",
    "datasets.py": "MNIST = 'the data sets'\n",
    "_meta_registrations.py": (
        "import torch\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def meta_nms(x): return x\n"
        "torch.library.register_fake('torchvision::qnms.default', meta_nms)\n"
        "@torch.library.register_fake('torchvision::present')\n"
        "def meta_present(x): return x.new_empty(7)\n"
    ),
}
PRELUDE = """
import torch
lib = torch.library.Library("torchvision", "DEF")
lib.define("present(Tensor x) -> Tensor")
genuine = torch.library.register_fake
def register_fake(op, func=None, /, **kwargs):
    if op.split("::")[1] != "present":
        raise RuntimeError(f"operator {op} does not exist")
    return genuine(op, func, **kwargs)
torch.library.register_fake = register_fake
"""


def _python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    import pyrovae

    home = Path(str(pyrovae.__path__[0])).parent
    path = os.pathsep.join(str(p) for p in (*paths, home))
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


def _fake(folder: Path, **changes: str) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    for name, text in {**FAKE_TORCHVISION, **{f"{key}.py": text for key, text in changes.items()}}.items():
        (package / name).write_text(text)
    return folder


def test_the_trap_springs_without_the_door(tmp_path: Path) -> None:
    result = _python(PRELUDE + "import torchvision.datasets\n", _fake(tmp_path))
    assert result.returncode != 0
    assert "operator torchvision::nms does not exist" in result.stderr


def test_the_door_skips_missing_ops_only(tmp_path: Path) -> None:
    code = PRELUDE + (
        "from pyrovae.data._torchvision import torchvision_datasets\n"
        "try:\n    import torchvision\nexcept RuntimeError:\n    print('trapped')\n"
        "print(torchvision_datasets().MNIST)\n"
        "print(torch.library.register_fake is register_fake)\n"  # put back
        "print(torch.ops.torchvision.present(torch.empty(2, device='meta')).shape)\n"  # registered as usual
    )
    result = _python(code, _fake(tmp_path))
    assert result.stdout.splitlines() == ["trapped", "the data sets", "True", "torch.Size([7])"], result.stderr


@pytest.mark.parametrize(
    ("registration", "message"),
    [
        ("torch.library.register_fake('torchvision::present', 1 / 0)", "ZeroDivisionError"),
        ("torch.library.register_fake('elsewhere::nms', print)", "operator elsewhere::nms does not exist"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    ],
)
def test_the_door_swallows_nothing_else(tmp_path: Path, registration: str, message: str) -> None:
    code = PRELUDE + (
        "from pyrovae.data._torchvision import torchvision_datasets\n"
        "try:\n    torchvision_datasets()\n"
        "finally:\n    print(torch.library.register_fake is register_fake)\n"
    )
    result = _python(code, _fake(tmp_path, _meta_registrations=f"import torch\n{registration}\n"))
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stdout.splitlines() == ["True"]


def test_torchvision_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="torchvision")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match="pip install torchvision"):
        torchvision_datasets()


def test_the_installed_torchvision_opens() -> None:
    """Whether or not its compiled ops match this torch."""
    before = torch.library.register_fake
    datasets = torchvision_datasets()
    assert datasets.__name__ == "torchvision.datasets"
    assert datasets.MNIST.__name__ == "MNIST"
    assert torch.library.register_fake is before


def test_importing_the_room_is_light() -> None:
    code = (
        "import sys, pyrovae.data\n"
        "print([m for m in ('torchvision', 'sklearn', 'scipy', 'arviz') if m in sys.modules])\n"
    )
    result = _python(code)
    assert result.stdout.strip() == "[]", result.stderr
