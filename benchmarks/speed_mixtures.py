"""A recursive mixture's posterior against one encoder pass, and against semi-amortized steps.

Batch 128, 784-500-500-50 ReLU nets, M = 5, without gradient, 2 threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from setting import images, nets, vae
from timing import Line, Options, arguments, compare, show

from pyrovae import guides

M = 5
SHARED, STEPS = (2.0, 1.5), 8
SEMI = (1 / 10, 1 / 30)


def lines(options: Options) -> list[Line]:
    parts, x = nets(784, 500, 50), images("bernoulli")[:128]
    model = vae(parts, "bernoulli")

    def without_gradient(function: Callable[..., Any]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x)

        return run

    encoder = without_gradient(parts.encoder)
    mixtures = {
        trunk: guides.RecursiveMixture(model, parts.copy().encoder, M, trunk=trunk) for trunk in ("shared", "separate")
    }
    semi = guides.SemiAmortized(guides.Amortized(model, parts.encoder), num_steps=STEPS)
    found = []
    for trunk, must, aim in (("shared", *SHARED), ("separate", 1.1 * M, None)):
        ours = without_gradient(mixtures[trunk].posterior)
        what = f"RecursiveMixture M = {M}, {trunk}: a posterior"
        found.append(compare(what, ours, "encoder pass of a VAE", encoder, options, threads=2, repeats=100, must=must,
                             aim=aim))  # fmt: skip
    encoders = list(mixtures["separate"].components)
    bare = without_gradient(lambda batch: [encoder(batch) for encoder in encoders])
    found.append(compare(f"RecursiveMixture M = {M}, separate: a posterior",
                         without_gradient(mixtures["separate"].posterior), f"passes of its {M} encoders", bare, options,
                         threads=2, repeats=100, must=1.1))  # fmt: skip
    ours, theirs = without_gradient(mixtures["shared"].posterior), without_gradient(semi.posterior)
    name = f"SemiAmortized K = {STEPS}: a posterior"
    what = f"RecursiveMixture M = {M}, shared: a posterior"
    found.append(compare(what, ours, name, theirs, options, threads=2, repeats=30, must=SEMI[0], aim=SEMI[1]))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    show(lines(arguments(__doc__)), "posteriors of mixtures")
