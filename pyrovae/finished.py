"""Finished parts of a long evaluation, kept in a folder so that a run that was stopped goes on where it was.

One file a part, written whole or not at all. Each carries the identity of its run: programs, data and settings. Parts
of another run are refused, never overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pyrovae import checkpoint
from pyrovae.errors import CheckpointError
from pyrovae.identity import program_identity
from pyrovae.provenance import fingerprint

__all__ = ["Finished"]


class Finished:
    """Parts by name.

    Args:
        folder: where they lie; None keeps nothing.
        programs: model and guide (`pyrovae.identity`).
        call: arguments of the evaluation, tensors in any nesting.
        settings: everything else the numbers depend on, with a `repr` that says it.
    """

    def __init__(
        self, folder: str | Path | None, programs: Sequence[Any], call: Any, settings: dict[str, Any]
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.identity = "" if folder is None else _identity(programs, call, settings)

    def get(self, name: str) -> dict[str, Any] | None:
        """A part that is finished, or None.

        Raises:
            CheckpointError: the file is of another run, or damaged.
        """
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        content = checkpoint.load(path)
        if content.get("identity") != self.identity:
            raise CheckpointError(
                f"{path} belongs to a run with another model, other weights, data or settings: pass another folder, or "
                "remove this one to start afresh"
            )
        part: dict[str, Any] = content["part"]
        return part

    def put(self, name: str, part: dict[str, Any]) -> None:
        """Keep a part."""
        if self.folder is not None:
            checkpoint.save(self._path(name), {"identity": self.identity, "part": part})

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.pt"


def _identity(programs: Sequence[Any], call: Any, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(program_identity(*programs).encode())
    leaves = pytree.tree_flatten(call)[0]
    digest.update(fingerprint([leaf for leaf in leaves if isinstance(leaf, Tensor)]).encode())
    digest.update(repr([leaf for leaf in leaves if not isinstance(leaf, Tensor)]).encode())
    digest.update(repr(sorted(settings.items())).encode())
    return digest.hexdigest()
