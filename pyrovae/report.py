"""The report: one self-contained HTML page with pictures first and the tables behind them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyrovae.table import Row, cells, columns_of

if TYPE_CHECKING:
    from pyrovae.diagnose import Report

__all__ = ["diagnosis", "figure", "page", "section", "table"]

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6875; --line: #e3e7eb; --accent: #0072B2; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; }
p { max-width: 74ch; margin: .5rem 0; }
.lead { font-size: 1.08rem; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .36rem .55rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; } td.words { color: var(--soft); }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
ul { max-width: 74ch; padding-left: 1.2rem; } li { margin: .3rem 0; }
pre { font-size: .8rem; overflow-x: auto; margin: .5rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .86rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def figure(fig: Any, description: str) -> str:
    """A matplotlib figure as an inline picture."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def table(rows: Sequence[Row]) -> str:
    """The rows as an HTML table; refuses rows that are not comparable."""
    columns = columns_of(rows)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)

    def cell(row: Row, column: str, text: str) -> str:
        words = column != "guide" and isinstance(row.values.get(column), str)
        return f'<td class="words">{html.escape(text)}</td>' if words else f"<td>{html.escape(text)}</td>"

    body = "".join(
        "<tr>" + "".join(cell(row, c, t) for c, t in zip(columns, cells(row, columns), strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(items: dict[str, Any]) -> str:
    """A list of names and values."""
    return "<dl>" + "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in items.items()
    ) + "</dl>"  # fmt: skip


def section(title: str, *parts: str) -> str:
    """A headed part of the page; parts are HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, style: str = "") -> str:
    """Plain words."""
    return f'<p class="{style}">{html.escape(text)}</p>' if style else f"<p>{html.escape(text)}</p>"


def diagnosis(found: Report, extra: Mapping[str, Any] | None = None) -> list[str]:
    """A diagnostic report as sections: the verdict, the pictures, the numbers."""
    words = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found.verdict)
    sections = [section(f"Verdict on {found.guide}", f"<ul>{words}</ul>")]
    sections += [section(title, figure(fig, title)) for title, fig in found.figures().items()]
    parts = (found.elbo, found.iwae, found.gaps, found.information, found.comparison, found.reference,
             found.calibration)  # fmt: skip
    numbers = "".join(f"<pre>{html.escape(repr(part))}</pre>" for part in parts if part is not None)
    origin = {k: v for k, v in found.provenance.to_dict().items() if k != "versions" and v != ""}
    sections.append(section("The numbers", numbers))
    sections.append(section("Where the numbers come from", facts({**origin, **found.provenance.versions,
                                                                  **(extra or {})})))  # fmt: skip
    return sections


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole document."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{paragraph(lead, 'lead')}{''.join(sections)}</main></body></html>"
    )
