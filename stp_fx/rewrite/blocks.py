"""Blocks: the parts of a network between values that alone carry what is computed, found in the data flow of its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

from stp_fx.analysis.consumers import linear_calls
from stp_fx.ir.nested import holds
from stp_fx.ir.shapes import fetch
from stp_fx.rewrite.side_by_side import Network

__all__ = ["Block", "TrainedCall", "Values", "find_blocks", "trained_calls", "values_of"]

_NORM_MODULES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_NORM_FUNCTIONS = frozenset(
    {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, torch.layer_norm, torch.group_norm, torch.rms_norm}
)


@dataclasses.dataclass(frozen=True)
class Block:
    """The nodes from place ``start`` up to place ``stop`` of a graph, and the values that they hand on (``targets``)."""

    start: int
    stop: int
    targets: tuple[str, ...]

    def holds(self, network: Network, node: str) -> bool:
        """Whether a node of ``network`` stands in the block."""
        return self.start <= network.at[node] < self.stop


@dataclasses.dataclass(frozen=True)
class TrainedCall:
    """A linear or recurrent layer, convolution or norm, and the names of its weights and biases; none has a smaller scale than
    the first one."""

    node: str
    parameters: tuple[str, ...]
    contracts: bool
    recurrent: bool = False


@dataclasses.dataclass(frozen=True)
class Values:
    """The names of the nodes that give tensors, alone or in containers, and of those that give one of floating point numbers
    with at least one dimension."""

    tensors: Set[str]
    floating: Set[str]


def trained_calls(gm: fx.GraphModule) -> tuple[list[TrainedCall], dict[str, str]]:
    """The calls whose parameters can be trained, in graph order, and why other layers cannot be."""
    linear = {call.node: call for call in linear_calls(gm)}
    found: list[TrainedCall] = []
    others: dict[str, str] = {}
    for node in gm.graph.nodes:
        call = linear.get(node.name)
        layer = _recurrent(gm, node)
        if layer is not None:
            if layer._forward_hooks or layer._forward_pre_hooks or is_parametrized(layer):
                others[node.name] = "it has hooks, or computes its weights"
                continue
            names = [f"{node.target}.{name}" for name, value in layer._parameters.items() if value is not None]
        elif call is None:
            names = _norm_parameters(gm, node)
        elif call.weight is None:
            others[node.name] = "its weight is computed from others"
            continue
        else:
            names = [name for name in (call.weight, call.bias) if name is not None]
        if names and all(gm.get_parameter(name).is_floating_point() for name in names):
            found.append(TrainedCall(node.name, tuple(names), (call or layer) is not None, layer is not None))
        elif names:
            others[node.name] = "its weight does not hold floating point numbers"
    return found, others


def _recurrent(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The recurrent module of torch's that a node calls."""
    module = fetch(gm, str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, _RECURRENT) else None


def _norm_parameters(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    """The names of the scale and the shift of a norm."""
    if node.op == "call_module":
        module = fetch(gm, str(node.target))
        known = module._parameters if isinstance(module, _NORM_MODULES) else {}
        return [f"{node.target}.{name}" for name in ("weight", "bias") if isinstance(known.get(name), nn.Parameter)]
    if node.op == "call_function" and node.target in _NORM_FUNCTIONS:
        stored = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        return [name for name in stored if isinstance(fetch(gm, name), nn.Parameter)]
    return []


def values_of(network: Network, arguments: tuple[Any, ...]) -> Values:
    """The values of the nodes of a network, by a run."""
    tensors, floating = set[str](), set[str]()
    env = network.start(arguments)
    for k, node in enumerate(network.nodes):
        if node.op == "output":
            break
        network.advance(env, k, k + 1, lambda *_: None)
        value = env.get(node)
        if holds(torch.Tensor, value):
            tensors.add(node.name)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim():
            floating.add(node.name)
    return Values(tensors, floating)


def find_blocks(network: Network, values: Values, known: Mapping[str, fx.Node], layers: Collection[str]) -> list[Block]:
    """The blocks of a network, in order; the last one ends at its outputs. Without ``layers``, one block.

    A *cut* is a value that is computed from inputs and parameters, and after which no other such value is read: the stream
    after each sum of a residual network, every value of a chain. A block ends at a cut, has at least one of the ``layers``,
    and reaches up to the next of them: a convolution with the norm and the activation behind it, a residual block, an
    attention, an MLP. Masks and tables of positions may be read by all blocks. ``known``: the nodes of the original network by
    name; a value that it does not have is no cut.
    """
    cuts = [k for k in _cuts(network, values) if _is_known(network.nodes[k], known)]
    places = sorted(network.at[name] for name in layers)
    end = next(k for k, node in enumerate(network.nodes) if node.op == "output")
    found: list[Block] = []
    start = 0
    for cut, following in zip(cuts, [*cuts[1:], end], strict=True):
        if any(start <= place <= cut for place in places) and any(cut < place <= following for place in places):
            found.append(Block(start, cut + 1, (network.nodes[cut].name,)))
            start = cut + 1
    outputs = _outputs(network, values, known, end)
    last = Block(start, max((network.at[name] + 1 for name in outputs), default=end), outputs)
    return [*found, last] if outputs else found


def _cuts(network: Network, values: Values) -> Iterator[int]:
    """The places of the nodes after which their value alone is read, of all that was computed from inputs and parameters."""
    moving = _computed(network, values)
    last = {node: max((network.at[u.name] for u in node.users if u not in network.left_out), default=-1) for node in moving}
    alive: set[fx.Node] = set()
    for k, node in enumerate(network.nodes):
        alive = {each for each in alive if last[each] > k}
        if last.get(node, -1) > k:
            alive.add(node)
        if alive == {node} and node.name in values.floating:
            yield k


def _computed(network: Network, values: Values) -> set[fx.Node]:
    """The nodes whose tensors are computed from inputs *and* parameters."""
    fed, stored, moving = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in network.nodes:
        inputs = set(node.all_input_nodes)
        if node.op == "get_attr":
            if isinstance(fetch(network.module, str(node.target)), nn.Parameter):
                stored.add(node)
        elif node in network.left_out or node.name not in values.tensors:
            continue
        elif node.op == "placeholder" or inputs & fed:
            fed.add(node)
            module = fetch(network.module, str(node.target)) if node.op == "call_module" else None
            if inputs & (moving | stored) or (module is not None and any(True for _ in module.parameters())):
                moving.add(node)
        elif inputs & stored:
            stored.add(node)
    return moving


def _is_known(node: fx.Node, known: Mapping[str, fx.Node]) -> bool:
    """Whether the original network has the value, with the same consumers: removal multiplies some norms by a number."""
    return node.name in known and all(user.name in known for user in node.users)


def _outputs(network: Network, values: Values, known: Mapping[str, fx.Node], end: int) -> tuple[str, ...]:
    """The computed values of floating point numbers that the outputs are made of."""
    moving = _computed(network, values)
    found: list[str] = []
    waiting, seen = list(network.nodes[end].all_input_nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop(0)
        if node in seen or node not in moving:
            continue
        seen.add(node)
        if node.name in values.floating and _is_known(node, known):
            found.append(node.name)
        else:
            waiting += node.all_input_nodes
    return tuple(found)
