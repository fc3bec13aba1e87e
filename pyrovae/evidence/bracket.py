"""log p(x) from both sides.

From below by importance weights and by annealing, whichever seems larger; from above by annealing backwards, which
needs exact draws of the posterior: closed forms, grids, or data the model made itself. On real data without any of
them there is no upper bound, and chains that passed their checks give an estimate in its place that is called one.

Bidirectional Monte Carlo (Grosse, Ancha & Roy 2016) brackets *simulated* data: it tells how far annealing of that
length is off for data as the model sees them; real data can be harder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae import noise
from pyrovae.evidence.annealing import ais, annealed, reverse_ais
from pyrovae.evidence.estimate import NO_BOUND, UNNORMALISED, Estimate
from pyrovae.evidence.importance import log_weights, summarize
from pyrovae.latents import LatentSpace
from pyrovae.provenance import Provenance
from pyrovae.runtime import evaluating, seeded
from pyrovae.simulate import simulate
from pyrovae.store import isolated

if TYPE_CHECKING:
    from pyrovae.reference import Reference

__all__ = ["Bracket", "bdmc", "bracket"]


@dataclass(frozen=True)
class Bracket:
    """log p(x) of every datum from below and, where that exists, from above.

    Attributes:
        lower: a lower bound per datum: the one of `candidates` that was larger on half of the weights, taken on the
            other half (and the other way round, on average), because the larger of two noisy bounds is none.
        upper: an upper bound; an estimate (`upper.kind`) where the posterior's draws are those of chains; or None.
        candidates: the bounds `lower` was chosen from.
        simulated: the data were made by the model.
    """

    lower: Estimate
    upper: Estimate | None
    candidates: tuple[Estimate, ...]
    simulated: bool = False

    @property
    def width(self) -> Tensor:
        """`[B]`, nats; Monte Carlo error can make one negative.

        Raises:
            ValueError: there is no upper bound.
        """
        if self.upper is None:
            raise ValueError("there is no upper bound: pass reference=..., or use evidence.bdmc on simulated data")
        return self.upper.values - self.lower.values

    def __repr__(self) -> str:
        about = "simulated data" if self.simulated else "data"
        lines = [f"log p(x) of {len(self.lower.values)} {about}, nats per datum"]
        lines += [f"  {e.name:<28} {e.kind:<12} {e.mean:10.3f} +- {e.mean_se:.3f}" for e in self._shown()]
        if self.upper is None:
            lines.append("  no upper bound: exact draws of the posterior are not to be had")
        else:
            width = self.width
            spread = float(width.std() / math.sqrt(len(width))) if len(width) > 1 else float("nan")
            lines.append(f"  {'width':<28} {'':<12} {float(width.mean()):10.3f} +- {spread:.3f}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{e.name}</td><td>{e.kind}</td><td>{e.mean:.3f} &plusmn; {e.mean_se:.3f}</td></tr>"
            for e in self._shown()
        )
        return f"<table><caption>log p(x), nats per datum, {len(self.lower.values)} data</caption>{rows}</table>"

    def _shown(self) -> list[Estimate]:
        return [*self.candidates, *([] if self.upper is None else [self.upper])]


def bracket(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 5000,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    reference: Reference | None = None,
    seed: int = 0,
    annealing: Mapping[str, Any] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    **kwargs: Any,
) -> Bracket:
    """The best lower bound of every datum's log p(x) and, where one exists, an upper bound.

    Args:
        model, guide: and the arguments both are called with. `guide` may be None: annealing alone.
        num_samples: importance draws.
        num_chains, num_temperatures: of annealing; 0 temperatures leave it out, and with it the upper bound.
        reference: draws of the posterior of these data. By default the model's own `posterior`, of a model that knows
            its evidence, too (`posterior` and `log_evidence`, as `reference.exact` takes them).
        annealing: further options of `evidence.ais`.
        progress: label of a progress bar.
        resume: folder that keeps finished chunks; a run that was stopped goes on from there.

    Raises:
        ValueError: nothing to bound with, or a reference for other data or that is not ok.
    """
    options = {"num_chains": num_chains, "num_temperatures": num_temperatures, "seed": seed, "progress": progress,
               **_without_resume(annealing)}  # fmt: skip
    if guide is not None:
        options = {"plate": guide.plate, "batched": guide.batched, **options}
    found: list[tuple[Estimate, Tensor]] = []
    if guide is not None:
        weights = log_weights(
            model, guide, *args, num_samples=num_samples, seed=seed, progress=progress,
            resume=_folder(resume, "importance"), **kwargs,
        )  # fmt: skip
        provenance = Provenance.of_call(args, kwargs, num_data=weights.shape[1], seed=seed, num_samples=num_samples)
        found.append((summarize(weights, provenance, model=model)[1], weights))
    upper = None
    if num_temperatures:
        found.append(annealed(model, None, args, resume=_folder(resume, "forward"), **options, **kwargs))
        draws, exact = _posterior(model, args, kwargs, reference, num_chains, seed)
        if draws is not None:
            upper = reverse_ais(model, draws, *args, resume=_folder(resume, "reverse"), **options, **kwargs)
            upper = upper if exact or upper.kind == UNNORMALISED else replace(upper, kind=NO_BOUND)
    if not found:
        raise ValueError("nothing to bound log p(x) with: pass a guide, or num_temperatures of at least 1")
    return Bracket(_better(found), upper, tuple(estimate for estimate, _ in found))


def bdmc(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    observes: Mapping[str, int | str] | None = None,
    plate: str | None = "data",
    batched: Any = "auto",
    seed: int = 0,
    progress: str | None = None,
    annealing: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    **kwargs: Any,
) -> Bracket:
    """Bracket data that the model makes, one for every row of the arguments, in place of the observations.

    Args:
        observes: observed site -> position or name of its argument, where that cannot be told.
        Others as in `bracket`.
    """
    with seeded(noise.mix(seed, -1)), evaluating(model), isolated():
        space = LatentSpace(model, *args, plate=plate, batched=batched, **kwargs)
        u, new_args, new_kwargs = simulate(space, args, kwargs, observes)
    options = {"num_chains": num_chains, "num_temperatures": num_temperatures, "plate": plate, "batched": batched,
               "seed": seed, "progress": progress, **_without_resume(annealing)}  # fmt: skip
    lower = ais(model, *new_args, resume=_folder(resume, "forward"), **options, **new_kwargs)
    # One draw of the posterior is all there is: its chains share their start, which leaves the bound a bound.
    upper = reverse_ais(
        model, u.expand(num_chains, *u.shape), *new_args, resume=_folder(resume, "reverse"), **options, **new_kwargs
    )
    return Bracket(lower, upper, (lower,), simulated=True)


def _posterior(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reference: Reference | None, chains: int, seed: int
) -> tuple[Tensor | None, bool]:
    """Draws `[C, B, D]`, and whether they are exact."""
    if reference is None:
        if not (hasattr(model, "posterior") and hasattr(model, "log_evidence")):
            return None, False
        with torch.no_grad(), seeded(noise.mix(seed, -2)), isolated(), evaluating(model):
            return model.posterior(*args, **kwargs).sample((chains,)), True
    reference.require(model, args, kwargs)
    if not reference.usable.all():
        raise ValueError(f"an upper value needs a reference that is ok for every datum, not {reference.verdicts}")
    every = max(1, len(reference.pooled) // chains)
    draws = reference.pooled[::every][:chains]
    if len(draws) < chains:
        raise ValueError(f"the reference has {len(draws)} draws for {chains} chains: make more, or lower num_chains")
    return draws, reference.kind == "exact"


def _better(found: list[tuple[Estimate, Tensor]]) -> Estimate:
    """The better of two lower bounds, datum by datum, chosen on one half of the weights and taken on the other."""
    first = found[0][0]
    if len(found) == 1:
        return first
    bounds = torch.stack([torch.stack([_log_mean(weights[half::2]) for half in (0, 1)]) for _, weights in found])
    best = bounds.argmax(0).flip(0)  # [2, B]: which one the other half would take
    values = bounds.gather(0, best.unsqueeze(0))[0].mean(0)
    each = torch.stack([estimate.se for estimate, _ in found])
    se = each.gather(0, best).square().mean(0).sqrt()  # both halves from one: its own
    name = f"better of {', '.join(estimate.name for estimate, _ in found)}"
    return replace(first, name=name, values=values, se=se)


def _log_mean(weights: Tensor) -> Tensor:
    return torch.logsumexp(weights, 0) - math.log(len(weights))


def _folder(resume: str | Path | None, name: str) -> Path | None:
    return None if resume is None else Path(resume) / name


def _without_resume(annealing: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if annealing is not None and "resume" in annealing:
        raise ValueError("two annealings would share that folder: pass resume to this function, not to annealing")
    return annealing or {}
