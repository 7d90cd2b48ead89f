"""A batch of one: ``torch.export`` takes for granted that free sizes are at least 2, and a model's own code may branch there.

"Expand the positions, if there are not as many as the batch" goes another way for one, to the same effect. So the graph for a
batch of one is held against the graph for several, and where they make the same calls, the assertions let one pass.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from stp_fx.ir.example import on_meta
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.nested import holds
from stp_fx.ir.runner import operands, run_node
from stp_fx.ir.shapes import meta_twin

__all__ = ["allow_one", "batch_of_one", "same_for"]


def batch_of_one(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments with the first row of each tensor; ``None`` if the tensors do not share a leading size above 1."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    if any(value.dim() == 0 for value in tensors.values()) or len({value.shape[0] for value in tensors.values()}) != 1:
        return None
    if next(iter(tensors.values())).shape[0] < 2:
        return None
    return {name: value[:1] if name in tensors else value for name, value in arguments.items()}


def allow_one(gm: fx.GraphModule, arguments: dict[str, Any], single: fx.GraphModule) -> None:
    """Lets a batch of one pass those assertions of ``gm`` that it fails, if ``single`` makes the same calls.

    ``single`` is the graph that was captured with ``arguments``, whose batch is one.
    """
    if not same_for(arguments, gm, single):
        return
    batch: fx.Node | None = None
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    first = next(node for node in placeholders if isinstance(arguments[str(node.target)], torch.Tensor))
    for check in _run(gm, arguments).failing:
        condition = check.args[0]
        if isinstance(condition, fx.Node) and _is_least(condition):
            condition.update_arg(1, 1)
            check.update_arg(1, str(check.args[1]).replace("at least size 2", "at least size 1"))
            continue
        if batch is None:
            with gm.graph.inserting_after(placeholders[-1]):
                batch = gm.graph.call_method("size", (first, 0))
        with gm.graph.inserting_before(check):
            alone = gm.graph.call_function(operator.eq, (batch, 1))
            check.update_arg(0, gm.graph.call_function(operator.or_, (check.args[0], alone)))
    gm.recompile()


def _is_least(condition: fx.Node) -> bool:
    """Whether it says that a batch is at least 2. (The other way, "or one", is too much for the ONNX exporter of torch 2.8.)"""
    if condition.target is not operator.ge or condition.args[1] != 2 or len(condition.users) > 1:
        return False
    size = condition.args[0]
    return isinstance(size, fx.Node) and (size.target, size.args[1:]) == ("size", (0,))


def same_for(arguments: dict[str, Any], first: fx.GraphModule, second: fx.GraphModule) -> bool:
    """Whether two graphs make the same calls on these arguments: operators, numbers and the shapes of what they give."""
    try:
        one, other = (_run(gm, arguments).calls for gm in (first, second))
    except Exception:  # either of them does not run with these shapes, for whatever reason an operator has
        return False
    return one == other


def _run(gm: fx.GraphModule, arguments: dict[str, Any]) -> _Recorder:
    recorder, twin = _Recorder(), meta_twin(gm)
    inputs = iter([on_meta(arguments[str(n.target)]) for n in gm.graph.nodes if n.op == "placeholder"])
    with torch.no_grad(), MetaRun():
        for node in gm.graph.nodes:
            recorder.run_node(node, twin, inputs)
    return recorder


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.env: dict[fx.Node, Any] = {}
        self.order: dict[fx.Node, int] = {}
        self.count = 0
        self.failing: list[fx.Node] = []

    def run_node(self, n: fx.Node, twin: nn.Module, inputs: Iterator[Any]) -> None:
        if n.target is torch._assert:
            if isinstance(n.args[0], fx.Node) and not self.env[n.args[0]]:
                self.failing.append(n)
            self.env[n] = None
            return
        result = self.env[n] = run_node(n, self.env.__getitem__, twin, inputs)
        source = n.args[0] if n.args else None
        if n.target == "expand" and isinstance(source, fx.Node) and result.shape == self.env[source].shape:
            self.order[n] = self.order[source]  # what is left out where it changes nothing
        elif holds(torch.Tensor, result):
            self.order[n] = self.count = self.count + 1
            if n.op in ("call_function", "call_method", "call_module"):
                written = operands(n, self._shown)
                self.calls.append((n.op, str(n.target), _plain(written), _plain(_shape(result))))

    def _shown(self, node: fx.Node) -> Any:
        """A tensor by its place in the graph, a number by its value."""
        return ("value", self.order[node]) if node in self.order else self.env[node]


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return tuple(map(_shape, value)) if isinstance(value, (list, tuple)) else ()


def _plain(value: Any) -> str:
    """Lists and tuples are written alike."""
    return repr(list(map(_plain, value))) if isinstance(value, (list, tuple)) else repr(value)
