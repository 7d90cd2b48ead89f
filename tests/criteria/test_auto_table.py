"""The rule of ``criterion="auto"`` against the committed tables: what it keeps beside each criterion by itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not (BENCHMARKS / "results" / "retention-repairs.json").exists():
    pytest.skip("the measured tables are not part of this copy", allow_module_level=True)


@pytest.fixture(scope="module")
def table() -> Iterator[Any]:
    """``benchmarks/auto.py`` as a module."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_auto", BENCHMARKS / "auto.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["benchmarks_auto"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["benchmarks_auto"]


def test_no_single_criterion_keeps_more_in_any_situation(table: Any) -> None:
    found = table.lines(table.cells(), "situation")
    assert len(found) == 7
    assert sum(each.cells for each in found.values()) >= 290
    for (situation,), each in found.items():
        for criterion, mean in each.means.items():
            assert each.beside[criterion] >= mean - 1e-12, f"{situation}: {criterion} keeps more"


def test_on_every_network_it_keeps_more_than_the_worst_criterion(table: Any) -> None:
    for (situation, network), each in table.lines(table.cells(), "situation", "network").items():
        behind = [name for name, mean in each.means.items() if each.beside[name] > mean]
        assert behind, f"{situation}, {network}: nothing keeps less"


def test_the_choice_is_a_candidate_of_every_cell_that_counts(table: Any) -> None:
    cells = table.cells()
    used = [cell for cell in cells if cell.auto in cell.kept]
    assert len(used) == len(cells)
    assert {cell.auto for cell in used} == {"magnitude", "variance", "reconstruction"}
    assert all(cell.kept[cell.auto] >= min(cell.kept.values()) for cell in used)


def test_the_page_is_of_these_cells(table: Any) -> None:
    committed = json.loads((BENCHMARKS / "results" / "auto.json").read_text())["cells"]
    assert [(each["network"], each["target"], each["auto"], each["kept"]) for each in committed] == [
        (cell.network, cell.target, cell.auto, dict(cell.kept)) for cell in table.cells()
    ]
