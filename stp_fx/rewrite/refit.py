"""Puts the literals of a shortened graph right, and proves every shape on the way.

The new graph runs once on meta tensors. At each node its handler renews what is written there, numbers computed from sizes
that changed are frozen where they enter arithmetic, and the result must have the shape that the analysis promised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.errors import RewriteError
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.provenance import example_of
from stp_fx.ir.runner import call, operands, run_node
from stp_fx.ir.shapes import meta_twin
from stp_fx.rewrite.numbers import Numbers, drop_dead_numbers
from stp_fx.rules import Dim, TensorDims, has_ids
from stp_fx.rules.edit import Edit, Signature
from stp_fx.rules.literals import calls_of, fixed_numbers, handler_for, module_calls_of

__all__ = ["refit"]


def refit(gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> None:
    """Rewrites the literals and module attributes of ``gm`` in place; ``graph`` is the analysis of the original.

    Raises:
        RewriteError: a node cannot run, or gives a shape that the analysis did not promise.
    """
    _Refit(gm, graph, survivors).run()
    drop_dead_numbers(gm)
    gm.recompile()


class _Refit:
    def __init__(self, gm: fx.GraphModule, graph: ChannelGraph, survivors: Survivors) -> None:
        self.gm, self.graph, self.survivors = gm, graph, survivors
        self.twin = meta_twin(gm).eval()
        self.env: dict[fx.Node, Any] = {}
        self.seen: set[int] = set()
        self.positions: dict[tuple[int, ...], np.ndarray] = {}
        self.numbers = Numbers(gm, graph, self.keep, self.env)

    def keep(self, dim: Dim) -> np.ndarray:
        key = tuple(id(f.ids) if f.ids is not None else -f.size for f in dim)
        if key not in self.positions:
            self.positions[key] = self.survivors.flags(dim)
        return self.positions[key]

    def run(self) -> None:
        inputs = iter(example_of(self.gm))
        with torch.no_grad(), MetaRun():
            for node in list(self.gm.graph.nodes):
                try:
                    self.env[node] = self._node(node, inputs)
                except RewriteError:
                    raise
                except Exception as error:
                    raise RewriteError(
                        f"node '{node.name}' ({node.format_node()}) does not run with the units removed: {error}. "
                        "The input graph is unchanged; please report this with the op"
                    ) from error
                self._check(node, self.env[node], self.graph.value(node.name))

    def _node(self, node: fx.Node, inputs: Any) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return run_node(node, self._now, self.twin, inputs)
        self._freeze(node)
        args, kwargs = operands(node, self._now)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            self._renew_module(node, args, kwargs)
            return self._call(node, args, kwargs)
        if node.target is torch._assert and node.args[0] is True:
            self.gm.graph.erase_node(node)  # of channels alone, and it held
            return None
        calls = calls_of(node)
        handler = None if calls is None else calls.handler
        if calls is not None and handler is not None and self._touched(node):
            handler(self._edit(node, calls.signature, args, kwargs))
            args, kwargs = operands(node, self._now)
        try:
            return self._call(node, args, kwargs)
        except (ArithmeticError, ValueError):  # a number that is a power of a size, say, and the size is 0 now
            if not self.numbers.affected(node):
                raise
            self.numbers.settle(node)
            return self._call(node, *operands(node, self._now))

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        return call(node, args, kwargs, self.twin.get_submodule)

    def _now(self, node: fx.Node) -> Any:
        """A value of the new graph; a number that a handler has just written in is computed here."""
        if node not in self.env:
            self.env[node] = self._call(node, *operands(node, self._now))
        return self.env[node]

    def _edit(self, node: fx.Node, signature: Signature, args: Any, kwargs: Any, module: nn.Module | None = None) -> Edit:
        values = map(self._value_of, (*node.args, *node.kwargs.values()))
        source = next((value.dims for value in values if isinstance(value, TensorDims)), ())
        return Edit(
            node,
            signature,
            args,
            kwargs,
            *operands(node, self.numbers.old),
            values=self._value_of,
            before=self._frozen,
            source=source,
            result=self.graph.value(node.name),
            keep=self.keep,
            module=module,
        )

    def _value_of(self, arg: Any) -> Any:
        return self.graph.value(arg.name) if isinstance(arg, fx.Node) else None

    def _touched(self, node: fx.Node) -> bool:
        """Whether any factor with elements is among the inputs or outputs: all other calls keep their literals."""
        values = [self.graph.value(n.name) for n in (*node.all_input_nodes, node)]
        return any(has_ids(dim) for value in values for tensor in _leaves(value) for dim in tensor.dims)

    def _freeze(self, node: fx.Node) -> None:
        """Numbers that were computed from sizes keep their old value in arguments that are no sizes or positions themselves."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return
        if node.target is not torch._assert and handler_for(node) is None and not _leaves(self.graph.value(node.name)):
            return
        for where in fixed_numbers(node):
            raw = node.args[where] if isinstance(where, int) else node.kwargs[where]
            frozen = self._frozen(raw)
            if frozen is not raw and isinstance(where, int):
                node.update_arg(where, frozen)
            elif frozen is not raw:
                node.update_kwarg(str(where), frozen)

    def _frozen(self, raw: Any) -> Any:
        """An argument with the numbers that it would have without the removal; the same object if it has them."""
        found: list[fx.Node] = []
        map_arg(raw, lambda n: found.append(n) or n)
        numbers = [n for n in found if isinstance(self.graph.value(n.name), (int, float)) and self.numbers.affected(n)]
        return map_arg(raw, lambda n: self.numbers.as_before(n) if n in numbers else n) if numbers else raw

    def _renew_module(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        module = self.gm.get_submodule(str(node.target))
        calls = module_calls_of(module)
        if calls is None or calls.handler is None or id(module) in self.seen or not self._touched(node):
            return
        self.seen.add(id(module))
        for each in (module, self.twin.get_submodule(str(node.target))):
            calls.handler(self._edit(node, calls.signature, args, kwargs, each))

    def _check(self, node: fx.Node, value: Any, promised: Any) -> None:
        if isinstance(promised, TensorDims):
            expected = tuple(int(self.keep(dim).sum()) if dim else 1 for dim in promised.dims)
            if tuple(value.shape) != expected:
                raise RewriteError(
                    f"node '{node.name}' ({node.format_node()}) gives {tuple(value.shape)} with the units removed, the analysis "
                    f"promised {expected}. The input graph is unchanged; please report this with the op"
                )
        elif isinstance(promised, list):
            for item, each in zip(value, promised, strict=True):
                self._check(node, item, each)
        elif isinstance(promised, dict):
            for key, each in promised.items():
                self._check(node, value[key], each)


def _leaves(value: Any) -> list[TensorDims]:
    if isinstance(value, TensorDims):
        return [value]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return []
