"""Checkpoints: everything a training run needs to go on as if it had never stopped.

A checkpoint is one file of tensors, numbers and strings (no pickled objects; it loads with `weights_only=True`):
state dicts of model and guide, bare `pyro.param` values, optimiser state keyed by state-dict names, step, epoch
permutation and position, every random state, early-stopping state and the data's fingerprint. It is written to a
temporary file and renamed, so the file on disk is always whole.
"""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn

from pyrovae.errors import CheckpointError

__all__ = ["load", "restore_modules", "restore_optimizer", "restore_rng", "rng_state", "save",
           "snapshot_modules", "snapshot_optimizer"]  # fmt: skip

FORMAT = 1


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint; the old file stays until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"format": FORMAT, **content}, temporary)
    os.replace(temporary, path)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; the file is never touched.

    Raises:
        CheckpointError: no PyroVAE checkpoint, or a truncated one.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        content = torch.load(data, weights_only=True, map_location="cpu")
    # torch reports a damaged file in any of these ways
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({type(error).__name__}): it is left as it is; restore a copy, or "
            "pass another path to start afresh"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a PyroVAE checkpoint of format {FORMAT}: pass another path")
    return content


def rng_state() -> dict[str, Any]:
    """Random states of torch (CPU, GPUs), numpy and python as tensors and numbers."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": gpus,
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put random states back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _modules(model: Any, guide: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in (("model", model), ("guide", guide)) if isinstance(part, nn.Module)}


def snapshot_modules(model: Any, guide: Any) -> dict[str, Any]:
    """Copies of all parameters and buffers, and of store parameters that no module owns."""
    modules = _modules(model, guide)
    owned = {id(p) for module in modules.values() for p in module.parameters()}
    bare = {
        name: value.detach().clone()
        for name, value in pyro.get_param_store()._params.items()
        if id(value) not in owned
    }
    states = {name: {k: v.detach().clone() for k, v in m.state_dict().items()} for name, m in modules.items()}
    return {"modules": states, "bare": bare}


def restore_modules(model: Any, guide: Any, state: dict[str, Any]) -> None:
    """Load a snapshot; store parameters must have been created by a first run.

    Raises:
        CheckpointError: names or shapes differ: another architecture. Nothing has been changed then.
    """
    ours, theirs = _shapes(snapshot_modules(model, guide)), _shapes(state)
    differing = sorted({name for name, _ in ours ^ theirs})
    if differing:
        raise CheckpointError(
            f"the checkpoint belongs to another architecture (differing: {', '.join(differing[:5])}): build the same "
            "model and guide, or pass another path"
        )
    for name, module in _modules(model, guide).items():
        module.load_state_dict(state["modules"][name])
    with torch.no_grad():
        for name, value in state["bare"].items():
            pyro.get_param_store()._params[name].copy_(value)


def _shapes(state: dict[str, Any]) -> set[tuple[str, tuple[int, ...]]]:
    """(name, shape) of everything in a snapshot."""
    parts = {**state["modules"], "param": state["bare"]}
    return {(f"{part}.{name}", tuple(v.shape)) for part, values in parts.items() for name, v in values.items()}


def _names(model: Any, guide: Any) -> dict[int, str]:
    """id of a parameter -> its state-dict name ("model.decoder.0.weight"); bare ones keep their store name."""
    names = {id(value): f"param.{name}" for name, value in pyro.get_param_store()._params.items()}
    for prefix, module in _modules(model, guide).items():
        names.update({id(value): f"{prefix}.{name}" for name, value in module.named_parameters()})
    return names


def snapshot_optimizer(optimizer: Any, model: Any, guide: Any) -> dict[str, Any]:
    """State of a Pyro optimiser (schedulers included), keyed by state-dict names."""
    # State that was restored but not yet applied (no step since) counts as well.
    by_store = {**optimizer._state_waiting_to_be_consumed, **optimizer.get_state()}
    names, params = _names(model, guide), pyro.get_param_store()._params
    return {names[id(params[name])]: state for name, state in by_store.items()}


def restore_optimizer(optimizer: Any, model: Any, guide: Any, state: dict[str, Any]) -> None:
    """Hand the state back; Pyro applies it when each parameter is first stepped."""
    store = pyro.get_param_store()
    to_store = {}
    for name, value in store._params.items():
        key = _names(model, guide).get(id(value))
        if key in state:
            to_store[name] = state[key]
    if len(to_store) != len(state):
        raise CheckpointError("the checkpoint's optimiser state names parameters that this model and guide lack")
    optimizer.optim_objs.clear()
    optimizer.set_state(to_store)
