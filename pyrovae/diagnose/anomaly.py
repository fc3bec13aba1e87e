r"""Which data does the model not know? Scores per datum, in nats, higher for stranger data, and how well they detect.

* "evidence": :math:`-\log p(x)`, from above, by minus the importance-weighted bound of S draws.
* "elbo": minus the ELBO, which also counts what the guide loses on x (its KL to the posterior).
* "layer-ratio": for several latent groups (Havtorn, Frellsen, Hauberg & Maaloe 2021). Some groups A are drawn as the
  model draws them, given those before, and only the rest K from the guide:

.. math::
    r(z|x) = q(z_K | x) \prod_{l \in A} p(z_l | z_{<l}), \qquad
    L^A = \mathbb{E}_r \Big[ \log p(x|z) + \sum_{l \in K} \log p(z_l | z_{<l}) - \log q(z_K|x) \Big],

.. math::
    \text{score} = L - L^A = \mathrm{KL}(r \,\|\, p(z|x)) - \mathrm{KL}(q \,\|\, p(z|x)),

L the ELBO; with L the importance-weighted bound the second KL goes to 0 with S. log p(x) has cancelled: a datum that is
likely only because its details are common does not pass. With A the k groups drawn last (the shallow ones, next to the
data; the paper's LLR^{>k}), the score is what the shallow groups must add to what the deep ones know of x. Data like
the training set's are mostly explained by the deep groups; of strange data these know little, all is left to the
shallow ones, and the score is high.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyrovae import evidence, handlers, noise
from pyrovae.chunks import per_chunk
from pyrovae.diagnose.group_information import drawn_posterior, marginal_log_prob
from pyrovae.errors import IncompatibleError, ScaleError
from pyrovae.evidence import Estimate
from pyrovae.evidence.estimate import NO_BOUND, UPPER, kind_of
from pyrovae.joint import AtLatents, Structure, hidden_samples
from pyrovae.latents import LatentSpace, LogJoint
from pyrovae.losses.base import require_pair
from pyrovae.provenance import Provenance
from pyrovae.runtime import preserve_rng

__all__ = ["Detection", "anomaly", "detection"]

_BLOCK = 1000  # draws of one datum at once


def anomaly(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    score: Literal["evidence", "elbo", "layer-ratio"] = "evidence",
    from_prior: int | str | Sequence[str] = 1,
    tight: bool = False,
    num_samples: int = 100,
    seed: int = 0,
    chunk: int | None = None,
    indices: Sequence[int] | None = None,
    **kwargs: Any,
) -> Estimate:
    """How strange each datum is to the model: `values` `[B]`, nats, higher is stranger, with standard errors.

    Args:
        model, guide: and the arguments both are called with.
        score: see above.
        from_prior: A, of "layer-ratio": names of latent sites, or the number of sites, from the one drawn last. A
            ladder draws its deepest group first, so 1 is "z1", the shallowest.
        tight: of "layer-ratio": L is the importance-weighted bound, not the ELBO.
        num_samples: S draws per datum.
        seed, chunk, indices: as in `evidence.log_weights`.

    Raises:
        NoDensityError: the guide has no density, or (layer ratio) no marginal in closed form over the groups of K.
        IncompatibleError: a layer ratio of a model with one latent group, or the guide was built for another model.
        LatentError: a layer ratio of a model that sums discrete latents out.
        ScaleError: a KL weight or scale is in force.
        ValueError: an unknown score or site, or a choice that leaves the guide no group.
    """
    options: dict[str, Any] = {"seed": seed, "chunk": chunk, "indices": indices}
    if score in ("evidence", "elbo"):
        bound = evidence.iwae if score == "evidence" else evidence.elbo
        found = bound(model, guide, *args, num_samples=num_samples, **options, **kwargs)
        kind = kind_of(model, UPPER)
        return Estimate(f"-{found.name}", kind, -found.values, found.se, num_samples, found.provenance)
    if score != "layer-ratio":
        raise ValueError(f"score must be 'evidence', 'elbo' or 'layer-ratio', got {score!r}")
    require_pair(model, guide, None)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if handlers.kl_weight() != 1.0:
        raise ScaleError(f"a layer ratio under a KL weight of {handlers.kl_weight():g}: evaluate with 1")
    space = guide.space(*args, **kwargs)
    drawn = _from_prior(space, from_prior)
    kept = [site.name for site in space.sites if site.name not in drawn]

    def measure(*some: Any, **named: Any) -> Tensor:
        """log w of all groups from q and, below, of those in A from the prior, `[2 S, b]`."""
        with guide._aside():
            q, u, space = drawn_posterior(guide, num_samples, some, named)
            bound = space.bind(*some, **named)
            whole = bound(u) - q.log_prob(u)
            return torch.cat([whole, _log_joint(bound, u, drawn) - marginal_log_prob(q, space, kept, u)]).double()

    # Both bounds take the same draws of the groups in K, whose part of the noise cancels.
    whole, part = per_chunk(
        measure, (model, guide), args, kwargs, plate=guide.plate, batched=guide.batched, seed=seed, indices=indices,
        chunk=chunk if chunk is not None else max(1, 64_000 // num_samples),
    ).chunk(2)  # fmt: skip
    elbo, iwae = evidence.summarize(whole)
    # What one draw adds to the bound: log w to the ELBO, w / mean(w) to the other (delta method).
    each = torch.softmax(whole, 0) * num_samples if tight else whole
    spread = (each - part).std(0) if num_samples > 1 else torch.full_like(part[0], torch.nan)
    name = f"{iwae.name if tight else elbo.name} - ELBO with {', '.join(drawn)} from the prior"
    return Estimate(
        name, NO_BOUND, (iwae if tight else elbo).values - part.mean(0), spread / math.sqrt(num_samples), num_samples,
        Provenance.of_call(args, kwargs, num_data=whole.shape[1], seed=seed, num_samples=num_samples),
    )  # fmt: skip


def _from_prior(space: LatentSpace, chosen: int | str | Sequence[str]) -> tuple[str, ...]:
    """Names of the sites in A, in the order of the program."""
    names = [site.name for site in space.sites]
    if len(names) < 2:
        raise IncompatibleError(
            f"a layer ratio compares latent groups, but the model has one, {names[0]!r}: use score='evidence', or a "
            "model with several (LadderVAE)"
        )
    if isinstance(chosen, int):
        if not 1 <= chosen < len(names):
            raise ValueError(
                f"from_prior must lie between 1 and {len(names) - 1}, one less than the model's groups, got {chosen}"
            )
        return tuple(names[-chosen:])
    wanted = {chosen} if isinstance(chosen, str) else set(chosen)
    if not wanted or not wanted < set(names):
        raise ValueError(
            f"from_prior must name some, not all, of the latent sites {names} (drawn in this order), got "
            f"{sorted(wanted)}"
        )
    return tuple(name for name in names if name in wanted)


def _log_joint(bound: LogJoint, u: Tensor, drawn: Sequence[str]) -> Tensor:
    """log p(x|z) + the log priors of all sites but those drawn, which the model draws anew, `[S, B, D] -> [S, B]`.

    Datum by datum, since a model's own draws come from torch's global random state.
    """
    structure, number = bound.space.structure, len(u)

    def run(some: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        at = _FromPrior(structure, some, drawn)
        with pyro.validation_enabled(False), hidden_samples(), at:
            structure.model(*args, **kwargs)
        return torch.stack([*at.latent, *at.observed]).sum(0)

    columns = []
    for row, seed in enumerate(noise.row_seeds()):
        with preserve_rng():
            torch.manual_seed(seed)
            if structure.joint or not bound.foldable:  # rows that cannot be taken apart
                return torch.stack([run(one, bound.rows.args, bound.rows.kwargs) for one in u])
            one = bound.rows.select(slice(row, row + 1))
            parts = []
            for some in u[:, row].split(_BLOCK):
                repeated = one.repeated(len(some))
                parts.append(run(some, repeated.args, repeated.kwargs))
            columns.append(torch.cat(parts))
    return torch.stack(columns, 1).view(number, -1)


class _FromPrior(AtLatents):
    """Latents from `u` but for some sites, which the model draws and whose log-density does not count."""

    def __init__(self, structure: Structure, u: Tensor, drawn: Sequence[str]) -> None:
        super().__init__(structure, u, check=False)
        self.drawn = drawn

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.drawn:
            super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.drawn:
            super()._pyro_post_sample(msg)


@dataclass(frozen=True)
class Detection:
    """How well a score tells strange data from known ones.

    Attributes:
        auroc: probability that a strange datum scores above a known one (ties count half).
        auroc_se: its standard error (DeLong, DeLong & Clarke-Pearson 1988); 0 where the two do not overlap, which says
            little of few data, and nan with a single datum on a side.
        auprc: average precision, strange data being the ones to find; a score at random has `num_out` over all.
        fpr80: share of known data flagged where 80 % of the strange ones are.
        num_in, num_out: known and strange data.
    """

    auroc: float
    auroc_se: float
    auprc: float
    fpr80: float
    num_in: int
    num_out: int

    def __repr__(self) -> str:
        base = self.num_out / (self.num_in + self.num_out)
        return (
            f"Detection of {self.num_out} strange among {self.num_in} known data: AUROC {self.auroc:.3f} +- "
            f"{self.auroc_se:.3f}, AUPRC {self.auprc:.3f} (at random {base:.3f}), {self.fpr80:.1%} false positives at "
            "80 % found"
        )


def detection(scores_in: Tensor | Estimate, scores_out: Tensor | Estimate) -> Detection:
    """How well scores `[M]` of strange data, the higher ones, are told from those `[N]` of known data.

    Raises:
        ValueError: another shape, no scores, or NaN among them.
    """
    known, strange = (
        torch.as_tensor(s.values if isinstance(s, Estimate) else s).detach().cpu().double()
        for s in (scores_in, scores_out)
    )
    for name, values in (("scores_in", known), ("scores_out", strange)):
        if values.dim() != 1 or not len(values) or values.isnan().any():
            raise ValueError(f"{name} must be numbers [N], one a datum and none NaN, got shape {list(values.shape)} "
                             f"with {int(values.isnan().sum())} NaN")  # fmt: skip
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    # Ranks: the curves depend on the order alone, and infinite scores have one as well.
    ranks = torch.cat([known, strange]).unique(return_inverse=True)[1].numpy()
    truth = torch.cat([torch.zeros(len(known)), torch.ones(len(strange))]).numpy()
    false, true, _ = roc_curve(truth, ranks, drop_intermediate=False)
    above, below = _share_below(strange, known), 1 - _share_below(known, strange)
    variance = above.var() / len(strange) + below.var() / len(known) if min(len(known), len(strange)) > 1 else torch.nan
    return Detection(
        float(roc_auc_score(truth, ranks)), math.sqrt(variance), float(average_precision_score(truth, ranks)),
        float(false[(true >= 0.8).argmax()]), len(known), len(strange),
    )  # fmt: skip


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Share of others below each value, ties by half."""
    others = others.sort().values
    sides = [torch.searchsorted(others, values, right=right).double() for right in (False, True)]
    return (sides[0] + sides[1]) / (2 * len(others))
