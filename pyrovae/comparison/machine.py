"""Threads and device of a job on images, before anything is read or written."""

from __future__ import annotations

import torch

from pyrovae import runtime
from pyrovae.comparison.recipes import hidden_width

__all__ = ["require_device", "set_threads"]


def require_device(device: str) -> None:
    """Raise `ValueError` for what is no device, and for a GPU that is not there."""
    if device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f"unknown device {device!r}: pass cpu, cuda or cuda:0")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that torch can use: pass --device cpu")


def set_threads(requested: int | None, pixels: int, batch_size: int) -> int:
    """Set the number of torch threads and return it; one for images of at most 256 pixels unless asked otherwise."""
    work = batch_size * hidden_width(pixels) * pixels
    return runtime.threads(requested, work=0 if pixels <= 256 else work)
