"""Laplace's approximation per datum, amortized by an encoder's start (Park, Kim & Kim 2019, "VLAE").

From the encoder's mean a search climbs log p(x, z); the posterior is the Gaussian at the end point with the log-joint's
curvature there, full covariance:

    q(u | x) = N(mu, Lambda(mu)^{-1}),      mu = argmax_u log p(x, u),      Lambda as in `pyrovae.curvature`

The published search takes T damped Newton steps mu + a_t Lambda^{-1} grad and differentiates through all of them. The
default one finds the mode without a graph (`pyrovae.newton`) and differentiates it by the implicit function theorem,

    d mu / d theta = H^{-1} d/d theta grad_u log p(x, mu),      H the negative Hessian at mu

whose cost does not grow with the steps, and the covariance through products with Lambda instead of D directions
(`pyrovae.precision_normal`). As the mode does not depend on where the search began, the encoder has a term of its own:
it descends KL(N(mu_0, Lambda^{-1}) || q) = (mu_0 - mu)' Lambda (mu_0 - mu) / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import handlers, noise
from pyrovae.averaged import Averaged
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.curvature import Curvature
from pyrovae.emission import emit
from pyrovae.errors import IncompatibleError
from pyrovae.families import FullRankNormal
from pyrovae.guides.amortized import Amortized, first_argument, joint_space, require_net, run_encoder
from pyrovae.guides.base import DensityGuide, Sampler
from pyrovae.guides.side_term import emit_term, pull, share
from pyrovae.latents import LatentSpace, LogJoint
from pyrovae.nets import Table
from pyrovae.newton import conjugate_gradient, find_mode, newton_step
from pyrovae.precision_normal import PrecisionNormal, covariance_factor
from pyrovae.recording import recorded
from pyrovae.runtime import modules_of, preserve_rng

__all__ = ["Laplace", "Mode"]

_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.02, 0.0)  # candidate step lengths of the averaged search
_STANDSTILL = 1e-6  # a datum whose decrement is this share of the tolerance is searched no further
_WRONG = (nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # their means count as constants
_IMPLICIT_CG = 10  # iterations at most for H^{-1} v; one where Lambda is the Hessian


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
        update: "newton" (default) is line-searched Newton-CG on log p(x, z); where a site has no Fisher information its
            Hessian takes part in the products, and at negative curvature the step is the gradient's. "damped" is the
            published schedule a_t = step_size / (t + 1), with step_size 0.5; "full" takes a = 1.
        curvature: "fisher" is J' F J where a site has a Fisher information; "hessian" the exact Hessian everywhere,
            which may not be positive definite away from a mode. By default "fisher", and "hessian" in joint mode: there
            the result equals Pyro's `AutoLaplaceApproximation`.
        gradient: "full" differentiates mode and covariance (through every update for "damped" and "full", implicitly
            for "newton"); "envelope" treats both as constants, which is cheap and biased: the model then learns slower
            and ends lower.
        num_probes: for "newton": the covariance is differentiated through products with Lambda, its log-determinant by
            this many random vectors (`pyrovae.precision_normal`): unbiased, a little noisier, several times cheaper.
            After 3 epochs on 20,000 MNIST images one is 1.3 nats behind 0, which differentiates the matrix itself, and
            4.4 ahead of the published algorithm.
        num_cg: conjugate-gradient iterations per Newton step.
        tolerance: Newton decrement in nats below which a datum counts as converged.
        num_draws: 0 is Laplace's method: gradient and curvature at one point. An even M > 0 averages both over M
            antithetic draws of the current Gaussian, instead of the mode; worth it where the posterior spans many
            linear pieces of a ReLU decoder. With the Hessian as curvature the fixed point, E_q[grad] = 0 and
            Lambda = E_q[-Hessian], is the Gaussian nearest to the posterior in KL(q || p); Fisher information in its
            place comes close. Differentiated through every update.
        encoder_input, plate, batched, example: as in `Amortized`.

    Note:
        The posterior is a proper density whatever the search did, so the ELBO stays a bound; `mode(*args)` says
        where it did not converge (a model may have no joint mode at all: centred hierarchies).
        The implicit gradient uses the Hessian H, by conjugate gradients preconditioned with Lambda; for
        piecewise-linear decoders Lambda is H. Where H is not positive definite Lambda takes its place.
        torch's own derivatives of layer and instance norms are wrong from the third on, which a full gradient needs:
        training such a model raises.
    """

    traits = GuideTraits(name="Laplace")

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None,
        num_steps: int = 4,
        *,
        update: Literal["newton", "full", "damped"] = "newton",
        curvature: Literal["fisher", "hessian"] | None = None,
        gradient: Literal["full", "envelope"] = "full",
        step_size: float = 0.5,
        num_probes: int = 1,
        num_cg: int = 5,
        tolerance: float = 1e-3,
        num_draws: int = 0,
        encoder_input: Callable[..., Any] = first_argument,
        plate: str | None = "data",
        batched: Batched = "auto",
        example: tuple[Any, ...] = (),
    ) -> None:
        if num_steps < 0 or not step_size > 0 or num_draws < 0 or num_draws % 2 or num_probes < 0 or num_cg < 1:
            raise ValueError(
                "Laplace needs num_steps >= 0, step_size > 0, num_probes >= 0, num_cg >= 1 and an even num_draws >= 0"
            )
        if update not in ("newton", "full", "damped"):
            raise ValueError(f"update must be 'newton', 'full' or 'damped', got {update!r}")
        if gradient not in ("full", "envelope"):
            raise ValueError(f"gradient must be 'full' or 'envelope', got {gradient!r}")
        if curvature not in (None, "fisher", "hessian"):
            raise ValueError(f"curvature must be 'fisher' or 'hessian', got {curvature!r}")
        require_net(encoder)
        super().__init__(model, plate=plate, batched=batched)
        self.num_steps, self.update, self.gradient, self.step_size = num_steps, update, gradient, step_size
        self.num_probes, self.num_cg, self.tolerance, self.num_draws = num_probes, num_cg, tolerance, num_draws
        self.hessian = plate is None if curvature is None else curvature == "hessian"
        self.encoder_input = encoder_input
        self.encoder = encoder
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
        with self._aside(), torch.no_grad(), preserve_rng():
            return self._search(args, kwargs).mode

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> Amortized:
        """A guide with full-rank normals whose parameters are this guide's posteriors for these data.

        As `AutoLaplaceApproximation.laplace_approximation` does for a global model. In local mode it serves these rows,
        in this order, and no others.
        """
        mode = self.mode(*args, **kwargs)
        lam = FullRankNormal(mode.loc.shape[-1]).pack(mode.loc, covariance_factor(mode.precision))
        if self.plate is not None:
            return Amortized(
                self.model, Table(lam), "full-rank", encoder_input=self.encoder_input, plate=self.plate,
                batched=self.batched,
            )  # fmt: skip
        frozen = Amortized(self.model, None, "full-rank", plate=None, batched=self.batched, example=args)
        frozen.constant.data.copy_(lam)
        return frozen

    def _search(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, exact: bool = False) -> _Found:
        """The mode; with `exact` its precision carries a gradient whatever `num_probes` says."""
        train = torch.is_grad_enabled()
        log_joint = self.space(*args, **kwargs).bind(*args, **kwargs)
        start = self.start(*args, **kwargs)
        if train and self.gradient == "full":
            _require_third_derivatives(self.model)
        if self.update == "newton" and self.num_steps and not self.num_draws:
            probes = 0 if exact else self.num_probes
            found = self._implicit(log_joint, start, probes, train=train and self.gradient == "full")
            return found._replace(term=self._encoder_term(start, found.mode) if train else None)
        with torch.set_grad_enabled(train and self.gradient == "full"):
            mode = self._unrolled(log_joint, start)
        return _Found(mode, term=self._encoder_term(start, mode) if train and self.gradient == "envelope" else None)

    def _encoder_term(self, start: Tensor, mode: Mode) -> Tensor | None:
        if not start.requires_grad:
            return None
        away = (mode.loc - start).detach().unsqueeze(-1)
        return pull(start, (mode.precision.detach() @ away).squeeze(-1))

    def _implicit(self, log_joint: LogJoint, start: Tensor, num_probes: int, *, train: bool) -> _Found:
        """The mode by Newton-CG; with `train`, its derivative by the implicit function theorem."""
        curvature = Curvature(log_joint, beta=handlers.kl_weight(), hessian=self.hessian)
        objective = recorded(log_joint, start)
        loc = find_mode(
            curvature, objective, start, self.num_steps, num_cg=self.num_cg, tolerance=_STANDSTILL * self.tolerance
        )
        with torch.enable_grad():
            leaf = loc.requires_grad_()
            value = objective(leaf, curvature.beta).sum()
            (slope,) = torch.autograd.grad(value, leaf, create_graph=train)
        point = leaf.detach()
        if train:
            path = slope - slope.detach()
            point = point + path  # the value stays; the hook below makes the gradient that of the mode
        precision, floored = curvature.precision(point, create_graph=train and not num_probes)
        normal = None
        if train and num_probes:
            normal = PrecisionNormal(point, precision, curvature.products(point), num_probes)
        factor = covariance_factor(precision.detach()) if normal is None else normal.scale_tril

        def newton(gradient: Tensor) -> Tensor:
            return (factor @ (factor.mT @ gradient.unsqueeze(-1))).squeeze(-1)

        if train and path.requires_grad:
            path.register_hook(
                lambda gradient: conjugate_gradient(
                    lambda p: -torch.autograd.grad(slope, leaf, p, retain_graph=True)[0], gradient,
                    num_steps=_IMPLICIT_CG, tolerance=torch.finfo(loc.dtype).eps ** 0.5, precondition=newton,
                )
            )  # fmt: skip
        with torch.no_grad():
            decrement = 0.5 * (slope * newton(slope)).sum(-1)
        mode = Mode(point, precision, (decrement < self.tolerance) & ~floored, floored, decrement)
        return _Found(mode, normal)

    def _unrolled(self, log_joint: LogJoint, start: Tensor) -> Mode:
        """Explicit Newton steps, each differentiated where gradients are on."""
        mu = start if torch.is_grad_enabled() else start.detach()
        around = Averaged(log_joint, mu, self.num_draws, self.hessian, create_graph=torch.is_grad_enabled())
        here = around.at(mu)
        for t in range(self.num_steps):
            step = newton_step(here)
            mu = mu + self._length(t, mu, step, around).unsqueeze(-1) * step
            here = around.at(mu, here)
        if self.num_draws and not self.num_steps:
            here = around.at(mu, here)
        with torch.no_grad():
            decrement = 0.5 * (here.gradient * newton_step(here)).sum(-1)
            converged = (decrement < self.tolerance) & ~here.floored
        return Mode(mu, here.precision, converged, here.floored, decrement)

    def _length(self, t: int, mu: Tensor, step: Tensor, around: Averaged) -> Tensor:
        """Step lengths, `[B]`, without gradient."""
        if self.update != "newton":
            length = 1.0 if self.update == "full" else self.step_size / (t + 1)
            return mu.new_full((len(mu),), length)
        with torch.no_grad():
            lengths = mu.new_tensor(_LENGTHS)
            values = around.objective(mu + lengths[:, None, None] * step)
            return lengths[values.nan_to_num(nan=-torch.inf).argmax(0)]

    def _posterior(self, *args: Any, **kwargs: Any) -> Any:
        return self._search(args, kwargs, exact=True).posterior()

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        found = self._search(args, kwargs)
        q = found.posterior()

        def write() -> None:
            emit(space.structure, q)
            emit_term(space, found.term)

        return write

    def _sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        found = self._search(args, kwargs)
        q = found.posterior()
        frozen = dist.MultivariateNormal(q.loc.detach(), scale_tril=q.scale_tril.detach())
        extra = share(found.term)

        def draw(number: int) -> tuple[Tensor, Tensor]:
            eps = noise.normal(number, *q.loc.shape, like=q.loc)
            lazy = isinstance(q, PrecisionNormal)
            u = q.at(eps) if lazy else q.loc + (q.scale_tril @ eps.unsqueeze(-1)).squeeze(-1)
            return u, q.log_prob(u) - extra

        return Sampler(draw, lambda u: frozen.log_prob(u) - extra)


class _Found(NamedTuple):
    """A search's end; the posterior where the mode's precision has no gradient of its own; the encoder's term."""

    mode: Mode
    normal: PrecisionNormal | None = None
    term: Tensor | None = None

    def posterior(self) -> Any:
        if self.normal is not None:
            return self.normal
        return dist.MultivariateNormal(self.mode.loc, scale_tril=covariance_factor(self.mode.precision))


def _require_third_derivatives(model: Any) -> None:
    for root in modules_of(model):
        for module in root.modules():
            if isinstance(module, _WRONG):
                raise IncompatibleError(
                    f"torch's third derivatives of {type(module).__name__} are wrong, and Laplace with gradient='full' "
                    "needs them to train the model: use nn.RMSNorm or no norm in the decoder, or gradient='envelope'"
                )
