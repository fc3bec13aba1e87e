"""The one door to torchvision's data sets.

torchvision registers fake (shape-only) kernels for its compiled ops while it is imported. Where the compiled ops do
not match the torch build they are not there, and the first registration raises ``RuntimeError: operator
torchvision::nms does not exist``: the whole package, data sets included, cannot be imported. Downloading data sets
needs none of these ops. So, while torchvision is being imported, registering a fake kernel for a torchvision op that
does not exist does nothing. Everything else goes to torch unchanged: no exception is caught, and ops that do exist are
registered as usual.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

__all__ = ["torchvision_datasets"]


def torchvision_datasets() -> ModuleType:
    """Imports torchvision, whether or not its compiled ops match the torch build.

    Returns:
        The module ``torchvision.datasets``.

    Raises:
        ImportError: If torchvision is not installed.
    """
    with _skip_missing_ops():
        try:
            return importlib.import_module("torchvision.datasets")
        except ModuleNotFoundError as error:
            if error.name != "torchvision":
                raise
            message = "data sets are downloaded through torchvision, which is not installed: pip install torchvision"
            raise ImportError(message) from error


@contextmanager
def _skip_missing_ops() -> Iterator[None]:
    """While open, ``torch.library.register_fake`` ignores torchvision ops that do not exist."""
    original = torch.library.register_fake

    def register_fake(op: Any, func: Callable[..., Any] | None = None, /, **kwargs: Any) -> Any:
        if isinstance(op, str) and _is_missing(op):
            return func if func is not None else _identity
        # Return torch's own decorator, not a wrapped one: it looks at its caller's frame.
        return original(op, **kwargs) if func is None else original(op, func, **kwargs)

    torch.library.register_fake = register_fake
    try:
        yield
    finally:
        torch.library.register_fake = original


def _is_missing(op: str) -> bool:
    namespace, _, name = op.partition("::")
    return namespace == "torchvision" and not hasattr(torch.ops.torchvision, name.partition(".")[0])


def _identity(func: Callable[..., Any]) -> Callable[..., Any]:
    return func
