"""What is measured on every trained arm: bounds of log p(x), paired over arms, and how far they can be believed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae import diagnose, evidence, flows
from pyrovae.chunks import per_chunk
from pyrovae.data.text import Sentences
from pyrovae.fitting.numbers import perplexity
from pyrovae.guides.base import Guide
from pyrovae.minibatches import Rows
from pyrovae.provenance import Provenance
from pyrovae.runtime import evaluating

__all__ = ["differences", "evaluate", "inference_time", "layer_probes", "number", "plain"]

_ROWS = 50  # data evaluated between two looks at the progress bar
_DRAWS, _KL_DRAWS = 200, 10  # of a KL, a datum's own error is nothing beside the spread over data
_PROBED = 20  # draws of a posterior mean
_CALLS, _WARM_UP = 30, 3  # of an inference that is timed


def number(values: Tensor) -> dict[str, float]:
    """Mean and standard error over data."""
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "se": se}


def plain(value: float) -> dict[str, Any]:
    """A number whose error is not known from the data it was computed on."""
    return {"mean": float(value), "se": None}


def evaluate(
    model: Any, guide: Any, x: Tensor | Sentences, num_samples: int, *, seed: int, name: str, progress: bool
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Bounds at S and S / 10 draws, KL to the prior, mutual information, active latents and k-hat, over all of x; of
    sentences their perplexity, too. A model without latents is scored exactly; one with a tilted prior is to be
    normalised before, and its numbers are estimates.

    Returns:
        numbers with standard errors, and each datum's ELBO and IWAE for paired differences.
    """
    from tqdm.auto import tqdm

    data = Rows(x)
    few = max(1, num_samples // 10)
    found = {key: torch.zeros(len(data), dtype=torch.float64) for key in ("ELBO", "IWAE few", "IWAE", "k-hat")}
    # Sentences go by length, so that hardly any padding is scored.
    batches = data.in_order(_ROWS)
    for index in tqdm(batches, desc=f"{name}, evaluation", disable=None if progress else True):
        (some,) = data.take(index)
        if not hasattr(guide, "traits"):
            with torch.no_grad(), evaluating(model):
                exact = model.log_prob(some).double().cpu()
            for key in ("ELBO", "IWAE few", "IWAE"):
                found[key][index] = exact
            continue
        weights = evidence.log_weights(
            model, guide, some, num_samples=num_samples, seed=seed, indices=index.tolist()
        ).cpu()  # fmt: skip
        elbo, iwae = evidence.summarize(weights, model=model)
        found["ELBO"][index], found["IWAE"][index] = elbo.values, iwae.values
        found["IWAE few"][index] = evidence.summarize(weights[:few])[1].values
        found["k-hat"][index] = diagnose.pareto_khat(weights).double()
    share = float((found["k-hat"] > 0.7).double().mean())
    numbers = {
        "ELBO": number(found["ELBO"]),
        f"IWAE-{few}": number(found["IWAE few"]),
        f"IWAE-{num_samples}": number(found["IWAE"]),
        **_latents(model, guide, data, seed),
        "k-hat above 0.7": {"mean": share, "se": math.sqrt(share * (1 - share) / len(data))},
    }
    if data.sentences is not None:
        found_ppl = perplexity(found["IWAE"], data.sentences.lengths)
        numbers["PPL"] = {"mean": found_ppl.value, "se": found_ppl.se}
    return numbers, {key: found[key].tolist() for key in ("ELBO", "IWAE")}


def _latents(model: Any, guide: Any, data: Rows, seed: int) -> dict[str, dict[str, float]]:
    """What the posteriors know; chains have no density of z alone, so no KL either."""
    if not hasattr(guide, "traits"):
        return {"KL": {"mean": 0.0, "se": 0.0}, "MI": plain(0), "AU": plain(0)}
    if not guide.traits.marginal or "continuous" not in guide.traits.latents:  # a diffusion's are noise by design
        return {}
    flow = isinstance(getattr(guide, "family_spec", None), flows.IAF)  # whose densities elsewhere take D passes each
    known = diagnose.information(
        model, guide, *data.tensors, num_samples=_DRAWS, num_scored=_KL_DRAWS, mixture=not flow, seed=seed
    )  # fmt: skip
    found = {"KL": number(known.kl), "AU": plain(float(known.active.sum()))}
    if known.mutual_information is not None:
        found["MI"] = plain(known.mutual_information)
    return found


def inference_time(guide: Guide, x: Tensor) -> dict[str, float]:
    """CPU milliseconds of one thread until the posteriors of `x` are found and drawn from once; draws of a chain are
    its posterior. The median, and half the range between quartiles."""
    before, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with evaluating(guide.model, guide):
            for _ in range(_WARM_UP + _CALLS):
                began = time.thread_time()
                guide.draws(1, x)
                times.append(1000 * (time.thread_time() - began))
    finally:
        torch.set_num_threads(before)
    low, middle, high = statistics.quantiles(times[_WARM_UP:], n=4)
    return {"mean": middle, "se": (high - low) / 2}


def differences(
    arms: list[dict[str, Any]], baseline_of: Callable[[str], str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> bound -> paired difference from its baseline with its standard error, nats per datum.

    Raises:
        ValueError: arms were evaluated on different data.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    known = {arm["name"]: arm for arm in arms if "values" in arm}
    for arm in known.values():
        base = known.get(baseline_of(arm["name"]))
        if base is None or base is arm:
            continue
        found[arm["name"]] = {}
        for bound in ("ELBO", "IWAE"):
            mean, se = evidence.difference(_estimate(arm, bound), _estimate(base, bound))
            found[arm["name"]][bound] = {"mean": mean, "se": se}
    return found


def _estimate(arm: dict[str, Any], bound: str) -> evidence.Estimate:
    values = torch.tensor(arm["values"][bound], dtype=torch.float64)
    provenance = Provenance(**arm["provenance"])
    return evidence.Estimate(bound, "lower bound", values, torch.zeros_like(values), provenance.num_samples or 1,
                             provenance)  # fmt: skip


def layer_probes(guide: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Row of a table: accuracy of a linear probe on each layer's posterior means; empty where labels are too few."""
    if not 2 <= len(y.unique()) < len(x) // 4:
        return {}
    u = per_chunk(lambda *some: guide.draws(_PROBED, *some), (guide.model, guide), (x,), {}, plate="data").mean(0)
    found = {}
    for name, part in getattr(guide.model, "groups", {"z": slice(None)}).items():
        probe = diagnose.probe(u[:, part], y)
        found[name] = {"mean": 100 * probe.accuracy, "se": 100 * probe.se}
    return {"table": "Digits from each layer's codes by a linear probe, accuracy in %", **found}
