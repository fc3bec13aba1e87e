"""Reference posteriors by stock NUTS (Hoffman & Gelman 2014), the gold standard on small problems.

All data are sampled jointly (their posterior factorises, so the target is block-diagonal): one run per chain instead
of one per datum. The potential is minus the log-joint of `LatentSpace`; parameters of the model are left alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyrovae import noise, store
from pyrovae.batching import Batched
from pyrovae.identity import program_identity
from pyrovae.latents import LatentSpace
from pyrovae.provenance import Provenance
from pyrovae.recording import recorded
from pyrovae.reference.posterior import DIVERGENT_SHARE, Reference, status_of
from pyrovae.reference.starts import starts
from pyrovae.runtime import evaluating, seeded

__all__ = ["nuts"]


def nuts(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 2,
    num_samples: int = 700,
    warmup: int = 300,
    init: Tensor | Any | None = None,
    target_accept: float = 0.8,
    plate: str | None = "data",
    batched: Batched = "auto",
    seed: int = 0,
    progress: bool = False,
    **kwargs: Any,
) -> Reference:
    """NUTS draws of every datum's posterior, chain after chain, in this process.

    Args:
        model: the Pyro program, and the arguments it is called with.
        num_chains, num_samples, warmup: per-run budget; chains run one after the other.
        init: where chains start: None draws from the prior, a guide draws from it, a tensor `[C, B, D]` is taken as
            it is (unconstrained). Starting chains in different places is how a missed mode shows.
        target_accept: target acceptance probability of the step-size adaptation.
        plate, batched: as in `LatentSpace`.
        seed: makes the run repeatable; the caller's random state is left alone.
        progress: Pyro's own progress bar.

    Returns:
        a `Reference` with R-hat and effective sample size per datum.
    """
    if num_chains < 1 or num_samples < 4 or warmup < 0:
        raise ValueError("nuts needs num_chains >= 1, num_samples >= 4 and warmup >= 0")
    began = time.perf_counter()
    with evaluating(model), store.isolated(), seeded(seed):
        space = LatentSpace(model, *args, plate=plate, batched=batched, **kwargs)
        space.require_unit_scale(*args, **kwargs)
        log_joint = space.bind(*args, **kwargs)
        start = starts(space, init, num_chains, args, kwargs)

        fast = recorded(log_joint, start[0])

        def potential(params: dict[str, Tensor]) -> Tensor:
            return -fast(params["u"]).sum()

        chains, divergences = [], 0
        for chain in range(num_chains):
            torch.manual_seed(noise.mix(seed, chain))
            kernel = NUTS(potential_fn=potential, target_accept_prob=target_accept)
            mcmc = MCMC(
                kernel,
                num_samples=num_samples,
                warmup_steps=warmup,
                initial_params={"u": start[chain].clone()},
                disable_progbar=not progress,
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*requires_grad.*")
                mcmc.run()
            chains.append(mcmc.get_samples()["u"].detach())
            divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
        draws = torch.stack(chains)
        with torch.no_grad():
            lp = torch.stack([log_joint(chain) for chain in draws])
    # Divergences of a run on all data are nobody's in particular: too many, and no datum's draws are trusted.
    divergent = torch.full((draws.shape[2],), divergences > DIVERGENT_SHARE * num_chains * num_samples)
    rhat, bulk, tail, status = status_of(draws, divergent=divergent)
    pooled = draws.double().flatten(0, 1)
    return Reference(
        kind="nuts", space=space, draws=draws, rhat=rhat, ess=torch.minimum(bulk, tail),
        divergences=divergences, status=status, mean=pooled.mean(0), sd=pooled.std(0), log_evidence=None,
        provenance=Provenance.of_call(args, kwargs, num_data=draws.shape[2], seed=seed, num_samples=num_samples),
        program=program_identity(model), seconds=time.perf_counter() - began, initial=start, lp=lp,
    )  # fmt: skip
