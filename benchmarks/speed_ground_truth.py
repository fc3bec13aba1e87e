"""Ground truth: batched HMC in effective draws per second, IWAE-5000, and what more data cost.

The digits' VAE (8 latents, 64-128-128 decoder) is trained for a few seconds first. One sampler is worth the sum over
data of the smallest bulk ESS over latents, per second, warm-up included, recording and compilation left out. Lines with
blackjax run where it is installed (`pip install blackjax`); its chains are compiled before the clock starts.
"""

from __future__ import annotations

import math
import statistics
import warnings
from importlib.util import find_spec

import torch
from setting import images, nets, vae
from timing import Line, Options, arguments, show
from torch import Tensor

from pyrovae import evidence, fit, guides, reference
from pyrovae.comparison.recipes import build_guide, build_model
from pyrovae.diagnose import ess_bulk, split_rhat
from pyrovae.latents import _PIECE, LatentSpace
from pyrovae.models import VAE
from pyrovae.runtime import evaluating, seeded
from pyrovae.samplers import batched
from pyrovae.slopes import slopes

CHAINS, WARMUP, DRAWS, DATA = 4, 300, 500, 100


def worth(draws: Tensor) -> tuple[float, float]:
    """(sum over data of the smallest bulk ESS, largest R-hat) of `[C, S, B, D]`."""
    return float(ess_bulk(draws).amin(-1).sum()), float(split_rhat(draws).max())


def digits() -> tuple[VAE, Tensor]:
    """A trained model of the digits, frozen, and the data whose posteriors are drawn from."""
    x = images("bernoulli", side=8)
    model = build_model(64, 8, "bernoulli", 0, "cpu")
    fit(model, build_guide("amortized", model, 0, "cpu"), x, epochs=30, batch_size=100, seed=0, progress=False)
    return model.requires_grad_(False).eval(), x[:DATA]


def ours(model: VAE, x: Tensor, options: Options, seed: int = 0) -> tuple[float, float, float]:
    """(ESS per second, R-hat, seconds) of warm-up and draws of batched HMC."""
    space = LatentSpace(model, x)
    start = space.prior(CHAINS, x)
    target = slopes(space.bind(x), start)
    generator = torch.Generator().manual_seed(seed)
    began = options.clock()
    state, tuned = batched.warm_up(target.at(start), target, WARMUP, generator)
    _, found = batched.draw(state, target, tuned, DRAWS, generator)
    seconds = options.clock() - began
    ess, rhat = worth(found["u"].transpose(0, 1))
    return ess / seconds, rhat, seconds


def stock_nuts(model: VAE, x: Tensor, options: Options) -> float:
    """ESS per second of Pyro's NUTS on the program itself, one chain and one datum at a time, of three data."""
    from pyro.infer import MCMC, NUTS

    total = seconds = 0.0
    for row in range(3):
        one = x[row : row + 1]
        began = options.clock()
        mcmc = MCMC(NUTS(model), num_samples=DRAWS, warmup_steps=WARMUP, disable_progbar=True)
        with warnings.catch_warnings(), seeded(row):
            warnings.simplefilter("ignore")
            mcmc.run(one)
        seconds += options.clock() - began
        total += float(ess_bulk(mcmc.get_samples()["z"].reshape(1, DRAWS, 8)).min())
    return total / seconds


def rate_line(what: str, ours: float, baseline: str, theirs: float, threads: int, must: float, aim: float) -> Line:
    """ESS per second as milliseconds per 1,000 effective draws; `must` and `aim` are times faster."""
    mine, other = 1e6 / ours, 1e6 / theirs
    ratio = mine / other
    return Line(what, mine, baseline, other, (ratio, ratio), threads, 1 / must, 1 / aim)


def floor_line(options: Options, threads: int) -> Line:
    """Transitions of batched HMC against log-joint with gradient times leapfrog steps, 784-500-500-50 nets."""
    torch.set_num_threads(threads)
    parts = nets(784, 500, 50)
    model, x = vae(parts, "bernoulli").requires_grad_(False).eval(), images("bernoulli")[:64]
    space = LatentSpace(model, x)
    start = space.prior(CHAINS, x)
    target = slopes(space.bind(x), start)
    generator = torch.Generator().manual_seed(0)
    state, tuned = batched.warm_up(target.at(start), target, 60, generator)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.repeats or 10):
        began = options.clock()
        _, found = batched.draw(state, target, tuned, 20, generator)
        times[0].append(1000 * (options.clock() - began))
        steps = round(20 * float(found["num_leapfrog"][0]))
        began = options.clock()
        for _ in range(steps):
            target.at(start)
        times[1].append(1000 * (options.clock() - began))
    return _line("batched HMC, 64 data, 50 latents", times, "log-joint and gradient x steps", threads, 1.3, 1.1)


