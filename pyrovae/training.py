"""`fit`: a thin loop over Pyro's SVI.

What it adds to `svi.step`: a parameter-store scope of its own that is handed back, mini-batches, a progress bar that
names the objective in nats per datum, KL schedules, held-out early stopping, a stop before a NaN reaches the weights,
and checkpoints from which a resumed run equals an unbroken one.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pyrovae import checkpoint as ckpt
from pyrovae import handlers, losses, noise, store
from pyrovae.compat import require_compatible
from pyrovae.diverged import diagnose_nan
from pyrovae.errors import CheckpointError, ParameterCollision, PlateError, TrainingDiverged
from pyrovae.losses.default import default_loss
from pyrovae.minibatches import Rows
from pyrovae.optim import Adam
from pyrovae.plates import read_plate
from pyrovae.provenance import Provenance, fingerprint
from pyrovae.runtime import evaluating, modules_of, preserve_rng, seeded
from pyrovae.schedules import Block, Schedule

if TYPE_CHECKING:
    from pyrovae.data.text import Sentences

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True, repr=False)
class FitResult:
    """A finished (or early stopped) training run.

    Attributes:
        objective: what the curves show: "ELBO", "IWAE-5", "E_q log p(x,z)".
        steps, epochs: taken in all, resumed ones included.
        curve: `[epochs]`, mean training objective of each epoch, nats per datum.
        validation: `[evaluations]` of (epoch, held-out objective, or ELBO where that has a penalty), nats per datum.
        best_epoch: epoch whose weights were kept: the best held-out one with `patience`, else the last one.
        kl_weight: weight of the KL at the last step.
        provenance: of the curves (training data).
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
    provenance: Provenance
    state: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        last = f"{self.curve[-1]:.2f} nats per datum" if self.curve else "unknown before the first epoch ends"
        held_out = f", held out {self.validation[-1][1]:.2f}" if self.validation else ""
        return (
            f"FitResult({self.objective} {last}{held_out} after {self.epochs} epochs, {self.steps} steps; "
            f"{self.seconds:.1f} s)"
        )

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
    data: Tensor | tuple[Tensor, ...] | Sentences,
    *,
    loss: Any = None,
    optimizer: Any = None,
    schedule: Schedule | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    kl_weight: float | handlers.KLSchedule = 1.0,
    validation: Tensor | tuple[Tensor, ...] | Sentences | None = None,
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
        data: a tensor `[N, ...]` or a tuple of them; rows are mini-batched and passed as positional arguments. Or
            `pyrovae.data.Sentences`: batches are then of about one length each, without needless padding.
        batch_size: rows per step; 128 by default, all rows for a guide in joint mode (`plate=None`).
        loss: a Pyro loss; by default the ELBO (stratified for mixtures, recursive for recursive ones, E_q log p(x,z)
            for guides without density).
        optimizer: a `pyro.optim` optimiser or scheduler; `pyrovae.optim.Adam(lr=1e-3)` by default. It must be
            a fresh one. A scheduler steps once per epoch (`ReduceLROnPlateau` on minus the held-out, else the training
            objective).
        schedule: stages of training (`pyrovae.schedules`): blocks of parameters that take turns within every step, each
            by its own objective, latent groups that come in one by one, or a guide trained ahead of the model. None
            steps all at once.
        epochs, max_steps: when to stop; with both, whichever comes first. Default 50 epochs.
        transform: applied to the first tensor of every training batch (dynamic binarisation).
        kl_weight: a number, or a schedule over steps; its final value is recorded, and a run that ends before its
            schedule warns.
        validation: held-out data, evaluated after every epoch at KL weight 1 with fixed noise; by the ELBO where the
            objective is one with a penalty, which is no bound and may change on the way.
        patience: stop after so many epochs without a better held-out objective and keep the best weights; not
            before a KL schedule and the stages of a schedule have ended.
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
        CheckpointError: the checkpoint is truncated, or of another architecture, data set, seed or frozen weights.
        ParameterCollision: a bare parameter's name is taken in the caller's store.
        IncompatibleError: model, guide and loss do not go together.
    """
    rows = Rows(data)
    held_out = None if validation is None else Rows(validation, "validation")
    _check(held_out, kl_weight, max_norm, checkpoint, {
        "batch_size": batch_size, "epochs": epochs, "max_steps": max_steps, "patience": patience,
        "checkpoint_every": checkpoint_every,
    })  # fmt: skip
    if batch_size is None:
        batch_size = len(rows) if getattr(guide, "plate", "data") is None else 128
    loss = default_loss(guide) if loss is None else loss
    require_compatible(model, guide, loss)
    if patience is not None and getattr(getattr(loss, "traits", None), "negative_phase", False):
        raise ValueError(
            "held-out numbers of a tilted prior lack log Z, which moves with training: the best of them is not the "
            "best model, so leave patience out"
        )
    if schedule is not None:
        schedule.require(guide, loss)
        schedule.start(None if held_out is None else held_out.tensors)
    if hasattr(loss, "start"):
        loss.start()
    optimizer = Adam(lr=1e-3) if optimizer is None else optimizer
    if not hasattr(optimizer, "optim_objs"):
        raise TypeError(
            f"the optimiser must be one of pyro.optim, such as pyrovae.optim.Adam(lr=1e-3), got {type(optimizer)}"
        )
    if optimizer.optim_objs:
        raise ValueError("the optimiser has stepped parameters before: pass a fresh one")
    epochs = 50 if epochs is None and max_steps is None else epochs
    began = time.perf_counter()
    outer = pyro.get_param_store()._params.copy()
    run = _Run(model, guide, rows, loss, optimizer, schedule, batch_size, transform, kl_weight, max_norm)
    path = Path(checkpoint) if checkpoint is not None else None
    state: dict[str, Any] = {}
    try:
        with seeded(seed), warnings.catch_warnings(), store.fresh() as state:
            # What the caller froze stays out of Pyro's store on purpose.
            warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            run.create_parameters(outer)
            identity = run.identity(seed) if path is not None else {}
            if path is not None and resume and path.exists():
                run.restore(ckpt.load(path), identity, path)
            final = run.loop(epochs, max_steps, held_out, patience, path, checkpoint_every, identity, progress,
                             description)  # fmt: skip
    finally:  # a run that was stopped hands back what it has
        for name in run.bare:
            pyro.get_param_store()._params[name] = state["params"][name]
            pyro.get_param_store()._constraints[name] = state["constraints"][name]
            pyro.get_param_store()._param_to_name[state["params"][name]] = name
    where = run.at
    return FitResult(
        objective=run.objective, steps=where.step, epochs=where.epoch, curve=where.curve,
        validation=where.validation, best_epoch=where.best_epoch if where.best_state is not None else where.epoch,
        kl_weight=final, seconds=time.perf_counter() - began, state=state,
        provenance=Provenance.of_call(rows.tensors, {}, num_data=len(rows), seed=seed, split="train", kl_weight=final),
    )  # fmt: skip


class _Run:
    """One training run inside its own store."""

    def __init__(
        self, model: Any, guide: Any, data: Rows, loss: Any, optimizer: Any,
        schedule: Schedule | None, batch_size: int, transform: Any, kl_weight: Any, max_norm: float | None,
    ) -> None:  # fmt: skip
        self.model, self.guide, self.data, self.loss, self.optimizer = model, guide, data, loss, optimizer
        self.schedule, self.batch_size, self.transform = schedule, batch_size, transform
        self.kl_weight, self.max_norm = kl_weight, max_norm
        self.svi = SVI(model, guide, optimizer, loss)
        self.at = _Progress()
        self.bare: list[str] = []
        self.buffers = [b for module in modules_of(model, guide) for b in module.buffers()]
        self.joint = getattr(guide, "plate", "data") is None
        if self.joint and batch_size < len(data):
            raise ValueError(
                f"a guide with plate=None takes all data as one datum: pass batch_size={len(data)} or more"
            )

    @property
    def objective(self) -> str:
        """The name of what is maximised; a guide without density never has an ELBO."""
        if hasattr(self.loss, "name_with"):
            return str(self.loss.name_with(self.guide))
        traits = getattr(self.guide, "traits", None)
        if traits is not None and not traits.has_density:
            return losses.ExpectedLogJoint.traits.name
        kind = type(self.loss).__name__
        return str(getattr(self.loss, "name", "ELBO" if kind.endswith("_ELBO") else kind))

    def identity(self, seed: int | None) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        modules = modules_of(self.model, self.guide)
        frozen = [p for module in modules for p in module.parameters() if not p.requires_grad]
        return {
            "data": fingerprint(self.data.tensors), "batch_size": self.batch_size,
            "seed": -1 if seed is None else seed, "set_of_frozen_weights": fingerprint(frozen),
            "schedule": repr(self.schedule),
        }  # fmt: skip

    def create_parameters(self, outer: dict[str, Tensor]) -> None:
        """A first run of both programs makes every parameter; names taken outside are refused before training."""
        # Pyro's store switches requires_grad on for a PyroModule's own parameters; `evaluating` gives the flags back,
        # so what the caller froze stays frozen.
        with preserve_rng(), torch.no_grad(), poutine.block(), evaluating(self.model, self.guide):
            rows = self._batch(torch.arange(min(self.batch_size, len(self.data))))
            self.guide(*rows)
            self.model(*rows)
        modules = [part for part in (self.model, self.guide) if isinstance(part, torch.nn.Module)]
        owned = {id(p) for module in modules for p in module.parameters()}
        bare = [
            name
            for name, value in pyro.get_param_store()._params.items()
            if id(value) not in owned and not isinstance(value, torch.nn.Parameter)
        ]
        taken = [name for name in bare if name in outer]
        if taken:
            raise ParameterCollision(
                f"the parameters {taken} are taken in Pyro's store, so training could not hand them back: call "
                "pyro.clear_param_store() first, or rename them"
            )
        self.bare = bare

    def _batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """Rows of the training data, transformed."""
        first, *rest = self.data.take(index)
        return (first if self.transform is None else self.transform(first), *rest)

    def restore(self, content: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
        for key, value in identity.items():
            if content["identity"].get(key) != value:
                raise CheckpointError(
                    f"{path} was written with another {key.replace('_', ' ')}: continue with the same one, pass "
                    "another path, or resume=False to start afresh"
                )
        ckpt.restore_modules(self.model, self.guide, content["state"])
        ckpt.restore_optimizer(self.optimizer, self.model, self.guide, content["optimizer"])
        if hasattr(self.loss, "load_state_dict"):
            self.loss.load_state_dict(content["loss"])
        if self.schedule is not None:
            self.schedule.load_state_dict(content["schedule"])
        ckpt.restore_rng(content["rng"])
        self.at = _Progress(**{**content["at"], "validation": [tuple(item) for item in content["at"]["validation"]]})

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        at = {name: getattr(self.at, name) for name in _Progress.__dataclass_fields__}
        at["validation"] = [list(item) for item in self.at.validation]
        ckpt.save(path, {
            "identity": identity, "at": at, "rng": ckpt.rng_state(),
            "state": ckpt.snapshot_modules(self.model, self.guide),
            "optimizer": ckpt.snapshot_optimizer(self.optimizer, self.model, self.guide),
            "loss": self.loss.state_dict() if hasattr(self.loss, "state_dict") else {},
            "schedule": {} if self.schedule is None else self.schedule.state_dict(),
        })  # fmt: skip

    def loop(
        self, epochs: int | None, max_steps: int | None, held_out: Rows | None, patience: int | None,
        path: Path | None, every: int | None, identity: dict[str, Any], progress: bool, description: str | None,
    ) -> float:  # fmt: skip
        """Train to the end; returns the last KL weight."""
        if progress:
            from tqdm.auto import tqdm
        else:  # tqdm.auto warns in notebooks that lack widgets, even for a bar that is never shown
            from tqdm import tqdm

        at, size = self.at, len(self.data)
        per_epoch = -(-size // self.batch_size)
        total = min(n for n in (None if epochs is None else epochs * per_epoch, max_steps) if n is not None)
        label = description or getattr(getattr(self.guide, "traits", None), "name", type(self.guide).__name__)
        beta = self._beta(max(0, at.step - 1))
        stages = 0 if self.schedule is None else self.schedule.settled(self.guide)
        if total < stages:
            warnings.warn(
                f"{self.schedule} takes {stages} steps but training stops at step {total}, before all of the model is "
                "in: train longer or shorten the stages", stacklevel=3,
            )  # fmt: skip
        if isinstance(self.kl_weight, handlers.KLSchedule) and total < self.kl_weight.steps:
            warnings.warn(
                f"the KL schedule takes {self.kl_weight.steps} steps but training stops at step {total}, with a KL "
                f"weight of {self._beta(total - 1):g}: train longer or shorten the schedule", stacklevel=3,
            )  # fmt: skip
        bar = tqdm(total=total, initial=at.step, desc=label, unit="step", disable=None if progress else True)
        with bar:
            while at.step < total and not self._stopped(patience):
                if at.position == 0:
                    at.permutation, at.epoch_sum = self.data.order(self.batch_size), 0.0
                index = at.permutation[at.position : at.position + self.batch_size]
                beta = self._beta(at.step)
                at.epoch_sum -= self._step(index, beta)
                at.step += 1
                at.position += len(index)
                bar.update()
                if at.position >= size:
                    self._end_epoch(size, held_out, patience)
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
        """One step, of all parameters or block by block; returns the loss summed over rows."""
        rows = self._batch(index)
        if self.schedule is None:
            return self._update(rows, beta, None) * self._rows_over_data(rows)
        turns = self.schedule.blocks(self.guide, self.loss, self.at.step)
        block = next(turns)
        while True:
            here = self._batch(self.data.order(self.batch_size)[: self.batch_size]) if block.fresh else rows
            loss = self._update(here, beta, block) * self._rows_over_data(here)
            try:
                block = turns.send(loss / here[0].numel())
            except StopIteration:
                return loss

    def _update(self, rows: tuple[Tensor, ...], beta: float, block: Block | None) -> float:
        """`svi.step`, with a look at the numbers before the optimiser moves."""
        buffers = [buffer.clone() for buffer in self.buffers]
        gradients = self.svi.loss_and_grads if block is None else block.loss.loss_and_grads
        with handlers.anneal(beta), poutine.trace(param_only=True) as capture:
            loss = float(gradients(self.model, self.guide, *rows))
        # One entry per tensor, in the order of the programs: a set's order would change the rounding of the norm.
        named = {site["value"].unconstrained(): name for name, site in capture.trace.nodes.items()}
        parameters = [p for p in named if block is None or block.owns(p)]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])  # not finite if any gradient is not
        bad: list[str] = []
        if not (math.isfinite(loss) and math.isfinite(norm)):  # a finite gradient's square may overflow
            bad = [named[p] for p in parameters if p.grad is not None and not torch.isfinite(p.grad).all()]
        if bad or not math.isfinite(loss):
            pyro.infer.util.zero_grads(named)
            cause = diagnose_nan(self.model, self.guide, rows, loss, bad)
            for buffer, value in zip(self.buffers, buffers, strict=True):
                buffer.copy_(value)
            kept = "this step" if block is None else "this block of the step"
            raise TrainingDiverged(
                f"step {self.at.step}: {cause}; the weights are those before {kept}: lower the step size, clip "
                "gradients with max_norm, or bound the scale of that site"
            )
        if self.max_norm is not None:
            clip_grads_with_norm_(parameters, self.max_norm, norm)
        self.optimizer(parameters)
        pyro.infer.util.zero_grads(named)
        return loss

    def _rows_over_data(self, rows: tuple[Tensor, ...]) -> float:
        """B / N of the data plate: the curve is in nats per datum whatever the plate's scale."""
        if self.joint:
            return 1.0
        try:
            plate = read_plate(self.model, getattr(self.guide, "plate", "data"), rows, {})
        except PlateError:  # a stock guide's model may do without; then nothing is scaled by N / B
            return 1.0
        return plate.size / plate.full_size

    def _end_epoch(self, size: int, held_out: Rows | None, patience: int | None) -> None:
        at = self.at
        at.curve.append(at.epoch_sum / (1 if self.joint else size))
        at.epoch, at.position = at.epoch + 1, 0
        if held_out is not None:
            at.validation.append((at.epoch, self._evaluate(held_out)))
        latest = at.curve[-1] if held_out is None else at.validation[-1][1]
        if isinstance(self.optimizer, PyroLRScheduler):
            plateau = self.optimizer.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
            self.optimizer.step(*[-latest] if plateau else [])
        if held_out is not None:
            self._watch(latest, patience)
        if self.schedule is not None:
            self.schedule.end_epoch(self.model, self.guide)

    def _watch(self, value: float, patience: int | None) -> None:
        """Early stopping."""
        at = self.at
        stages = 0 if self.schedule is None else self.schedule.settled(self.guide)
        warm_up = self.kl_weight.steps if isinstance(self.kl_weight, handlers.KLSchedule) else 0
        if at.step < max(stages, warm_up):
            return  # the model is still moving towards the objective it will be judged by
        if value > at.best:
            at.best, at.best_epoch, at.waited = value, at.epoch, 0
            if patience is not None:
                at.best_state = ckpt.snapshot_modules(self.model, self.guide)
        else:
            at.waited += 1

    def _evaluate(self, held_out: Rows) -> float:
        """Held-out objective at KL weight 1, nats per datum, with the same noise every time."""
        total = 0.0
        with torch.no_grad(), preserve_rng(), evaluating(self.model, self.guide):
            torch.manual_seed(0)
            if self.joint:
                with noise.per_datum(0, [0]):
                    return -float(self.loss.loss(self.model, self.guide, *held_out.tensors))
            for index in held_out.in_order(self.batch_size):
                rows = held_out.take(index)
                with noise.per_datum(0, index.tolist()):
                    total += self._held_out(rows)
        return total / len(held_out)

    def _held_out(self, rows: tuple[Tensor, ...]) -> float:
        if hasattr(self.loss, "penalty"):
            return float(self.loss.per_datum(self.model, self.guide, *rows).sum())
        return -float(self.loss.loss(self.model, self.guide, *rows)) * self._rows_over_data(rows)


def _check(
    held_out: Rows | None, kl_weight: Any, max_norm: float | None, checkpoint: Any, counts: dict[str, int | None]
) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if counts["patience"] is not None and held_out is None:
        raise ValueError("patience needs held-out data: pass validation=...")
    if counts["checkpoint_every"] is not None and checkpoint is None:
        raise ValueError("checkpoint_every needs a file to write: pass checkpoint=...")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if not isinstance(kl_weight, int | float | handlers.KLSchedule):
        raise TypeError(
            "kl_weight must be a number, a handlers.LinearSchedule or a handlers.ExponentialSchedule, got "
            f"{type(kl_weight).__name__}"
        )
