"""DAIS for models with global and local latents (NumPyro's AutoSemiDAIS, after Geffner & Domke 2021).

    theta ~ q(theta),      z_b ~ a DAIS chain towards p(z_b | x_b, theta), for every datum b

    ELBO = E[ log p(theta) - log q(theta) + (N / B) sum_b (log p(x_b, z_b | theta) - log q(z_b, momenta_b | theta)) ]

Globals come from a guide of their own, of any kind. Given them the data are independent, so rows of the plate may be
subsampled: the sum over a mini-batch, times N / B, has the mean of the whole sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn

from pyrovae import handlers, noise
from pyrovae.batching import Batched, Shared
from pyrovae.compat import GuideTraits
from pyrovae.errors import LatentError, ScaleError
from pyrovae.families import Family
from pyrovae.guides.amortized import Amortized, first_argument
from pyrovae.guides.base import Guide
from pyrovae.guides.dais import DAIS
from pyrovae.joint import counts
from pyrovae.runtime import evaluating, preserve_rng

__all__ = ["SemiDAIS"]


class _Given:
    """The model with its globals fixed: what is left is a program of local latents alone."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def __call__(self, *args: Any, given: Shared, **kwargs: Any) -> Any:
        with poutine.block(hide=list(given.values)), poutine.condition(data=given.values):
            return self.model(*args, **kwargs)


