"""What a reproduction is: named arms trained on the same data with the same seeds, and how far each preset goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyrovae import data, models
from pyrovae.data.images import Binarization
from pyrovae.data.text import Sentences
from pyrovae.nets import MLP, LinearHeadDecoder
from pyrovae.runtime import seeded
from pyrovae.schedules import Schedule
from pyrovae.training import FitResult

__all__ = [
    "Arm", "Experiment", "Preset", "Setup", "Split", "Trained", "load", "override", "published_start", "setup",
    "start_noise",
]  # fmt: skip

Likelihood = Literal["bernoulli", "gaussian", "categorical"]

_TEXTS = ("ptb", "snli", "yahoo")


@dataclass(frozen=True)
class Preset:
    """How far an experiment goes.

    Attributes:
        epochs, batch_size, learning_rate, adam_eps, max_norm: of training (Adam; `max_norm` clips the whole gradient).
        train_rows, test_rows: the first rows of each part; None for all.
        validation_rows: held out from the end of the training images; the weights of the best epoch on them are kept.
            0: none, and the last weights are kept.
        num_samples: S of the importance-weighted bound.
        hidden, latent_dim: widths of the hidden layers of both nets, and D.
        kl_epochs: epochs in which the KL weight rises from 0.1 to 1; 0: no schedule.
        extra_rows, extra_steps: of what an experiment measures beside bounds (see its file).
        max_words: of a text's vocabulary.
        energy_rate: step size of energies, as a share of the others'.
    """

    epochs: int
    train_rows: int | None = None
    validation_rows: int = 0
    test_rows: int | None = None
    num_samples: int = 1000
    batch_size: int = 128
    learning_rate: float = 5e-4
    adam_eps: float = 1e-8
    max_norm: float | None = None
    hidden: tuple[int, ...] = (500, 500)
    latent_dim: int = 50
    kl_epochs: int = 0
    extra_rows: int = 0
    extra_steps: int = 0
    max_words: int | None = None
    energy_rate: float | None = None


@dataclass(frozen=True)
class Split:
    """The rows an experiment works on, with labels where the data set has them.

    Attributes:
        source: the data set (`ImageData`, `TextData` or an experiment's own), with a name, a fingerprint and, in words,
            its split.
        test: what bounds are taken on.
        wide, wide_labels: the first `extra_rows` test data, for what takes no importance samples.
    """

    source: Any
    train: Tensor | Sentences
    validation: Tensor | Sentences | None
    test: Tensor | Sentences
    train_labels: Tensor | None = None
    wide: Tensor | None = None
    wide_labels: Tensor | None = None

    @property
    def event_shape(self) -> torch.Size:
        """Of one datum."""
        return self.train.shape[1:] if isinstance(self.train, Tensor) else torch.Size(())

    @property
    def fingerprint(self) -> str:
        """Hash of the data set."""
        return str(self.source.fingerprint)


@dataclass(frozen=True)
class Setup:
    """What an arm is built from: an untrained model, the same in every arm that does not bring its own, and the nets'
    sizes."""

    model: Any
    split: Split
    preset: Preset
    activation: type[nn.Module]
    start: Callable[[nn.Module], None] | None

    @property
    def dim(self) -> int:
        return self.preset.latent_dim

    def encoder(self, outputs: int) -> MLP:
        """An encoder with as many outputs as the guide takes parameters."""
        pixels = self.split.event_shape.numel()
        net = MLP([pixels, *self.preset.hidden, outputs], activation=self.activation)
        if self.start is not None:
            self.start(net)
        return net


@dataclass(frozen=True)
class Trained:
    """What an arm that trains by itself says of it; the names are those of `FitResult`."""

    objective: str
    curve: list[float]
    steps: int
    epochs: int
    kl_weight: float = 1.0

    @property
    def best_epoch(self) -> int:
        return self.epochs

    @property
    def validation(self) -> list[tuple[int, float]]:
        return []


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        name: in tables.
        build: guide from a `Setup`.
        loss: makes the training loss; None for `fit`'s default.
        model: the arm's own model; the experiment's by default.
        prepare: what is done to model and guide before training.
        train: trains model and guide in place of `fit`, from a seed, without a pause; None for `fit`.
        baseline: the arm from which this one's differences are taken, instead of the experiment's.
        judge: the guide that evaluates the trained model, for guides without a density.
        published: the paper's number on this experiment's scale, nats; None where there is none.
        schedule: makes the stages of training, for `fit`; None steps all at once.
        kl_epochs: instead of the preset's.
        stretch: how many times the preset's epochs it is trained for.
        rows: training data, instead of the preset's; for as many steps.
        cut: from the data to those the arm is trained on, such as all but one class; every arm is judged on all.
        as_long_as: name of an arm before this one; train until as many seconds have passed as that one took, instead
            of its number of epochs.
        presets: in which the arm takes part.
    """

    name: str
    build: Callable[[Setup], Any]
    loss: Callable[[], Any] | None = None
    model: Callable[[Preset, Split], nn.Module] | None = None
    prepare: Callable[[Setup, Any, int], None] | None = None
    train: Callable[[Setup, Any, int], Trained | FitResult] | None = None
    baseline: str | None = None
    judge: Callable[[Setup], Any] | None = None
    schedule: Callable[[Preset, Split], Schedule] | None = None
    kl_epochs: int | None = None
    stretch: float = 1.0
    rows: int | None = None
    cut: Callable[[Split], Split] | None = None
    published: float | None = None
    as_long_as: str | None = None
    presets: tuple[str, ...] = ("quick", "paper")

    @property
    def slug(self) -> str:
        """Name of the arm's folder."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")


@dataclass(frozen=True)
class Experiment:
    """Arms, data and presets.

    Attributes:
        name, title, paper: what is reproduced, and after whom.
        data, binarization, preprocessing, logit_lambda: of `pyrovae.data.load`, or the name of a text.
        split: makes the data, where they are no files.
        pictures: whether data are `[N, 1, H, W]` instead of `[N, X]`.
        likelihood: of the model.
        model: the untrained model; by default a VAE with an MLP decoder.
        baseline: arm from which paired differences are taken; a name for what they are taken from, in words, where
            arms have baselines of their own.
        arms: in the order of training.
        presets: "quick" and "paper".
        seeds: of the runs that make up a result, unless one is asked for.
        pairs: arms that are to be compared with one another, (name, with the arm of this name).
        settings: the published settings that hold for both presets, in words.
        published: what the column of published numbers is, in words ("" where no arm has one).
        published_bound: which of our bounds the published differences are held against.
        remarks: facts a reader needs to judge the numbers.
        missing: published columns that cannot be reached with the data at hand, and why.
        activation, start: of the nets; `start` sets the first weights of a net.
        measure: (guide, split, preset, progress, name of the arm) -> rows of further tables; not of arms without
            latents.
        draw: (guide, split, preset, name of the arm) -> what `picture` needs of it, for the results file.
        facts: from the runs of all seeds to sentences on them.
        picture: from the runs of all seeds to a figure.
    """

    name: str
    title: str
    paper: str
    data: str
    likelihood: Likelihood
    baseline: str
    arms: tuple[Arm, ...]
    presets: dict[str, Preset]
    settings: str
    seeds: tuple[int, ...] = (0,)
    pairs: tuple[tuple[str, str], ...] = ()
    binarization: Binarization = "none"
    preprocessing: Literal["none", "logit", "centred"] = "none"
    logit_lambda: float = 0.05
    published: str = ""
    published_bound: Literal["ELBO", "IWAE"] = "IWAE"
    remarks: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    activation: type[nn.Module] = nn.ReLU
    start: Callable[[nn.Module], None] | None = None
    model: Callable[[Preset, Split], nn.Module] | None = None
    pictures: bool = False
    measure: Callable[[Any, Split, Preset, bool, str], list[dict[str, Any]]] | None = None
    draw: Callable[[Any, Split, Preset, str], Any] | None = None
    split: Callable[[Preset], Split] | None = None
    facts: Callable[[list[dict[str, Any]]], list[str]] | None = None
    picture: Callable[[list[dict[str, Any]]], Any] | None = None

    def baseline_of(self, name: str) -> str:
        """The arm from which the differences of an arm are taken."""
        return next((arm.baseline for arm in self.arms if arm.name == name and arm.baseline), self.baseline)


def load(experiment: Experiment, preset: Preset, device: str, path: str | None = None) -> Split:
    """The data, cut to the preset's rows; `path` names an `.npz` file, or the folder of a text, to take instead of the
    experiment's data set.

    Binarisation and dequantisation have seed 0 whatever the seed of a run: all runs share one test set. Grey values
    are centred by the mean training image (which moves no density).

    Raises:
        ValueError: a path, or another device than the CPU, for an experiment that makes its own data.
    """
    if experiment.split is not None:
        if path is not None:
            raise ValueError(f"{experiment.name} makes its own data: leave --data out")
        if device != "cpu":
            raise ValueError(f"{experiment.name} makes its own data, on the CPU: leave --device out")
        return experiment.split(preset)
    if experiment.data in _TEXTS:
        text = data.load_text(experiment.data, max_words=preset.max_words, root=path)
        parts = text.train[: preset.train_rows], text.valid[: preset.validation_rows], text.test[: preset.test_rows]
        return Split(text, *(part.to(device) for part in parts))
    images = data.load(
        path or experiment.data, binarization=experiment.binarization, preprocessing=experiment.preprocessing,
        logit_lambda=experiment.logit_lambda, seed=0,
    )  # fmt: skip
    validation = None
    if preset.validation_rows:
        images, validation = images.split_validation(preset.validation_rows)
    shift = images.train.mean(0) if experiment.likelihood == "gaussian" else torch.zeros(images.event_shape)
    shape = (1, *images.image_shape) if experiment.pictures else images.event_shape

    def ready(rows: Tensor | None) -> Any:
        return None if rows is None else (rows - shift).reshape(-1, *shape).to(device)

    train, wide = images.train[: preset.train_rows], images.test[: preset.extra_rows]
    return Split(
        images, ready(train), ready(validation), ready(images.test[: preset.test_rows]),
        None if images.train_labels is None else images.train_labels[: len(train)], ready(wide),
        None if images.test_labels is None else images.test_labels[: len(wide)],
    )  # fmt: skip


def setup(experiment: Experiment, preset: Preset, split: Split, seed: int, arm: Arm | None = None) -> Setup:
    """The untrained model: the same weights for a seed, whatever the arm, unless it brings its own."""
    make = (arm.model if arm is not None else None) or experiment.model
    if make is not None:
        with seeded(seed):
            model = make(preset, split)
        return Setup(model, split, preset, experiment.activation, experiment.start)
    with seeded(seed):
        decoder = LinearHeadDecoder(
            preset.latent_dim, preset.hidden, split.event_shape, activation=experiment.activation
        )
        if experiment.start is not None:
            experiment.start(decoder)
    vae = models.VAE(decoder, preset.latent_dim, experiment.likelihood)
    if experiment.likelihood == "gaussian":
        start_noise(vae, split)
    return Setup(vae, split, preset, experiment.activation, experiment.start)


def start_noise(model: Any, split: Split) -> Any:
    """The model, with the noise of a decoder that knows the mean image alone, which is what a fresh one gives."""
    spread = float(split.train.square().mean().sqrt())
    model.noise["log"].data.fill_(math.log(spread - model.noise_floor))
    return model


def published_start(net: nn.Module) -> None:
    """First weights as in the released code of the VLAE: uniform, by the number of outputs; biases as torch has them.

    Its Kaiming initialisation is given the slope 2^(1/3), which makes a gain of 0.88.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=2 ** (1 / 3), mode="fan_out")


def override(preset: Preset, **given: Any) -> Preset:
    """The preset with those of `given` that are not None."""
    return replace(preset, **{name: value for name, value in given.items() if value is not None})
