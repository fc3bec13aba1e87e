"""A figure of the page, with its heading and what it shows."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Picture"]


class Picture(NamedTuple):
    """A figure with its heading and what it shows."""

    title: str
    figure: Any
    words: str