def iwae_lines(options: Options, threads: int) -> list[Line]:
    """IWAE-5000 of 100 images against the same in bare PyTorch: the same chunks of 12 images x 1,000 draws, and, for
    information, the pieces in which the library then scores a chunk.
    """
    torch.set_num_threads(threads)
    parts = nets(784, 200, 50)
    model, x = vae(parts, "bernoulli").eval(), images("bernoulli")[:100]
    guide = guides.Amortized(model, parts.encoder)
    number, chunk = 5000, max(1, 64_000 // 5000)
    piece = math.ceil(1000 / (1 + 1000 * chunk // _PIECE))  # as `LogJoint` cuts a block of 1,000 draws

    def bare(piece: int) -> Tensor:
        values = []
        with torch.no_grad():
            for start in range(0, len(x), chunk):
                rows = x[start : start + chunk]
                loc, log_var = parts.encoder(rows).chunk(2, dim=-1)
                scale, pieces = (log_var / 2).exp(), []
                for first in range(0, number, piece):
                    eps = torch.randn(min(piece, number - first), len(rows), loc.shape[-1])
                    z = loc + scale * eps
                    logits = parts.decoder(z.flatten(0, 1)).view(*z.shape[:2], -1)
                    target = rows.expand_as(logits)
                    fit = -torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
                    gap = -0.5 * z.square() + 0.5 * eps.square() + log_var / 2
                    pieces.append(fit.sum(-1) + gap.sum(-1))
                values.append(torch.logsumexp(torch.cat(pieces).double(), 0) - math.log(number))
        return torch.cat(values)

    works = (lambda: evidence.iwae(model, guide, x, num_samples=number), lambda: bare(1000), lambda: bare(piece))
    times: tuple[list[float], ...] = ([], [], [])
    for turn in range(1 + (options.repeats or 3)):
        for kept, work in zip(times, works, strict=True):
            began = options.clock()
            work()
            if turn:
                kept.append(1000 * (options.clock() - began))
    what = "IWAE-5000, 100 images of 784 pixels"
    return [
        _line(what, (times[0], times[1]), "bare PyTorch, same chunks", threads, 1.1, 1.0),
        _line(what, (times[0], times[2]), "bare PyTorch, same pieces", threads, None, None),
    ]


def scaling_line(model: VAE, options: Options, threads: int) -> Line:
    """Batched HMC of 1,000 data against ten times 100: the exponent is log10 of ten times the ratio."""
    torch.set_num_threads(threads)
    x = images("bernoulli", side=8)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.repeats or 2):
        for kept, rows, times_over in zip(times, (1000, 100), (1, 10), strict=True):
            began = options.clock()
            reference.hmc(model, x[:rows], num_chains=CHAINS, target_ess=800, progress=False)
            kept.append(1000 * times_over * (options.clock() - began))
    # An exponent of 1.05 from 100 to 1,000 data is a ratio of 10^0.05.
    return _line("reference.hmc, 1,000 data", times, "10 x 100 data", threads, 10**0.05, 1.0)


def _line(
    what: str, times: tuple[list[float], list[float]], baseline: str, threads: int, must: float | None,
    aim: float | None,
) -> Line:  # fmt: skip
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    return Line(
        what, statistics.median(times[0]), baseline, statistics.median(times[1]), (ratios[0], ratios[-1]), threads,
        must, aim,
    )  # fmt: skip


def lines(options: Options) -> list[Line]:
    threads = 1 if options.busy else options.threads or 2
    torch.set_num_threads(threads)
    model, x = digits()
    with evaluating(model):
        runs = [ours(model, x, options, seed) for seed in range(options.repeats or 3)]
        mine = statistics.median(run[0] for run in runs)
        what = f"batched HMC, {DATA} x {CHAINS} chains (R-hat <= {max(run[1] for run in runs):.3f}): ms per 1,000 ESS"
        found = [rate_line(what, mine, "stock Pyro NUTS, 3 data", stock_nuts(model, x, options), threads, 200, 600)]
        if find_spec("blackjax") is not None:
            import blackjax_baseline

            for name, sampler, must, aim in (
                ("blackjax NUTS, vmapped", blackjax_baseline.nuts, 2.0, 5.0),
                ("blackjax ChEES, diagonal mass", blackjax_baseline.chees, 0.4, 1.0),
            ):
                draws, seconds = sampler(model, x, CHAINS, WARMUP, DRAWS)
                ess, rhat = worth(draws)
                found.append(rate_line(what, mine, f"{name} (R-hat <= {rhat:.3f})", ess / seconds, threads, must, aim))
        found += [floor_line(options, threads), *iwae_lines(options, threads), scaling_line(model, options, threads)]
    return found




if __name__ == "__main__":
    torch.manual_seed(0)
    show(lines(arguments(__doc__)), "ground truth: milliseconds per 1,000 effective draws, or per call")
