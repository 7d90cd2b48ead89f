"""Arguments that hold no tensor: baked into the graph, which takes them all the same, so that it is called as the model is."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from stp_fx.ir.example import is_plain
from stp_fx.ir.nested import holds

__all__ = ["assert_constants", "constant_inputs"]


def constant_inputs(arguments: Mapping[str, Any], named: Collection[str]) -> dict[str, bool]:
    """Which arguments without a tensor a graph takes all the same, and whether they may be left out.

    An argument after the last tensor may. Before it, arguments given by position have a place, those given by name have none.
    """
    order = list(arguments)
    last = max(k for k, name in enumerate(order) if holds(torch.Tensor, arguments[name]))
    found: dict[str, bool] = {}
    for k, name in enumerate(order):
        if k > last and is_plain(arguments[name]):
            found[name] = True
        elif k < last and name not in named and not holds(torch.Tensor, arguments[name]):
            found[name] = False
    return found


def assert_constants(graph: fx.Graph, inputs: Mapping[str, fx.Node], arguments: Mapping[str, Any]) -> list[fx.Node]:
    """Asserts that inputs are given the values that the graph was captured with; the new nodes."""
    made: list[fx.Node] = []
    for name, node in inputs.items():
        value = arguments[name]
        if is_plain(value) and value == value:  # not NaN
            text = f"the graph holds for {name}={value!r:.80}, as in its example: trace again for another value"
            made.append(graph.call_function(operator.eq, (node, value)))
            made.append(graph.call_function(torch._assert, (made[-1], text)))
    return made
