"""Mode finding by line-searched Newton-CG, a batch of problems at once.

Each outer step solves Lambda s = g by a few conjugate-gradient iterations with products Lambda p (no matrix is
formed) and ends them at negative curvature: s is what was reached, at first the gradient at the length the curvature
suggests. It backtracks a few times until the log-joint rises (Nocedal & Wright 2006, chapter 7); where no trial was
good enough the next step begins shorter. A datum that has converged stands still, so no datum's path depends on the
others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae.curvature import Curvature, Expansion

__all__ = ["conjugate_gradient", "find_mode", "newton_step"]

_TRIALS = 3  # step lengths at most
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
        objective: the log-joint `(u, beta) -> [B]` for step lengths, as `pyrovae.recording.recorded` gives it.
        num_steps: Newton steps at most.
        num_cg: conjugate-gradient iterations per step at most.
        tolerance: Newton decrement g's / 2 in nats below which a datum stands still.
    """
    u = u.detach()
    moving = torch.ones(len(u), dtype=torch.bool, device=u.device)
    before = None
    longest = u.new_ones(len(u))
    for _ in range(num_steps):
        here = curvature.operator(u, objective)
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
            length = _backtrack(
                lambda point: objective(point, curvature.beta), u, step, here.log_joint, slope, moving, longest
            )
            u = torch.where(length.unsqueeze(-1) > 0, u + length.unsqueeze(-1) * step, u)  # a step may be NaN
            longest = torch.where(moving & (length == 0), 0.1**_TRIALS * longest, torch.ones_like(longest))
    return u


def _backtrack(
    objective: Callable[[Tensor], Tensor], u: Tensor, step: Tensor, value: Tensor, slope: Tensor, moving: Tensor,
    length: Tensor,
) -> Tensor:  # fmt: skip
    """Step lengths that raise each datum's objective enough, `[B]`: `length`, or where that fails the top of the
    parabola through what has been seen; 0 where no trial was good enough."""
    found = torch.zeros_like(value)
    searching = moving
    slack = 10 * torch.finfo(value.dtype).eps * value.abs()  # a rise below rounding error cannot be seen
    for _ in range(_TRIALS):
        rise = objective(u + torch.where(searching, length, 0.0).unsqueeze(-1) * step) - value
        enough = searching & (rise >= _ARMIJO * length * slope - slack)
        found = torch.where(enough, length, found)
        searching = searching & ~enough
        if not searching.any():
            break
        top = 0.5 * slope * length / (slope - rise / length)  # NaN where the rise is: then a tenth
        length = torch.maximum(torch.minimum(top.nan_to_num(nan=0.0), 0.5 * length), 0.1 * length)
    return found


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

    A row with negative curvature along a search direction p stops there. If it is the first one, the target itself, its
    length becomes p'p / |p' Lambda p|. With a preconditioner the row goes back to the preconditioned target, and so
    does one that is left with a larger residual than it began with.
    """
    solve = precondition or (lambda r: r)
    guess = solve(target)
    with torch.no_grad():
        if precondition is None:
            s, r = torch.zeros_like(target), target.clone()
        else:
            s = guess.clone()
            r = target - product(s)
        goal, first = tolerance * target.norm(dim=-1), r.norm(dim=-1)
        z = solve(r)
        p, rz = z, (r * z).sum(-1)
        active = first > goal
        lost = torch.zeros_like(active)
        for iteration in range(num_steps):
            if not active.any():
                break
            q = product(p)
            bend = (p * q).sum(-1)
            bent = active & ~(bend > 0)
            if iteration == 0 and precondition is None:
                size = torch.where(bend < 0, rz / bend.abs(), torch.ones_like(rz))
                s = torch.where(bent.unsqueeze(-1), size.unsqueeze(-1) * target, s)
            lost = lost | bent
            active = active & ~bent
            alpha = torch.where(active, rz / bend, torch.zeros_like(rz)).unsqueeze(-1)
            s, r = s + alpha * p, r - alpha * q
            z = solve(r)
            new = (r * z).sum(-1)
            active = active & (r.norm(dim=-1) > goal)
            p = z + torch.where(active, new / rz, torch.zeros_like(rz)).unsqueeze(-1) * p
            rz = new
        if precondition is not None:
            lost = lost | (r.norm(dim=-1) > first)
            s = torch.where(lost.unsqueeze(-1), guess, s)
    return s


def newton_step(here: Expansion) -> Tensor:
    """Lambda^{-1} gradient, `[B, D]`."""
    factor = torch.linalg.cholesky(here.precision)
    return torch.cholesky_solve(here.gradient.unsqueeze(-1), factor).squeeze(-1)
