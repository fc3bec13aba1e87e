"""Latent energy-based priors (Pang et al. 2020; Cui, Wu & Han 2023) on MNIST: which digit was never seen?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import diagnose, guides
from pyrovae.chunks import per_chunk
from pyrovae.models import VAE, LadderVAE
from pyrovae.models.energy_prior_vae import EnergyPriorVAE
from pyrovae.models.joint_energy_prior import JointEnergyPrior
from pyrovae.models.tilted import PriorChain, Tilted
from pyrovae.nets import MLP, LadderDecoder, LadderEncoder
from reproduction.evaluation import layer_probes, plain
from reproduction.experiment import Arm, Experiment, Preset, Setup, Split
from reproduction.sheets import sheet, to_bytes

__all__ = ["EXPERIMENT"]

SIZES = (8, 8)  # of the ladders, shallowest first
DIGITS = (1, 4, 9)
CHAIN = PriorChain(num_steps=60, step_size=0.4)
_DRAWS, _SHOWN = 1000, 20  # samples of the model in the comparison with test images, and in the picture


class Energy(nn.Module):
    """f of all latents, `[R, D] -> [R]`."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.net = MLP([dim, width, width, 1], nn.LeakyReLU)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z).squeeze(-1)


def one_layer(preset: Preset, split: Split, *, tilted: bool) -> VAE:
    size = sum(SIZES)
    decoder = LadderDecoder((size,), split.event_shape, preset.hidden[0])
    if tilted:
        return EnergyPriorVAE(decoder, size, Energy(size, preset.hidden[-1]), chain=CHAIN)
    return VAE(decoder, size)


def two_layers(preset: Preset, split: Split, *, tilted: bool) -> LadderVAE:
    decoder = LadderDecoder(SIZES, split.event_shape, preset.hidden[0])
    if tilted:
        return JointEnergyPrior(decoder, SIZES, Energy(sum(SIZES), preset.hidden[-1]), chain=CHAIN)
    return LadderVAE(decoder, SIZES)


def guide(parts: Setup) -> guides.Amortized:
    sizes = getattr(parts.model, "sizes", (sum(SIZES),))
    return guides.Amortized(parts.model, LadderEncoder(sizes, parts.split.event_shape, parts.preset.hidden[0]))


def without(split: Split, *, digit: int) -> Split:
    """Training images of the other digits."""
    if split.train_labels is None:
        raise ValueError("a digit can be held out of labelled data only: these have no labels")
    keep = split.train_labels != digit
    assert isinstance(split.train, Tensor)
    return replace(split, train=split.train[keep.to(split.train.device)], train_labels=split.train_labels[keep])


def measure(guide: Any, split: Split, preset: Preset, progress: bool, arm: str) -> list[dict[str, Any]]:
    """Detection of the held-out digit by several scores, probes of each layer, the tilt's effect on samples."""
    model, x, y = guide.model, split.wide, split.wide_labels
    if x is None or y is None:
        return []
    rows = [layer_probes(guide, x, y), _samples(model, x)]
    strange = y == int(arm.rsplit(" ", 1)[1])
    if strange.any() and not strange.all():
        rows[:0] = [_detection(name, values, strange) for name, values in _scores(model, guide, x, preset).items()]
    return [row for row in rows if row]


def _scores(model: Any, guide: Any, x: Tensor, preset: Preset) -> dict[str, Tensor]:
    """Higher for stranger images; log Z, the same for all, changes no order."""
    found = {"-log p(x)": diagnose.anomaly(model, guide, x, num_samples=preset.num_samples).values}
    # The papers': the log-joint at inferred latents.
    found["-log p(x, z)"] = -per_chunk(
        lambda *some: guide.space(*some).bind(*some)(guide.draws(10, *some)), (model, guide), (x,), {},
        plate=guide.plate, batched=guide.batched,
    ).mean(0)  # fmt: skip
    if hasattr(model, "groups"):
        found["layer ratio"] = diagnose.anomaly(
            model, guide, x, score="layer-ratio", num_samples=preset.num_samples
        ).values
    return found


def _detection(score: str, values: Tensor, strange: Tensor) -> dict[str, Any]:
    found = diagnose.detection(values[~strange], values[strange])
    return {
        "table": "Held-out digit among all test digits (AUPRC in %, the digit being what is to be found)",
        "score": score, "AUPRC": plain(100 * found.auprc),
        "at random": plain(100 * found.num_out / (found.num_in + found.num_out)),
        "AUROC": {"mean": 100 * found.auroc, "se": 100 * found.auroc_se},
    }  # fmt: skip


