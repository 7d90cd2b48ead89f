"""Graphs of two modes: what training alone and evaluation alone run stands in one graph, between marks.

A mark is a call of a :class:`Mark`; the nodes from it to the next one run in its mode. Where a value comes from one node in
training and from another in evaluation, a :class:`Choice` stands for it. Both are modules, so that whoever traces a graph
again, as unpickling does, keeps them. An interpreter that knows nothing of marks runs all nodes and returns what the graph
returns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

__all__ = [
    "CHOICE",
    "MARKS",
    "Choice",
    "Mark",
    "OneMode",
    "add_mode_modules",
    "graph_of_mode",
    "has_modes",
    "is_mark",
    "modes_of",
]

MARKS = {"stp_fx_training_only": "train", "stp_fx_evaluation_only": "eval", "stp_fx_both": "both"}
"""The names of the marks, and the mode of the nodes that follow."""
CHOICE = "stp_fx_mode_choice"
"""The name of the module that chooses."""


class Mark(nn.Module):
    """The nodes after this call run in one mode ("train", "eval") or in both."""

    _is_impure = True  # its call has no result, and passes of torch.fx must not remove it as unused

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self) -> None:
        """Nothing."""

    def extra_repr(self) -> str:
        return self.mode


class Choice(nn.Module):
    """The first of two values in training, the second in evaluation."""

    def forward(self, training: Any, evaluation: Any) -> Any:
        return training if self.training else evaluation


def is_mark(node: fx.Node) -> bool:
    """Whether a node says in which mode those after it run."""
    return node.op == "call_module" and node.target in MARKS


def has_modes(graph: fx.Graph) -> bool:
    """Whether training and evaluation run different nodes or numbers."""
    return any(node.op == "call_module" and (node.target in MARKS or node.target == CHOICE) for node in graph.nodes)


def modes_of(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """The nodes that are no marks, each with "train", "eval" or "both"."""
    mode = "both"
    for node in graph.nodes:
        if is_mark(node):
            mode = MARKS[str(node.target)]
        else:
            yield node, mode


def graph_of_mode(graph: fx.Graph, training: bool) -> fx.Graph:
    """The nodes that one mode runs, as a graph without marks and choices."""
    other = "eval" if training else "train"
    result = fx.Graph(tracer_cls=graph._tracer_cls)
    result.set_codegen(copy.copy(graph._codegen))
    known: dict[fx.Node, Any] = {}

    def now(value: Any) -> Any:
        return map_aggregate(value, lambda leaf: known[leaf] if isinstance(leaf, fx.Node) else leaf)

    for node, mode in modes_of(graph):
        if mode == other:
            continue
        if node.op == "call_module" and node.target == CHOICE:
            known[node] = now(node.args[0 if training else 1])
        else:
            known[node] = result.create_node(node.op, node.target, now(node.args), now(node.kwargs), node.name, node.type)
            known[node].meta = copy.copy(node.meta)
    return result


class OneMode(fx.Interpreter):
    """Runs what one mode runs, node by node; the others have no value.

    Args:
        module: what has the modules and tensors, with the flags with which they are to run.
        training: whose nodes.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, training: bool = False) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False
        other = "eval" if training else "train"
        self.training = training
        self.left_out = {node for node, mode in modes_of(graph) if mode == other}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.left_out or is_mark(n):
            return None
        if n.op == "call_module" and n.target == CHOICE:
            return self.fetch_args_kwargs_from_env(n)[0][0 if self.training else 1]
        return super().run_node(n)


def add_mode_modules(gm: nn.Module) -> None:
    """Gives ``gm`` the modules that marks and choices call."""
    for name, mode in MARKS.items():
        gm.add_module(name, Mark(mode).train(gm.training))
    gm.add_module(CHOICE, Choice().train(gm.training))
