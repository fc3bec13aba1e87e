"""Grey values as continuous data: the logit against its closed form, the centred images, and held-out rows."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyrovae.data import BINARIZATIONS, PREPROCESSINGS, ImageData, binarize, load
from pyrovae.data.preprocessing import logit_log_det

DATA = os.environ.get("PYROVAE_DATA")
needs_mnist = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "MNIST/raw/train-images-idx3-ubyte").is_file(),
    reason="PYROVAE_DATA does not name a folder with MNIST/raw",
)
EPS = 2.0**-23  # of float32


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.RandomState(0)
    path = tmp_path / "grey.npz"
    train, test = (random.randint(0, 256, (n, 6, 5)).astype(np.uint8) for n in (400, 60))
    np.savez(path, train=train, test=test, train_labels=np.arange(400))
    return path


def grey(path: Any, **options: Any) -> ImageData:
    return load(path, binarization="none", **options)


def levels_of(y: torch.Tensor, lam: float, levels: int = 256) -> torch.Tensor:
    """Closed form of the way back: ``L x' = (L - 1) x + u``, in float64."""
    s = 1 / (1 + np.exp(-y.double().numpy()))
    return torch.from_numpy(levels * (s - lam) / (1 - 2 * lam))


@pytest.mark.parametrize("lam", [0.05, 0.01, 0.3])
def test_logit_is_the_published_one(images: Path, lam: float) -> None:
    plain, data = grey(images), grey(images, preprocessing="logit", logit_lambda=lam)
    assert data.train.dtype == data.test.dtype == torch.float32
    assert data.train.shape == plain.train.shape
    assert (data.preprocessing, data.logit_lambda, data.mean, data.seed) == ("logit", lam, None, 0)
    assert data.transform is None
    bound = float(torch.tensor(1 - lam, dtype=torch.float64).logit())
    for y, x in ((data.train, plain.train), (data.test, plain.test)):
        assert float(y.abs().max()) <= bound * (1 + EPS)
        # |dL x'/dy| <= L / (4 (1 - 2 l)), and y is rounded to float32 once: half an ulp of at most the bound.
        error = 256 / (4 * (1 - 2 * lam)) * bound * EPS
        u = levels_of(y, lam) - (255 * x.double()).round()
        assert float(u.min()) >= -error
        assert float(u.max()) <= 1 + error
        # Uniform: mean 1/2 and variance 1/12 within 4 standard errors (Var of (u - 1/2)^2 is 1/180).
        n = u.numel()
        assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
        assert abs(float((u - 0.5).square().mean()) - 1 / 12) < 4 * (1 / 180 / n) ** 0.5


def test_intensities_undo_the_logit(images: Path) -> None:
    plain, data = grey(images), grey(images, preprocessing="logit")
    back = data.intensities(data.test)
    assert back.dtype == torch.float32
    np.testing.assert_allclose(back.numpy(), levels_of(data.test, 0.05).numpy() / 256, atol=4 * EPS)
    # x' and x are within one grey level of each other.
    assert float((back - plain.test).abs().max()) <= 1 / 256 + 4 * EPS
    assert data.intensities(torch.zeros(3, 2, 30)).tolist() == torch.full((3, 2, 30), 0.5).tolist()


def test_log_det_is_that_of_autograd_and_of_the_published_formula(images: Path) -> None:
    lam = 0.05
    data = grey(images, preprocessing="logit", logit_lambda=lam)
    assert data.log_det.shape == (60,)
    assert data.log_det.dtype == torch.float32
    x = (levels_of(data.test, lam) / 256).requires_grad_()
    (slope,) = torch.autograd.grad((lam + (1 - 2 * lam) * x).logit().sum(), x)
    expected = slope.log().sum(-1)
    # Only the result is rounded to float32; it is below 30 log(0.9 / (0.05 * 0.95)) = 89.
    np.testing.assert_allclose(data.log_det.numpy(), expected.numpy(), rtol=0, atol=64 * EPS)
    # Bits per pixel of Papamakarios et al. 2017, from a log-density in logit space, here -100 nats.
    s = data.test.double().sigmoid()
    published = 100 / (30 * np.log(2)) - np.log2(1 - 2 * lam) + 8 + (s.log2() + (1 - s).log2()).mean(-1)
    ours = -(-100 + data.log_det.double() - 30 * np.log(256)) / (30 * np.log(2))
    np.testing.assert_allclose(ours.numpy(), published.numpy(), rtol=0, atol=1e-5)


