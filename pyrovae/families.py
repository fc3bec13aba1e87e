"""Variational families: a flat parameter `lam: [B, P]` to a distribution over `u`, batch [B], event [D].

`lam` is the currency of inference: encoders output it, semi-amortized steps and per-datum SVI move it by plain
gradient steps, mixtures concatenate it. Every coordinate of it is therefore unconstrained, and every family is
reparameterised and twice differentiable. Log-scale parameters are clamped to [-10, 10] in value, not in gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.mixture import MixtureOfNormals as Mixture

__all__ = ["FAMILIES", "DiagonalNormal", "Family", "FullRankNormal", "LowRankNormal", "MixtureOfNormals",
           "get_family", "marginal"]  # fmt: skip


class Family(ABC):
    """A variational family over R^D.

    Attributes:
        dim: D.
        blocks: the named parts of `lam`; their slices tile `[0, num_params)`.
        noise_dim: standard normals per draw that `sample` takes.
        symmetric: whether `sample(lam, -noise)` mirrors `sample(lam, noise)` at the mean (antithetic draws).
        reparameterised: whether the whole gradient flows through the draws.
        gaussian: whether every site's posterior is a Gaussian in closed form.
        gaussian_base: whether it is a Gaussian, or a flow from one.
    """

    symmetric = True
    reparameterised = True
    gaussian = gaussian_base = True

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"a family needs at least one dimension, got {dim}")
        self.dim = dim
        self.blocks: dict[str, slice] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim})"

    def _tile(self, **sizes: int) -> None:
        start = 0
        for name, size in sizes.items():
            self.blocks[name] = slice(start, start + size)
            start += size

    @property
    def num_params(self) -> int:
        """P."""
        return max(block.stop for block in self.blocks.values())

    @property
    def noise_dim(self) -> int:
        return self.dim

    @property
    def strata_noise_dim(self) -> int:
        """Standard normals per draw that `stratified` takes."""
        return self.noise_dim

    @abstractmethod
    def __call__(self, lam: Tensor) -> Any:
        """`lam: [B, P]` to a distribution, batch `[B]`, event `[D]`."""

    @abstractmethod
    def init(self, rows: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """A `lam: [rows, P]` close to the standard normal."""

    @abstractmethod
    def sample(self, lam: Tensor, noise: Tensor) -> Tensor:
        """Reparameterised draws `[S, B, D]` from `noise: [S, B, noise_dim]`."""

    def rsample_and_log_prob(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised draws `[S, B, D]` and log q at them `[S, B]` (flows give both in one pass)."""
        u = self.sample(lam, noise)
        return u, self(lam).log_prob(u)

    def frozen_log_prob(self, lam: Tensor, u: Tensor) -> Tensor:
        """log q(u), `[..., B]`, with q's parameters held constant: gradient flows through `u` alone."""
        return self(lam.detach()).log_prob(u)

    def stratified(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted draws whose expectation is exact in the mixing weights.

        Args:
            noise: `[S, B, strata_noise_dim]`.

        Returns:
            log-weights `[R, B]` (their exponentials sum to 1 over R) and draws `[R, B, D]`.
        """
        u = self.sample(lam, noise)
        return torch.full(u.shape[:2], -math.log(len(u)), dtype=u.dtype, device=u.device), u

    def stratified_and_log_prob(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`stratified` and log q at its draws, `[R, B]` (flows give them in one pass)."""
        log_weights, u = self.stratified(lam, noise)
        return log_weights, u, self(lam).log_prob(u)

    def entropy(self, lam: Tensor) -> Tensor | None:
        """Entropy `[B]` in nats, or None where there is no closed form."""
        return self(lam).entropy()

    def base(self, lam: Tensor) -> Any:
        """The Gaussian the family starts from (itself, except for flows)."""
        return self(lam)

    def _check(self, lam: Tensor) -> None:
        if lam.shape[-1] != self.num_params:
            raise ValueError(
                f"{self!r} takes lam with {self.num_params} columns ({', '.join(self.blocks)}), got "
                f"{lam.shape[-1]}: give the encoder {self.num_params} outputs"
            )


def _clamp(log_scale: Tensor, bound: float = 10.0) -> Tensor:
    return log_scale + (log_scale.clamp(-bound, bound) - log_scale).detach()


class DiagonalNormal(Family):
    """Independent normals. `lam = (loc [D], log_var [D])`, scale = exp(log_var / 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._tile(loc=dim, log_var=dim)

    def _parts(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        self._check(lam)
        return lam[..., self.blocks["loc"]], (0.5 * _clamp(lam[..., self.blocks["log_var"]])).exp()

    def __call__(self, lam: Tensor) -> Any:
        loc, scale = self._parts(lam)
        return dist.Normal(loc, scale).to_event(1)

    def init(self, rows: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return torch.zeros(rows, self.num_params, dtype=dtype, device=device)

    def sample(self, lam: Tensor, noise: Tensor) -> Tensor:
        loc, scale = self._parts(lam)
        return loc + scale * noise

    def entropy(self, lam: Tensor) -> Tensor:
        _, scale = self._parts(lam)
        return scale.log().sum(-1) + 0.5 * self.dim * math.log(2 * math.pi * math.e)


class FullRankNormal(Family):
    """Normal with full covariance. `lam = (loc [D], log_diag [D], lower [D(D-1)/2])`.

    The Cholesky factor of the covariance has diagonal exp(log_diag) and the entries `lower` below it, row by row.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._tile(loc=dim, log_diag=dim, lower=dim * (dim - 1) // 2)

    def _parts(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        self._check(lam)
        scale_tril = torch.diag_embed(_clamp(lam[..., self.blocks["log_diag"]]).exp())
        rows, columns = torch.tril_indices(self.dim, self.dim, offset=-1, device=lam.device)
        below = torch.zeros_like(scale_tril)
        below[..., rows, columns] = lam[..., self.blocks["lower"]]
        return lam[..., self.blocks["loc"]], scale_tril + below

    def pack(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The `lam: [B, P]` of given locations `[B, D]` and Cholesky factors `[B, D, D]`."""
        rows, columns = torch.tril_indices(self.dim, self.dim, offset=-1, device=loc.device)
        log_diag = scale_tril.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([loc, log_diag, scale_tril[..., rows, columns]], dim=-1)

    def __call__(self, lam: Tensor) -> Any:
        loc, scale_tril = self._parts(lam)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)

    def init(self, rows: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return torch.zeros(rows, self.num_params, dtype=dtype, device=device)

    def sample(self, lam: Tensor, noise: Tensor) -> Tensor:
        loc, scale_tril = self._parts(lam)
        return loc + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def entropy(self, lam: Tensor) -> Tensor:
        self._check(lam)
        log_diag = _clamp(lam[..., self.blocks["log_diag"]])
        return log_diag.sum(-1) + 0.5 * self.dim * math.log(2 * math.pi * math.e)


class LowRankNormal(Family):
    """Normal with covariance W W' + diag(exp(log_var)). `lam = (loc [D], log_var [D], factor [D * rank])`."""

    def __init__(self, dim: int, rank: int | None = None) -> None:
        super().__init__(dim)
        self.rank = max(1, math.isqrt(dim)) if rank is None else rank
        if self.rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        self._tile(loc=dim, log_var=dim, factor=dim * self.rank)

    @property
    def noise_dim(self) -> int:
        return self.dim + self.rank

    def _parts(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check(lam)
        factor = lam[..., self.blocks["factor"]].reshape(*lam.shape[:-1], self.dim, self.rank)
        return lam[..., self.blocks["loc"]], factor, _clamp(lam[..., self.blocks["log_var"]]).exp()

    def __call__(self, lam: Tensor) -> Any:
        loc, factor, var = self._parts(lam)
        return dist.LowRankMultivariateNormal(loc, factor, var)

    def init(self, rows: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        lam = torch.zeros(rows, self.num_params, dtype=dtype, device=device)
        # The factor must not start at zero: there its gradient vanishes by symmetry.
        size = self.dim * self.rank
        start = 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(0)).to(lam)
        lam[:, self.blocks["factor"]] = start
        return lam

    def sample(self, lam: Tensor, noise: Tensor) -> Tensor:
        loc, factor, var = self._parts(lam)
        shared = (factor @ noise[..., self.dim :].unsqueeze(-1)).squeeze(-1)
        return loc + var.sqrt() * noise[..., : self.dim] + shared


class MixtureOfNormals(Family):
    """Mixture of M diagonal normals. `lam = (logits [M], locs [M * D], log_vars [M * D])`."""

    symmetric = reparameterised = gaussian = gaussian_base = False

    def __init__(self, dim: int, num_components: int = 2) -> None:
        super().__init__(dim)
        if num_components < 1:
            raise ValueError(f"a mixture needs at least one component, got {num_components}")
        self.num_components = num_components
        self._tile(logits=num_components, locs=num_components * dim, log_vars=num_components * dim)

    @property
    def noise_dim(self) -> int:
        return self.dim + 1  # the last one picks the component

    @property
    def strata_noise_dim(self) -> int:
        return self.num_components * self.dim

    def __call__(self, lam: Tensor) -> Mixture:
        self._check(lam)
        shape = (*lam.shape[:-1], self.num_components, self.dim)
        log_vars = _clamp(lam[..., self.blocks["log_vars"]]).reshape(shape)
        return Mixture(
            lam[..., self.blocks["logits"]], lam[..., self.blocks["locs"]].reshape(shape), (0.5 * log_vars).exp()
        )

    def init(self, rows: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        lam = torch.zeros(rows, self.num_params, dtype=dtype, device=device)
        # Equal components stay equal for ever: spread them.
        spread = torch.randn(self.num_components * self.dim, generator=torch.Generator().manual_seed(0))
        lam[:, self.blocks["locs"]] = spread.to(lam)
        return lam

    def sample(self, lam: Tensor, noise: Tensor) -> Tensor:
        q = self(lam)
        uniform = torch.special.ndtr(noise[..., -1:])
        steps = q.log_weights.detach().exp().cumsum(-1)[..., :-1]
        return q.at((uniform > steps).sum(-1), noise[..., :-1])

    def stratified(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        q = self(lam)
        samples = len(noise)
        eps = noise.reshape(samples, -1, self.num_components, self.dim)
        u = (q.locs + q.scales * eps).movedim(2, 1).flatten(0, 1)
        log_weights = q.log_weights.movedim(-1, 0).repeat(samples, 1) - math.log(samples)
        return log_weights, u

    def entropy(self, lam: Tensor) -> None:
        return None


FAMILIES: dict[str, type[Family]] = {
    "diagonal": DiagonalNormal,
    "full-rank": FullRankNormal,
    "low-rank": LowRankNormal,
    "mixture": MixtureOfNormals,
}
FLOWS = {"householder": "Householder", "iaf": "IAF", "coupling": "Coupling", "spline": "Spline"}  # of pyrovae.flows


def get_family(family: str | type[Family] | Any, dim: int, **options: Any) -> Family:
    """A family over R^dim from its name, its class, or any callable of `dim`."""
    if isinstance(family, Family):
        if family.dim != dim:
            raise ValueError(f"{family!r} was given for a model with {dim} unconstrained latents")
        return family
    refuse_unbuilt_flow(family)
    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}: choose one of {', '.join(FAMILIES)}")
        family = FAMILIES[family]
    refuse_unbuilt_flow(type(made := family(dim, **options)))
    return made


def refuse_unbuilt_flow(family: Any) -> None:
    """Raise for a flow that is named, not built: nothing would train its weights if they were made later."""
    name = FLOWS.get(family) if isinstance(family, str) else None
    if isinstance(family, type) and issubclass(family, nn.Module):
        name = family.__name__
    if name is not None:
        raise ValueError(f"{name} has weights, which must exist before the guide does: pass the flow itself, "
                         f"family=pyrovae.flows.{name}(dim=D), D the model's unconstrained latents")  # fmt: skip


def marginal(q: Any, part: slice) -> Any | None:
    """The marginal of a family's distribution over some of its dims, or None where it has no closed form.

    Diagonal, full-rank, low-rank and mixture families are closed under it.
    """
    if isinstance(q, Mixture):
        return Mixture(q.logits, q.locs[..., part], q.scales[..., part])
    if isinstance(q, torch.distributions.Independent) and isinstance(q.base_dist, torch.distributions.Normal):
        return dist.Normal(q.base_dist.loc[..., part], q.base_dist.scale[..., part]).to_event(1)
    if isinstance(q, torch.distributions.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(
            q.loc[..., part], q._unbroadcasted_cov_factor[..., part, :], q._unbroadcasted_cov_diag[..., part]
        )
    if isinstance(q, torch.distributions.MultivariateNormal):
        covariance = q.covariance_matrix[..., part, part]
        return dist.MultivariateNormal(q.loc[..., part], covariance_matrix=covariance)
    return None
