"""Pictures a model makes of codes: between two data, along one latent, and of what is hidden in a datum.

All of it is E[x | z] at some z, the mean of the model's own observed site, so any Pyro model with one will do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from torch import Tensor, nn
from torch.distributions import Independent

from pyrovae.chunks import per_chunk
from pyrovae.errors import DataError, IncompatibleError
from pyrovae.latents import LatentSpace
from pyrovae.losses.base import require_pair
from pyrovae.psis import pareto_khat, psis_smooth
from pyrovae.rowwise import RowWise
from pyrovae.runtime import evaluating, preserve_rng
from pyrovae.store import isolated

__all__ = ["Imputation", "centre", "decode", "impute", "interpolate", "traverse"]


def decode(
    space: LatentSpace, u: Tensor, *args: Any, site: str = "x", **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """(E[x | z], Var[x | z]) of an observed site at latents `u: [S, B, D]` of a call's data, `[S, B, *event]`; plates
    inside the data plate come before the event.

    Raises:
        DataError: no such observed site, or one whose mean has no closed form, or depends on a discrete latent too.
    """
    with isolated():
        rows = space.bind(*args, **kwargs)
    number, size = u.shape[:2]
    whole = space.plate is not None and rows.foldable
    calls = [rows.rows.repeat(number)] if whole else [(args, kwargs)] * number
    latents = [u.reshape(number * size, -1)] if whole else list(u)
    found = []
    with torch.no_grad(), preserve_rng(), isolated(), evaluating(space.model):
        for (some, named), point in zip(calls, latents, strict=True):
            nodes = poutine.trace(poutine.condition(space.model, space.constrain(point))).get_trace(*some, **named)
            if site not in nodes.nodes or not nodes.nodes[site]["is_observed"]:
                observed = [name for name in nodes.observation_nodes if name not in space.constrain(point)]
                raise DataError(f"the model observes {observed}, but no site {site!r}: pass site=...")
            fn = nodes.nodes[site]["fn"]
            try:
                moments = fn.mean, fn.variance
            except NotImplementedError as error:
                raise DataError(
                    f"the mean of site {site!r} ({type(fn).__name__}) is not known in closed form, so there is no "
                    "picture of E[x | z]: draw from the model at these latents"
                ) from error
            _require_settled(space, point, nodes.nodes, site, some, named)
            moments = tuple(moment.expand(fn.shape()) for moment in moments)
            if space.plate is None:
                found.append([moment.unsqueeze(0) for moment in moments])
                continue
            (row,) = (frame.dim for frame in nodes.nodes[site]["cond_indep_stack"] if frame.name == space.plate)
            ahead = [moment.movedim(len(fn.batch_shape) + row, 0) for moment in moments]  # of plates inside, too
            found.append([moment.reshape(-1, size, *moment.shape[1:]) for moment in ahead])
    mean, variance = (torch.cat(parts) for parts in zip(*found, strict=True))
    return mean, variance


def _require_settled(
    space: LatentSpace, point: Tensor, nodes: dict[str, Any], site: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise where E[x | z] moves with a discrete latent that the space sums out: a draw of it would decide."""
    for name in space.enumerated:
        values = nodes[name]["fn"].enumerate_support(expand=True)
        sites = [
            poutine.trace(poutine.condition(space.model, {**space.constrain(point), name: value}))
            .get_trace(*args, **kwargs).nodes[site]["fn"]
            for value in values
        ]  # fmt: skip
        first = sites[0]
        if not all(torch.equal(fn.mean, first.mean) and torch.equal(fn.variance, first.variance) for fn in sites):
            raise DataError(
                f"site {site!r} depends on the discrete latent {name!r}, which the space sums out, so there is no one "
                "E[x | z]: use the model's own methods (of a ChartAutoencoder mean(z, c), Charts.reconstruct and "
                "Charts.interpolate)"
            )


def interpolate(
    model: Callable[..., Any], guide: Any, x: Tensor, other: Tensor, *, steps: int = 8, site: str = "x"
) -> Tensor:
    """E[x | z] on the straight line between the posterior means of two batches of data, `[steps, B, *event]`."""
    if steps < 2:
        raise ValueError(f"an interpolation needs at least its two ends, got steps={steps}")
    if x.shape != other.shape:
        raise ValueError(f"both ends must have one shape, got {list(x.shape)} and {list(other.shape)}")
    start, end = centre(model, guide, x), centre(model, guide, other)
    share = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device).view(-1, 1, 1)
    return decode(guide.space(x), torch.lerp(start, end, share), x, site=site)[0]


