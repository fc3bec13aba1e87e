"""Boosting: a mixture for each datum, a component at a time (Guo et al. 2016; Locatello, Khanna, Ghosh & Rätsch 2018).

    Q_t = (1 - w_t) Q_{t-1} + w_t s_t,      s_t = argmax_s RELBO(s)
    RELBO(s) = E_s[log p(x, u) - log s + phi(log s - log Q_{t-1})] - lambda E_s[log s]

Frank-Wolfe on KL(Q || posterior): with phi the identity the first term is the directional derivative of the ELBO
towards s, and the second keeps s from shrinking to a point. As in the papers, that has a maximum only if densities are
bounded: a Gaussian s gains more by lying where Q has no mass than it loses by lying where p has little. Here
phi(r) = C log(1 + r / C), r > 0, stands for a bound (`pyrovae.bounded`). The duality gap

    gap_t = max_s E_s[log p - log s + phi(log s - log Q_t)] - E_{Q_t}[log p - log Q_t]

is what the best component that was found promises; a datum whose gap is small takes no more. Q is scored exactly, as
the mixture it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pyrovae import noise
from pyrovae.ascent import Ascent
from pyrovae.bounded import logarithmic
from pyrovae.families import DiagonalNormal, MixtureOfNormals
from pyrovae.latents import LogJoint
from pyrovae.recording import recorded

__all__ = ["BoostedFit", "Boosting"]

_LEAST = 1e-12  # weight of a component that a datum has no use for
_INFLATED = 3.0  # standard deviations of the mixture, within which half of the new components begin
_GOLDEN = 0.5 * (math.sqrt(5) - 1)


@dataclass(frozen=True)
class BoostedFit:
    """Mixtures built datum by datum.

    Attributes:
        lam: `[B, P]` of `MixtureOfNormals` with as many components as were allowed.
        components: `[B]`, how many each datum uses.
        elbo: `[T, B]`, of the mixture after each addition, nats, by the draws that its weights were chosen with.
        gap: `[T, B]`, duality gap before each later addition, nats (the last row: after the last addition); a datum
            that takes no more keeps the gap that made it stop.
        converged: `[B]`: the gap fell below the tolerance.
    """

    lam: Tensor
    components: Tensor
    elbo: Tensor
    gap: Tensor
    converged: Tensor

    def __repr__(self) -> str:
        return (
            f"BoostedFit({int(self.converged.sum())} of {len(self.converged)} data converged; on average "
            f"{float(self.components.double().mean()):.1f} components, ELBO {float(self.elbo[-1].mean()):.3f} nats)"
        )


@dataclass(frozen=True)
class Boosting:
    """How mixtures are built.

    Args:
        num_components: at most.
        weights: "line-search" chooses w_t by the mixture's ELBO; "corrective" then chooses all weights again; "fixed"
            takes w_t = 2 / (t + 2), t = 1, 2, ...
        bound: C, nats; `math.inf` for none. Large ones put components beyond the posterior's mass, where weights close
            to zero take them back (C = 10 gains nothing on a curved posterior of two latents); small ones stop early.
        entropy: lambda; 0 because the bound does its work (Locatello et al. take 1 / sqrt(t + 1) without a bound). It
            makes components wider than they should be.
        tolerance: duality gap in nats below which a datum takes no more components.
        restarts: starts of every component, the best of which is taken.
        num_steps, step_size, num_samples: Adam steps on every component's (loc, log_var), and draws for each.
        num_draws: of each component, to choose weights and measure the gap.
        first: how the first component is brought to convergence.
    """

    num_components: int = 5
    weights: Literal["line-search", "corrective", "fixed"] = "corrective"
    bound: float = 3.0
    entropy: float = 0.0
    tolerance: float = 0.02
    restarts: int = 16
    num_steps: int = 300
    step_size: float = 0.1
    num_samples: int = 16
    num_draws: int = 500
    first: Ascent = field(default_factory=Ascent)

    def __post_init__(self) -> None:
        counts = (self.num_components, self.restarts, self.num_steps, self.num_samples, self.num_draws)
        if min(counts) < 1 or not self.step_size > 0 or not self.tolerance >= 0:
            raise ValueError(
                "boosting needs num_components, restarts, num_steps, num_samples and num_draws of at least 1, "
                "step_size > 0 and tolerance >= 0"
            )
        if self.weights not in ("line-search", "corrective", "fixed"):
            raise ValueError(f"weights must be 'line-search', 'corrective' or 'fixed', got {self.weights!r}")
        if not self.bound > 0:
            raise ValueError(f"the bound on the divergence must be positive, got {self.bound}")
        if not self.entropy >= 0:
            raise ValueError(f"the weight of the entropy must not be negative, got {self.entropy:g}")

    def run(self, log_joint: LogJoint, start: Tensor, beta: float = 1.0) -> BoostedFit:
        """Build the mixtures.

        Args:
            start: `[B, 2 D]`, a diagonal normal for each datum, whose width the first component's starts have.

        Raises:
            FloatingPointError: an ELBO that is not finite.
        """
        single = DiagonalNormal(start.shape[-1] // 2)
        # A stream of its own for each datum, however many components its neighbours take.
        own = noise.per_datum(1, noise.row_seeds()) if noise.active() else nullcontext()
        with torch.no_grad(), own:
            mixture = _Mixture(self, log_joint, beta, start)
            mixture.begin(self.first.improve(single, log_joint, mixture.propose(0.0), beta=beta))
            elbos: list[Tensor] = [mixture.elbo()]
            gaps: list[Tensor] = []
            active = torch.ones(len(start), dtype=torch.bool, device=start.device)
            for t in range(1, self.num_components + 1):
                new = mixture.propose(self.entropy)
                gap = mixture.gap(new)
                gaps.append(torch.where(active, gap, gaps[-1]) if gaps else gap)  # a datum that is done stays so
                active = active & (gaps[-1] > self.tolerance)
                if t == self.num_components:  # the last proposal measures the gap that is left
                    break
                mixture.add(new, active, t)
                elbos.append(mixture.elbo())
                if not active.any():
                    break
        lam, used = mixture.pack(self.num_components)
        return BoostedFit(lam, used, torch.stack(elbos), torch.stack(gaps), ~active)


class _Mixture:
    """A mixture under way. Every component keeps its draws, and log p at them."""

    def __init__(self, rule: Boosting, log_joint: LogJoint, beta: float, start: Tensor) -> None:
        self.rule, self.log_joint, self.beta, self.start = rule, log_joint, beta, start
        self.dim = start.shape[-1] // 2
        self.parts: list[Tensor] = []  # lam, [B, 2 D]
        self.draws: list[Tensor] = []  # [S, B, D]
        self.log_p: list[Tensor] = []  # [S, B]
        self.log_w = start.new_zeros(0, len(start))  # [M, B]

    def begin(self, first: Tensor) -> None:
        """The first component, `[B, 2 D]`."""
        self._append(first)
        self.log_w = torch.zeros_like(first[:, 0]).unsqueeze(0)

    def _normal(self, lam: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(*DiagonalNormal(self.dim)._parts(lam), validate_args=False)

    def _append(self, lam: Tensor) -> None:
        u = self._draw(lam)
        self.parts.append(lam)
        self.draws.append(u)
        self.log_p.append(self._log_p(u))

    def _draw(self, lam: Tensor) -> Tensor:
        q = self._normal(lam)
        return q.loc + q.scale * noise.normal(self.rule.num_draws, len(lam), self.dim, like=lam)

    def _log_p(self, u: Tensor) -> Tensor:
        return self.log_joint(u, self.beta)

    def _log_q(self, u: Tensor, log_w: Tensor | None = None) -> Tensor:
        """log Q at `[..., B, D]`."""
        log_w = self.log_w if log_w is None else log_w
        terms = [w + self._normal(lam).log_prob(u).sum(-1) for w, lam in zip(log_w, self.parts, strict=True)]
        return torch.logsumexp(torch.stack(terms), 0)

    def _gains(self, log_w: Tensor) -> Tensor:
        """E_{q_m}[log p - beta log Q], `[M, B]`."""
        pairs = zip(self.draws, self.log_p, strict=True)
        return torch.stack([(log_p - self.beta * self._log_q(u, log_w)).mean(0) for u, log_p in pairs])

    def elbo(self, log_w: Tensor | None = None) -> Tensor:
        """`[B]`, every component at its own draws, weighed exactly."""
        log_w = self.log_w if log_w is None else log_w
        value = (log_w.exp() * self._gains(log_w)).sum(0)
        if not torch.isfinite(value).all():
            raise FloatingPointError("the ELBO of a mixture is not finite: the log-joint runs away, or the data do")
        return value

    def propose(self, entropy: float) -> Tensor:
        """The component with the largest RELBO (ELBO, for the first) that the restarts find, `[B, 2 D]`."""
        rule, rows = self.rule, len(self.start)
        lam = self._starts().requires_grad_()  # [R, B, 2 D]
        optimizer = torch.optim.Adam([lam], lr=rule.step_size)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rule.num_steps)
        density: Callable[..., Tensor] | None = None

        def relbo(samples: int) -> Tensor:
            nonlocal density
            q = self._normal(lam)
            eps = noise.normal(samples, rows, rule.restarts * self.dim, like=lam)
            eps = eps.view(samples, rows, rule.restarts, self.dim).movedim(2, 1)
            u = (q.loc + q.scale * eps).flatten(0, 1)
            if density is None:
                density = recorded(self.log_joint, u.detach())
            gain = self._gain(u, q.log_prob(u.unflatten(0, (samples, -1))).sum(-1).flatten(0, 1), density(u, self.beta))
            return gain.unflatten(0, (samples, -1)).mean(0) + self.beta * entropy * q.entropy().sum(-1)

        with torch.enable_grad():
            for _ in range(rule.num_steps):
                optimizer.zero_grad()
                (-relbo(rule.num_samples).sum()).backward(inputs=[lam])
                optimizer.step()
                decay.step()
        density = self.log_joint
        best = relbo(max(rule.num_samples, rule.num_draws // 4)).detach().nan_to_num(nan=-torch.inf).argmax(0)
        return lam.detach()[best, torch.arange(rows)]

    def _starts(self) -> Tensor:
        """`[R, B, 2 D]`: every other one from the prior, the rest around the mixture; as wide as the mixture.

        A mode that no component touches may lie many of the mixture's deviations away. The first component has all its
        starts from the prior, and the width it is given.
        """
        rows, number = self.log_joint.rows, self.rule.restarts
        if not self.parts:
            begin = self.log_joint.space.prior(number, *rows.args, **rows.kwargs)
            return torch.cat([begin, self.start[:, self.dim :].expand_as(begin)], dim=-1)
        weights = self.log_w.exp().unsqueeze(-1)
        locs, scales = (torch.stack(some) for some in zip(*((q.loc, q.scale) for q in map(self._normal, self.parts)),
                                                          strict=True))  # fmt: skip
        mean = (weights * locs).sum(0)
        variance = (weights * (scales.square() + (locs - mean).square())).sum(0)
        begin = mean + _INFLATED * variance.sqrt() * noise.normal(number, *mean.shape, like=mean)
        begin[::2] = self.log_joint.space.prior(len(begin[::2]), *rows.args, **rows.kwargs)
        return torch.cat([begin, variance.log().expand_as(begin)], dim=-1)

    def gap(self, new: Tensor) -> Tensor:
        """What a component promises, `[B]`."""
        u = self._draw(new)
        return self._gain(u, self._normal(new).log_prob(u).sum(-1), self._log_p(u)).mean(0) - self.elbo()

    def _gain(self, u: Tensor, log_s: Tensor, log_p: Tensor) -> Tensor:
        """log p - log s + phi(log s - log Q) at draws of s."""
        if not self.parts:
            return log_p - self.beta * log_s
        return log_p - self.beta * (log_s - logarithmic(log_s - self._log_q(u), self.rule.bound))

    def add(self, new: Tensor, active: Tensor, t: int) -> None:
        """Take a component in, with no weight where a datum is not active."""
        old = self.log_w
        self._append(new)

        def mixed(share: Tensor) -> Tensor:
            share = share.clamp(_LEAST, 1 - _LEAST)
            return torch.cat([old + torch.log1p(-share), share.log().unsqueeze(0)])

        if self.rule.weights == "fixed":
            share = torch.full_like(old[0], 2 / (t + 2))
        else:
            share = _golden(lambda share: self.elbo(mixed(share)), torch.zeros_like(old[0]), torch.ones_like(old[0]))
        self.log_w = mixed(torch.where(active, share, torch.zeros_like(share)))
        if self.rule.weights == "corrective":
            self.log_w = torch.where(active, self._corrected(self.log_w), self.log_w)

    def _corrected(self, log_w: Tensor) -> Tensor:
        """All weights by mirror ascent on the mixture's ELBO: log w rises by the gradient, and is normalised."""
        best, value = log_w, self.elbo(log_w)
        for _ in range(50):
            log_w = (log_w + 0.5 * self._gains(log_w)).log_softmax(0).clamp_min(math.log(_LEAST))
            new = self.elbo(log_w)
            best = torch.where(new > value, log_w, best)
            value = torch.maximum(new, value)
        return best.log_softmax(0)

    def pack(self, number: int) -> tuple[Tensor, Tensor]:
        """`lam` of a mixture of `number` components (those not needed without weight), and how many count."""
        missing = number - len(self.parts)
        parts = self.parts + self.parts[:1] * missing
        weights = torch.cat([self.log_w, self.log_w.new_full((missing, self.log_w.shape[1]), math.log(_LEAST))])
        columns = [weights.T, *(part[:, : self.dim] for part in parts), *(part[:, self.dim :] for part in parts)]
        lam = torch.cat(columns, dim=-1)
        assert lam.shape[-1] == MixtureOfNormals(self.dim, number).num_params
        return lam, (self.log_w.exp() > 1e-6).sum(0)


def _golden(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The maximum of concave functions between `low` and `high`, entry by entry, to about 1e-4."""
    for _ in range(20):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        better = function(left) > function(right)
        low, high = torch.where(better, low, left), torch.where(better, right, high)
    return 0.5 * (low + high)
