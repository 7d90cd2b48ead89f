"""Writes the pages that have Python as notebooks, into ``out/notebooks``: ``make notebooks``.

The tests run the Python of every page (``docs/pages.py``), so what a notebook holds has run. A notebook has no outputs; the
page's own stand in its text. Nothing but JSON is needed to write one (format 4.5 of Jupyter).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pages import ROOT, Page, all_pages, read

FOLDER = ROOT / "out" / "notebooks"
_PART = re.compile(r"<!--.*?-->|^( *)```[\w-]*[^\n]*\n.*?^\1```[ \t]*$", re.DOTALL | re.MULTILINE)


def notebook(page: Page) -> dict[str, Any]:
    """The page as a notebook, as JSON holds it: prose as text, Python (hidden, too) as code, files as cells that write them."""
    cells: list[dict[str, Any]] = []
    text = page.path.read_text()
    blocks = iter([block for block in page.blocks if block.kind in ("python", "file")])
    at, prose = 0, ""
    for part in _PART.finditer(text):
        prose += text[at : part.start()]
        at = part.end()
        if re.match(r"<!--\s*python\b|\s*```python\b", part[0]):
            block = next(blocks)
            cells += _cell("markdown", prose)
            cells += _cell("code", (f"%%writefile {block.title}\n" if block.kind == "file" else "") + block.code)
            prose = ""
        elif not part[0].startswith("<!--"):
            prose += part[0]
    cells += _cell("markdown", prose + text[at:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, text: str) -> list[dict[str, Any]]:
    text = text.strip("\n")
    code = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return [{"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True), **code}] if text.strip() else []


def main(folder: Path) -> None:
    for page in map(read, all_pages()):
        if page.has_python:
            target = folder / f"{page.path.stem.lower()}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(notebook(page), indent=1) + "\n")
            print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