def traverse(
    model: Callable[..., Any], guide: Any, x: Tensor, latent: int, values: Sequence[float], *, site: str = "x"
) -> Tensor:
    """E[x | z] with one unconstrained latent set to some values, the others at their posterior mean,
    `[len(values), B, *event]`.
    """
    mean = centre(model, guide, x)
    if not -mean.shape[-1] <= latent < mean.shape[-1]:
        raise ValueError(f"the model has latents 0 to {mean.shape[-1] - 1}, got {latent}")
    u = mean.repeat(len(values), 1, 1)
    u[..., latent] = torch.as_tensor(values, dtype=u.dtype, device=u.device).unsqueeze(1)
    return decode(guide.space(x), u, x, site=site)[0]


def centre(model: Any, guide: Any, x: Tensor, num_samples: int = 100) -> Tensor:
    """Posterior mean of the unconstrained latents, `[B, D]`, from draws."""
    require_pair(model, guide, None)
    return per_chunk(
        lambda *some: guide.draws(num_samples, *some).mean(0, keepdim=True), (model, guide), (x,), {},
        plate=guide.plate, batched=guide.batched,
    )[0]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Imputation:
    """What a model makes of hidden values.

    Attributes:
        mean: posterior predictive mean, `[B, *event]`; seen values as they are.
        sd: its standard deviation; 0 at seen values.
        khat: of the importance weights of each datum, `[B]`: above 0.7 the guide is too far from the posterior given
            what is seen, and a refined one is needed (`LocalSVI`, `Laplace`, more steps). None for guides without
            density, whose draws are taken as they come.
        log_density: log p(hidden | seen) of the true values, `[B]`, nats, from the weighted draws; None where they
            were not given. An estimate, neither bound, low where no draw comes near the truth.
    """

    mean: Tensor
    sd: Tensor
    khat: Tensor | None
    log_density: Tensor | None = None

    def __repr__(self) -> str:
        bad = "" if self.khat is None else f", k-hat above 0.7 for {int((self.khat > 0.7).sum())}"
        return f"Imputation of {len(self.mean)} data {list(self.mean.shape[1:])}{bad}"


