"""Rewrite README.md's result tables and its picture from a run (`python benchmarks/readme.py runs/demo`)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import arviz as az
import torch

from pyrovae import plots

# column of comparison.json -> (heading, digits, factor)
COLUMNS = {
    "ELBO": ("ELBO", 2, 1.0),
    "IWAE": ("IWAE", 2, 1.0),
    "Δ ELBO": ("Δ ELBO", 2, 1.0),
    "Δ IWAE": ("Δ IWAE", 3, 1.0),
    "k-hat": ("k-hat, median", 2, 1.0),
    "> 0.7": ("k-hat > 0.7, %", 1, 100.0),
    "mean error": ("mean error (floor)", 2, 1.0),
    "sliced W2": ("sliced W2 (floor)", 3, 1.0),
    "ms": ("µs per posterior", 1, 1000.0),
    "train s": ("training, s", 1, 1.0),
}


def cell(column: str, item: dict[str, Any] | None) -> str:
    """A number with its standard error and noise floor, or the reason why there is none."""
    if item is None:
        return ""
    if "reason" in item:
        return str(item["reason"])
    _, digits, factor = COLUMNS[column]
    sign = "+" if column.startswith("Δ") else ""
    text = f"{item['value'] * factor:{sign}.{digits}f}"
    if item["se"] is not None:
        text += f" ± {item['se'] * factor:.{digits}f}"
    if item["noise_floor"] is not None:
        text += f" ({item['noise_floor']:.{digits}f})"
    return text


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with the columns in which any row has something to say."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    lines = ["| guide | " + " | ".join(COLUMNS[column][0] for column in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for row in rows:
        lines.append(f"| {row['guide']} | " + " | ".join(cell(column, row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def picture(folder: Path, path: Path) -> str:
    """Draw the datum and the two latents in which the amortized mean is furthest off; returns what it shows."""
    idata = az.from_netcdf(folder / "posterior.nc")
    names = {"amortized": "amortized", "semi_amortized": "semi-amortized", "laplace": "laplace", "mixture": "mixture",
             "short_run": "short-run"}  # fmt: skip
    truth = torch.tensor(idata["posterior"]["z"].values).flatten(0, 1)
    draws = {shown: torch.tensor(idata[f"posterior_{group}"]["z"].values)[0] for group, shown in names.items()}
    error = (draws["amortized"].mean(0) - truth.mean(0)).abs() / truth.std(0)
    datum = int(error.amax(-1).argmax())
    first, second = error[datum].topk(2).indices.tolist()
    plots.posterior(truth, draws, data=[datum], dims=(first, second)).savefig(path, dpi=100)
    return f"datum {datum}, latents {first} and {second}, amortized mean off by {float(error[datum, first]):.2f} sd"


def main(folder: str) -> None:
    content = json.loads((Path(folder) / "comparison.json").read_text())
    root = Path(__file__).parent.parent
    print(picture(Path(folder), root / "docs" / "images" / "posteriors.png"))
    path = root / "README.md"
    text = path.read_text()
    for marker, key in (("end-to-end", "end_to_end"), ("frozen", "frozen")):
        block = f"<!-- {marker} -->\n{table(content[key])}\n<!-- /{marker} -->"
        text, found = re.subn(rf"<!-- {marker} -->.*?<!-- /{marker} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md must have the marker {marker!r} once, found {found}")
    path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
