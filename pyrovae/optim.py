"""Adam (Kingma & Ba 2015) for stock SVI, one torch optimiser for all parameters.

    m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

`pyro.optim.Adam` makes a torch optimiser for each parameter and leaves gradients of zeros behind, to which the next
backward pass adds. Here parameters with the same options form one group, stepped by torch's fused kernel where there
is one (CPU, CUDA), and their gradients are dropped afterwards. The numbers are those of `torch.optim.Adam`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import normalize_param_name
from torch import Tensor

__all__ = ["Adam"]

# How a step is computed, not what: every machine decides for itself, so these are never taken from a saved state.
_PER_MACHINE: dict[str, Any] = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
_FUSED_DEVICES = ("cpu", "cuda")


class Adam(PyroOptim):
    """Adam over all parameters at once: `SVI(model, guide, pyrovae.optim.Adam(lr=1e-3), loss)`.

    Args:
        lr: step size.
        betas: decay of the two running means, each in [0, 1).
        eps: added to the denominator.
        weight_decay: weight of the L2 penalty, added to the gradient.
        amsgrad: use the largest second moment so far (Reddi, Kale & Kumar 2018).
        per_parameter: from a parameter's name ("guide.encoder.0.weight") to the options that differ for it, such as
            `{"lr": 1e-4}`; asked once for each parameter.
        max_norm: clip the norm of the whole gradient.

    Note:
        A parameter's state is made when it is first stepped, and saved as `pyro.optim.Adam` saves it: each reads the
        other's. A parameter that had no gradient in a step stays where it is, as with `torch.optim.Adam`.

    Raises:
        TypeError: options given by position, or inside a scheduler of `pyro.optim` (which builds a torch optimiser
            for each parameter).

    Example:
        >>> import pyro, torch
        >>> optimizer = Adam(lr=0.1)
        >>> with pyro.get_param_store().scope():
        ...     p = pyro.param("p", torch.tensor(1.0))
        ...     p.square().backward()
        ...     optimizer([p])
        ...     round(p.item(), 4)
        0.9
    """

    def __init__(
        self,
        *misplaced: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        per_parameter: Callable[[str], dict[str, Any]] | None = None,
        max_norm: float | None = None,
    ) -> None:
        if misplaced:
            raise TypeError(
                "give options by name, Adam(lr=1e-3); a learning-rate schedule takes torch's own optimiser: "
                "pyro.optim.ExponentialLR({'optimizer': torch.optim.Adam, 'optim_args': {'lr': 1e-3}, 'gamma': 0.9})"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        torch.optim.Adam([torch.zeros(())], **options)  # torch's own checks, now rather than at the first step
        super().__init__(torch.optim.Adam, options)
        self.options, self.per_parameter, self.max_norm = options, per_parameter, max_norm

    def __repr__(self) -> str:
        return f"Adam({', '.join(f'{name}={value}' for name, value in self.options.items())})"

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step those of the parameters that have a gradient, and drop the gradients."""
        called = list(params)
        if not called:
            return
        for p in called:
            if p not in self.optim_objs:
                self._add(p)
        if self.max_norm is not None:  # in the order of names: a set's order would change the rounding of the norm
            torch.nn.utils.clip_grad_norm_(sorted(called, key=_name), self.max_norm)
        others = self.optim_objs.keys() - set(called)
        gradients = {p: p.grad for p in others if p.grad is not None}  # Pyro steps what it calls with, nothing else
        for p in gradients:
            p.grad = None
        self.optim_objs[called[0]].step(*args, **kwargs)
        for p in called:
            p.grad = None
        for p, gradient in gradients.items():
            p.grad = gradient

    def _add(self, p: Tensor) -> None:
        """Take a parameter in, with its state where one is waiting."""
        fused = p.device.type in _FUSED_DEVICES and p.is_floating_point()
        alone = torch.optim.Adam([p], **self._options(p), fused=fused)
        waiting = self._state_waiting_to_be_consumed.pop(_name(p), None)
        if waiting is not None:
            (group,) = waiting["param_groups"]
            if not self.options.keys() <= group.keys():
                raise ValueError(
                    f"the saved state of {_name(p)!r} is not Adam's (its options: {', '.join(sorted(group))}): go on "
                    "with the optimiser that wrote it"
                )
            alone.load_state_dict({**waiting, "param_groups": [{**group, **_PER_MACHINE, "fused": fused}]})
        # Only optim_objs says which torch optimiser is in use: clearing it, as checkpoints do, starts afresh.
        shared = next(iter(self.optim_objs.values()), alone)
        if shared is not alone:
            _move(p, alone, shared)
        self.optim_objs[p] = shared

    def _options(self, p: Tensor) -> dict[str, Any]:
        if self.per_parameter is None:
            return self.options
        name = normalize_param_name(_name(p))
        own = self.per_parameter(name)
        if not isinstance(own, dict) or not own.keys() <= self.options.keys():
            raise ValueError(
                f"per_parameter must return a dict with some of {', '.join(self.options)} (empty for the common "
                f"options), but returned {own!r} for {name!r}"
            )
        return {**self.options, **own}

    def get_state(self) -> dict[str, Any]:
        """Parameter's name in Pyro's store -> state of a torch Adam that has this parameter alone."""
        found = {}
        for p, shared in self.optim_objs.items():
            state = dict(shared.state.get(p, {}))
            if "step" in state:
                state["step"] = state["step"].cpu()
            group = next(group for group in shared.param_groups if any(p is other for other in group["params"]))
            found[_name(p)] = {
                "state": {0: state} if state else {},
                "param_groups": [{**group, **_PER_MACHINE, "params": [0]}],
            }
        return found


def _name(p: Tensor) -> str:
    """A parameter's name in Pyro's store."""
    name = pyro.get_param_store().param_name(p)
    if name is None:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is not in Pyro's store: step the tensors that pyro.param and "
            "pyro.module registered, inside the store (or scope) in which they were registered"
        )
    return name


def _move(p: Tensor, alone: torch.optim.Optimizer, shared: torch.optim.Optimizer) -> None:
    """Put a parameter with its state into the shared optimiser, in the group that has its options."""
    (new,) = alone.param_groups
    options = {name: value for name, value in new.items() if name != "params"}
    for group in shared.param_groups:
        if all(group[name] == value for name, value in options.items()):
            group["params"].append(p)
            break
    else:
        shared.add_param_group(new)
    if p in alone.state:
        shared.state[p] = alone.state[p]
