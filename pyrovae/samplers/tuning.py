"""What warm-up tunes: a step size of every datum, and one trajectory length for all of them.

Step sizes by dual averaging (Nesterov 2009; Hoffman & Gelman 2014) of the acceptance rate a_t, a mean over the datum's
chains, with target delta, gamma = 0.05, t_0 = 10, kappa = 0.75:

    h_t = (1 - 1/(t + t_0)) h_{t-1} + (delta - a_t) / (t + t_0)
    log e_t = mu - sqrt(t) / gamma h_t,      log e_bar = t^-kappa log e_t + (1 - t^-kappa) log e_bar

Trajectory length by ascent on the change of squared distance from the centre (ChEES: Hoffman, Radul & Sountsov 2021)
in whitened coordinates q, pooled over data and chains with weights alpha, their acceptance probabilities:

    C(tau) = E[(|q' - m|^2 - |q - m|^2)^2] / 4,
    dC/dlog tau ~ t mean(alpha (|q' - m|^2 - |q - m|^2) (q' - m)'p')

t the trajectory's length and p' its last momentum. Adam ascends log tau; what is kept is an average over the last part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["StepSizes", "TrajectoryLength"]

_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75


class StepSizes:
    """Dual averaging of `[B]` step sizes, started at `initial`."""

    def __init__(self, initial: Tensor, target: float) -> None:
        self.target, self.count = target, 0
        self.mu = initial.log()
        self.log_size, self.log_average = self.mu.clone(), self.mu.clone()
        self.gap = torch.zeros_like(initial)

    def update(self, accept_prob: Tensor) -> None:
        """`accept_prob: [B]`, the mean over a datum's chains."""
        self.count += 1
        share = 1 / (self.count + _T0)
        self.gap = (1 - share) * self.gap + share * (self.target - accept_prob)
        self.log_size = self.mu - math.sqrt(self.count) / _GAMMA * self.gap
        weight = self.count**-_KAPPA
        self.log_average = weight * self.log_size + (1 - weight) * self.log_average

    @property
    def size(self) -> Tensor:
        return self.log_size.exp()

    @property
    def average(self) -> Tensor:
        return self.log_average.exp()


class TrajectoryLength:
    """tau, one number, in whitened coordinates."""

    _RATE, _BETA1, _BETA2, _LIMIT = 0.05, 0.9, 0.95, math.log(100.0)

    def __init__(self, start: float = 1.0) -> None:
        self.log_tau = math.log(start)
        self._first = self._second = 0.0
        self._count, self._kept = 0, []  # type: int, list[float]

    @property
    def tau(self) -> float:
        return math.exp(self.log_tau)

    def update(self, length: Tensor, accept_prob: Tensor, before: Tensor, after: Tensor, momentum: Tensor) -> None:
        """One trajectory of every chain.

        Args:
            length: `[B]`, step size times number of steps.
            accept_prob: `[C, B]`.
            before, after: `[C, B, D]`, whitened positions from the centre.
            momentum: `[C, B, D]`, at the end.
        """
        change = after.square().sum(-1) - before.square().sum(-1)
        signal = accept_prob * change * (after * momentum).sum(-1) * length
        signal = signal.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        slope = float(signal.sum() / accept_prob.sum().clamp_min(1e-10))
        self._count += 1
        self._first = self._BETA1 * self._first + (1 - self._BETA1) * slope
        self._second = self._BETA2 * self._second + (1 - self._BETA2) * slope**2
        first = self._first / (1 - self._BETA1**self._count)
        second = self._second / (1 - self._BETA2**self._count)
        moved = self.log_tau + self._RATE * first / (math.sqrt(second) + 1e-10)
        self.log_tau = min(self._LIMIT, max(-self._LIMIT, moved))
        self._kept.append(self.log_tau)

    def settle(self, last: int) -> float:
        """The geometric mean over the last updates, which stays."""
        kept = self._kept[-last:]
        if kept:
            self.log_tau = sum(kept) / len(kept)
        return self.tau
