"""Where a number comes from; carried by every result, checked before two numbers stand side by side."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Provenance", "fingerprint", "require_comparable"]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("pyrovae", "torch", "pyro-ppl")}}


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """sha256 of tensors, shapes and dtypes included."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Provenance:
    """The circumstances of a result.

    Attributes:
        data, fingerprint: the data set's name and the hash of its bytes.
        split: which part the number is about ("test").
        num_data: data the number is a mean of.
        binarization: "none", "static" or "dynamic".
        preprocessing: of grey values: "none", "logit" or "centred".
        likelihood: of the observation.
        num_samples: draws per datum of the estimator (None: not one number).
        seed, dtype, device, threads: how it was run.
        kl_weight: final weight of the KL in training.
        versions: of the software.
    """

    data: str = "unnamed"
    fingerprint: str = ""
    split: str = ""
    num_data: int = 0
    binarization: str = ""
    preprocessing: str = ""
    likelihood: str = ""
    seed: int | None = 0
    num_samples: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    kl_weight: float = 1.0
    threads: int = field(default_factory=torch.get_num_threads)
    versions: dict[str, str] = field(default_factory=_versions)

    comparable_fields = ("data", "fingerprint", "split", "num_data", "binarization", "preprocessing", "likelihood",
                         "kl_weight")  # fmt: skip

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any], **known: Any) -> Provenance:
        """What can be told from the arguments a program was called with; `dataclasses.replace` adds names."""
        tensors = [leaf for leaf in pytree.tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        first = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
        dtype = str(first.dtype).removeprefix("torch.")
        return cls(fingerprint=fingerprint(tensors), dtype=dtype, device=str(first.device), **known)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_comparable(first: Provenance, *others: Provenance) -> None:
    """Raise `ValueError` when numbers with these provenances must not stand side by side."""
    for other in others:
        for name in Provenance.comparable_fields:
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"these results are not comparable: {name} is {ours!r} in one and {theirs!r} in another; put them "
                    "in separate tables"
                )
