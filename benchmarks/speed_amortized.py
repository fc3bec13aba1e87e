"""`Amortized`: a training step under stock SVI against the same step in bare eager PyTorch.

Batch 128, 784-500-500-50 ReLU nets, 2 threads; and the small nets of `pyrovae compare` (batch 100, 64-128-128-8,
1 thread), where handlers weigh most.
"""

from __future__ import annotations

from functools import partial

import baselines
import pyro
from setting import Nets, images, nets, svi_step, vae
from timing import Line, Options, arguments, compare, show
from torch import Tensor

from pyrovae import guides
from pyrovae.optim import Adam

MUST, AIM = 1.15, 0.7


def lines(options: Options) -> list[Line]:
    large, x = nets(784, 500, 50), images("bernoulli")[:128]
    small, y = nets(64, 128, 8), images("bernoulli", side=8)[:100]
    return [
        line("Amortized, stock SVI", large, x, Adam(lr=1e-3), options, must=MUST, aim=AIM),
        line("Amortized, stock SVI", large, x, Adam(lr=1e-3), options, fused=True),
        line("Amortized, stock SVI, pyro.optim.Adam", large, x, pyro.optim.Adam({"lr": 1e-3}), options),
        line("Amortized on 64-128-128-8, stock SVI", small, y, Adam(lr=1e-3), options, threads=1),
    ]


def line(
    what: str,
    parts: Nets,
    x: Tensor,
    optimizer: pyro.optim.PyroOptim,
    options: Options,
    *,
    threads: int = 2,
    fused: bool = False,
    must: float | None = None,
    aim: float | None = None,
) -> Line:
    """One comparison, from the same weights; `fused` is the baseline's Adam."""
    own = parts.copy()
    ours = partial(svi_step(guides.Amortized(vae(own, "bernoulli"), own.encoder), optimizer), x)
    theirs = partial(baselines.amortized(parts.copy(), fused=fused), x)
    baseline = f"bare PyTorch, {'fused ' if fused else ''}Adam"
    return compare(what, ours, baseline, theirs, options, threads=threads, repeats=100, must=must, aim=aim)


if __name__ == "__main__":
    show(lines(arguments(__doc__)), "amortized training step")
