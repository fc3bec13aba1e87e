"""Running a Pyro model at given latents: structure, log-densities per datum, draws from the prior.

One small messenger sets the latents of a run from `u` (with the support that the run itself has) and adds up
log-densities as the sites go by; no trace is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to

from pyrovae import noise
from pyrovae.batching import RowArguments
from pyrovae.errors import DataError, LatentError, PlateError
from pyrovae.plates import per_datum
from pyrovae.runtime import evaluating, preserve_rng
from pyrovae.sites import LatentSite, pack, simplify

__all__ = [
    "AtLatents", "Structure", "counts", "evaluate", "hidden_samples", "inspect_model", "prior_draw", "remaining_scales",
]  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """What one look at a model finds: the program, its latents, and where they lie in `u`."""

    model: Callable[..., Any]
    plate: str | None
    sites: tuple[LatentSite, ...]
    enumerated: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def joint(self) -> bool:
        """Whether the whole program is one datum."""
        return self.plate is None

    def block(self, site: LatentSite, u: Tensor, *, padded: bool = False) -> Tensor:
        """A site's part of `u: [..., B, D]`, in the site's layout."""
        return site.arrange(u[..., site.slice], joint=self.joint, padded=padded)


def counts(site: dict[str, Any]) -> bool:
    """Whether a trace node is a random site (not a plate's row draw, a parameter or `pyro.deterministic`)."""
    return site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")


def _trace(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with poutine.block(), pyro.validation_enabled(False):
        return poutine.trace(model).get_trace(*args, **kwargs)


def inspect_model(
    model: Callable[..., Any], plate: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Structure:
    """Find the latents of a model from two runs (two, to see which supports move)."""
    trace, twin = _trace(model, args, kwargs), _trace(model, args, kwargs)
    nodes = {name: site for name, site in trace.nodes.items() if counts(site)}
    if plate is not None:
        _check_plates(nodes, plate)
    sites: list[LatentSite] = []
    enumerated: list[str] = []
    start = 0
    for name, site in nodes.items():
        fn, value = site["fn"], site["value"]
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != plate]
        if site["is_observed"]:
            _check_support(name, fn, value, site["mask"])
            if plate is not None:
                batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
                _check_batch_dims(name, batch[:-1], frames)
            continue
        if fn.support.is_discrete:
            if not fn.has_enumerate_support:
                raise LatentError(
                    f"the discrete latent {name!r} ({type(fn).__name__}) can be neither enumerated nor relaxed: sum it "
                    "out by hand, or observe it with poutine.condition"
                )
            enumerated.append(name)
            continue
        other = twin.nodes[name]["fn"]
        support = simplify(fn.support, other.support, len(fn.event_shape))
        unconstrained = _coordinates(name, fn, value)[len(fn.batch_shape) :]
        for frame in frames:
            if frame.size != frame.full_size:
                raise PlateError(f"the inner plate {frame.name!r} is subsampled: only the data plate may be")
        inner = fn.batch_shape[:-1] if plate is not None else fn.batch_shape
        size = inner.numel() * unconstrained.numel()
        sites.append(
            LatentSite(
                name=name,
                slice=slice(start, start + size),
                inner=inner,
                frames=tuple((frame.name, frame.size, frame.dim) for frame in frames),
                unconstrained_shape=unconstrained,
                event_dim=len(fn.event_shape),
                support=support,
            )
        )
        _check_batch_dims(name, inner, frames)
        start += size
    if not sites:
        raise LatentError("the model has no continuous latent site: there is nothing to infer")
    if enumerated and any(frame.name != plate for site in nodes.values() for frame in site["cond_indep_stack"]):
        raise LatentError(
            f"the discrete latents {enumerated} share the model with inner plates: sum them out by hand instead"
        )
    first = nodes[sites[0].name]["value"]
    return Structure(model, plate, tuple(sites), tuple(enumerated), first.dtype, first.device)


def _check_plates(nodes: dict[str, Any], plate: str) -> None:
    outside, found = [], {}
    for name, site in nodes.items():
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        found.update({frame.name: frame.size for frame in frames.values()})
        if plate not in frames:
            outside.append(name)
        elif frames[plate].dim != -1:
            raise PlateError(f"plate {plate!r} must be the outermost one, at dim -1, but has dim {frames[plate].dim}")
    if outside:
        plates = ", ".join(f"{name!r} (size {size})" for name, size in found.items()) or "none"
        raise PlateError(
            f"the sites {outside} lie outside the plate {plate!r} (plates found: {plates}); move them inside, pass "
            "plate='other' or plate=None for joint inference, or fix global latents with poutine.condition"
        )


def _coordinates(name: str, fn: Any, value: Tensor) -> torch.Size:
    """Shape of a latent in unconstrained coordinates."""
    try:
        transform = biject_to(fn.support)
        shape = transform.inverse_shape(fn.shape())
        zero = value.new_zeros(shape)
        transform.log_abs_det_jacobian(zero, transform(zero))
    except NotImplementedError as error:
        raise LatentError(
            f"the support of site {name!r} ({_base_name(fn)}) has no coordinates in R^n with a Jacobian: "
            "reparameterise the model (for covariances LKJCholesky and scales, for directions a normalised Normal)"
        ) from error
    return shape


def _check_batch_dims(name: str, inner: torch.Size, frames: list[Any]) -> None:
    sizes = [size for size in inner if size != 1]
    plates = [frame.size for frame in frames if frame.size != 1]
    if sorted(sizes) != sorted(plates):
        raise PlateError(
            f"site {name!r} has batch shape {list(inner)} outside any plate: declare those dims with .to_event(...) "
            "or an inner pyro.plate (or bring data and distribution to the same shape)"
        )


def _check_support(name: str, fn: Any, value: Tensor, mask: Any) -> None:
    if isinstance(fn, Unit):
        return
    try:
        torch.broadcast_shapes(fn.shape(), value.shape)
    except RuntimeError as error:
        raise DataError(
            f"the data at site {name!r} have shape {tuple(value.shape)}, but the model makes {tuple(fn.shape())}: "
            "reshape one of them"
        ) from error
    if mask is False:
        return
    inside = _inside(fn, value)
    if isinstance(mask, Tensor):
        inside = inside | ~mask
    if not inside.all():
        base = _base_support(fn.support)
        if hasattr(base, "explain"):  # our own constraints know better
            raise DataError(f"site {name!r}: {base.explain(value)}")
        hint = ": binarise them, or use a continuous likelihood" if fn.support.is_discrete else ""
        raise DataError(
            f"{int((~inside).sum())} of {inside.numel()} data at site {name!r} lie outside the support of "
            f"{_base_name(fn)}{hint}"
        )


def _base_support(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _inside(fn: Any, value: Tensor) -> Tensor:
    """Whether values lie in the support; masked ones (also element by element, below `to_event`) always do."""
    if isinstance(fn, MaskedDistribution):
        return _inside(fn.base_dist, value) | ~torch.as_tensor(fn._mask)
    if isinstance(fn, Independent):
        inside = _inside(fn.base_dist, value)
        n = fn.reinterpreted_batch_ndims
        return inside.flatten(-n).all(-1) if n else inside
    return fn.support.check(value)


def _base_name(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


class AtLatents(poutine.messenger.Messenger):
    """Set the latents of a run from `u` and add up log-densities per datum."""

    def __init__(self, structure: Structure, u: Tensor, check: bool) -> None:
        super().__init__()
        self.structure, self.u, self.check = structure, u, check
        self.sites = {site.name: site for site in structure.sites}
        self.depth = 0 if structure.plate is None else 1  # batch dims of a site without enumeration
        self.latent: list[Tensor] = []
        self.enumerated: list[Tensor] = []  # of discrete latents, and of latents that depend on them
        self.observed: list[Tensor] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        site = self.sites.get(msg["name"])
        if site is None:
            return
        block = self.structure.block(site, self.u)
        if site.is_real:
            msg["value"] = block
        else:
            transform = biject_to(msg["fn"].support)
            msg["value"] = transform(block)
            msg["infer"] = {**msg["infer"], "_log_det": transform.log_abs_det_jacobian(block, msg["value"])}
        msg["is_observed"] = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not counts(msg):
            return
        if self.check and msg["name"] not in self.sites and msg["is_observed"]:
            _check_support(msg["name"], msg["fn"], msg["value"], msg["mask"])
        log_prob = msg["fn"].log_prob(msg["value"])
        log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        if msg["name"] not in self.sites:
            kept = self.enumerated if msg["name"] in self.structure.enumerated else self.observed
            kept.append(self._reduce(log_prob, msg))
            return
        log_det = msg["infer"].get("_log_det")
        if log_det is not None:
            log_prob = log_prob + scale_and_mask(log_det, msg["scale"], msg["mask"])
        mixed = self.structure.enumerated and log_prob.dim() > self.depth
        (self.enumerated if mixed else self.latent).append(self._reduce(log_prob, msg))

    def _reduce(self, log_prob: Tensor, msg: dict[str, Any]) -> Tensor:
        if not self.structure.enumerated:
            return per_datum(log_prob, msg["cond_indep_stack"], self.structure.plate)
        if self.structure.plate is None:
            return log_prob.unsqueeze(-1)
        frame = next(frame for frame in msg["cond_indep_stack"] if frame.name == self.structure.plate)
        return log_prob * (frame.size / frame.full_size)


def hidden_samples() -> Any:
    """A handler that keeps an inner run of the model out of outer traces while SVI still sees its parameters."""
    return poutine.block(hide_fn=lambda msg: msg["type"] == "sample")


def evaluate(
    structure: Structure, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *, check: bool = False
) -> tuple[Tensor, Tensor]:
    """(latent part, everything else) of the log-joint at `u: [R, D]`, each `[R]` (`[1]` in joint mode).

    With `check`, observations outside their support raise `DataError`.
    """
    at = AtLatents(structure, u, check)
    model = structure.model
    if structure.enumerated:
        model = poutine.enum(config_enumerate(model), first_available_dim=-1 - at.depth)
    with hidden_samples(), at:
        model(*args, **kwargs)
    zero = u.new_zeros(u.shape[:-1] if structure.plate is not None else (1,))
    latent = sum(at.latent, zero)
    if not structure.enumerated:
        return latent, sum(at.observed, zero)
    # log p(z) and log p(x, z), each summed over the discrete latents: their difference is log p(x | z).
    prior = latent + _summed_out(at.enumerated)
    return prior, latent + _summed_out([*at.enumerated, *at.observed]) - prior


def _summed_out(terms: list[Tensor]) -> Tensor:
    """log sum of exp over all enumerated dims, `[R]`."""
    total = torch.stack(torch.broadcast_tensors(*terms)).sum(0)
    return torch.logsumexp(total.reshape(-1, total.shape[-1]), 0)


def remaining_scales(
    model: Callable[..., Any], plate: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, float]:
    """Each site's scale once the data plate's N/B is taken out (the extreme one, where a scale is a tensor)."""
    scales = {}
    for name, site in _trace(model, args, kwargs).nodes.items():
        if counts(site):
            scale = torch.as_tensor(site["scale"], dtype=torch.double)
            for frame in site["cond_indep_stack"]:
                if frame.name == plate:
                    scale = scale * (frame.size / frame.full_size)
            scales[name] = float(scale.flatten()[(scale - 1).abs().argmax()])
    return scales


def prior_draw(structure: Structure, rows: RowArguments, num_samples: int, *, foldable: bool) -> Tensor:
    """Draws of the latents from the prior, `[S, B, D]`, without gradient."""

    def draw(source: RowArguments, times: int) -> Tensor:
        joint = structure.plate is None
        folded = not joint and foldable
        runs = [source.repeat(times)] if folded else [(source.args, source.kwargs)] * times
        packed = []
        for args, kwargs in runs:
            nodes = _trace(structure.model, args, kwargs).nodes
            values = {site.name: nodes[site.name]["value"] for site in structure.sites}
            packed.append(pack(structure.sites, values, joint=joint))
        return packed[0].view(times, source.size, -1) if folded else torch.stack(packed)

    with torch.no_grad(), evaluating(structure.model):
        if not noise.active():
            return draw(rows, num_samples)
        parts = []
        for row, seed in enumerate(noise.row_seeds()):
            with preserve_rng():
                torch.manual_seed(seed)
                if structure.plate is None or not foldable:
                    return draw(rows, num_samples)
                parts.append(draw(rows.select(slice(row, row + 1)), num_samples))
        return torch.cat(parts, dim=1)
