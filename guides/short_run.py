"""Short-run inference (Nijkamp et al. 2020; Pang et al. 2021): K steps of a sampler, always from the same start.

    u_0 ~ prior (or another guide),   u_{k+1} = Langevin or HMC step on log p(x, u),   q(u | x) = law of u_K

Nothing is amortized and nothing has parameters. The law of u_K has no tractable density, so the training objective
is E_q[log p(x, z)], which is not a bound and is never called an ELBO.

A model in training may draw masks (dropout, word dropout). A chain whose masks stay has one target, log p(x, u) under
those masks; with fresh ones at every step, as published for text, it has another target each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae import handlers, noise
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.emission import emit_draws
from pyrovae.guides.base import Guide
from pyrovae.guides.chain import particles
from pyrovae.latents import LatentSpace
from pyrovae.recording import recorded, same_draws
from pyrovae.samplers import hmc, init, langevin

__all__ = ["ShortRun", "text_steps"]

_TEXT_STEPS = (0.8, 0.7, 0.6, 0.5, 0.2, 0.2, 0.1, 0.1, 0.05)


class ShortRun(Guide):
    """K sampler steps per datum, from the prior or from another guide.

    Args:
        model: the Pyro program.
        num_steps: K >= 1.
        step_size: the noise scale s of Langevin, or the leapfrog step of HMC; a number, or K of them.
            `guides.tune_step_size` chooses it.
        kernel: "langevin" (unadjusted) or "hmc" (`num_leapfrog` leapfrog steps with fresh momentum, uncorrected).
        init: None starts from the prior; a guide starts from its draws.
        temperature: noise temperature of Langevin.
        masks: of a model in training: "fixed", the same at every step of a chain and new for the next call, or "fresh"
            at every step. The model's own pass that follows draws its own either way.
        plate, batched: as in `LatentSpace`.

    Example:
        The published chain for text; in training `schedules.RisingTemperature` brings its noise up to 0.2:

        >>> from pyrovae.models import TextVAE
        >>> from pyrovae.nets import LSTMDecoder
        >>> model = TextVAE(LSTMDecoder(10, 2, embedding=4, hidden=8, dropout=0.5), latent_dim=2)
        >>> guide = ShortRun(model, 20, text_steps(20), temperature=0.2, masks="fresh")
        >>> guide.sample(10, torch.tensor([[4, 5, 2], [6, 2, 0]]))["z"].shape
        torch.Size([10, 2, 2])
    """

    traits = GuideTraits(name="ShortRun", has_density=False, reparameterised=False)

    def __init__(
        self,
        model: Callable[..., Any],
        num_steps: int = 20,
        step_size: float | Sequence[float] = 0.1,
        kernel: Literal["langevin", "hmc"] = "langevin",
        init: Guide | None = None,
        *,
        num_leapfrog: int = 5,
        temperature: float = 1.0,
        masks: Literal["fixed", "fresh"] = "fixed",
        plate: str | None = "data",
        batched: Batched = "auto",
    ) -> None:
        steps = step_sizes(num_steps, step_size)
        if num_leapfrog < 1:
            raise ValueError(f"ShortRun needs num_leapfrog >= 1, got {num_leapfrog}")
        if not temperature >= 0:
            raise ValueError(f"the temperature must not be negative, got {temperature:g}")
        if masks not in ("fixed", "fresh"):
            raise ValueError(f"masks must be 'fixed' or 'fresh', got {masks!r}")
        if kernel not in ("langevin", "hmc"):
            raise ValueError(f"kernel must be 'langevin' or 'hmc', got {kernel!r}")
        if init is not None and (init.model is not model or init.plate != plate):
            raise ValueError("the starting guide must be one of the same model with the same plate")
        super().__init__(model, plate=plate, batched=batched)
        self.num_steps, self.steps, self.kernel = num_steps, steps, kernel
        self.num_leapfrog, self.temperature, self.masks = num_leapfrog, float(temperature), masks
        self.init = init

    def _describe(self) -> str:
        masks = "" if self.masks == "fixed" else f"masks={self.masks!r}, "
        return f"num_steps={self.num_steps}, kernel={self.kernel!r}, {masks}"

    def _draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        space = self.space(*args, **kwargs)
        log_joint = space.bind(*args, **kwargs)
        beta = handlers.kl_weight()
        with torch.no_grad():
            if self.init is None:
                u = space.prior(num_samples, *args, **kwargs)
            else:
                u = self.init._draws(num_samples, *args, **kwargs)
            density: Callable[..., Tensor] = recorded(log_joint, u)
            if self.masks == "fixed":
                density = same_draws(density)

            def target(point: Tensor) -> Tensor:
                return density(point, beta)

            state = init(target, u)
            for step_size in self.steps:
                eps = noise.normal(*u.shape, like=u)
                if self.kernel == "langevin":
                    state, _ = langevin.step(state, target, step_size, eps, temperature=self.temperature)
                else:
                    state, _ = hmc.step(state, target, step_size, self.num_leapfrog, eps)
        return state.u

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        number, shape = particles("ShortRun", space)
        u = shape(self._draws(number, *args, **kwargs))
        return lambda: emit_draws(space.structure, u)


def text_steps(num_steps: int = 20) -> list[float]:
    """The published step sizes for text: large ones first, 0.05 from the ninth step on (Pang et al. 2021)."""
    return step_sizes(num_steps, [*_TEXT_STEPS, *[_TEXT_STEPS[-1]] * num_steps][:num_steps])


def step_sizes(num_steps: int, step_size: float | Sequence[float]) -> list[float]:
    """One step size for each of K steps."""
    if num_steps < 1:
        raise ValueError(f"a short run needs num_steps >= 1, got {num_steps}")
    sizes = [float(step_size)] * num_steps if isinstance(step_size, int | float) else [float(s) for s in step_size]
    if len(sizes) != num_steps or not min(sizes) > 0:
        raise ValueError(f"step_size must be positive, one number or one per step ({num_steps})")
    return sizes
