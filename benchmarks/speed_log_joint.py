"""Log-joint and its gradient, as inner loops ask for them, against hand-written PyTorch.

A traced Pyro model, 100 x 8 latents, 64-128-128 nets, 1 thread; once through Pyro's handlers and once recorded, as
refinement, mode search and chains run it. A Langevin step is one such evaluation and the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import baselines
import torch
from setting import images, nets, vae
from timing import Line, Options, arguments, compare, show
from torch import Tensor

from pyrovae.latents import LatentSpace
from pyrovae.recording import recorded
from pyrovae.samplers import init, langevin

MUST, AIM, LANGEVIN = 1.5, 1.1, 1.3


def gradient(function: Callable[[Tensor], Tensor], u: Tensor) -> Callable[[], object]:
    """Value and gradient at `u: [B, D]`."""

    def run() -> object:
        leaf = u.detach().requires_grad_()
        value = function(leaf)
        return value, torch.autograd.grad(value.sum(), leaf)

    return run


def lines(options: Options) -> list[Line]:
    parts, x = nets(64, 128, 8), images("bernoulli", side=8)[:100]
    bound = LatentSpace(vae(parts, "bernoulli"), x).bind(x)
    u = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    by_hand = gradient(baselines.log_joint(parts, x), u)
    name = "hand-written PyTorch"

    def line(what: str, function: Callable[[Tensor], Tensor], must: float | None, aim: float | None) -> Line:
        return compare(what, gradient(function, u), name, by_hand, options, threads=1, repeats=300, must=must, aim=aim)

    density = recorded(bound, u)
    state = init(density, u)
    step, evaluation = "a Langevin step", f"{name}: log-joint and gradient"
    return [
        line("log-joint and gradient, recorded", density, MUST, AIM),
        line("log-joint and gradient, through handlers", bound, None, None),
        compare(step, lambda: langevin.step(state, density, 0.1, torch.randn_like(u)), evaluation, by_hand, options,
                threads=1, repeats=300, must=LANGEVIN),
    ]  # fmt: skip


if __name__ == "__main__":
    show(lines(arguments(__doc__)), "log-joint and gradient")
