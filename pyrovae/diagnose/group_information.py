r"""How much does each group of latents know? KL to the prior and active units, latent site by latent site.

With groups numbered as the model draws them, and :math:`u_{<l}` those before l,

.. math::
    \mathrm{KL}_l = \mathbb{E}_{q(u|x)} \log \frac{q(u_l \mid u_{<l}, x)}{p(u_l \mid u_{<l})}, \qquad
    \sum_l \mathrm{KL}_l = \mathrm{KL}(q(u|x) \,\|\, p(u)).

The conditional of q is the ratio of two of its marginals, so these must be known: Gaussians and mixtures of them. Where
q factorises over groups it is q(u_l | x). A group that has switched off has a KL of 0 and no active unit, which is what
happens to the deep groups of ladders trained without warm-up (Zhao, Song & Ermon 2017; Li et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae import noise
from pyrovae.chunks import per_chunk
from pyrovae.diagnose.collapse import ACTIVE, mean_variance
from pyrovae.errors import LatentError, NoDensityError
from pyrovae.families import marginal
from pyrovae.latents import LatentSpace, LogJoint
from pyrovae.losses.base import require_pair
from pyrovae.precision_normal import PrecisionNormal
from pyrovae.sitewise import run_at

__all__ = ["GroupInformation", "drawn_posterior", "group_information", "marginal_log_prob"]


@dataclass(frozen=True)
class GroupInformation:
    """What a guide's posteriors know, group by group.

    Attributes:
        groups: latent sites, in the order the model draws them.
        kl_per_datum: `[L, N]`, nats; over all groups they add up to `information`'s.
        kl_se: `[L, N]`, their Monte Carlo standard errors.
        mean_variance: `[D]`, variance over data of the posterior mean, as in `information`.
        sizes: `[L]`, latents of each group.
    """

    groups: tuple[str, ...]
    kl_per_datum: Tensor
    kl_se: Tensor
    mean_variance: Tensor
    sizes: Tensor

    @property
    def kl(self) -> Tensor:
        """`[L]`, mean over data, nats per datum."""
        return self.kl_per_datum.mean(1)

    @property
    def se(self) -> Tensor:
        """`[L]`, its standard error, for data drawn from a population; of one datum, the Monte Carlo error."""
        number = self.kl_per_datum.shape[1]
        return self.kl_se[:, 0] if number == 1 else self.kl_per_datum.std(1) / math.sqrt(number)

    @property
    def active(self) -> Tensor:
        """`[L]`, latents of each group whose posterior mean moves with the data; of one datum, none."""
        parts = (self.mean_variance > ACTIVE).split(self.sizes.tolist())
        return torch.stack([part.sum() for part in parts])

    def __repr__(self) -> str:
        number = self.kl_per_datum.shape[1]
        width = max(len(name) for name in (*self.groups, "group"))
        lines = [f"{'group'.ljust(width)}  {'KL, nats':>16}  active"]
        rows = zip(self.groups, self.kl.tolist(), self.se.tolist(), self.active.tolist(), self.sizes, strict=True)
        for name, kl, se, active, size in rows:
            units = f"{active} of {size}" if number > 1 else "takes two data"
            lines.append(f"{name.ljust(width)}  {f'{kl:.2f} +- {se:.2f}':>16}  {units}")
        return "\n".join([*lines, f"over {number} data"])


def group_information(
    model: Callable[..., Any], guide: Any, *args: Any, num_samples: int = 100, seed: int = 0, chunk: int = 64,
    **kwargs: Any,
) -> GroupInformation:  # fmt: skip
    """KL to the prior and active units of each latent site.

    Args:
        model, guide: and the arguments both are called with.
        num_samples: draws per datum, at least 2.
        seed, chunk: as in `evidence.log_weights`.

    Raises:
        NoDensityError: the guide has no density, or its marginals over the first groups are not known.
        LatentError: the model sums discrete latents out, so that log p(u_l) has no value of its own.
        ScaleError: a user's scale is in force.
    """
    require_pair(model, guide, None)
    if num_samples < 2:
        raise ValueError(f"group_information needs num_samples of at least 2, got {num_samples}")

    def measure(*some: Any, **named: Any) -> Tensor:
        """Draws and, as L more latents, log q - log p of every group there, `[S, b, D + L]`."""
        with guide._aside():
            q, u, space = drawn_posterior(guide, num_samples, some, named)
            names = [site.name for site in space.sites]
            until = [marginal_log_prob(q, space, names[: level + 1], u) for level in range(len(names))]
            log_q = torch.stack(until, -1).diff(dim=-1, prepend=torch.zeros_like(until[0]).unsqueeze(-1))
            return torch.cat([u, log_q - _log_priors(space.bind(*some, **named), u)], -1).double()

    found = per_chunk(
        measure, (model, guide), args, kwargs, plate=guide.plate, batched=guide.batched, seed=seed, chunk=chunk
    )
    sites = guide.space(*args, **kwargs).sites
    u, excess = found[..., : -len(sites)], found[..., -len(sites) :]
    return GroupInformation(
        tuple(site.name for site in sites), excess.mean(0).T, excess.std(0).T / math.sqrt(num_samples),
        mean_variance(u), torch.tensor([site.size for site in sites]),
    )  # fmt: skip


def _log_priors(bound: LogJoint, u: Tensor) -> Tensor:
    """log p of every latent site given those before it, log-Jacobian included, `[S, B, D] -> [S, B, L]`."""
    if bound.space.plate is not None and bound.foldable:
        runs = [run_at(bound.at_rows(bound.rows.repeated(len(u))), u.flatten(0, 1))]
    else:
        runs = [run_at(bound, one) for one in u]
    each = [torch.cat([run.log_probs[site.name] for run in runs]).view(u.shape[:2]) for site in bound.space.sites]
    return torch.stack(each, -1)


def drawn_posterior(
    guide: Any, num_samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor, LatentSpace]:
    """A guide's posterior in closed form, draws of it `[S, B, D]` and the space they lie in, inside `per_chunk`.

    Raises:
        NoDensityError: there is no closed form, or two calls do not find the same posterior.
        LatentError: discrete latents are summed out.
        ScaleError: a user's scale is in force.
    """
    space = guide.space(*args, **kwargs)
    if space.enumerated:
        raise LatentError(
            f"the model sums {list(space.enumerated)} out of all sites together, so single groups have no density: "
            "write it collapsed (of VLAC, classes='collapsed')"
        )
    space.require_unit_scale(*args, **kwargs)
    seeds = noise.row_seeds()  # the same for both calls: a posterior that is found with noise is found again
    with noise.per_datum(0, seeds):
        q = guide.posterior(*args, **kwargs)
    with noise.per_datum(0, seeds):
        u, log_q = guide._sampler(*args, **kwargs).draw(num_samples)
    if not torch.allclose(q.log_prob(u), log_q, rtol=1e-3, atol=1e-2):
        raise NoDensityError(
            f"two calls of {guide!r} gave two posteriors for the same data: take noise of torch's own out of it"
        )
    return q, u, space


def marginal_log_prob(q: Any, space: LatentSpace, names: Sequence[str], u: Tensor) -> Tensor:
    """log q of some latent sites alone, at their parts of `u: [S, B, D]`, `[S, B]`.

    Raises:
        NoDensityError: that marginal has no closed form.
    """
    parts = [site.slice for site in space.sites if site.name in names]
    if len(parts) == len(space.sites):
        return q.log_prob(u)
    if isinstance(q, PrecisionNormal):
        q = torch.distributions.MultivariateNormal(q.loc, scale_tril=q.scale_tril, validate_args=False)
    whole = slice(parts[0].start, parts[-1].stop)
    if whole.stop - whole.start == sum(part.stop - part.start for part in parts):
        parts = [whole]
    elif not isinstance(q, torch.distributions.Independent):  # only independent latents may be added up
        raise NoDensityError(
            f"the marginal of {type(q).__name__} over the sites {list(names)} is only at hand where the model draws "
            "them one after another: name others, or use a diagonal family"
        )
    total = torch.zeros(u.shape[:-1], dtype=u.dtype, device=u.device)
    for part in parts:
        own = marginal(q, part)
        if own is None:
            raise NoDensityError(
                f"the marginal of {type(q).__name__} over the sites {list(names)} alone has no closed form: use a "
                "diagonal, full-rank, low-rank or mixture family"
            )
        total = total + own.log_prob(u[..., part])
    return total
