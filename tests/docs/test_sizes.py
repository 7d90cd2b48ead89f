"""Functions and files stay short: a long one is split by what it is responsible for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import stp_fx

FUNCTION, FILE = 60, 400
"""Lines, with signature and docstring."""

ROOT = Path(stp_fx.__file__).parent


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {name}, {lines}" for path in sources() for name, lines in functions(path) if lines > FUNCTION
    ]
    assert not long, f"functions of more than {FUNCTION} lines: {'; '.join(long)}"


def test_files_are_short() -> None:
    long = [str(path.relative_to(ROOT)) for path in sources() if len(path.read_text().splitlines()) > FILE]
    assert not long, f"files of more than {FILE} lines: {', '.join(long)}"
