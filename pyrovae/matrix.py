"""The compatibility matrix, guides x losses, as Markdown: what `pyrovae.compat.compatible` says of every pair.

A cell is "yes", or the number of the reason below the table. Registered guides and losses appear by themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from pyrovae import guides, losses
from pyrovae.compat import compatible

__all__ = ["matrix"]


def matrix() -> str:
    """The Markdown table and the reasons under it.

    Example:
        >>> print(matrix().splitlines()[2])
        | `Amortized` | yes | yes | yes | no (1) | no (2) | yes | yes |
    """
    registry: dict[str, Any] = losses.REGISTRY
    columns: dict[Any, tuple[list[str], Any]] = {}  # losses with the same needs share one
    for name, make in registry.items():
        loss = make()
        needs = replace(loss.traits, name="", scores_traces=False)  # of guides
        columns.setdefault(needs, ([], loss))[0].append(f"`{name}`")
    reasons: dict[str, int] = {}
    heads = ["guide", *(", ".join(names) for names, _ in columns.values())]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for name, guide in _rows().items():
        cells = [_cell(compatible(guide=guide, loss=loss), guide, reasons) for _, loss in columns.values()]
        lines.append(_line([f"`{name}`", *cells]))
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def _rows() -> dict[str, Any]:
    """Name -> what `compatible` is asked about; `Amortized` stands twice, because its family decides."""
    rows: dict[str, Any] = {}
    for guide in guides.REGISTRY.values():
        rows[guide.__name__] = guide
        if guide is guides.Amortized:
            rows['Amortized(family="mixture")'] = guides.Amortized(_no_model, nn.Identity(), "mixture")
    return rows


def _no_model() -> None:
    """Never run: a guide's traits are known from its construction."""


def _cell(reason: str | None, guide: Any, reasons: dict[str, int]) -> str:
    if reason is None:
        return "yes"
    # One reason for all guides it holds for.
    general = reason.replace(guide.traits.name, "the guide")
    general = general[0].upper() + general[1:] if general.startswith("the guide") else general
    return f"no ({reasons.setdefault(general, len(reasons) + 1)})"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
