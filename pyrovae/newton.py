"""Mode finding by line-searched Newton-CG, a batch of problems at once.

Each outer step solves Lambda s = g by a few conjugate-gradient iterations with products Lambda p (no matrix is
formed), stops early at negative curvature (then s is what was reached, at first the gradient itself), and backtracks
on the log-joint until it rises (Nocedal & Wright 2006, chapter 7). A datum that has converged stands still, so no
datum's path depends on the others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae.curvature import Curvature, Expansion

__all__ = ["conjugate_gradient", "covariance_factor", "find_mode", "newton_step"]

_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.02)
_FORCING = 0.1  # no Newton system is solved worse than to this share of its gradient
_ARMIJO = 1e-4  # share of the promised rise that a step must bring


def find_mode(
    curvature: Curvature,
    objective: Callable[..., Tensor],
    u: Tensor,
    num_steps: int,
    *,
    num_cg: int,
    tolerance: float,
) -> Tensor:
    """Climb the log-joint from `u: [B, D]`, without gradient; returns where it ended.

    Args:
        objective: the log-joint `(u, beta) -> [B]` for step lengths, as `LogJoint.recorded` gives it.
        num_steps: Newton steps at most.
        num_cg: conjugate-gradient iterations per step at most.
        tolerance: Newton decrement g's / 2 in nats below which a datum stands still.
    """
    u = u.detach()
    moving = torch.ones(len(u), dtype=torch.bool, device=u.device)
    before = None
    for _ in range(num_steps):
        here = curvature.operator(u)
        size = here.gradient.norm(dim=-1)
        # As exact as the last step was good: cheap far away, quadratic convergence near the mode.
        forcing = torch.full_like(size, _FORCING) if before is None else (size / before).square().clamp(max=_FORCING)
        before = size.clamp_min(torch.finfo(size.dtype).tiny)
        step = conjugate_gradient(here.product, here.gradient, num_steps=num_cg, tolerance=forcing)
        slope = (here.gradient * step).sum(-1)
        moving = moving & (0.5 * slope > tolerance)
        if not moving.any():
            break
        with torch.no_grad():
            length = _backtrack(lambda point: objective(point, curvature.beta), u, step, here.log_joint, slope, moving)
            u = u + length.unsqueeze(-1) * step
    return u


def _backtrack(
    objective: Callable[[Tensor], Tensor], u: Tensor, step: Tensor, value: Tensor, slope: Tensor, moving: Tensor
) -> Tensor:
    """The first of the step lengths that raises each datum's objective enough, `[B]`; 0 where none does."""
    length = torch.zeros_like(value)
    searching = moving
    slack = 10 * torch.finfo(value.dtype).eps * value.abs()  # a rise below rounding error cannot be seen
    for candidate in _LENGTHS:
        trial = objective(u + candidate * torch.where(searching.unsqueeze(-1), step, torch.zeros_like(step)))
        enough = searching & (trial >= value + _ARMIJO * candidate * slope - slack)
        length = torch.where(enough, candidate, length)
        searching = searching & ~enough
        if not searching.any():
            break
    return length


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    num_steps: int,
    tolerance: float | Tensor = 1e-2,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Solve Lambda s = target, `[B, D]`, row by row, without gradient.

    Args:
        product: p -> Lambda p.
        tolerance: on |Lambda s - target| / |target|, a number or one per row.
        precondition: r -> M^{-1} r with M close to Lambda; the start is then M^{-1} target.

    A row with negative curvature along a search direction stops there: at the (preconditioned) target if it is the
    first direction.
    """
    solve = precondition or (lambda r: r)
    guess = solve(target)
    with torch.no_grad():
        if precondition is None:
            s, r = torch.zeros_like(target), target.clone()
        else:
            s = guess.clone()
            r = target - product(s)
        goal = tolerance * target.norm(dim=-1)
        z = solve(r)
        p, rz = z, (r * z).sum(-1)
        active = r.norm(dim=-1) > goal
        for iteration in range(num_steps):
            if not active.any():
                break
            q = product(p)
            bend = (p * q).sum(-1)
            bent = active & ~(bend > 0)
            if iteration == 0 and precondition is None:
                s = torch.where(bent.unsqueeze(-1), target, s)
            active = active & ~bent
            alpha = torch.where(active, rz / bend, torch.zeros_like(rz)).unsqueeze(-1)
            s, r = s + alpha * p, r - alpha * q
            z = solve(r)
            new = (r * z).sum(-1)
            active = active & (r.norm(dim=-1) > goal)
            p = z + torch.where(active, new / rz, torch.zeros_like(rz)).unsqueeze(-1) * p
            rz = new
    return s


def newton_step(here: Expansion) -> Tensor:
    """Lambda^{-1} gradient, `[B, D]`."""
    factor = torch.linalg.cholesky(here.precision)
    return torch.cholesky_solve(here.gradient.unsqueeze(-1), factor).squeeze(-1)


def covariance_factor(precision: Tensor) -> Tensor:
    """Cholesky factor of the covariance from the precision, without forming an inverse.

    With J the exchange matrix, J P J = L L' gives P^{-1} = A A' for the lower-triangular A = (J L' J)^{-1}.
    """
    flipped = torch.linalg.cholesky(precision.flip(-2, -1))
    lower = flipped.flip(-2, -1).mT
    return torch.linalg.solve_triangular(lower, torch.eye(lower.shape[-1]).to(lower).expand_as(lower), upper=False)
