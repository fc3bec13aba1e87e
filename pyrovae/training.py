"""`fit`: a thin loop over Pyro's SVI.

What it adds to `svi.step`: a parameter-store scope of its own that is handed back, mini-batches, a progress bar that
names the objective in nats per datum, KL schedules, held-out early stopping, a stop before a NaN reaches the weights,
and checkpoints from which a resumed run equals an unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyrovae import checkpoint as ckpt
from pyrovae import handlers, losses, noise, store
from pyrovae.compat import require_compatible
from pyrovae.diverged import diagnose_nan
from pyrovae.errors import CheckpointError, DataError, ParameterCollision, TrainingDiverged
from pyrovae.runtime import evaluating, preserve_rng, seeded

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """A finished (or early stopped) training run.

    Attributes:
        objective: what the curves show: "ELBO", "IWAE-5", "E_q log p(x,z)".
        steps, epochs: taken in all, resumed ones included.
        curve: `[epochs]`, mean training objective of each epoch, nats per datum.
        validation: `[evaluations]` of (epoch, held-out objective), nats per datum.
        best_epoch: epoch whose weights were kept (early stopping), else the last one.
        kl_weight: weight of the KL at the last step.
        seconds: of this call.
        state: the parameter store's state after training.
    """

    objective: str
    steps: int
    epochs: int
    curve: list[float]
    validation: list[tuple[int, float]]
    best_epoch: int
    kl_weight: float
    seconds: float
    state: dict[str, Any] = field(repr=False)

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Pyro's parameter store as it was at the end of training."""
        with pyro.get_param_store().scope(self.state):
            yield


