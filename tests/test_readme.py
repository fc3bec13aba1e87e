"""The user-facing pages: every python block runs, in order, and the README's matrix is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyrovae.matrix import matrix

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[tuple[int, str]]:
    """(line, code) of every fenced python block."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.mark.parametrize("page", [pytest.param(page, marks=[] if page == "README.md" else [pytest.mark.slow])
                                  for page in PAGES])  # fmt: skip
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__page__"}
    found = blocks(page)
    assert found or page != "README.md"
    for line, code in found:
        # Blank lines before the block make line numbers of an error those of the page.
        exec(compile("\n" * line + code, page, "exec"), namespace)


def test_matrix_is_generated():
    text = (ROOT / "README.md").read_text()
    kept = re.search(r"<!-- matrix -->\n(.*?)\n<!-- /matrix -->", text, flags=re.DOTALL)
    assert kept is not None, "the README has lost the comment markers of its matrix"
    assert kept[1] == matrix(), "put the output of pyrovae.matrix.matrix() between the README's markers"


@pytest.mark.parametrize("page", PAGES)
def test_local_links_exist(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not missing
