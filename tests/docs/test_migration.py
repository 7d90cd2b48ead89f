"""The migration page names every argument of Torch-Pruning's pruners, importances and graph."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from pages import ROOT

PRUNERS = ("BasePruner", "MetaPruner", "MagnitudePruner", "GroupNormPruner", "GrowingRegPruner", "BNScalePruner")


def named() -> set[str]:
    """All names in code spans of the page."""
    page = (ROOT / "docs" / "migration.md").read_text()
    return {word for span in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"\w+", span)}


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("torch_pruning", reason='pip install -e ".[benchmark]"')


@pytest.mark.filterwarnings("ignore")
def test_every_argument_is_named(peer: Any) -> None:
    wanted = set().union(*(parameters(getattr(peer.pruner, name)) for name in PRUNERS))
    wanted |= parameters(peer.DependencyGraph.build_dependency) | parameters(peer.DependencyGraph.get_all_groups)
    importances = {
        name: value
        for name, value in vars(peer.importance).items()
        if inspect.isclass(value) and issubclass(value, peer.importance.Importance) and value is not peer.importance.Importance
    }
    wanted |= set(importances) | set().union(*(parameters(value) for value in importances.values()))
    wanted |= {name for name in vars(peer.utils) if name.startswith(("draw_", "count_"))}
    wanted |= parameters(peer.utils.draw_groups) | parameters(peer.utils.count_ops_and_params)
    wanted |= {name for name, _ in inspect.getmembers(peer.BasePruner, inspect.isfunction) if not name.startswith("_")}
    assert len(wanted) > 60
    assert sorted(wanted - named()) == []
