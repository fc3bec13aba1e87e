"""`Laplace`, T = 4: a training step under stock SVI against the published algorithm written plainly.

Plainly: T + 1 explicit Jacobians `[B, X, D]` by forward accumulation of ReLU masks, as in the released code, damped
updates, everything differentiated (Park, Kim & Kim 2019). For information also against the same algorithm with its
Jacobians laid out as `[B, D, X]`, which folds the batch into single matrix products. Batch 128, 784-500-500-50 ReLU
nets, 2 threads. The nets have been trained as a VAE for a while first, as a search costs more where posteriors have
left the prior.
"""

from __future__ import annotations

from functools import partial

import baselines
import torch
from setting import Likelihood, Nets, images, nets, svi_step, vae
from timing import Line, Options, arguments, compare, show
from torch import Tensor

from pyrovae import guides
from pyrovae.optim import Adam
from pyrovae.runtime import seeded

STEPS, LR, WARM_STEPS = 4, 5e-4, 300
LIMITS: dict[Likelihood, tuple[float, float]] = {"gaussian": (1 / 5, 1 / 12), "bernoulli": (1 / 4, 1 / 10)}


def trained(likelihood: Likelihood, data: Tensor) -> Nets:
    """Nets after a few VAE steps on random batches."""
    parts = nets(784, 500, 50)
    step = baselines.amortized(parts, likelihood, lr=1e-3)
    with seeded(0):
        for _ in range(WARM_STEPS):
            step(data[torch.randint(len(data), (128,))])
    return parts


def lines(options: Options) -> list[Line]:
    found = []
    for likelihood, (must, aim) in LIMITS.items():
        data = images(likelihood)
        start, x = trained(likelihood, data), data[:128]
        own, theirs = start.copy(), start.copy()
        guide = guides.Laplace(vae(own, likelihood), own.encoder, num_steps=STEPS)
        ours = partial(svi_step(guide, Adam(lr=LR)), x)
        what = f"Laplace T = {STEPS}, {likelihood}, stock SVI"
        plain = partial(baselines.vlae(theirs, likelihood, STEPS, lr=LR), x)
        found.append(compare(
            what, ours, "published algorithm, plainly", plain, options, threads=2, repeats=10, must=must, aim=aim
        ))  # fmt: skip
        folded = partial(baselines.vlae(start.copy(), likelihood, STEPS, baselines.folded_jacobian, lr=LR), x)
        found.append(compare(what, ours, "the same, Jacobians [B, D, X]", folded, options, threads=2, repeats=10))
    return found


if __name__ == "__main__":
    show(lines(arguments(__doc__)), "Laplace training step")