class SemiDAIS(Guide):
    """Globals by one guide, every datum's latents by annealed chains given the globals.

    Args:
        model: the Pyro program; latents inside the plate are local, all others global.
        global_guide: a Pyro guide of the global sites alone, such as
            `AutoNormal(poutine.block(model, expose=["theta"]))`.
        encoder: module to the parameters of the chains' Gaussian starts, `[B, P]`; `nn.Embedding(N, P)` with
            `encoder_input=lambda *args: index` gives every datum parameters of its own.
        num_steps: K >= 1.
        family: "diagonal", "full-rank" or "low-rank".
        step_size, max_step_size, keep: as in `DAIS`.
        encoder_input: picks the encoder's input from the guide's arguments; by default the first one.
        plate: name of the data plate.
        batched: which arguments carry rows, as `LatentSpace` takes it.

    Note:
        Train it with stock `Trace_ELBO`, or `losses.ELBO()`. To the outside the program is one datum (`plate=None`):
        `log_weights` is `[S, 1]`, for all data at once, and its draws are taken one after another.

    Raises:
        LatentError: the global guide's sites are not the model's globals.
    """

    traits = GuideTraits(name="SemiDAIS", marginal=False)

    def __init__(
        self,
        model: Callable[..., Any],
        global_guide: Callable[..., Any],
        encoder: nn.Module,
        num_steps: int = 4,
        *,
        family: str | type[Family] | Callable[[int], Family] = "diagonal",
        step_size: float = 0.1,
        max_step_size: float = 1.0,
        keep: float = 0.9,
        encoder_input: Callable[..., Any] = first_argument,
        plate: str = "data",
        batched: Batched = "auto",
    ) -> None:
        super().__init__(model, plate=None, batched=batched)
        if encoder is None:
            raise ValueError("SemiDAIS needs an encoder of the local latents: nn.Embedding gives each datum a row")

        def without_globals(*args: Any, given: Shared, **kwargs: Any) -> Any:
            return encoder_input(*args, **kwargs)

        self.global_guide = global_guide
        base = Amortized(
            _Given(model), encoder, family, encoder_input=without_globals, plate=plate, batched=batched
        )
        self.local = DAIS(base, num_steps, step_size=step_size, max_step_size=max_step_size, keep=keep)
        self.__dict__["_names"] = None

    def _describe(self) -> str:
        return f"num_steps={self.local.num_steps}, "

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(frame.vectorized for frame in get_plates()):
            raise NotImplementedError(
                "SemiDAIS draws one set of globals a run: use Trace_ELBO(num_particles=...) without vectorize_particles"
            )
        given = {"given": Shared(self._globals(args, kwargs)[0])}
        self.local._program(self.local.space(*args, **given, **kwargs), args, {**given, **kwargs})

    def _globals(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """A draw of the globals, and the trace-wise log q of the guide that drew them."""
        trace = poutine.trace(self.global_guide).get_trace(*args, **kwargs)
        nodes = {name: node for name, node in trace.nodes.items() if counts(node)}
        values = {
            name: node["value"] for name, node in nodes.items() if not node["infer"].get("is_auxiliary")
            and not node["is_observed"]
        }  # fmt: skip
        expected = self._global_sites(args, kwargs)
        if set(values) != set(expected):
            raise LatentError(
                f"the global guide draws {sorted(values)}, but the model's latents outside the plate "
                f"{self.local.plate!r} are {sorted(expected)}: give it these sites, and these alone"
            )
        return values, sum(node["fn"].log_prob(node["value"]).sum() for node in nodes.values())

    def _global_sites(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Latents outside the data plate."""
        if self._names is None:
            with preserve_rng(), torch.no_grad(), poutine.block(), evaluating(self.model):
                nodes = poutine.trace(self.model).get_trace(*args, **kwargs).nodes
            self.__dict__["_names"] = [
                name for name, node in nodes.items()
                if counts(node) and not node["is_observed"]
                and all(frame.name != self.local.plate for frame in node["cond_indep_stack"])
            ]  # fmt: skip
            if not self._names:
                raise LatentError(f"all latents lie in the plate {self.local.plate!r}: use guides.DAIS")
        return self._names

    def _prepare(self, space: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        raise NotImplementedError("SemiDAIS writes its sites in two parts")

    @contextmanager
    def _global_noise(self) -> Iterator[None]:
        """Per-datum noise seeds the whole program: the global guide draws from torch's own state."""
        if not noise.active():
            yield
            return
        (seed,) = noise.row_seeds()
        with preserve_rng(), noise.suspended():
            torch.manual_seed(seed)
            yield

    def _draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        space, found = self.space(*args, **kwargs), []
        with self._global_noise():
            for _ in range(num_samples):
                values, _ = self._globals(args, kwargs)
                given = {"given": Shared(values)}
                u = self.local._draws(1, *args, **given, **kwargs)
                sites = self.local.space(*args, **given, **kwargs).constrain(u[0])
                found.append(space.unconstrain({**values, **sites}))
        return torch.stack(found)

    def log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x, theta, z_s) - log q(theta_s, chains_s), `[S, 1]`, nats, for all data at once.

        Raises:
            ScaleError: a KL weight, a user's scale, or a subsampled plate.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if handlers.kl_weight() != 1.0:
            raise ScaleError(f"importance weights under a KL weight of {handlers.kl_weight():g}: evaluate with 1")
        found = []
        with self._aside(), self._global_noise(), torch.no_grad():
            for _ in range(num_samples):
                values, log_q = self._globals(args, kwargs)
                given = {"given": Shared(values)}
                local = self.local.space(*args, **given, **kwargs)
                plate = local.read_plate(*args, **given, **kwargs)
                if plate is not None and plate.size != plate.full_size:
                    raise ScaleError(f"importance weights of {plate.size} of {plate.full_size} rows: pass all data")
                self.space(*args, **kwargs).require_unit_scale(*args, **kwargs)
                weights = self.local._weighted(1, *args, **given, **kwargs)
                found.append(self._log_prior(values, args, kwargs) - log_q + weights.sum())
        return torch.stack(found).unsqueeze(-1)

    def _log_prior(self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """log p(theta), and whatever else the model observes outside the plate."""
        with poutine.block(), poutine.condition(data=values):
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        total = torch.zeros(())
        for node in trace.nodes.values():
            outside = all(frame.name != self.local.plate for frame in node.get("cond_indep_stack", ()))
            if counts(node) and outside:
                total = total + node["fn"].log_prob(node["value"]).sum()
        return total

