"""The examples in docstrings run; a warning is an error there as everywhere."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path.relative_to(ROOT) for path in sorted((ROOT / "stp_fx").rglob("*.py")) if ">>> " in path.read_text()]
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted > 0


def test_the_functions_that_most_programs_need_have_examples() -> None:
    assert {"stp_fx.api", "stp_fx.analysis.plan", "stp_fx.training.schedules"} <= set(MODULES)
