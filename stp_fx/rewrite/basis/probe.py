"""Does a node commute with a change of its channels? Asked of the node itself, with random numbers in double precision.

A table of ops that commute would guess about those it lacks, and miss what arguments decide. A node is run twice, before and
after the change of its operands and stored tensors; a function that only looks as if it commuted would have to agree on random
numbers to nine digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

from stp_fx.analysis.build import analyze
from stp_fx.analysis.carriers import Carrier, carriers_of_value
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.errors import NothingToRotateError
from stp_fx.ir.nested import leaves_of
from stp_fx.ir.runner import call, operands, run_node
from stp_fx.measure.latency import example_values
from stp_fx.rewrite.slicing import copied
from stp_fx.rules import TensorDims

__all__ = ["Change", "Probe", "applied", "described", "on_blocks", "same"]

Change = Callable[[torch.Tensor, tuple[Carrier, ...]], torch.Tensor]
"""The effect of the change on a tensor with the given carriers."""

_SCALE = 1e5
"""Of random numbers: what clamps large numbers (float16's largest is 65504) is found out."""
_TOLERANCE = 1e-9
_SINGLE = 1e-4
"""Where a node computes in single precision whatever it is given."""


class Probe:
    """A graph in double precision with the values of its recorded example, in which nodes are run by themselves.

    Raises:
        NothingToRotateError: the graph is on the meta device, so that no number can be asked for.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        if any(t.is_meta for t in (*gm.parameters(), *gm.buffers())):
            raise NothingToRotateError("the graph is on the meta device: a change of basis needs the values of its weights")
        self.graph: ChannelGraph = analyze(gm)
        self.root = copied(gm).double().eval()
        self.tensors = dict(self.root.named_parameters(remove_duplicate=False)) | dict(
            self.root.named_buffers(remove_duplicate=False)
        )
        self.values: dict[fx.Node, Any] = {}
        self.names = {node.name: node for node in gm.graph.nodes}
        self._draws = torch.Generator().manual_seed(0)
        inputs = iter([_doubled(value) for value in example_values(gm)])
        with torch.no_grad():
            for node in gm.graph.nodes:
                if node.op == "output":
                    self.outputs: list[torch.Tensor] = leaves_of(torch.Tensor, operands(node, self.values.__getitem__)[0])
                else:
                    self.values[node] = run_node(node, self.values.__getitem__, self.root, inputs)

    def stored(self, node: fx.Node) -> list[str]:
        """First names of the tensors of the module that a node calls, or of the one that it reads."""
        if node.op == "get_attr":
            return [self.graph.first_name(str(node.target))] if str(node.target) in self.tensors else []
        if node.op != "call_module":
            return []
        module = self.root.get_submodule(str(node.target))
        own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return [self.graph.first_name(f"{node.target}.{name}") for name, _ in own]

    def drawn(self, tensor: torch.Tensor) -> torch.Tensor:
        """Random numbers of a tensor's shape, or random flags; whole numbers are kept, since they may be indices."""
        if tensor.dtype == torch.bool:
            return torch.rand(tensor.shape, generator=self._draws).to(tensor.device) < 0.5
        if not tensor.is_floating_point():
            return tensor
        return _SCALE * torch.randn(tensor.shape, generator=self._draws, dtype=torch.float64).to(tensor)

    def run(self, node: fx.Node, given: Mapping[fx.Node, Any], stored: Mapping[str, torch.Tensor]) -> Any:
        """The value of a node for other values of its operands, and other stored tensors by their first names.

        Raises:
            NothingToRotateError: the node rewrites rows that it looks up (``max_norm``), which its example may not show.
        """
        if _renormalises(node, self.root):
            raise NothingToRotateError(f"'{node.name}' looks up rows and bounds their norm (max_norm)")
        values = {n: _cloned(given.get(n, self.values[n])) for n in node.all_input_nodes}
        args, kwargs = operands(node, values.__getitem__)
        with torch.no_grad():
            return call(
                node, args, kwargs, lambda path: _with(self.root.get_submodule(path), path, stored, self.graph.first_name)
            )


def _renormalises(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "max_norm", None) is not None
    given = node.kwargs.get("max_norm", node.args[3] if len(node.args) > 3 else None)
    return node.target is F.embedding and given is not None


def _with(
    module: nn.Module, path: str, stored: Mapping[str, torch.Tensor], first_name: Callable[[str], str]
) -> Callable[..., Any]:
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    given = {name: stored[first_name(f"{path}.{name}")] for name, _ in own if first_name(f"{path}.{name}") in stored}
    return lambda *args, **kwargs: (
        functional_call(module, given, args, kwargs, tie_weights=False) if given else module(*args, **kwargs)
    )


def applied(tensor: torch.Tensor, carriers: tuple[Carrier, ...], matrix: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the channels x of every block replaced by x ``matrix`` [channels, channels]."""
    return on_blocks(tensor, carriers, lambda blocks: blocks @ matrix.to(blocks))


def on_blocks(
    tensor: torch.Tensor, carriers: tuple[Carrier, ...], function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``tensor`` with ``function`` of its channels, which it sees as [..., blocks, channels]."""
    for carrier in carriers:
        last = tensor.movedim(carrier.dim, -1)
        flat = carrier.positions.ravel()
        whole = len(flat) == last.shape[-1]
        if whole and bool((flat == np.arange(len(flat))).all()):
            result = function(last.unflatten(-1, carrier.positions.shape)).flatten(-2)
        else:
            index = torch.from_numpy(flat).to(tensor.device)
            changed = function(last.index_select(-1, index).unflatten(-1, carrier.positions.shape)).flatten(-2)
            result = last.clone().index_copy_(-1, index, changed)
        tensor = result.movedim(-1, carrier.dim).contiguous()
    return tensor


def described(graph: ChannelGraph, name: str, value: Any, units: np.ndarray, actual: Any, change: Change) -> Any:
    """A value with ``change`` made to every tensor in it that carries ``units``; ``value`` has its dimensions."""
    if isinstance(value, TensorDims):
        carriers = carriers_of_value(graph, name, value, units)
        return change(actual, carriers) if carriers else actual
    if isinstance(value, list):
        return type(actual)(described(graph, name, v, units, a, change) for v, a in zip(value, actual, strict=True))
    if isinstance(value, dict):
        return {key: described(graph, name, value[key], units, a, change) for key, a in actual.items()}
    return actual


def same(first: Any, second: Any) -> bool:
    """Whether two values, or lists and dicts of values, agree to rounding."""
    if isinstance(first, torch.Tensor):
        if not isinstance(second, torch.Tensor) or first.shape != second.shape:
            return False
        if not first.is_floating_point():
            return bool((first == second).all())
        tolerance = _TOLERANCE if first.dtype == torch.float64 else _SINGLE
        size = max(float(first.detach().abs().max()), 1e-30) if first.numel() else 1.0
        return bool(((first - second).abs() <= tolerance * size).all())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return all(same(first[key], second[key]) for key in first)
    return True


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_cloned(each) for each in value)
    return value


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_doubled(each) for each in value)
    if isinstance(value, Mapping):
        return {key: _doubled(each) for key, each in value.items()}
    return value
