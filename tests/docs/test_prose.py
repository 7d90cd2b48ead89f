"""The checker of words finds them in comments, docstrings, messages and pages, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from prose import findings, main, prose_of

PROGRAM = '''"""Reads a site."""
gone = "dead"  # names are code
# A comment on two lines whose channels
# are gone
message = f"the storey of {gone} is wrong"
"""Code such as ``gone`` is left out.

>>> print("what is said")
"""
'''


def found(path: Path) -> list[tuple[int, str]]:
    return sorted((each.line, each.words) for text, line in prose_of(path) for each in findings(text, path, line))


def test_words_are_found_where_people_read(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert found(program) == [(1, "site"), (4, "gone"), (5, "storey")]


def test_code_of_pages_is_left_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "A `dead` word.\n\n```python\ngone = 1\n```\n\nWhat remains is\nsaid below. Dead code is a compiler's term.\n"
    )
    assert found(page) == [(7, "What"), (7, "What remains")]


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [
        ("What a layer reads is its input.", True),
        ("The input. What it gives is its output.", True),
        ("What is a group? An axis.", False),
        ("It returns what it was given.", False),
        ("Sixty documentation sites.", True),
        ("The documentation site.", False),
    ],
)
def test_sentences(sentence: str, wrong: bool) -> None:
    assert bool(findings(sentence, Path("page.md"))) is wrong


def test_the_project_keeps_to_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0, capsys.readouterr().out