def impute(
    model: Callable[..., Any],
    guide: Any,
    x: Tensor,
    mask: Tensor,
    *,
    num_samples: int = 500,
    fill: float = 0.0,
    truth: Tensor | None = None,
    site: str = "x",
    seed: int = 0,
    chunk: int | None = None,
) -> Imputation:
    """Hidden values from the posterior given the seen ones.

    The guide is copied onto a model that observes the seen values alone. An encoder still takes whole data, with
    `fill` in the holes: its draws are importance-weighted (Pareto-smoothed) to the posterior, and guides that refine or
    run chains come there by themselves. `guides.Exact` draws from the exact posterior given what is seen, of models
    that have one for some of their outputs (`model.marginal(seen)`).

    Args:
        model, guide: a guide built for this model, with a data plate.
        x: `[B, *event]`; hidden values may be anything, NaN included.
        mask: bool, the same shape; True where x is seen.
        num_samples: S draws per datum.
        fill: what an encoder sees in the holes.
        truth: whole data, the same shape, whose hidden values are to be scored.
        site: the observed site.
        seed, chunk: as in `evidence.log_weights`.

    Raises:
        DataError: another shape or type of mask or truth, or no such site.
        IncompatibleError: `guides.Exact` with a model whose posterior is known of whole data alone.
    """
    require_pair(model, guide, None)
    if truth is not None and (truth.shape != x.shape or not torch.isfinite(truth).all()):
        raise DataError(f"truth must be finite and of shape {list(x.shape)}, got shape {list(truth.shape)}")
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise DataError(f"mask must be bool of shape {list(x.shape)}, got {mask.dtype} of shape {list(mask.shape)}")
    if guide.plate is None:
        raise DataError("imputation goes datum by datum, but this guide takes the program as one datum (plate=None)")
    program = _Seen(model, site)
    partly = _on(guide, model, program)
    filled = torch.where(mask, x, torch.full_like(x, fill))
    dense = hasattr(partly, "_sampler")

    def measure(*rows: Any, **named: Any) -> Tensor:
        """Mean, sd, k-hat and log density of the truth, `[4, b, *event]`."""
        *whole, some = rows
        space = partly.space(some, **named)
        log_joint = space.bind(some, **named)
        if dense:
            with partly._aside():
                u, log_q = partly._sampler(some, **named).draw(num_samples)
                weights = (log_joint(u) - log_q).double()
            log_share, khat = torch.log_softmax(psis_smooth(weights)[0], 0), pareto_khat(weights)
        else:
            u, khat = partly.draws(num_samples, some, **named), torch.full((len(some),), torch.nan)
            log_share = torch.full(u.shape[:2], -math.log(num_samples), dtype=torch.double, device=u.device)
        mean, variance = decode(space, u, some, site=site, **named)
        share = log_share.exp().to(u.dtype).reshape(*log_share.shape, *[1] * (mean.dim() - 2))
        middle = (share * mean).sum(0)
        spread = (share * (variance + (mean - middle).square())).sum(0)
        density = torch.zeros_like(khat)
        for data in whole:  # log p(hidden | z) is what whole data add to the seen ones
            hidden = (guide.space(data).bind(data)(u) - log_joint(u)).double()
            density = torch.logsumexp(log_share + hidden, 0)
        each = [value.to(middle).view(-1, *[1] * (mean.dim() - 2)).expand_as(middle) for value in (khat, density)]
        return torch.stack([middle, spread.sqrt(), *each])

    rows = chunk if chunk is not None else max(1, 16_000 // num_samples)
    mean, sd, khat, density = per_chunk(
        measure, (program, partly), (filled,), {"_mask": mask}, plate=guide.plate, batched=partly.batched, seed=seed,
        chunk=rows, beside=() if truth is None else (torch.where(mask, x, truth),),
    )  # fmt: skip
    khat, density = (values.flatten(1)[:, 0].double() for values in (khat, density))
    return Imputation(
        torch.where(mask, x, mean), torch.where(mask, torch.zeros_like(sd), sd), khat if dense else None,
        None if truth is None else density,
    )  # fmt: skip


class _Seen(nn.Module):
    """The model with one observed site masked value by value: `program(x, _mask=mask)`."""

    def __init__(self, model: Callable[..., Any], site: str) -> None:
        super().__init__()
        self.model, self.site = model, site
        if hasattr(model, "traits"):
            self.traits = model.traits

    def forward(self, *args: Any, _mask: Tensor, **kwargs: Any) -> Any:
        with _Pixels(self.site, _mask):
            return self.model(*args, **kwargs)

    def posterior(self, x: Tensor, *, _mask: Tensor) -> RowWise:
        """p(z | what is seen), exact: for each pattern of holes that of the model of the seen outputs."""
        if not hasattr(self.model, "marginal"):
            raise IncompatibleError(
                "Exact knows this model's posterior given whole data alone: give the model marginal(seen), the model "
                "of some of its outputs, or take another guide"
            )
        patterns, which = _mask.unique(dim=0, return_inverse=True)
        rows = [(which == number).nonzero().squeeze(-1) for number in range(len(patterns))]
        parts = [self.model.marginal(p).posterior(x[some][:, p]) for p, some in zip(patterns, rows, strict=True)]
        return RowWise(parts, rows)


class _Pixels(poutine.messenger.Messenger):
    def __init__(self, site: str, mask: Tensor) -> None:
        super().__init__()
        self.site, self.mask = site, mask

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] != self.site or not msg["is_observed"]:
            return
        fn, dims = msg["fn"], len(msg["fn"].event_shape)
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if fn.event_shape:
            raise DataError(
                f"the values of site {self.site!r} are not independent given the latents ({type(fn).__name__}), so "
                "single ones cannot be hidden"
            )
        if msg["value"].shape != self.mask.shape:
            raise DataError(
                f"the values of site {self.site!r} have shape {list(msg['value'].shape)}, the mask "
                f"{list(self.mask.shape)}: only data with a row a datum can be hidden in part"
            )
        shape = torch.broadcast_shapes(fn.batch_shape, self.mask.shape)  # an enumerated latent puts a dim in front
        msg["fn"] = MaskedDistribution(fn.expand(shape), self.mask.expand(shape)).to_event(dims)


def _on(guide: Any, model: Any, program: Any) -> Any:
    """A copy of a guide, with everything it is made of, for another program over the same latents."""
    found = copy.deepcopy(guide, {id(model): program})
    for part in found.modules():
        for cache in ("_space", "_ledger"):
            if cache in part.__dict__:
                part.__dict__[cache] = None
        if part.__dict__.get("batched", "auto") != "auto":
            part.batched = [*part.batched, "_mask"]
        if hasattr(part, "encoder_input"):
            part.encoder_input = _Unmasked(part.encoder_input)
    return found


class _Unmasked:
    """An `encoder_input` that is not shown the mask."""

    def __init__(self, pick: Callable[..., Any]) -> None:
        self.pick = pick

    def __call__(self, *args: Any, _mask: Tensor, **kwargs: Any) -> Any:
        return self.pick(*args, **kwargs)
