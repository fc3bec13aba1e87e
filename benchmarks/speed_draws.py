"""One posterior draw of every guide of `pyrovae compare` against the amortized one's (small nets, 1 thread)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from setting import images
from timing import Line, Options, arguments, compare, show

from pyrovae import guides
from pyrovae.comparison.recipes import GUIDES, build_guide, build_model


def lines(options: Options) -> list[Line]:
    x = images("bernoulli", side=8)[:100]
    vae = build_model(64, 8, "bernoulli", 0, "cpu")
    amortized = build_guide("amortized", vae, 0, "cpu")

    def draw(guide: guides.Guide) -> Callable[[], object]:
        return lambda: guide.draws(1, x)

    found = []
    for name in GUIDES:
        if name != "amortized":
            ours = draw(build_guide(name, vae, 0, "cpu"))
            what = f"{name}: a posterior draw"
            found.append(compare(what, ours, "amortized", draw(amortized), options, threads=1, repeats=30))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    show(lines(arguments(__doc__)), "posterior draws, batch 100, 64-128-128-8 nets")
