"""Guards of an exported graph, as nodes: ``torch.export`` writes them as Python over the sizes of inputs."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

__all__ = ["as_nodes", "in_order"]


def in_order(conditions: Iterable[str]) -> list[str]:
    """Conditions as text, each once and always in one order; ``torch.export`` gives them in that of a set."""
    return sorted({_sides_in_order(condition) for condition in conditions})


def _sides_in_order(condition: str) -> str:
    try:
        found = ast.parse(condition, mode="eval").body
    except SyntaxError:  # which is told where it is written into the graph
        return condition
    if not isinstance(found, ast.Compare) or len(found.ops) != 1 or not isinstance(found.ops[0], ast.Eq):
        return condition
    left, right = ast.unparse(found.left), ast.unparse(found.comparators[0])
    literal = isinstance(found.comparators[0], ast.Constant)
    return f"{right} == {left}" if right < left and not literal else condition


def as_nodes(graph: fx.Graph, part: ast.expr, inputs: dict[str, Any]) -> Any:
    """An expression over sizes of inputs; raises KeyError for what such expressions do not have."""
    if isinstance(part, ast.Constant):
        return part.value
    if isinstance(part, ast.Compare) and len(part.ops) == 1:
        return graph.call_function(
            _OPERATORS[type(part.ops[0])],
            (as_nodes(graph, part.left, inputs), as_nodes(graph, part.comparators[0], inputs)),
        )
    if isinstance(part, ast.BinOp):
        both = (as_nodes(graph, part.left, inputs), as_nodes(graph, part.right, inputs))
        return graph.call_function(_OPERATORS[type(part.op)], both)
    if isinstance(part, ast.UnaryOp):
        return graph.call_function(_OPERATORS[type(part.op)], (as_nodes(graph, part.operand, inputs),))
    match part:
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=tensor, attr="size"), args=[]), slice=ast.Constant(value=int(dim))
        ):
            return graph.call_method("size", (as_nodes(graph, tensor, inputs), dim))
        case ast.Call(func=ast.Attribute(value=ast.Name(id=("torch" | "math") as module), attr=name)) if name in _FUNCTIONS:
            function = getattr(torch if module == "torch" else math, name)
            return graph.call_function(function, tuple(as_nodes(graph, each, inputs) for each in part.args))
        case ast.Call(func=ast.Name(id=("max" | "min") as name), args=[_, _, *_]):  # torch 2.8 to 2.12
            function = getattr(torch, f"sym_{name}")  # unlike Python's, it takes proxies
            values = [as_nodes(graph, each, inputs) for each in part.args]
            return functools.reduce(lambda a, b: graph.call_function(function, (a, b)), values)
        case ast.BoolOp():
            first, *rest = (as_nodes(graph, each, inputs) for each in part.values)
            for each in rest:
                first = graph.call_function(_OPERATORS[type(part.op)], (first, each))
            return first
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))):
            return inputs[name]
        case ast.Subscript(slice=ast.Constant(value=(str() | int()) as item)):  # of a list or a dict
            return graph.call_function(operator.getitem, (as_nodes(graph, part.value, inputs), item))
    raise KeyError(ast.dump(part))


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.Not: operator.not_, ast.And: operator.and_, ast.Or: operator.or_,
}  # fmt: skip
_FUNCTIONS = {"sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "floor", "ceil", "trunc"}