@dataclass
class _Progress:
    """Where a run stands; what a checkpoint stores besides weights."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # rows of the epoch's permutation already used
    permutation: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    epoch_sum: float = 0.0
    curve: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: float = -float("inf")
    best_epoch: int = 0
    waited: int = 0
    best_state: dict[str, Any] | None = None


def fit(
    model: Callable[..., Any],
    guide: Any,
    data: Tensor | tuple[Tensor, ...],
    *,
    loss: Any = None,
    optimizer: Any = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int = 128,
    transform: Callable[[Tensor], Tensor] | None = None,
    kl_weight: float | handlers.LinearSchedule = 1.0,
    validation: Tensor | tuple[Tensor, ...] | None = None,
    patience: int | None = None,
    max_norm: float | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: bool = True,
    description: str | None = None,
) -> FitResult:
    """Train model and guide with stock SVI.

    Args:
        data: a tensor `[N, ...]` or a tuple of them; rows are mini-batched and passed as positional arguments.
        loss: a Pyro loss; by default the ELBO (stratified for mixtures, E_q log p(x,z) for guides without density).
        optimizer: a `pyro.optim` optimiser or scheduler; Adam with step 1e-3 by default. It must be a fresh one.
        epochs, max_steps: when to stop; with both, whichever comes first. Default 50 epochs.
        transform: applied to the first tensor of every training batch (dynamic binarisation).
        kl_weight: a number, or a schedule over steps; its final value is recorded.
        validation: held-out data, evaluated after every epoch with fixed noise.
        patience: stop after so many epochs without a better held-out objective and keep the best weights; not
            before a KL schedule has ended.
        max_norm: clip the norm of the whole gradient.
        seed: of everything random; the caller's random state comes back. None uses and moves the caller's.
        checkpoint: file to write at the end of every epoch and every `checkpoint_every` steps; with `resume`, an
            existing file is continued, and the run then equals an unbroken one.
        progress: show a progress bar on a terminal.

    Returns:
        a `FitResult`. Parameters of modules are trained in place; bare `pyro.param` values are copied to the caller's
        store.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; names the site and the step, weights are those before it.
        CheckpointError: the checkpoint is truncated, or of another architecture, data set or seed.
        ParameterCollision: a bare parameter's name is taken in the caller's store.
        IncompatibleError: model, guide and loss do not go together.
    """
    tensors = data if isinstance(data, tuple) else (data,)
    _check(tensors, batch_size, epochs, max_steps, patience, validation)
    loss = default_loss(guide) if loss is None else loss
    require_compatible(model, guide, loss)
    optimizer = pyro.optim.Adam({"lr": 1e-3}) if optimizer is None else optimizer
    epochs = 50 if epochs is None and max_steps is None else epochs
    began = time.perf_counter()
    outer = pyro.get_param_store()._params.copy()
    with seeded(seed), store.fresh() as state:
        run = _Run(model, guide, tensors, loss, optimizer, batch_size, transform, kl_weight, max_norm)
        run.create_parameters(outer)
        path = Path(checkpoint) if checkpoint is not None else None
        identity = {"data": ckpt.fingerprint(tensors), "batch_size": batch_size, "seed": -1 if seed is None else seed}
        if path is not None and resume and path.exists():
            run.restore(ckpt.load(path), identity, path)
        final = run.loop(epochs, max_steps, validation, patience, path, checkpoint_every, identity, progress,
                         description)  # fmt: skip
        state.update(pyro.get_param_store().get_state())
    for name in run.bare:
        pyro.get_param_store()._params[name] = state["params"][name]
        pyro.get_param_store()._constraints[name] = state["constraints"][name]
        pyro.get_param_store()._param_to_name[state["params"][name]] = name
    where = run.at
    return FitResult(
        objective=run.objective, steps=where.step, epochs=where.epoch, curve=where.curve,
        validation=where.validation, best_epoch=where.best_epoch or where.epoch, kl_weight=final,
        seconds=time.perf_counter() - began, state=state,
    )  # fmt: skip


def default_loss(guide: Any) -> Any:
    """The loss `fit` takes for a guide: ELBO, stratified where weights have no path gradient, E_q log p otherwise."""
    traits = getattr(guide, "traits", None)
    if traits is None:
        return Trace_ELBO()
    if not traits.has_density:
        return losses.ExpectedLogJoint()
    return losses.ELBO() if traits.reparameterised else losses.ELBO("stratified")


class _Run:
    """One training run inside its own store."""

    def __init__(
        self, model: Any, guide: Any, tensors: tuple[Tensor, ...], loss: Any, optimizer: Any, batch_size: int,
        transform: Any, kl_weight: Any, max_norm: float | None,
    ) -> None:  # fmt: skip
        self.model, self.guide, self.tensors, self.loss, self.optimizer = model, guide, tensors, loss, optimizer
        self.batch_size, self.transform, self.kl_weight, self.max_norm = batch_size, transform, kl_weight, max_norm
        self.svi = SVI(model, guide, optimizer, loss)
        self.at = _Progress()
        self.bare: list[str] = []

    @property
    def objective(self) -> str:
        return str(getattr(self.loss, "name", "ELBO"))

    def create_parameters(self, outer: dict[str, Tensor]) -> None:
        """A first run of both programs makes every parameter; names taken outside are refused before training."""
        rows = tuple(tensor[: self.batch_size] for tensor in self.tensors)
        with preserve_rng(), torch.no_grad(), poutine.block(), evaluating(self.model, self.guide):
            self.guide(*rows)
            self.model(*rows)
        modules = [part for part in (self.model, self.guide) if isinstance(part, torch.nn.Module)]
        owned = {id(p) for module in modules for p in module.parameters()}
        self.bare = [
            name
            for name, value in pyro.get_param_store()._params.items()
            if id(value) not in owned and not isinstance(value, torch.nn.Parameter)
        ]
        taken = [name for name in self.bare if name in outer]
        if taken:
            raise ParameterCollision(
                f"the parameters {taken} are taken in Pyro's store, so training could not hand them back: call "
                "pyro.clear_param_store() first, or rename them"
            )

    def restore(self, content: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
        for key, value in identity.items():
            if content["identity"].get(key) != value:
                raise CheckpointError(
                    f"{path} was written with another {key.replace('_', ' ')}: continue with the same one, pass "
                    "another path, or resume=False to start afresh"
                )
        ckpt.restore_modules(self.model, self.guide, content["state"])
        ckpt.restore_optimizer(self.optimizer, self.model, self.guide, content["optimizer"])
        ckpt.restore_rng(content["rng"])
        self.at = _Progress(**{**content["at"], "validation": [tuple(item) for item in content["at"]["validation"]]})

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        at = {name: getattr(self.at, name) for name in _Progress.__dataclass_fields__}
        at["validation"] = [list(item) for item in self.at.validation]
        ckpt.save(path, {
            "identity": identity, "at": at, "rng": ckpt.rng_state(),
            "state": ckpt.snapshot_modules(self.model, self.guide),
            "optimizer": ckpt.snapshot_optimizer(self.optimizer, self.model, self.guide),
        })  # fmt: skip

    def loop(
        self, epochs: int | None, max_steps: int | None, validation: Any, patience: int | None, path: Path | None,
        every: int | None, identity: dict[str, Any], progress: bool, description: str | None,
    ) -> float:  # fmt: skip
        """Train to the end; returns the last KL weight."""
        from tqdm.auto import tqdm

        at, size = self.at, len(self.tensors[0])
        per_epoch = -(-size // self.batch_size)
        total = min(n for n in (None if epochs is None else epochs * per_epoch, max_steps) if n is not None)
        label = description or getattr(getattr(self.guide, "traits", None), "name", type(self.guide).__name__)
        beta = self._beta(max(0, at.step - 1))
        bar = tqdm(total=total, initial=at.step, desc=label, unit="step", disable=None if progress else True)
        with bar:
            while at.step < total and not self._stopped(patience):
                if at.position == 0:
                    at.permutation, at.epoch_sum = torch.randperm(size), 0.0
                index = at.permutation[at.position : at.position + self.batch_size]
                beta = self._beta(at.step)
                at.epoch_sum -= self._step(index, beta)
                at.step += 1
                at.position += len(index)
                bar.update()
                if at.position >= size:
                    self._end_epoch(size, validation, patience)
                    bar.set_postfix_str(f"{self.objective} {at.curve[-1]:.2f} nats/datum")
                    if path is not None:
                        self.save(path, identity)
                elif path is not None and every is not None and at.step % every == 0:
                    self.save(path, identity)
        if path is not None:
            self.save(path, identity)
        if at.best_state is not None:
            ckpt.restore_modules(self.model, self.guide, at.best_state)
        return beta

    def _beta(self, step: int) -> float:
        return self.kl_weight(step) if callable(self.kl_weight) else float(self.kl_weight)

    def _stopped(self, patience: int | None) -> bool:
        return patience is not None and self.at.waited >= patience

    def _step(self, index: Tensor, beta: float) -> float:
        """`svi.step`, with a look at the numbers before the optimiser moves; returns the loss summed over rows."""
        rows = tuple(tensor[index] for tensor in self.tensors)
        if self.transform is not None:
            rows = (self.transform(rows[0]), *rows[1:])
        with handlers.anneal(beta), poutine.trace(param_only=True) as capture:
            loss = float(self.svi.loss_and_grads(self.model, self.guide, *rows))
        parameters = {site["value"].unconstrained() for site in capture.trace.nodes.values()}
        gradients = [p.grad for p in parameters if p.grad is not None]
        finite = torch.isfinite(torch.tensor(loss)) and all(torch.isfinite(g).all() for g in gradients)
        if not finite:
            pyro.infer.util.zero_grads(parameters)
            raise TrainingDiverged(
                f"step {self.at.step}: {diagnose_nan(self.model, self.guide, rows, loss)}; the weights are those "
                "before this step: lower the step size, clip gradients with max_norm, or bound the scale of that site"
            )
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(sorted(parameters, key=lambda p: p.numel()), self.max_norm)
        self.optimizer(parameters)
        pyro.infer.util.zero_grads(parameters)
        return loss * self._rows_over_data(rows)

    def _rows_over_data(self, rows: tuple[Tensor, ...]) -> float:
        """B / N of the data plate: the curve is in nats per datum whatever the plate's scale."""
        if getattr(self.guide, "space", None) is None:
            return 1.0
        plate = self.guide.space(*rows).read_plate(*rows)
        return 1.0 if plate is None else plate.size / plate.full_size

    def _end_epoch(self, size: int, validation: Any, patience: int | None) -> None:
        at = self.at
        at.curve.append(at.epoch_sum / size)
        at.epoch, at.position = at.epoch + 1, 0
        if validation is None:
            return
        held_out = validation if isinstance(validation, tuple) else (validation,)
        value = self._evaluate(held_out)
        at.validation.append((at.epoch, value))
        if isinstance(self.kl_weight, handlers.LinearSchedule) and at.step < self.kl_weight.steps:
            return  # objectives under different KL weights do not compare
        if value > at.best:
            at.best, at.best_epoch, at.waited = value, at.epoch, 0
            if patience is not None:
                at.best_state = ckpt.snapshot_modules(self.model, self.guide)
        else:
            at.waited += 1

    def _evaluate(self, held_out: tuple[Tensor, ...]) -> float:
        """Held-out objective at the present KL weight's end, nats per datum, with noise fixed by datum."""
        size, total = len(held_out[0]), 0.0
        with torch.no_grad(), preserve_rng(), evaluating(self.model, self.guide):
            torch.manual_seed(0)
            for start in range(0, size, self.batch_size):
                rows = tuple(tensor[start : start + self.batch_size] for tensor in held_out)
                with noise.per_datum(0, range(start, start + len(rows[0]))):
                    total -= float(self.loss.loss(self.model, self.guide, *rows)) * self._rows_over_data(rows)
        return total / size


def _check(
    tensors: tuple[Tensor, ...], batch_size: int, epochs: int | None, max_steps: int | None, patience: int | None,
    validation: Any,
) -> None:  # fmt: skip
    if not tensors or not all(isinstance(t, Tensor) and t.dim() > 0 for t in tensors):
        raise TypeError("data must be a tensor [N, ...] or a tuple of such tensors")
    sizes = {len(t) for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(f"the data tensors must have the same, positive number of rows, got {sorted(sizes)}")
    for tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError("the data contain NaN or infinite values: clean or mask them before training")
    counts = {"batch_size": batch_size, "epochs": epochs, "max_steps": max_steps, "patience": patience}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if patience is not None and validation is None:
        raise ValueError("patience needs held-out data: pass validation=...")
