"""Where a model and its graph begin to differ: the first node, among those that a module of the model stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from stp_fx.ir.agreement import compared
from stp_fx.ir.nested import mapped
from stp_fx.ir.runner import operands, run_node

__all__ = ["first_difference", "module_values", "node_values"]

Seen = dict[str, tuple[Any, Any]]
"""The arguments and the result of a module, by its path."""


def module_values(model: nn.Module, names: set[str], run: Callable[[], Any]) -> Seen:
    """The positional arguments and results of the named modules in a run; those that are called twice are left out."""
    seen: Seen = {}
    twice: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        if name not in names:
            continue

        def keep(_: nn.Module, args: Any, result: Any, name: str = name) -> None:
            twice.update({name} & seen.keys())
            seen[name] = (_copied(args), _copied(result))

        handles.append(module.register_forward_hook(keep))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: values for name, values in seen.items() if name not in twice}


def node_values(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Seen:
    """The same of the graph's calls of modules; runs until a node fails."""
    seen: Seen = {}
    env: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in gm.graph.nodes:
        args = _copied(operands(node, env.__getitem__)[0]) if node.op == "call_module" else None
        try:
            env[node] = run_node(node, env.__getitem__, gm, given)
        except Exception:
            break
        if node.op == "call_module":
            seen[str(node.target)] = (args, _copied(env[node]))
    return seen


def first_difference(gm: fx.GraphModule, theirs: Seen, ours: Seen) -> str:
    """In words, to be put after what differs; empty if no module tells."""
    for node in gm.graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or name not in theirs or name not in ours:
            continue
        for place, of_model, of_graph in zip(("input", "result"), theirs[name], ours[name], strict=True):
            found = compared(of_model, of_graph, f"the {place} of node '{node.name}' (module '{name}')")
            if found.text is not None:
                return f"; first, {found.text}"
    return ""


def _copied(value: Any) -> Any:
    return mapped(torch.Tensor, lambda t: t.detach().clone(), value)
