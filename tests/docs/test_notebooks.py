"""A page's notebook has the page's Python, in its order, and nothing of its hidden notes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from notebooks import notebook
from pages import ROOT, all_pages, read

PAGES = {str(path.relative_to(ROOT)): path for path in all_pages()}


@pytest.mark.parametrize("name", PAGES)
def test_notebooks_hold_the_code_of_their_page(name: str) -> None:
    page = read(PAGES[name])
    cells = notebook(page)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    wanted = [
        (f"%%writefile {block.title}\n" if block.kind == "file" else "") + block.code.strip("\n")
        for block in page.blocks
        if block.kind in ("python", "file")
    ]
    assert code == wanted
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "<!--" not in text
    assert all(block.code in text for block in page.blocks if block.kind == "text" and not block.code.startswith(" "))
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_the_program_writes_them(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "docs" / "notebooks.py"), str(tmp_path)], check=True, capture_output=True)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.ipynb")}
    assert {"readme", "faq", "prune-a-cnn"} <= set(found)
    assert all(each["nbformat"] == 4 for each in found.values())
