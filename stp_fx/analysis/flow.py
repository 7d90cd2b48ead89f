"""The calls of a graph as pictures show them: what is called, whose values it reads, in the code of which modules it stands."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from torch import fx

from stp_fx.ir.modes import modes_of
from stp_fx.ir.train_eval import AutogradCall, ModeSwitch

__all__ = ["FlowNode", "flow_of"]


@dataclasses.dataclass(frozen=True)
class FlowNode:
    """One node of the graph.

    ``call`` is the name of the module's class or of the function, ``path`` the module called ("" for anything else),
    ``scopes`` the calls of modules around it, outermost first: the module's path, with ``@1`` from its second call on.
    """

    name: str
    op: str
    call: str
    path: str
    inputs: tuple[str, ...]
    scopes: tuple[str, ...]


def flow_of(gm: fx.GraphModule) -> list[FlowNode]:
    """The nodes in the graph's order. Scopes are those recorded in tracing; without a record, those that the names suggest."""
    recorded = any(node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    result: dict[str, FlowNode] = {}
    for node, _ in modes_of(gm.graph):
        path = str(node.target) if node.op == "call_module" else ""
        module = gm.get_submodule(path) if path else None
        # A module that stands for a function is called as that function is.
        called = type(module) if module else node.target
        called = module.function if isinstance(module, (AutogradCall, ModeSwitch)) else called
        call = getattr(called, "__name__", str(called))
        inputs = tuple(n.name for n in node.all_input_nodes)
        scopes = _recorded(node) if recorded else _guessed(node.op, path, inputs, result)
        result[node.name] = FlowNode(node.name, node.op, call, path, inputs, scopes)
    return list(result.values())


def _recorded(node: fx.Node) -> tuple[str, ...]:
    scopes = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, repeats, again = str(key).rpartition("@")
        scopes.append(f"{path}@{again}" if repeats and again.isdigit() else str(path))
    scopes = [scope for scope in scopes if scope]
    leaf = node.op == "call_module" and bool(scopes) and scopes[-1].partition("@")[0] == node.target
    return tuple(scopes[:-1] if leaf else scopes)


def _guessed(op: str, path: str, inputs: tuple[str, ...], earlier: Mapping[str, FlowNode]) -> tuple[str, ...]:
    if path:
        return tuple(path[: dot.start()] for dot in re.finditer(r"\.", path))
    # A function is taken to stand in the code of the module around what it reads first.
    return earlier[inputs[0]].scopes if op.startswith("call") and inputs else ()
