"""The digits' posteriors under blackjax's samplers (JAX), compiled first: what batched HMC is held against."""

from __future__ import annotations

import time
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from pyrovae.models import VAE

__all__ = ["chees", "nuts"]


def _log_joint(model: VAE) -> Any:
    """log p(x, z) of one datum, `(z [D], x [X])`; the decoder's layers as they are."""
    layers = [(jnp.asarray(m.weight.detach().numpy()), jnp.asarray(m.bias.detach().numpy()))
              for m in model.decoder.modules() if isinstance(m, torch.nn.Linear)]  # fmt: skip

    def log_joint(z: Any, x: Any) -> Any:
        hidden = z
        for weight, bias in layers[:-1]:
            hidden = jax.nn.relu(weight @ hidden + bias)
        weight, bias = layers[-1]
        logits = weight @ hidden + bias
        prior = -0.5 * (z @ z + len(z) * jnp.log(2 * jnp.pi))
        return prior + jnp.sum(x * logits - jnp.logaddexp(0.0, logits))

    return log_joint


def _timed(run: Any, *args: Any) -> tuple[Any, float]:
    compiled = jax.jit(run).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    began = time.perf_counter()
    found = jax.block_until_ready(compiled(*args))
    return found, time.perf_counter() - began


def nuts(model: VAE, x: Tensor, chains: int, warmup: int, draws: int) -> tuple[Tensor, float]:
    """Window adaptation and NUTS of every chain by itself, all of them vmapped; `[C, S, B, D]` and seconds."""
    log_joint, data = _log_joint(model), jnp.asarray(x.numpy())

    def one(key: Any, datum: Any) -> Any:
        density = lambda z: log_joint(z, datum)  # noqa: E731
        start, adapt, sample = jax.random.split(key, 3)
        tuning = blackjax.window_adaptation(blackjax.nuts, density)
        (state, found), _ = tuning.run(adapt, jax.random.normal(start, (model.latent_dim,)), num_steps=warmup)
        step = blackjax.nuts(density, **found).step

        def advance(state: Any, key: Any) -> Any:
            state, _ = step(key, state)
            return state, state.position

        return jax.lax.scan(advance, state, jax.random.split(sample, draws))[1]

    keys = jax.random.split(jax.random.key(0), (chains, len(data)))
    run = jax.vmap(jax.vmap(one), in_axes=(0, None))
    found, seconds = _timed(run, keys, data)
    return torch.from_numpy(np.asarray(found).copy()).transpose(1, 2), seconds


def chees(model: VAE, x: Tensor, chains: int, warmup: int, draws: int) -> tuple[Tensor, float]:
    """ChEES-HMC of every datum, vmapped over data: step size and length tuned on the datum's chains.

    The diagonal mass comes from a first warm-up of the same length: latents are divided by their standard deviations.
    """
    import optax

    log_joint, data = _log_joint(model), jnp.asarray(x.numpy())

    def tuned(key: Any, start: Any, datum: Any, scale: Any) -> Any:
        density = lambda z: log_joint(z * scale, datum)  # noqa: E731
        adaptation = blackjax.chees_adaptation(density, chains)
        return adaptation.run(key, start, 0.2, optax.adam(0.05), warmup // 2), density

    def one(key: Any, datum: Any) -> Any:
        keys = jax.random.split(key, 4)
        start = jax.random.normal(keys[0], (chains, model.latent_dim))
        (found, _), _ = tuned(keys[1], start, datum, jnp.ones(model.latent_dim))
        rough, parameters = found
        kernel = blackjax.dynamic_hmc(lambda z: log_joint(z, datum), **parameters)

        def advance(states: Any, key: Any) -> Any:
            states, _ = jax.vmap(kernel.step)(jax.random.split(key, chains), states)
            return states, states.position

        _, path = jax.lax.scan(advance, rough, jax.random.split(keys[2], 50))
        scale = path.reshape(-1, model.latent_dim).std(0)
        (found, _), density = tuned(keys[3], path[-1] / scale, datum, scale)
        states, parameters = found
        final = blackjax.dynamic_hmc(density, **parameters)

        def collect(states: Any, key: Any) -> Any:
            states, _ = jax.vmap(final.step)(jax.random.split(key, chains), states)
            return states, states.position * scale

        return jax.lax.scan(collect, states, jax.random.split(keys[0], draws))[1]

    keys = jax.random.split(jax.random.key(0), len(data))
    found, seconds = _timed(jax.vmap(one), keys, data)
    return torch.from_numpy(np.asarray(found).copy()).permute(2, 1, 0, 3), seconds
