"""What is measured on every trained arm: bounds of log p(x), paired over arms, and how far they can be believed."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from pyrovae import diagnose, evidence
from pyrovae.chunks import per_chunk
from pyrovae.guides.base import Guide
from pyrovae.provenance import Provenance
from pyrovae.runtime import evaluating, seeded

__all__ = ["differences", "evaluate", "inference_time", "number"]

_ROWS = 50  # data evaluated between two looks at the progress bar
_KL_DRAWS = 100
_CALLS, _WARM_UP = 30, 3  # of an inference that is timed


def number(values: Tensor) -> dict[str, float]:
    """Mean and standard error over data."""
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "se": se}


def evaluate(
    guide: Guide, x: Tensor, num_samples: int, *, seed: int, name: str, progress: bool
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Bounds at S and S / 10 draws, the KL to the prior and k-hat, over `x: [B, X]`.

    Returns:
        numbers with standard errors, and each datum's ELBO and IWAE for paired differences.
    """
    from tqdm.auto import tqdm

    marginal = guide.traits.marginal  # chains have no density of z alone, so no KL either
    parts: dict[str, list[Tensor]] = {"ELBO": [], "IWAE few": [], "IWAE": [], "k-hat": []}
    if marginal:
        parts["KL"] = []
    few = max(1, num_samples // 10)
    starts = tqdm(range(0, len(x), _ROWS), desc=f"{name}, evaluation", disable=None if progress else True)
    for start in starts:
        rows = range(start, min(start + _ROWS, len(x)))
        some = x[start : rows.stop]
        weights = evidence.log_weights(
            guide.model, guide, some, num_samples=num_samples, seed=seed, indices=rows
        ).cpu()  # fmt: skip
        elbo, iwae = evidence.summarize(weights)
        parts["ELBO"].append(elbo.values)
        parts["IWAE"].append(iwae.values)
        parts["IWAE few"].append(evidence.summarize(weights[:few])[1].values)
        parts["k-hat"].append(diagnose.pareto_khat(weights))
        if marginal:
            parts["KL"].append(_kl(guide, some, rows, seed))
    joined = {key: torch.cat(tensors).double() for key, tensors in parts.items()}
    share = float((joined["k-hat"] > 0.7).double().mean())
    numbers = {
        "ELBO": number(joined["ELBO"]),
        f"IWAE-{few}": number(joined["IWAE few"]),
        f"IWAE-{num_samples}": number(joined["IWAE"]),
        **({"KL": number(joined["KL"])} if marginal else {}),
        "k-hat above 0.7": {"mean": share, "se": math.sqrt(share * (1 - share) / len(x))},
    }
    return numbers, {key: joined[key].tolist() for key in ("ELBO", "IWAE")}


def _kl(guide: Guide, x: Tensor, rows: range, seed: int) -> Tensor:
    """KL(q(z | x) || p(z)) of a standard normal prior, by draws, `[B]`."""

    def terms(x: Tensor) -> Tensor:
        q = guide.posterior(x)
        u = q.sample((_KL_DRAWS,))
        return q.log_prob(u) + 0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)

    with seeded(seed):
        values = per_chunk(
            terms, (guide.model, guide), (x,), {}, plate=guide.plate, batched=guide.batched, seed=seed,
            chunk=len(x), indices=rows,
        )  # fmt: skip
    return values.double().mean(0).cpu()


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


def differences(arms: list[dict[str, Any]], baseline: str) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> bound -> paired difference from the baseline with its standard error, nats per datum.

    Raises:
        ValueError: arms were evaluated on different data.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    base = next((arm for arm in arms if arm["name"] == baseline and "values" in arm), None)
    if base is None:
        return found
    for arm in arms:
        if arm is base or "values" not in arm:
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
