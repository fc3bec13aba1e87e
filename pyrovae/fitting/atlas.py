"""A run with charts: where they start, how often each is in use, what only an atlas has to show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrovae import diagnose, plots
from pyrovae.fitting.material import Material
from pyrovae.fitting.outcome import Outcome
from pyrovae.fitting.picture import Picture
from pyrovae.runtime import evaluating
from pyrovae.table import Number

__all__ = ["facts", "pictures", "settle"]

_AGAINST = 5000  # training data that generated ones are held against
_TAU = 0.1  # predicted probability above which a chart holds a datum
_ROW, _COLUMNS, _SHOWN = 12, 16, 6  # pictures of samples and reconstructions in a row; points of a chart's coordinate
_NO_CHARTS = "unknown: the guide finds a datum in no chart"


def settle(model: Any, guide: Any, train: Tensor) -> None:
    """The charts' weights, after training: how often each is in use."""
    model.set_weights(guide.frequencies(train))


def facts(model: Any, guide: Any, material: Material, seed: int) -> dict[str, Number | str]:
    """Charts in use; how far generated data are from training data, and how many of these they reach, beside the same
    numbers of as many test data; how well charts agree.
    """
    names = ("charts in use", "charts", "unfaithfulness", "unfaithfulness of test data", "coverage",
             "coverage of test data", "cycle residual")  # fmt: skip
    if not guide.traits.charts:
        return dict.fromkeys(names, _NO_CHARTS) | {"charts": Number(model.num_charts)}
    x, data = material.rows, material.train[:_AGAINST]
    used = guide.predict(x).argmax(-1).unique()
    try:
        made: Tensor | str = guide.generate(len(x), seed=seed).x
    except ValueError as error:
        made = f"unknown: {error}"
    residuals = diagnose.cycle_residuals(guide, x, tau=_TAU).values
    values: tuple[Number | str, ...] = (
        Number(len(used)), Number(model.num_charts),
        made if isinstance(made, str) else Number.over_data(diagnose.unfaithfulness(made, data)),
        Number.over_data(diagnose.unfaithfulness(x, data)),
        made if isinstance(made, str) else Number(diagnose.coverage(made, data)),
        Number(diagnose.coverage(x, data)),
        Number.over_data(residuals) if len(residuals) > 1 else f"none: no two charts hold a datum above {_TAU:g} each",
    )  # fmt: skip
    return dict(zip(names, values, strict=True))


def pictures(outcome: Outcome, material: Material) -> list[Picture]:
    """Reconstructions through the likeliest chart, samples, and every chart along its coordinates."""
    return [*_reconstructions(outcome, material), _samples(outcome, material), _charts(outcome, material)]


def _reconstructions(outcome: Outcome, material: Material) -> list[Picture]:
    guide = outcome.guide
    if not guide.traits.charts:
        return []
    x = material.rows[:_COLUMNS]
    with evaluating(outcome.model, guide):
        figure = plots.reconstructions(material.planes(x), material.planes(guide.reconstruct(x)), columns=_COLUMNS)
    words = "Above, test data; below, the model's mean E[x | z, c] through the chart that the predictor likes best."
    return [Picture("Reconstructions", figure, words)]


def _samples(outcome: Outcome, material: Material) -> Picture:
    model, guide, number = outcome.model, outcome.guide, 3 * _ROW
    words = "Charts by their weights, coordinates anywhere in their cube; each picture is the model's mean E[x | z, c]."
    made = None
    if guide.traits.charts:
        try:
            found = guide.generate(number, seed=outcome.settings.seed)
        except ValueError as error:
            words += f" No draw is left out, though ({error})."
        else:
            made = found.x
            words += (
                f" Shown are draws that the predictor takes for the chart they are from, {found.kept:.0%} of all: "
                "corners of a cube that no datum is sent to are not on the manifold."
            )
    if made is None:
        with torch.no_grad(), evaluating(model):
            c = torch.distributions.Categorical(logits=model.log_weights).sample((number,))
            made = model.mean(torch.rand(number, model.latent_dim).to(model.log_weights), c)
    return Picture("Samples", plots.samples(material.planes(made), columns=_ROW), words)


def _charts(outcome: Outcome, material: Material) -> Picture:
    model = outcome.model
    coordinates = min(2, model.latent_dim)
    z = torch.full((coordinates, _SHOWN, model.latent_dim), 0.5).to(model.log_weights)
    for k in range(coordinates):
        z[k, :, k] = torch.linspace(0.05, 0.95, _SHOWN)
    every = torch.arange(model.num_charts, device=z.device).unsqueeze(1)
    with torch.no_grad(), evaluating(model):
        made = model.mean(z.flatten(0, 1), every)
    shares = model.log_weights.exp()
    rows = {f"chart {c}, {float(shares[c]):.0%}": material.planes(made[c]) for c in range(len(made))}
    which = "its coordinate" if coordinates == 1 else "its first coordinate and then along its second"
    words = (
        f"One chart a row, with its weight: the model's mean E[x | z, c] along {which}, in {_SHOWN} pictures from 0.05 "
        "to 0.95 while others stay at 0.5."
    )
    return Picture("Charts", plots.images(rows), words)

