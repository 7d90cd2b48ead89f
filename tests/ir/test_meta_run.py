"""Running for shapes alone: what is imported for it."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from stp_fx.ir.meta_run import import_compiler


@contextmanager
def collecting(on: bool) -> Iterator[None]:
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What was imported, and whether garbage was looked for meanwhile; ``torch._dynamo`` is not there yet."""
    seen: list[tuple[str, bool]] = []

    def record(name: str) -> Any:
        seen.append((name, gc.isenabled()))
        return SimpleNamespace()

    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(importlib, "import_module", record)
    return seen


@pytest.mark.parametrize("on", [True, False])
def test_nobody_looks_for_garbage_while_the_compiler_is_imported(imports: list[tuple[str, bool]], on: bool) -> None:
    with collecting(on):
        young = [[] for _ in range(100)]
        import_compiler()
        assert gc.isenabled() is on
        assert imports == [("torch._dynamo", False)]
        assert not set(map(id, young)) & set(map(id, gc.get_objects(generation=0))), "what there is counts as old"
        assert gc.get_freeze_count() == 0


def test_an_import_that_fails_leaves_the_collector_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(importlib, "import_module", fails)
    with collecting(True):
        with pytest.raises(ImportError):
            import_compiler()
        assert gc.isenabled()


def test_what_is_imported_is_not_imported_again(imports: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", SimpleNamespace())
    import_compiler()
    assert not imports
