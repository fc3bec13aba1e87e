"""Speed, as ratios against a named baseline measured in the same run (`make bench`).

Each line times two callables in turn, A B A B ..., after a warm-up, and prints the medians and their ratio. Times on a
busy machine move; ratios hold.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from rich.console import Console
from rich.table import Table

from pyrovae import data, guides, runtime
from pyrovae.comparison.recipes import build_guide, build_model
from pyrovae.latents import LatentSpace
from pyrovae.samplers.graph import differentiable_graph


def paired(ours: Callable[[], object], baseline: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds of the two, timed in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 3):
        for index, function in enumerate((ours, baseline)):
            began = time.perf_counter()
            function()
            if turn >= 3:
                times[index].append(1000 * (time.perf_counter() - began))
    return statistics.median(times[0]), statistics.median(times[1])


def bare_step(vae: torch.nn.Module, encoder: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """The amortized training step in plain PyTorch: one draw, analytic KL, one Adam."""
    optimizer = torch.optim.Adam([*vae.parameters(), *encoder.parameters()], lr=1e-3)
    decoder = vae.decoder

    def step() -> None:
        loc, log_var = encoder(x).chunk(2, -1)
        z = loc + (0.5 * log_var).exp() * torch.randn_like(loc)
        kl = 0.5 * (log_var.exp() + loc**2 - 1 - log_var).sum()
        loss = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def svi_step(name: str, x: torch.Tensor) -> Callable[[], object]:
    vae = build_model(x.shape[1], 8, "bernoulli", 0, "cpu")
    guide = build_guide(name, vae, 0, "cpu")
    svi = SVI(vae, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with pyro.get_param_store().scope() as state:
        svi.step(x)

    def step() -> None:
        with pyro.get_param_store().scope(state):
            svi.step(x)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    threads = runtime.threads(options.threads)
    x = data.load("digits").train[:100]
    vae = build_model(64, 8, "bernoulli", 0, "cpu")
    encoder = build_guide("amortized", vae, 0, "cpu").encoder
    assert encoder is not None
    bare = bare_step(vae, encoder, x)

    table = Table(title=f"batch 100, 64-128-128-8 ReLU nets, {threads} thread(s), medians of {options.repeats}")
    for column in ("what", "ms", "baseline", "ms", "ratio"):
        table.add_column(column, justify="left" if column in ("what", "baseline") else "right")

    def line(what: str, ours: Callable[[], object], baseline: str, theirs: Callable[[], object]) -> None:
        a, b = paired(ours, theirs, options.repeats)
        table.add_row(what, f"{a:.2f}", baseline, f"{b:.2f}", f"{a / b:.2f}")

    for name in ("amortized", "semi-amortized", "laplace", "mixture", "short-run"):
        line(f"{name}: one stock SVI step", svi_step(name, x), "bare PyTorch VAE step", bare)

    space = LatentSpace(vae, x)
    log_joint = space.bind(x)
    u = torch.randn(100, 8)

    def hand(point: torch.Tensor) -> torch.Tensor:
        likelihood = -F.binary_cross_entropy_with_logits(vae.decoder(point), x, reduction="none").sum(-1)
        return likelihood - 0.5 * point.square().sum(-1)

    def gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            leaf = u.detach().requires_grad_()
            return torch.autograd.grad(function(leaf).sum(), leaf)

        return run

    line("log-joint and gradient, traced", gradient(log_joint), "hand-written PyTorch", gradient(hand))
    graph = differentiable_graph(log_joint, u)
    line("log-joint and gradient, recorded graph", gradient(graph), "hand-written PyTorch", gradient(hand))

    amortized = guides.Amortized(vae, encoder)
    for name in ("semi-amortized", "laplace", "mixture", "short-run"):
        guide = build_guide(name, vae, 0, "cpu", encoder)

        def posterior(guide: guides.Guide = guide) -> object:
            with torch.no_grad():
                return guide.draws(1, x)

        def encode() -> object:
            with torch.no_grad():
                return amortized.draws(1, x)

        line(f"{name}: one posterior draw", posterior, "amortized", encode)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
