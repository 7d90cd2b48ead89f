"""The one way in which a node of a graph is carried out, for whoever runs a graph node by node.

The caller decides the kind of values: tensors, meta tensors or proxies. ``torch.fx.Interpreter`` does the same for whole graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from stp_fx.ir.nested import own_containers
from stp_fx.ir.shapes import fetch

__all__ = ["call", "operands", "run_graph", "run_node"]

ValueOf = Callable[[fx.Node], Any]
ModuleOf = Callable[[str], Callable[..., Any]]


def operands(node: fx.Node, value_of: ValueOf) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, with values in place of the nodes in them, however nested."""
    return map_arg((node.args, dict(node.kwargs)), value_of)  # type: ignore[return-value]


def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], module_of: ModuleOf) -> Any:
    """The value of a node for its operands; ``module_of`` gives what to call for the path of a submodule."""
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_module":
        return module_of(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "output":
        return args[0]
    raise ValueError(f"node {node.name!r} is a {node.op}, which has no operands")


def run_node(
    node: fx.Node, value_of: ValueOf, root: nn.Module, inputs: Iterator[Any] | None = None, module_of: ModuleOf | None = None
) -> Any:
    """The value of any node. Placeholders take ``inputs`` in order; stored tensors and modules are those of ``root``."""
    if node.op == "placeholder":
        return own_containers(next(inputs or iter(()), *node.args))  # or its default, if it has one
    if node.op == "get_attr":
        return fetch(root, str(node.target))
    return call(node, *operands(node, value_of), module_of or root.get_submodule)


def run_graph(graph: fx.Graph, root: nn.Module, inputs: Iterable[Any]) -> Any:
    """The output of a graph for the values of its placeholders."""
    env: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        env[node] = run_node(node, env.__getitem__, root, given)
        if node.op == "output":
            return env[node]
    return None
