"""Short-run inference for generators of several layers (Nijkamp et al. 2020) on grey MNIST."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrovae import diagnose, evidence, generate, guides
from pyrovae.chunks import per_chunk
from pyrovae.diagnose.collapse import active_units
from pyrovae.models import LadderVAE
from pyrovae.nets import LadderDecoder, LadderEncoder
from pyrovae.runtime import evaluating, seeded
from reproduction.evaluation import layer_probes, number, plain
from reproduction.experiment import Arm, Experiment, Preset, Setup, Split
from reproduction.sheets import sheet, to_bytes

__all__ = ["EXPERIMENT"]

NOISE = 0.15  # published
STEPS, STEP = 25, 0.05  # published
DRAWS = 20  # of a posterior mean
PAIRS, POINTS = 3, 9  # interpolations in the picture, and images on each
AXES = 20  # principal components in which samples are compared


def sizes(preset: Preset) -> tuple[int, ...]:
    """Three layers of about the same size, shallowest first."""
    each = preset.latent_dim // 3
    return (preset.latent_dim - 2 * each, each, each)


def ladder(preset: Preset, split: Split) -> LadderVAE:
    groups = sizes(preset)
    return LadderVAE(LadderDecoder(groups, split.event_shape, preset.hidden[0]), groups, "gaussian", noise=NOISE)


def amortized(parts: Setup) -> guides.Amortized:
    encoder = LadderEncoder(sizes(parts.preset), parts.split.event_shape, parts.preset.hidden[0])
    return guides.Amortized(parts.model, encoder)


def short_run(parts: Setup) -> guides.ShortRun:
    return guides.ShortRun(parts.model, STEPS, STEP)


def judge(parts: Setup) -> guides.LocalSVI:
    """The same for both arms: a Gaussian fitted to each test image."""
    return guides.LocalSVI(parts.model, num_samples=2, max_steps=200, check=50)


def measure(guide: Any, split: Split, preset: Preset, progress: bool, arm: str) -> list[dict[str, Any]]:
    """Reconstruction by an arm's own inference, evidence by annealing, and how far samples are from test images."""
    model, x, y = guide.model, split.wide, split.wide_labels
    if x is None or y is None:
        return []
    known = active_units(model, guide, x, num_samples=DRAWS)
    active = "; ".join(f"{int(known.active[where].sum())} of {where.stop - where.start} in {name}"
                       for name, where in model.groups.items())  # fmt: skip
    few = x[: preset.extra_steps]
    annealed = evidence.ais(model, few, num_chains=8, num_temperatures=300)
    rows = [layer_probes(guide, x, y), {
        "table": f"Reconstruction of {len(x)} test images by each arm's own inference (squared error of a pixel in "
                 f"[0, 1], times 1000), active latents, log p(x) of {len(few)} images by annealed importance sampling, "
                 f"and the distance of samples from test images (sliced W2 in {AXES} principal components, in their "
                 "standard deviations) beside that of training images",
        "1000 MSE": number(1000 * _errors(guide, x)), "active": active, "AIS": number(annealed.values),
        "samples": plain(_distance(_samples(model, len(x)), x)), "training images": plain(
            _distance(split.train[: len(x)], x)
        ),
    }]  # fmt: skip
    return [row for row in rows if row]


def draw(guide: Any, split: Split, preset: Preset, arm: str) -> dict[str, list[Any]]:
    """E[x | z] on the lines between posterior means of pairs of test images, as bytes."""
    if split.wide is None:
        return {}
    start, end = split.wide[: 2 * min(PAIRS, len(split.wide) // 2)].chunk(2)
    paths = generate.interpolate(guide.model, guide, start, end, steps=POINTS).cpu()
    images = paths + split.source.train.mean(0).view(paths.shape[2:])
    return to_bytes({f"{arm}, {pair + 1}": images[:, pair] for pair in range(images.shape[1])})


def _errors(guide: Any, x: Tensor) -> Tensor:
    """Mean squared error of a pixel over draws, `[N]`."""

    def one(rows: Tensor) -> Tensor:
        found = guide.model.mean(guide.draws(DRAWS, rows))
        return (found - rows).square().flatten(2).mean((0, 2)).unsqueeze(0)

    return per_chunk(one, (guide.model, guide), (x,), {}, plate="data")[0].double()


def _samples(model: LadderVAE, number: int) -> Tensor:
    """E[x | z] of codes from the prior."""
    with seeded(0), torch.no_grad(), evaluating(model):
        return model.mean(torch.randn(number, model.latent_dim, device=model.origin.device))


def _distance(found: Any, x: Tensor) -> float:
    rows, given = found.flatten(1).double(), x.flatten(1).double()
    axes = torch.linalg.svd(given - given.mean(0), full_matrices=False)[2][:AXES].T
    a, b = ((part - given.mean(0)) @ axes for part in (rows, given))
    return float(diagnose.sliced_w2(a.unsqueeze(1), b.unsqueeze(1)))


EXPERIMENT = Experiment(
    name="short-run-ladder",
    title="Short-run inference for a generator of three layers on grey MNIST",
    paper="Nijkamp, Pang, Han, Zhou, Zhu & Wu (2020)",
    data="mnist",
    likelihood="gaussian",
    pictures=True,
    model=ladder,
    baseline="ladder",
    arms=(Arm("ladder", amortized, judge=judge), Arm("short-run", short_run, judge=judge)),
    presets={
        "quick": Preset(epochs=8, train_rows=10_000, validation_rows=500, test_rows=200, num_samples=100,
                        batch_size=100, learning_rate=1e-3, hidden=(256,), latent_dim=30, extra_rows=1000,
                        extra_steps=20),
        "paper": Preset(epochs=600, validation_rows=2000, num_samples=500, batch_size=100, learning_rate=8e-5,
                        hidden=(1024,), latent_dim=192, extra_rows=10_000, extra_steps=100),
    },
    settings=(
        "one decoder of three layers with gated injection, all noise variables N(0, 1), Gaussian pixels of standard "
        "deviation 0.15, batch 100, Adam, weights of the best epoch on validation images; short runs of 25 Langevin "
        "steps with a noise scale of 0.05 over all layers at once, from the prior"
    ),
    remarks=(
        "Both arms are judged by a Gaussian fitted to each test image (LocalSVI, 200 steps) and by annealed importance "
        "sampling, which know nothing of how a model was trained. Log-likelihoods are densities of grey values "
        "centred by the mean training image.",
        "Published are squared errors and FID on colour images (SVHN, five layers: 0.011 and 35.23, by a later paper); "
        "they cannot be held against these. Encoder and short run have the same decoder, steps and data.",
        "The standard deviation of the pixels is the published one and is not learned: a larger one would suit the "
        "first epochs better, whatever the inference.",
        "The picture has interpolations between the posterior means that each arm's own inference finds.",
    ),
    measure=measure,
    draw=draw,
    picture=sheet,
)  # fmt: skip