def test_log_det_turns_a_density_into_a_density() -> None:
    """The standard normal in logit space, carried to [0, 1], has the mass that it has between the two ends."""
    lam = 0.05
    x = ((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)[:, None]
    y = (lam + (1 - 2 * lam) * x).logit()
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    mass = (normal.log_prob(y).sum(-1) + logit_log_det(y, lam)).exp().mean()
    end = torch.tensor(1 - lam, dtype=torch.float64).logit()
    # The midpoint rule on a smooth bounded function: below 1e-9 with this many points.
    assert float(mass) == pytest.approx(float(normal.cdf(end) - normal.cdf(-end)), abs=1e-9)


@pytest.mark.parametrize("preprocessing", ["none", "centred"])
def test_log_det_is_zero_without_a_logit(images: Path, preprocessing: Any) -> None:
    data = grey(images, preprocessing=preprocessing)
    assert torch.equal(data.log_det, torch.zeros(60))


def test_dequantisation_is_repeatable_and_leaves_the_global_generator_alone(images: Path) -> None:
    state = torch.get_rng_state()
    first = grey(images, preprocessing="logit", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = grey(images, preprocessing="logit", seed=4), grey(images, preprocessing="logit", seed=5)
    assert first.seed == 4
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.train, other.train)
    assert not torch.equal(first.test, other.test)


def test_training_and_test_noise_are_independent(tmp_path: Path) -> None:
    black = np.zeros((100, 5, 4), np.uint8)
    np.savez(tmp_path / "black.npz", train=black, test=black)
    data = grey(tmp_path / "black.npz", preprocessing="logit")
    train, test = (levels_of(y, 0.05).flatten() - 0.5 for y in (data.train, data.test))
    # The product of two independent uniforms on (-1/2, 1/2) has mean 0 and variance 1/144.
    assert abs(float((train * test).mean())) < 4 * (1 / 144 / 2000) ** 0.5


def test_the_noise_fills_one_grey_level_of_the_set(tmp_path: Path) -> None:
    """17 levels in the digits, 2 in boolean images, 256 in float ones that were bytes."""
    plain, data = grey("digits"), grey("digits", preprocessing="logit")
    level = levels_of(data.test, 0.05, levels=17)
    assert torch.equal(level.floor(), (16 * plain.test.double()).round())

    random = np.random.RandomState(0)
    boolean = random.rand(30, 2, 3) > 0.5
    np.savez(tmp_path / "bool.npz", train=boolean, test=boolean)
    level = levels_of(grey(tmp_path / "bool.npz", preprocessing="logit").train, 0.05, levels=2)
    np.testing.assert_array_equal(level.floor().numpy().reshape(boolean.shape), boolean)

    bytes_ = random.randint(0, 256, (30, 2, 3)).astype(np.uint8)
    np.savez(tmp_path / "bytes.npz", train=bytes_, test=bytes_)
    np.savez(tmp_path / "floats.npz", train=(bytes_ / 255).astype(np.float32), test=bytes_ / 255)
    one, two = (grey(tmp_path / f"{name}.npz", preprocessing="logit") for name in ("bytes", "floats"))
    assert one.fingerprint == two.fingerprint


def test_float_images_without_grey_levels_are_refused(tmp_path: Path) -> None:
    values = np.random.RandomState(0).rand(5, 2, 2)
    np.savez(tmp_path / "smooth.npz", train=np.zeros((5, 2, 2)), test=values)
    with pytest.raises(ValueError, match="grey values in the test images of smooth are not multiples of 1/255: save"):
        grey(tmp_path / "smooth.npz", preprocessing="logit")


def test_centred_images(images: Path) -> None:
    plain, data = grey(images), grey(images, preprocessing="centred")
    assert (data.preprocessing, data.seed, data.logit_lambda) == ("centred", None, None)
    assert data.train.dtype == data.test.dtype == torch.float32
    assert data.mean is not None
    with np.load(images) as file:
        exact = file["train"].reshape(400, 30).astype(np.int64).sum(0) / (400 * 255)
    # The mean of float32 intensities, rounded: one rounding of each, all below 1.
    np.testing.assert_allclose(data.mean.numpy(), exact, rtol=0, atol=EPS)
    assert torch.equal(data.test, plain.test - data.mean)  # the training mean, not the test images' own
    np.testing.assert_allclose(data.train.double().mean(0).numpy(), 0, atol=2 * EPS)
    np.testing.assert_allclose(data.intensities(data.test).numpy(), plain.test.numpy(), rtol=0, atol=EPS)
    assert data.intensities(data.test.double()).dtype == torch.float64


def test_no_preprocessing_is_the_identity(images: Path) -> None:
    data = grey(images)
    assert (data.preprocessing, data.mean, data.logit_lambda, data.seed) == ("none", None, None, None)
    assert data.intensities(data.test) is data.test


def test_fingerprint_and_repr_know_the_preprocessing(images: Path) -> None:
    found = {kind: grey(images, preprocessing=kind) for kind in PREPROCESSINGS}
    prints = {data.fingerprint for data in found.values()}
    prints |= {grey(images, preprocessing="logit", **more).fingerprint for more in ({"seed": 1}, {"logit_lambda": 0.1})}
    assert len(prints) == 5
    assert repr(found["logit"]) == (
        "ImageData('grey', train=400, test=60, image_shape=(6, 5), binarization='none', preprocessing='logit', seed=0)"
    )
    assert "preprocessing='centred', seed=None" in repr(found["centred"])
    assert "preprocessing" not in repr(found["none"])


@pytest.mark.parametrize("binarization", ["static", "dynamic"])
@pytest.mark.parametrize("preprocessing", ["logit", "centred"])
def test_preprocessing_is_for_grey_values(binarization: Any, preprocessing: Any) -> None:
    message = f"preprocessing '{preprocessing}' is for grey values, but binarization is '{binarization}': pass "
    with pytest.raises(ValueError, match=message):
        load("digits", binarization=binarization, preprocessing=preprocessing)


@pytest.mark.parametrize("lam", [0.0, 0.5, -0.1, float("nan")])
def test_a_margin_that_is_none(lam: float) -> None:
    with pytest.raises(ValueError, match=r"logit_lambda is .*: choose it between 0 and 1/2"):
        load("digits", binarization="none", preprocessing="logit", logit_lambda=lam)


@pytest.mark.parametrize("binarization", BINARIZATIONS)
def test_held_out_rows(images: Path, binarization: Any) -> None:
    data = load(images, binarization=binarization, seed=3)
    rest, held_out = data.split_validation(100)
    assert torch.equal(rest.train, data.train[:300])
    assert rest.train_labels is not None
    assert rest.train_labels.tolist() == list(range(300))
    assert torch.equal(rest.test, data.test)
    assert held_out.shape == (100, 30)
    assert rest.split == "as stored in grey.npz; last 100 training images held out"
    assert rest.fingerprint != data.fingerprint
    assert rest.binarization == binarization
    if binarization != "dynamic":
        assert torch.equal(held_out, data.train[300:])
        return
    # Drawn once and for all, from noise that is neither the training nor the test set's.
    assert torch.equal(held_out, load(images, binarization="dynamic", seed=3).split_validation(100)[1])
    assert bool(((held_out == 0) | (held_out == 1)).all())
    same_noise = [binarize(data.train, 3)[300:], load(images, seed=3).train[300:]]
    assert not any(torch.equal(held_out, other) for other in same_noise)
    p = data.train[300:]
    assert abs(float((held_out - p).sum())) < 4 * float((p * (1 - p)).sum()) ** 0.5


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
def test_held_out_rows_are_preprocessed_as_the_rest(images: Path, preprocessing: Any) -> None:
    data = grey(images, preprocessing=preprocessing)
    rest, held_out = data.split_validation(1)
    assert torch.equal(torch.cat([rest.train, held_out]), data.train)
    assert torch.equal(rest.intensities(held_out), data.intensities(data.train[-1:]))
    assert torch.equal(rest.log_det, data.log_det)


@pytest.mark.parametrize("rows", [0, -3, 400, 401])
def test_nothing_left(images: Path, rows: int) -> None:
    with pytest.raises(ValueError, match=f"cannot hold out {rows} of 400 training images"):
        load(images).split_validation(rows)


def test_held_out_rows_go_into_fit(images: Path) -> None:
    """The held-out images of a dynamic set are in the support of the likelihood that trains on its batches."""
    from pyrovae import fit
    from pyrovae.comparison.recipes import build_guide, build_model

    rest, held_out = load(images, binarization="dynamic").split_validation(50)
    vae = build_model(30, 2, "bernoulli", 0, "cpu")
    guide = build_guide("amortized", vae, 0, "cpu")
    result = fit(vae, guide, rest.train, epochs=2, transform=rest.transform, validation=held_out, progress=False)
    assert [epoch for epoch, _ in result.validation] == [1, 2]
    # log p(x) of 30 fair coins is -30 log 2 = -20.8; an untrained model's bound is near it, and finite.
    assert all(-60 < value < 0 for _, value in result.validation)


@needs_mnist
def test_mnist_in_logit_space() -> None:
    data = load("mnist", binarization="none", preprocessing="logit", root=DATA)
    bound = float(torch.tensor(0.95).logit())
    assert data.train.shape == (60_000, 784)
    assert max(float(x.abs().max()) for x in (data.train, data.test)) <= bound * (1 + 2 * EPS)
    assert torch.isfinite(data.log_det).all()
    # Black pixels, four fifths of all, are uniform on one grey level: their mean is known in closed form from
    # int logit(s) ds = s log s + (1 - s) log(1 - s).
    black = data.test[load("mnist", binarization="none", root=DATA).test == 0].double()
    a, b = 0.05, 0.05 + 0.9 / 256
    integral = (b * np.log(b) + (1 - b) * np.log(1 - b)) - (a * np.log(a) + (1 - a) * np.log(1 - a))
    assert abs(float(black.mean()) - integral / (b - a)) < 4 * float(black.std()) / len(black) ** 0.5
