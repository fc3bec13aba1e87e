"""Laplace's approximation per datum, amortized by an encoder's start (Park, Kim & Kim 2019, "VLAE").

From the encoder's mean, T Newton updates climb log p(x, z); the posterior is the Gaussian at the end point with the
log-joint's curvature there:

    mu_{t+1} = mu_t + a_t Lambda_t^{-1} grad log p(x, mu_t),      q(u | x) = N(mu_T, Lambda(mu_T)^{-1})

Lambda as in `pyrovae.curvature`, full covariance. Gradients flow through every update and through the covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import handlers, noise
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.curvature import Curvature, Expansion
from pyrovae.guides.amortized import first_argument, joint_space, require_net, run_encoder
from pyrovae.guides.base import DensityGuide, Sampler
from pyrovae.latents import LogJoint

__all__ = ["Laplace", "Mode"]

_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.02, 0.0)  # candidate step lengths of the line search


class Mode(NamedTuple):
    """Where the search ended.

    Attributes:
        loc: `[B, D]`.
        precision: `[B, D, D]`.
        converged: `[B]`: the Newton decrement is below the tolerance and no eigenvalue was floored.
        floored: `[B]`: the curvature was not positive definite and had to be lifted.
        decrement: `[B]`, 0.5 g' Lambda^{-1} g in nats: what another full step promises to gain.
    """

    loc: Tensor
    precision: Tensor
    converged: Tensor
    floored: Tensor
    decrement: Tensor


class Laplace(DensityGuide):
    """Gaussian at the posterior mode with the curvature there.

    Args:
        model: the Pyro program.
        encoder: module from the data to the start of the search: `[B, D]`, or `[B, 2 D]` of which the first D columns
            are taken; None (joint mode only) learns a constant start.
        num_steps: T >= 0 updates.
        update: "newton" searches each datum's step length on log p(x, z) (default); "full" takes a = 1; "damped" is
            the published schedule a_t = step_size / (t + 1), with step_size 0.5.
        tolerance: Newton decrement in nats below which a datum counts as converged.
        num_draws: 0 is Laplace's method: gradient and curvature at one point. An even M > 0 averages both over M
            antithetic draws of the current Gaussian. Its fixed point, E_q[grad] = 0 and Lambda = E_q[curvature], is the
            Gaussian nearest to the posterior in KL(q || p) instead of the mode; worth it where the posterior spans many
            linear pieces of a ReLU decoder.
        encoder_input, plate, batched, example: as in `Amortized`.

    Note:
        The posterior is a proper density whatever the search did, so the ELBO stays a bound; `mode(*args)` says
        where it did not converge (a model may have no joint mode at all: centred hierarchies).
    """

    traits = GuideTraits(name="Laplace")

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None,
        num_steps: int = 4,
        *,
        update: Literal["newton", "full", "damped"] = "newton",
        step_size: float = 0.5,
        tolerance: float = 1e-3,
        num_draws: int = 0,
        encoder_input: Callable[..., Any] = first_argument,
        plate: str | None = "data",
        batched: Batched = "auto",
        example: tuple[Any, ...] = (),
    ) -> None:
        if num_steps < 0 or not step_size > 0 or num_draws < 0 or num_draws % 2:
            raise ValueError("Laplace needs num_steps >= 0, a positive step_size and an even num_draws >= 0")
        if update not in ("newton", "full", "damped"):
            raise ValueError(f"update must be 'newton', 'full' or 'damped', got {update!r}")
        require_net(encoder)
        super().__init__(model, plate=plate, batched=batched)
        self.num_steps, self.update, self.step_size, self.tolerance = num_steps, update, step_size, tolerance
        self.encoder_input = encoder_input
        self.encoder = encoder
        self.num_draws = num_draws
        if encoder is None:
            if plate is not None:
                raise ValueError("encoder=None learns one constant start: pass plate=None, or an encoder")
            space = joint_space(self, example)
            self.constant = nn.Parameter(torch.zeros(1, space.dim, dtype=space.dtype, device=space.device))

    def _describe(self) -> str:
        return f"num_steps={self.num_steps}, update={self.update!r}, "

    def start(self, *args: Any, **kwargs: Any) -> Tensor:
        """Where the search starts, `[B, D]`."""
        if self.encoder is None:
            return self.constant
        dim = self.space(*args, **kwargs).dim
        start = run_encoder(self.encoder, self.encoder_input(*args, **kwargs))
        if start.dim() != 2 or start.shape[-1] not in (dim, 2 * dim):
            raise ValueError(
                f"the encoder of a Laplace guide must return the start of the search, [B, {dim}] (or [B, {2 * dim}], "
                f"of which the first half is taken), got {tuple(start.shape)}"
            )
        return start[:, :dim]

    def mode(self, *args: Any, **kwargs: Any) -> Mode:
        """Search the modes and report how it went, without gradient."""
        with self._aside(), torch.no_grad():
            return self._search(*args, **kwargs)

    def _search(self, *args: Any, **kwargs: Any) -> Mode:
        train = torch.is_grad_enabled()
        log_joint = self.space(*args, **kwargs).bind(*args, **kwargs)
        mu = self.start(*args, **kwargs)
        around = _Around(log_joint, mu, self.num_draws, create_graph=train)
        here = around.at(mu)
        for t in range(self.num_steps):
            step = _newton_step(here)
            mu = mu + self._length(t, mu, step, around).unsqueeze(-1) * step
            here = around.at(mu, here)
        if self.num_draws and not self.num_steps:
            here = around.at(mu, here)
        with torch.no_grad():
            decrement = 0.5 * (here.gradient * _newton_step(here)).sum(-1)
            converged = (decrement < self.tolerance) & ~here.floored
        return Mode(mu, here.precision, converged, here.floored, decrement)

    def _length(self, t: int, mu: Tensor, step: Tensor, around: _Around) -> Tensor:
        """Step lengths, `[B]`, without gradient."""
        if self.update != "newton":
            length = 1.0 if self.update == "full" else self.step_size / (t + 1)
            return mu.new_full((len(mu),), length)
        with torch.no_grad():
            lengths = mu.new_tensor(_LENGTHS)
            values = around.objective(mu + lengths[:, None, None] * step)
            return lengths[values.nan_to_num(nan=-torch.inf).argmax(0)]

    def _posterior(self, *args: Any, **kwargs: Any) -> Any:
        mode = self._search(*args, **kwargs)
        return dist.MultivariateNormal(mode.loc, scale_tril=_scale_tril(mode.precision))

    def _sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        q = self._posterior(*args, **kwargs)
        frozen = dist.MultivariateNormal(q.loc.detach(), scale_tril=q.scale_tril.detach())

        def draw(number: int) -> tuple[Tensor, Tensor]:
            eps = noise.normal(number, *q.loc.shape, like=q.loc)
            u = q.loc + (q.scale_tril @ eps.unsqueeze(-1)).squeeze(-1)
            return u, q.log_prob(u)

        return Sampler(draw, frozen.log_prob)


class _Around:
    """Second-order expansions of one batch's log-joint: at a point, or averaged over a Gaussian around it.

    By the theorems of Bonnet and Price the averages are the gradients of E_q[log p] with respect to q's mean and
    (twice) its covariance (Opper & Archambeau 2009).
    """

    def __init__(self, log_joint: LogJoint, mu: Tensor, num_draws: int, *, create_graph: bool) -> None:
        self.log_joint, self.create_graph, self.num_draws = log_joint, create_graph, num_draws
        self.beta = handlers.kl_weight()
        self.curvature = Curvature(log_joint, beta=self.beta)
        self.offsets: Tensor | None = None
        if num_draws:
            args, kwargs = log_joint.rows.repeat(num_draws)
            self.wide = Curvature(log_joint.space.bind(*args, **kwargs), beta=self.beta)
            eps = noise.normal(num_draws // 2, *mu.shape, like=mu)
            self.eps = torch.cat([eps, -eps])

    def at(self, mu: Tensor, previous: Expansion | None = None) -> Expansion:
        """The expansion at `mu: [B, D]`; averaged over N(mu, previous precision^-1) once there is a previous one."""
        if not self.num_draws or previous is None:
            return self.curvature.at(mu, create_graph=self.create_graph)
        scale_tril = _scale_tril(previous.precision)
        offsets = (scale_tril @ self.eps.unsqueeze(-1)).squeeze(-1)
        self.offsets = offsets.detach()
        points = self.wide.at((mu + offsets).flatten(0, 1), create_graph=self.create_graph)
        parts = [part.unflatten(0, (self.num_draws, -1)) for part in points]
        return Expansion(parts[0].mean(0), parts[1].mean(0), parts[2].mean(0), parts[3].any(0))

    def objective(self, mu: Tensor) -> Tensor:
        """What a step should increase, `[L, B, D] -> [L, B]`: the log-joint, averaged as the expansion was."""
        if self.offsets is None:
            return self.log_joint(mu, self.beta)
        return self.log_joint(mu.unsqueeze(1) + self.offsets, self.beta).mean(1)


def _newton_step(here: Expansion) -> Tensor:
    factor = torch.linalg.cholesky(here.precision)
    return torch.cholesky_solve(here.gradient.unsqueeze(-1), factor).squeeze(-1)


def _scale_tril(precision: Tensor) -> Tensor:
    """Cholesky factor of the covariance from the precision, without forming an inverse.

    With J the exchange matrix, J P J = L L' gives P^{-1} = A A' for the lower-triangular A = (J L' J)^{-1}... solved
    against the identity.
    """
    flipped = torch.linalg.cholesky(precision.flip(-2, -1))
    lower = flipped.flip(-2, -1).mT
    return torch.linalg.solve_triangular(lower, torch.eye(lower.shape[-1]).to(lower).expand_as(lower), upper=False)
