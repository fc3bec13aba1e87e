"""DAIS for models with global and local latents (NumPyro's AutoSemiDAIS, after Geffner & Domke 2021).

    theta ~ q(theta),      z_b ~ a DAIS chain towards p(z_b | x_b, theta), for every datum b

    ELBO = E[ log p(theta) - log q(theta) + (N / B) sum_b (log p(x_b, z_b | theta) - log q(z_b, momenta_b | theta)) ]

Globals come from a guide of their own, of any kind. Given them the data are independent, so rows of the plate may be
subsampled: the sum over a mini-batch, times N / B, has the mean of the whole sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrovae import handlers, noise
from pyrovae.batching import Batched, Shared
from pyrovae.compat import GuideTraits
from pyrovae.errors import LatentError, NoDensityError, ScaleError
from pyrovae.families import Family
from pyrovae.guides.amortized import Amortized, first_argument
from pyrovae.guides.base import Guide
from pyrovae.guides.dais import DAIS
from pyrovae.joint import counts
from pyrovae.latents import LatentSpace
from pyrovae.plates import read_plate
from pyrovae.runtime import evaluating, preserve_rng

__all__ = ["SemiDAIS"]


class _Given:
    """The model with its globals fixed, and all that lies outside the plate unseen: a program of the rows alone."""

    def __init__(self, model: Callable[..., Any], plate: str) -> None:
        self.model, self.plate = model, plate

    def __call__(self, *args: Any, given: Shared, **kwargs: Any) -> Any:
        with poutine.block(hide_fn=self._outside), poutine.condition(data=given.values):
            return self.model(*args, **kwargs)

    def _outside(self, site: dict[str, Any]) -> bool:
        return counts(site) and _outside(site, self.plate)


def _outside(site: dict[str, Any], plate: str | None) -> bool:
    return all(frame.name != plate for frame in site["cond_indep_stack"])


def _log_prob(sites: Iterable[dict[str, Any]]) -> Tensor:
    """Scaled and masked, as Pyro's losses count it."""
    terms = [scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum() for site in sites]
    return torch.stack(terms).sum()


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
        `log_weights` is `[S, 1]`, for all data at once, and its draws are taken one after another. What the model
        observes outside the plate counts in the bound; if it depends on local latents, the chains do not see it.

    Raises:
        LatentError: the global guide's sites are not the model's globals.
        NoDensityError: importance weights with a global guide that fixes a global at a point (`AutoDelta`).
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
            _Given(model, plate), encoder, family, encoder_input=without_globals, plate=plate, batched=batched
        )
        self.local = DAIS(base, num_steps, step_size=step_size, max_step_size=max_step_size, keep=keep)
        self.__dict__["_sizes"] = None

    def _describe(self) -> str:
        return f"num_steps={self.local.num_steps}, "

    def space(self, *args: Any, **kwargs: Any) -> LatentSpace:
        """Of this call: the number of latents grows with the rows of the plate."""
        return LatentSpace(self.model, *args, plate=None, batched=self.batched, **kwargs)

    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise NoDensityError(
            "SemiDAIS knows the density of its whole chains, not that of their end points: use guide.log_weights "
            "(which are valid importance weights), or guide.sample for draws"
        )

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(frame.vectorized for frame in get_plates()):
            raise NotImplementedError(
                "SemiDAIS draws one set of globals a run: use Trace_ELBO(num_particles=...) without vectorize_particles"
            )
        given = {"given": Shared(self._globals(args, kwargs)[0])}
        self.local._program(self.local.space(*args, **given, **kwargs), args, {**given, **kwargs})

    def _globals(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """A draw of the globals, and all sites of the guide that drew them."""
        trace = poutine.trace(self.global_guide).get_trace(*args, **kwargs)
        nodes = {name: node for name, node in trace.nodes.items() if counts(node)}
        values = {
            name: node["value"] for name, node in nodes.items() if not node["infer"].get("is_auxiliary")
            and not node["is_observed"]
        }  # fmt: skip
        expected = self._global_sizes(args, kwargs)
        if set(values) != set(expected):
            raise LatentError(
                f"the global guide draws {sorted(values)}, but the model's latents outside the plate "
                f"{self.local.plate!r} are {sorted(expected)}: give it these sites, and these alone"
            )
        return values, nodes

    def _global_sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
        """Latents outside the data plate, and how many numbers each is, unconstrained."""
        if self._sizes is None:
            with preserve_rng(), torch.no_grad(), poutine.block(), evaluating(self.model):
                nodes = poutine.trace(self.model).get_trace(*args, **kwargs).nodes
            self.__dict__["_sizes"] = {
                name: biject_to(node["fn"].support).inv(node["value"]).numel() for name, node in nodes.items()
                if counts(node) and not node["is_observed"] and _outside(node, self.local.plate)
            }  # fmt: skip
            if not self._sizes:
                raise LatentError(f"all latents lie in the plate {self.local.plate!r}: use guides.DAIS")
        return self._sizes

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
        with self._aside(), torch.no_grad():
            assert self.local.plate is not None
            plate = read_plate(self.model, self.local.plate, args, kwargs)
            if plate.size != plate.full_size:
                raise ScaleError(f"importance weights of {plate.size} of {plate.full_size} rows: pass all data")
            self.space(*args, **kwargs).require_unit_scale(*args, **kwargs)
            return self._weighted(num_samples, *args, **kwargs)

    def _weighted(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """`log_weights` as part of a program (losses call it)."""
        found = []
        with self._global_noise():
            for _ in range(num_samples):
                values, nodes = self._globals(args, kwargs)
                self._require_density(nodes)
                given = {"given": Shared(values)}
                space = self.local.space(*args, **given, **kwargs)
                u, log_q = self.local._sampler(*args, **given, **kwargs).draw(1)
                local = (space.bind(*args, **given, **kwargs)(u) - log_q).sum()
                known = {**values, **space.constrain(u[0])}
                with poutine.block(), poutine.condition(data=known):
                    trace = poutine.trace(self.model).get_trace(*args, **kwargs)
                outside = [
                    site for site in trace.nodes.values() if counts(site) and _outside(site, self.local.plate)
                ]
                found.append(_log_prob(outside) - _log_prob(nodes.values()) + local)
        return torch.stack(found).unsqueeze(-1)

    def _require_density(self, nodes: dict[str, dict[str, Any]]) -> None:
        """Raise where the global guide draws fewer numbers than there are: a point has no density."""
        drawn = sum(
            node["value"].numel() for node in nodes.values()
            if not node["is_observed"] and not isinstance(node["fn"], dist.Delta)
        )  # fmt: skip
        if drawn < sum(self._sizes.values()):
            raise NoDensityError(
                f"the global guide fixes some of {sorted(self._sizes)} at a point, so its draws have no density and no "
                "importance weights: take one that draws them all, such as AutoNormal"
            )