def _samples(model: Any, x: Tensor) -> dict[str, Any]:
    """Sliced Wasserstein distance of mean images to test images, in pixel sds, before and after the tilt."""
    if not isinstance(model, Tilted):
        return {}
    data, found = x.flatten(1).unsqueeze(1), {}
    # Pixels that never change have no scale of their own.
    seen = data[:, 0].std(0) > 0.1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, tilted in (("before", False), ("after", True)):
            images = model.mean(model.sample_prior(_DRAWS, tilted=tilted)).bernoulli().flatten(1).unsqueeze(1)
            found[name] = plain(float(diagnose.sliced_w2(images[..., seen], data[..., seen])[0]))
    return {"table": "Samples before and after the tilt: sliced Wasserstein distance to test images", **found}


def draw(guide: Any, split: Split, preset: Preset, arm: str) -> dict[str, list[Any]]:
    """Mean images of codes from the base and from the tilted prior, as bytes."""
    if not isinstance(guide.model, Tilted):
        return {}
    found = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, tilted in (("before", False), ("after", True)):
            images = guide.model.mean(guide.model.sample_prior(_SHOWN, tilted=tilted))
            found[f"{arm}, {name}"] = images
    return to_bytes(found)


def _arms() -> tuple[Arm, ...]:
    models: dict[str, Any] = {
        "VAE": partial(one_layer, tilted=False), "energy prior": partial(one_layer, tilted=True),
        "ladder": partial(two_layers, tilted=False), "joint energy prior": partial(two_layers, tilted=True),
    }  # fmt: skip
    return tuple(
        Arm(f"{name} without {digit}", guide, model=model, cut=partial(without, digit=digit))
        for digit in DIGITS for name, model in models.items()
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="energy-mnist",
    title="Latent energy-based priors on MNIST: finding the digit that was held out",
    paper="Pang et al. (2020); Cui, Wu & Han (2023)",
    data="mnist",
    binarization="static",
    likelihood="bernoulli",
    pictures=True,
    baseline="VAE without 1",
    arms=_arms(),
    pairs=tuple(
        (f"{tilted} without {digit}", f"{untilted} without {digit}")
        for digit in DIGITS for tilted, untilted in (("energy prior", "VAE"), ("joint energy prior", "ladder"))
    ),
    presets={
        "quick": Preset(epochs=30, train_rows=30_000, test_rows=300, num_samples=50, batch_size=100,
                        learning_rate=1e-3, energy_rate=0.02, hidden=(256, 100), latent_dim=sum(SIZES), kl_epochs=3,
                        extra_rows=2000),
        "paper": Preset(epochs=200, num_samples=100, batch_size=100, learning_rate=3e-4, energy_rate=1 / 15,
                        hidden=(512, 200), latent_dim=sum(SIZES), kl_epochs=20, extra_rows=10_000),
    },
    settings=(
        "16 latents in one layer or 8 + 8 in a ladder, one energy on all of them (two hidden layers, a step size of "
        f"2e-5, as published), prior chain of {CHAIN.num_steps} Langevin steps of {CHAIN.step_size:g}, an encoder for "
        "the posterior, Bernoulli pixels, batch 100, Adam, KL weight from 0.1 to 1 in the first epochs"
    ),
    remarks=(
        "Bounds are of all test digits, the held-out one too. Of tilted priors log Z is measured by annealing and "
        "taken off: their numbers are estimates, not bounds, and KL is to the base.",
        "AUPRC published by Cui, Wu & Han (2023) for the digits 1, 4, 9: VAE 6.3, 33.7, 10.4; energy prior 33.6, 63.0, "
        "41.3; hierarchical VAE by a layer ratio 49.4, 92.0, 79.1; joint energy prior 72.2, 94.9, 93.5. Their nets, "
        "noise and share of strange images are others.",
        "Changed after results had been seen: at ten times this step size of the energy two of the three priors of one "
        "layer had run away (annealing found no log Z), and a first run at this one, with a sixth of the training "
        "steps, had left the scores of tilted models close to those of their bases. One seed: differences of a few "
        "percent between arms may be of the seed.",
    ),
    measure=measure,
    draw=draw,
    picture=sheet,
)  # fmt: skip
