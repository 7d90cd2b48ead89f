"""Every page's Python runs and prints what the page shows; every command that it names is run somewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pages import ROOT, all_pages, read

PAGES = {str(path.relative_to(ROOT)): path for path in all_pages()}
WITH_PYTHON = [name for name, path in PAGES.items() if read(path).has_python]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_of_a_page_prints_what_the_page_shows(name: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / "run.py"), "python", str(PAGES[name])]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pages_are_those_that_the_issue_of_documentation_asks_for() -> None:
    assert {"README.md", "docs/migration.md"} <= set(WITH_PYTHON)
    tutorials = [name for name in PAGES if name.startswith("docs/tutorials/")]
    assert len(tutorials) >= 7
    for name in tutorials:
        page = read(PAGES[name])
        assert page.has_python or page.commands, name


def test_ci_runs_the_commands_of_all_pages() -> None:
    """The README's first commands among them, as they stand or in short."""
    readme = dict(read(PAGES["README.md"]).commands)
    assert readme["make demo"].startswith("make demo ARGS=")
    assert dict(read(PAGES["README.md"]).elsewhere)["make test"] == ".ci/run"
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make commands" in lines
    assert "make docs" in lines
