"""LatentSpace: a Pyro model's latents as one unconstrained vector per datum, and its log-joint in those coordinates.

For latent sites z_1..z_J of datum b with supports S_j, `u_b` stacks `biject_to(S_j)^{-1}(z_j)`, flattened, and

    log_joint(u)_b = sum_j log p(z_j | ...) + log p(x_b | z) + log |det dz/du|        (nats per datum)

Two modes:

* `plate="data"` (local): every latent and observation lies in that plate at dim -1; `u: [..., B, D]`.
* `plate=None` (joint): the whole program is one datum; B = 1, D counts all latents, inner plates included.

Discrete latents that can be enumerated are summed out of `log_joint`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae.batching import Batched, RowArguments, check_finite
from pyrovae.emission import site_posteriors
from pyrovae.errors import BatchError, ScaleError
from pyrovae.joint import evaluate, inspect_model, prior_draw, remaining_scales
from pyrovae.plates import DataPlate, read_plate
from pyrovae.runtime import evaluating, preserve_rng
from pyrovae.sites import pack, to_constrained
from pyrovae.store import fresh, isolated

__all__ = ["LatentSpace", "LogJoint"]

_PIECE = 1 << 11  # rows scored at once on a CPU without gradient: larger arrays cost page faults, twice the time


class LatentSpace:
    """The latents of a Pyro model, found by running it once.

    Args:
        model: any Pyro program.
        *args, **kwargs: arguments on which it can be run; tensors with one row per datum are recognised.
        plate: name of the data plate, or None for joint mode.
        batched: `"auto"`, or names and positions of the arguments that carry one row per datum.

    Attributes:
        sites: the latent sites in the order of the program.
        dim: D, unconstrained latent dimensions per datum.
        enumerated: names of discrete latents that are summed out.

    Raises:
        PlateError: the plate is missing, or a site lies outside it.
        LatentError: a latent that can be neither transformed to R^D nor enumerated.
        BatchError: rows of the batch that are not independent of one another.
        DataError: NaN in the arguments, or observations outside their support.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        ...         loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("x", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=x)
        >>> x = torch.zeros(3, 2)
        >>> space = LatentSpace(model, x)
        >>> space
        LatentSpace(scale: [1] + loc: [2], D = 3, plate = 'data')
        >>> space.log_joint(torch.zeros(5, 3, 3), x).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        plate: str | None = "data",
        batched: Batched = "auto",
        **kwargs: Any,
    ) -> None:
        self.model, self.plate, self.batched = model, plate, batched
        check_finite(args, kwargs)
        with fresh(), preserve_rng(), torch.no_grad(), evaluating(model):
            if plate is not None:
                read_plate(model, plate, args, kwargs)  # a missing plate is reported before anything else
            self.structure = structure = inspect_model(model, plate, args, kwargs)
        self.sites, self.enumerated = structure.sites, structure.enumerated
        self.dim: int = sum(site.size for site in self.sites)
        self.dtype, self.device = structure.dtype, structure.device
        self._foldable: dict[tuple[Any, ...], bool] = {}  # by shapes: whether rows can be taken and repeated
        self._warned = False
        self.recordings: dict[Any, Any] = {}  # kept by `pyrovae.recording`
        with fresh():
            self.bind(*args, **kwargs)

    def __repr__(self) -> str:
        parts = " + ".join(f"{site.name}: {list(site.unconstrained_shape) or [1]}" for site in self.sites)
        return f"LatentSpace({parts}, D = {self.dim}, plate = {self.plate!r})"

    def read_plate(self, *args: Any, **kwargs: Any) -> DataPlate | None:
        """The data plate of a call (None in joint mode)."""
        return None if self.plate is None else read_plate(self.model, self.plate, args, kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> LogJoint:
        """The log-joint as a function of `u` alone, for inner loops and samplers.

        The arguments are checked here, once; the function itself runs without distribution validation.
        """
        check_finite(args, kwargs)
        plate = self.read_plate(*args, **kwargs)
        rows = RowArguments(args, kwargs, 1 if plate is None else plate.size, self.batched)
        bound = LogJoint(self, rows)
        key = (rows.size, rows.shapes, rows.carries)
        if plate is not None and key not in self._foldable:
            with preserve_rng(), torch.no_grad(), evaluating(self.model):
                self._foldable[key] = self._check_rows(bound)
        bound.foldable = self._foldable.get(key, False)
        return bound

    def log_joint(self, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x, z) + log |det dz/du| per datum, `[..., B, D] -> [..., B]`, nats.

        Masks, factors and a user's `poutine.scale` count; the plate's subsampling scale N/B does not. Parameters that
        modules own are not registered in Pyro's store (`bind` in a Pyro program does that).
        """
        with isolated():
            return self.bind(*args, **kwargs)(u)

    def require_unit_scale(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ScaleError` when a site keeps a scale other than 1 (importance weights would mean nothing)."""
        with isolated(), preserve_rng(), torch.no_grad(), evaluating(self.model):
            for name, scale in remaining_scales(self.model, self.plate, args, kwargs).items():
                if not math.isclose(scale, 1.0, rel_tol=1e-6):
                    raise ScaleError(
                        f"site {name!r} has scale {scale:g}: evidence, k-hat and references need the true joint "
                        "density, so evaluate with KL weight 1 and without poutine.scale"
                    )

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained `[..., B, D]` to the model's own space: site -> `[..., B, *event]`.

        In joint mode (B = 1) site -> `[..., *batch, *event]`.
        """
        return {site.name: to_constrained(site, self.structure.block(site, u)) for site in self.sites}

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """The inverse of `constrain`."""
        return pack(self.sites, values, joint=self.plate is None)

    def prior(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Draws of the latents from the model's prior, `[S, B, D]`."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        with isolated():
            bound = self.bind(*args, **kwargs)
            return prior_draw(self.structure, bound.rows, num_samples, foldable=bound.foldable)

    def site_posteriors(self, guide_trace: Any) -> dict[str, Any]:
        """Each site's variational distribution in unconstrained coordinates, or None where there is no closed one.

        The accessor for losses that need Gaussians per site, whichever way the guide emitted them.
        """
        return site_posteriors(self.structure, guide_trace)

    def _check_rows(self, bound: LogJoint) -> bool:
        """Whether rows can be taken and repeated; raises `BatchError` where they depend on one another."""
        rows, size = bound.rows, bound.rows.size
        u = 0.1 * torch.randn(2, size, self.dim, dtype=self.dtype, device=self.device)
        whole = bound(u[0])
        names = ", ".join(rows.names()) or "none"
        causes = (
            f"(arguments taken to have one row per datum: {names}); usual causes: a tensor that happens to have "
            f"{size} rows but is not data (pass batched=...), or rows that see each other"
        )
        if not rows.names():
            return False
        bound.foldable = True
        if size == 1:
            try:
                part, expected = bound(u), torch.stack([whole, bound(u[1])])
            except (RuntimeError, ValueError, IndexError) as error:
                raise BatchError(f"the model does not run on its one row repeated {causes}") from error
        else:
            half = (size + 1) // 2
            first = rows.select(slice(0, half))
            plate = self.read_plate(*first.args, **first.kwargs)
            assert plate is not None
            if plate.size != half:  # a plate of fixed size
                return False
            try:
                part = LogJoint(self, first)(u[0, :half])
            except (RuntimeError, ValueError, IndexError) as error:
                raise BatchError(f"the model does not run on the first {half} of {size} rows alone {causes}") from error
            expected = whole[:half]
        # Both runs may round differently; 1e-4 is far below any real dependence between rows.
        if not torch.allclose(part.double(), expected.double(), rtol=1e-4, atol=1e-3):
            raise BatchError(f"the log-joint of a row depends on the other rows of its batch {causes}")
        return bound.foldable


class LogJoint:
    """The log-joint of one batch as a function of `u`, from `LatentSpace.bind`."""

    def __init__(self, space: LatentSpace, rows: RowArguments) -> None:
        self.space, self.rows = space, rows
        self.foldable = False  # set by `bind`: samples may be folded into the batch
        self._data_checked = False
        self._repeated: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def at_rows(self, rows: RowArguments) -> LogJoint:
        """The same function for other arguments of the same shapes, whose data are taken to be checked."""
        other = LogJoint(self.space, rows)
        other.foldable, other._data_checked = self.foldable, True
        return other

    def __call__(self, u: Tensor, beta: float = 1.0) -> Tensor:
        """`[..., B, D] -> [..., B]`; `beta` weighs the latents' part (KL annealing)."""
        latent, observed = self.terms(u)
        if beta == 1.0:
            return latent + observed
        if self.space.enumerated:
            raise ScaleError("a KL weight is not defined for a model whose discrete latents are summed out")
        return beta * latent + observed

    def terms(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log prior of the latents with log-Jacobian, everything else), each `[..., B]`, nats."""
        space, size = self.space, self.rows.size
        if u.shape[-2:] != (size, space.dim):
            raise ValueError(f"u has shape {tuple(u.shape)}, expected [..., {size}, {space.dim}] for this batch")
        lead = u.shape[:-2]
        if not lead:
            return self._run(u, self.rows.args, self.rows.kwargs)
        flat = u.reshape(-1, size, space.dim)
        if space.plate is None:
            latent, observed = self._vmap(flat)
        elif self.foldable:
            latent, observed = self._folded(flat)
        else:
            latent, observed = self._loop(flat)
        return latent.reshape(*lead, size), observed.reshape(*lead, size)

    def _run(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        check, self._data_checked = not self._data_checked, True
        with pyro.validation_enabled(False):
            return evaluate(self.space.structure, u, args, kwargs, check=check)

    def _folded(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Samples as more rows of the data, `[S, B, D]`."""
        pieces = 1 if torch.is_grad_enabled() or u.is_cuda else 1 + u.shape[0] * u.shape[1] // _PIECE
        parts = [self._folded_piece(piece) for piece in u.chunk(pieces)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _folded_piece(self, u: Tensor) -> tuple[Tensor, Tensor]:
        times, size = u.shape[:2]
        if times not in self._repeated:
            if len(self._repeated) > 1:  # the size of most pieces and that of the last: copies of the data are large
                self._repeated.clear()
            args, kwargs = self.rows.repeat(times)
            assert self.space.plate is not None
            if read_plate(self.space.model, self.space.plate, args, kwargs).size != times * size:
                self.foldable = False
                return self._loop(u)
            self._repeated[times] = args, kwargs
        latent, observed = self._run(u.reshape(times * size, -1), *self._repeated[times])
        return latent.view(times, size), observed.view(times, size)

    def _loop(self, u: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._run(one, self.rows.args, self.rows.kwargs) for one in u]
        return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])

    def _vmap(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if len(u) == 1 or self.space._warned:
            return self._loop(u)
        if not self._data_checked:  # checks branch on the data, which vmap cannot
            with torch.no_grad():
                self._run(u[0], self.rows.args, self.rows.kwargs)
        try:
            return torch.func.vmap(lambda one: self._run(one, self.rows.args, self.rows.kwargs))(u)
        except RuntimeError as error:  # an operation without a batching rule
            self.space._warned = True
            warnings.warn(f"torch.func.vmap refuses this model ({error}); samples run one by one", stacklevel=2)
            return self._loop(u)
