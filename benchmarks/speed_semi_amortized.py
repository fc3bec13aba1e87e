"""`SemiAmortized`, K = 20: a training step under stock SVI against a double-backprop loop in bare PyTorch.

Batch 128, 784-500-500-50 ReLU nets, Bernoulli, step 0.03 and momentum 0.5 in (loc, log_var), gradients clipped per
datum and block in both, 2 threads.
"""

from __future__ import annotations

from functools import partial

import baselines
from setting import images, nets, svi_step, vae
from timing import Line, Options, arguments, compare, show

from pyrovae import guides
from pyrovae.optim import Adam

MUST, AIM = 1.2, 1.05
STEPS, STEP_SIZE, MOMENTUM, MAX_NORM, LR = 20, 0.03, 0.5, 5.0, 5e-4


def lines(options: Options) -> list[Line]:
    start, x = nets(784, 500, 50), images("bernoulli")[:128]
    own, theirs = start.copy(), start.copy()
    guide = guides.SemiAmortized(
        guides.Amortized(vae(own, "bernoulli"), own.encoder),
        num_steps=STEPS,
        step_size=STEP_SIZE,
        momentum=MOMENTUM,
        max_norm=MAX_NORM,
    )
    ours = svi_step(guide, Adam(lr=LR))
    bare = baselines.semi_amortized(theirs, STEPS, step_size=STEP_SIZE, momentum=MOMENTUM, max_norm=MAX_NORM, lr=LR)
    what, baseline = f"SemiAmortized K = {STEPS}, stock SVI", "bare PyTorch double backprop"
    return [
        compare(what, partial(ours, x), baseline, partial(bare, x), options, threads=2, repeats=20, must=MUST, aim=AIM)
    ]


if __name__ == "__main__":
    show(lines(arguments(__doc__)), "semi-amortized training step")
