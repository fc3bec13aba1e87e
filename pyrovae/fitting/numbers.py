"""Numbers of a trained run on test data; nothing here changes a weight.

Bounds are of log p(x) in nats per datum, their standard errors over data. What has no value says why in words. Of a
tilted prior, numbers are estimates where log Z has been measured, else log p(x) + log Z.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrovae import diagnose, evidence
from pyrovae.chunks import per_chunk
from pyrovae.diagnose.collapse import ACTIVE, mean_variance
from pyrovae.errors import LatentError, NoDensityError
from pyrovae.evidence.estimate import LOWER, NO_BOUND, UNNORMALISED, kind_of
from pyrovae.fitting import atlas, denoising
from pyrovae.fitting.material import Material
from pyrovae.fitting.outcome import Findings, Group
from pyrovae.minibatches import Rows
from pyrovae.models import text_vae
from pyrovae.runtime import evaluating
from pyrovae.table import Number

__all__ = ["evaluate", "independent_pixels", "perplexity"]

_ROWS = 50  # sentences scored at once, of about one length
_VALUES = 50_000_000  # that a layer may hold at once
_APART = 1_000_003  # seeds of the parts of one datum's draws
_DRAWS, _SCORED = 100, 40  # of every posterior, for its mean; of them, for its KL
_AT_MOST = "perplexity, at most"  # a lower bound of log p(x) bounds it from above
_CHAIN = "unknown: the density is of the whole chain, not of z"
_NO_DENSITY = "no bound: the guide has draws but no density"
_OF_CHARTS = "none: a coordinate means something within its chart alone"
_NAMED = {LOWER: "{}", NO_BOUND: "{} (estimate)", UNNORMALISED: "{} + log Z"}  # numbers of each kind
_AUDITED = 20  # data whose posterior is integrated on a grid


def evaluate(model: Any, guide: Any, material: Material, num_samples: int, seed: int) -> Findings:
    """All numbers of a model and its guide on the test data."""
    if not hasattr(guide, "traits"):
        return _exact(model, material)
    if model.traits.latents == "diffusion":
        return denoising.evaluate(model, guide, material, seed)
    x, found = material.rows, Findings(kind=kind_of(model, LOWER))
    if guide.traits.has_density:
        weights = _weights(model, guide, material, num_samples, seed)
        elbo, iwae = evidence.summarize(weights, model=model)
        name = _NAMED[iwae.kind]
        found.khat = diagnose.pareto_khat(weights)
        share = float((~(found.khat <= 0.7)).double().mean())
        found.numbers = {
            name.format(elbo.name): Number(elbo.mean, elbo.mean_se),
            name.format(iwae.name): Number(iwae.mean, iwae.mean_se),
            "k-hat above 0.7": Number(share, math.sqrt(share * (1 - share) / len(x))),
        }  # fmt: skip
        if material.vocabulary is not None:
            found.numbers[_AT_MOST] = perplexity(iwae.values, material.test.lengths)
    else:
        found.numbers = {"ELBO": _NO_DENSITY, f"IWAE-{num_samples}": _NO_DENSITY}
        if material.vocabulary is not None:
            found.numbers[_AT_MOST] = _NO_DENSITY
    if hasattr(model, "log_evidence"):
        with torch.no_grad():
            found.numbers["log p(x), exact"] = Number.over_data(model.log_evidence(x).double())
        found.numbers |= _audit(model, guide, x, num_samples, seed)
    rows = min(64, _at_once(_DRAWS * material.width))
    found.numbers |= _information(model, guide, x, seed, rows)
    if model.traits.charts:
        found.numbers |= dict.fromkeys(("active latents", "linear probe"), _OF_CHARTS)
        found.numbers |= atlas.facts(model, guide, material, seed)
        return found
    u = per_chunk(
        lambda *some: guide.draws(_DRAWS, *some), (model, guide), (x,), {}, plate=guide.plate, batched=guide.batched,
        seed=seed, chunk=rows,
    )  # fmt: skip
    found.centre = u.mean(0)
    variance = mean_variance(u)
    found.numbers["active latents"] = Number(float((variance > ACTIVE).sum()))
    found.numbers["latents"] = Number(float(len(variance)))
    if hasattr(model, "groups"):
        found.groups = _groups(model, guide, material, u, variance, seed)
    found.numbers["linear probe"] = _probe(found.centre, material.labels, seed)
    return found


def perplexity(log_likelihood: Tensor, lengths: Tensor) -> Number:
    """exp of minus the mean over words, ends counted; the standard error is that of a ratio of means.

    Args:
        log_likelihood: `[N]`, nats a sentence.
        lengths: `[N]`.
    """
    value, mean = text_vae.perplexity(log_likelihood, lengths), float(log_likelihood.sum() / lengths.sum())
    rest = (log_likelihood - mean * lengths) / lengths.double().mean()
    return Number(value, value * float(rest.std()) / math.sqrt(len(lengths)))


def independent_pixels(material: Material) -> float | None:
    """Mean log-density of test data when every pixel has the law of that pixel in the training data, nats; None of
    other likelihoods than Bernoulli and Gaussian."""
    train, test, kind = material.train, material.test, material.form.likelihood
    if kind not in ("bernoulli", "gaussian") or not isinstance(train, Tensor) or not isinstance(test, Tensor):
        return None
    mean = train.double().mean(0)
    if kind == "bernoulli":
        law: Any = torch.distributions.Bernoulli(mean.clamp(0.01, 0.99))
        return float(law.log_prob(test.round().double()).flatten(1).sum(1).mean())
    spread = (train.double() - mean).square().mean().sqrt().clamp_min(0.01)  # one scale, as the models have
    return float(torch.distributions.Normal(mean, spread).log_prob(test.double()).flatten(1).sum(1).mean())


def _exact(model: Any, material: Material) -> Findings:
    """A model without latents is scored exactly."""
    data = Rows(material.test)
    values = torch.zeros(len(data), dtype=torch.float64)
    with torch.no_grad(), evaluating(model):
        for index in data.in_order(_ROWS):
            values[index] = model.log_prob(*data.take(index)).double().cpu()
    return Findings({
        "log p(x), exact": Number.over_data(values), "perplexity": perplexity(values, material.test.lengths),
        "mutual information": "none: the model has no latents",
    })  # fmt: skip


def _weights(model: Any, guide: Any, material: Material, num_samples: int, seed: int) -> Tensor:
    """log p(x, z) - log q(z | x), `[S, N]`; sentences by length, with the noise of their own places."""
    if material.vocabulary is None:
        rows = min(_at_once(material.width * num_samples), max(1, 64_000 // num_samples))
        return evidence.log_weights(
            model, guide, material.rows, num_samples=num_samples, seed=seed, chunk=rows, progress="evaluation"
        ).cpu()
    from tqdm.auto import tqdm

    data, words = Rows(material.test), len(material.vocabulary)
    found = torch.zeros(num_samples, len(data), dtype=torch.float64)
    for index in tqdm(data.in_order(_ROWS), desc="evaluation", disable=None):
        (some,) = data.take(index)
        # A draw holds a score of every word at every place: long sentences take their draws in parts.
        draws = min(num_samples, _at_once(some.shape[1] * words))
        for number, part in enumerate(torch.arange(num_samples).split(draws)):
            found[part.unsqueeze(1), index] = evidence.log_weights(
                model, guide, some, num_samples=len(part), seed=seed + number * _APART, indices=index.tolist(),
                chunk=_at_once(some.shape[1] * words * len(part)),
            ).cpu()  # fmt: skip
    return found


def _at_once(values: int) -> int:
    """How many of what holds so many values fit."""
    return max(1, _VALUES // values)


def _audit(model: Any, guide: Any, x: Tensor, num_samples: int, seed: int) -> dict[str, Number | str]:
    """What the guide loses, exactly and as Monte Carlo sees it, of few data with one or two latents."""
    if model.latent_dim > 2 or not (guide.traits.has_density and guide.traits.marginal):
        return {}
    some = x[:_AUDITED]
    names = (f"KL(q || p(z|x)) of {len(some)} data, exact", "log p(x) - ELBO of these, Monte Carlo",
             "KL(p(z|x) || q) of these, exact")  # fmt: skip
    try:
        found = diagnose.audit(model, guide, some, num_samples=num_samples, seed=seed)
    except ValueError as error:  # tails that no grid resolves
        return dict.fromkeys(names, f"unknown: {error}")
    values = [Number(one.mean, one.mean_se) for one in (found.kl, found.gap, found.reverse)]
    return dict(zip(names, values, strict=True))


def _information(model: Any, guide: Any, x: Tensor, seed: int, rows: int) -> dict[str, Number | str]:
    """KL to the prior, or to its base where it is tilted, and mutual information with its cap."""
    name, found = "KL to the prior's base" if model.traits.tilted else "KL", dict[str, Number | str]()
    if guide.traits.has_density and guide.traits.marginal:
        known = diagnose.information(
            model, guide, x, num_samples=_DRAWS, num_scored=_SCORED, seed=seed, chunk=rows
        )  # fmt: skip
        mutual = known.mutual_information
        found[name] = Number.over_data(known.kl)
        found["mutual information"] = _CHAIN if mutual is None else Number(mutual)
    else:
        found[name] = found["mutual information"] = (
            _CHAIN if guide.traits.has_density else "unknown: the guide has no density"
        )
    found["log N, the most it can be"] = Number(math.log(len(x)))
    return found


def _groups(model: Any, guide: Any, material: Material, u: Tensor, variance: Tensor, seed: int) -> list[Group]:
    """Each group of a ladder, shallowest first."""
    x, y = material.rows, material.labels
    known: dict[str, Number | str] = {}
    if not guide.traits.has_density or not guide.traits.marginal:
        known = dict.fromkeys(model.groups, _CHAIN if guide.traits.has_density else "unknown: no density")
    else:
        try:
            information = diagnose.group_information(model, guide, x, num_samples=_SCORED, seed=seed)
        except (NoDensityError, LatentError) as error:  # of flows and of classes that are summed out: say so
            known = dict.fromkeys(model.groups, f"unknown: {error}")
        else:
            known = {name: Number(float(kl), float(se)) for name, kl, se in
                     zip(information.groups, information.kl, information.se, strict=True)}  # fmt: skip
    found = []
    for level, (name, part) in enumerate(model.groups.items()):
        one = Group(
            name, part.stop - part.start, known[name], int((variance[part] > ACTIVE).sum()),
            _probe(u.mean(0)[:, part], y, seed),
        )  # fmt: skip
        if hasattr(model, "responsibilities"):
            with torch.no_grad():
                one.clusters = model.responsibilities(u, level).mean(0).argmax(-1).cpu()
            if y is not None:
                one.clustering = diagnose.clustering(one.clusters, y, num_clusters=model.num_clusters[level])
        found.append(one)
    return found


def _probe(codes: Tensor, y: Tensor | None, seed: int) -> Number | str:
    """Accuracy of a linear predictor of labels, fitted to half of the codes and judged by the others."""
    if y is None:
        return "none: these data have no labels"
    classes = len(y.unique())
    if not 2 <= classes <= len(y) // 2:
        return f"none: {classes} classes among {len(y)} data are too {'many' if classes > 1 else 'few'} to predict"
    found = diagnose.probe(codes, y, seed=seed)
    return Number(found.accuracy, found.se)

