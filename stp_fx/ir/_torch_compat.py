"""What differs between the versions of PyTorch that the library runs with, from 2.6 on; the rest of the code asks here.

Each function does what the newest PyTorch does, by its own means where it has them.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._export.non_strict_utils import key_path_to_source
from torch._library.fake_class_registry import FakeScriptObject
from torch.fx import _symbolic_trace
from torch.fx.experimental import symbolic_shapes

__all__ = ["STORED_CONSTANTS", "children_of", "exported_module", "fx_tracing", "guards_of", "set_versions"]


def children_of(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The specs of a container's values. (A method from 2.9 on.)"""
    return spec.children() if hasattr(spec, "children") else spec.children_specs  # type: ignore[attr-defined]


def set_versions(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Sets the version counters of tensors. (Older versions set one at a time.)"""
    set_counter: Any = torch._C._autograd._unsafe_set_version_counter  # type: ignore[attr-defined]
    if "arg0: torch.Tensor," not in (set_counter.__doc__ or ""):
        set_counter(tensors, versions)
        return
    for tensor, version in zip(tensors, versions, strict=True):
        set_counter(tensor, version)


# -- torch.fx ----------------------------------------------------------------------------------------------------------


STORED_CONSTANTS: tuple[type, ...] = getattr(
    _symbolic_trace, "_constant_attribute_types", (torch.Tensor, torch.ScriptObject, FakeScriptObject)
)
"""What ``fx.Tracer`` reads by name, if it finds it in an attribute of a module."""


def fx_tracing() -> AbstractContextManager[None]:
    """A block in which ``is_fx_tracing`` is true in this thread. (Older versions have one flag for all threads.)"""
    context = getattr(_symbolic_trace, "_is_fx_tracing_context", None)
    return _flagged() if context is None else context(True)


@contextmanager
def _flagged() -> Iterator[None]:
    module: Any = _symbolic_trace
    previous, module._is_fx_tracing_flag = module._is_fx_tracing_flag, _InThread()
    try:
        yield
    finally:
        module._is_fx_tracing_flag = previous


class _InThread:
    """True in the thread that has made it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


# -- torch.export ------------------------------------------------------------------------------------------------------


def exported_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program, without a module that checks its guards. (Older versions have none.)"""
    settings = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**settings)  # type: ignore[return-value]


def guards_of(program: torch.export.ExportedProgram, positional: Sequence[str]) -> list[str]:
    """What ``torch.export`` took for granted of the sizes of inputs, as Python: ``L['x'].size()[0] <= 2``.

    Older versions only keep it as formulas, and name inputs by their places; ``positional`` are the names of those places.
    """
    conditions = program._guards_code if hasattr(program, "_guards_code") else _guards_in_code(program)
    if "sourced_prefixes" in inspect.signature(key_path_to_source).parameters:
        return conditions
    named = [re.sub(r"L\['args'\]\[0\]\[(\d+)\]", lambda m: f"L[{positional[int(m[1])]!r}]", each) for each in conditions]
    return [each.replace("L['args'][1][", "L[") for each in named]


def _guards_in_code(program: torch.export.ExportedProgram) -> list[str]:
    values = (node.meta.get("val") for node in program.graph.nodes)
    sizes = (size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
    free: Any = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    if free is None:
        return []
    shapes = free.node.shape_env
    sources = shapes.var_to_sources
    printer = symbolic_shapes.ShapeGuardPythonPrinter(sources, lambda source: source.name(), sources)
    known = [guard.expr for guard in shapes.guards if guard.expr.free_symbols <= sources.keys()]
    return [code for code in map(printer.doprint, known) if "L['self']" not in code]
