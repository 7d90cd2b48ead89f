"""Residual branches, found in the data flow of a graph: a sum, a value that reaches it unchanged, and what is added to that.

A value *carries* an earlier one if that reaches it unchanged: by itself, through calls that only change shapes or do nothing in
both modes, or as an operand of a sum. An operand of a sum is a branch if it is computed from a value that the other operand
carries. Where the sum is itself a term of a sum that alone reads it, another term of that may carry the value (attention and MLP
side by side).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from stp_fx.errors import TraceError
from stp_fx.ir.in_place import may_write, shares_memory
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.modes import CHOICE, is_mark, modes_of
from stp_fx.ir.nested import holds
from stp_fx.ir.provenance import example_of
from stp_fx.ir.runner import run_node
from stp_fx.ir.shapes import fetch, meta_twin
from stp_fx.ir.stored import COUNTER
from stp_fx.ir.train_eval import ModeSwitch

__all__ = ["Branch", "Flow", "find_branches"]

_SUMS = frozenset({operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_, "add", "add_"})
_DIFFERENCES = frozenset({operator.sub, operator.isub, torch.sub, torch.Tensor.sub, torch.Tensor.sub_, "sub", "sub_"})
_MOVES = frozenset({"clone", "contiguous", "alias", "to", "type", "type_as", "float", "double", "half", "bfloat16"}) | {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "squeeze",
    "unsqueeze", "t",
}  # fmt: skip
"""Calls that leave every number as it is, where dtype and number of elements stay."""
_DROPOUTS = frozenset({F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout})


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """``value`` is what ``total`` adds to the rest of its sum; ``root`` is the sum of which that is a term. ``stream`` is the
    latest value that reaches the sum unchanged and from which ``value`` is computed, ``body`` what is between them.

    ``gone``: the nodes that nothing reads any more once ``total`` is its other operand. ``reason``: why the branch cannot be
    removed; empty if it can. ``written``: whether a later call writes to the sum in place, so that it must be its own tensor.
    """

    value: fx.Node
    total: fx.Node
    root: fx.Node
    stream: fx.Node
    body: frozenset[fx.Node]
    gone: frozenset[fx.Node]
    reason: str = ""
    written: bool = False


def find_branches(gm: fx.GraphModule) -> list[Branch]:
    """The branches of a graph that hold parameters, in the order of the sums; also those that cannot be removed.

    Raises:
        InputError: no recorded example.
        TraceError: the graph does not run on meta tensors.
    """
    flow = Flow(gm)
    found: list[Branch] = []
    for total in flow.sums:
        own = [branch for value in flow.candidates(total) if (branch := flow.branch(total, value)) is not None]
        projected = None if own else flow.projected(total)
        found += own if projected is None else [projected]
    return found


class Flow:
    """A graph with what its nodes give on meta tensors, and which tensors are computed from which; sets of nodes are the bits of
    a number, node ``k`` being bit ``k``."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.at = {node: k for k, node in enumerate(self.nodes)}
        self.mode = dict(modes_of(gm.graph))
        self.value = _values(gm)
        self.sums = {node: pair for node in self.nodes if (pair := self._operands(node)) is not None}
        self._sources: dict[fx.Node, int] = {}
        self._carried: dict[fx.Node, int] = {}
        self._depends: dict[fx.Node, int] = {}
        """As the sources, but also by way of sizes and other numbers."""
        self._sinks: dict[tuple[fx.Node, bool], bool] = {}
        for k, node in enumerate(self.nodes):
            sources = carried = 1 << k if holds(torch.Tensor, self.value[node]) else 0
            if carried:
                for each in node.all_input_nodes:
                    sources |= self._sources[each]
                carried |= self._unchanged(node)
            self._sources[node], self._carried[node] = sources, carried
            self._depends[node] = _either(self._depends[each] for each in node.all_input_nodes) | 1 << k

    def is_float(self, node: Any) -> bool:
        """Whether a node gives a tensor of floating point numbers with dimensions."""
        value = self.value.get(node) if isinstance(node, fx.Node) else None
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
        """The operands of a sum, and whether the second is negated or multiplied by a number."""
        if node.op not in ("call_function", "call_method") or node.target not in _SUMS | _DIFFERENCES or "out" in node.kwargs:
            return None
        both: list[Any] = [*node.args[:2], *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
        if len(both) != 2 or len(node.args) > 2 or not all(map(self.is_float, (*both, node))):
            return None
        scaled = node.target in _DIFFERENCES or bool(node.kwargs.get("alpha", 1) != 1)
        return both[0], both[1], scaled

    def _unchanged(self, node: fx.Node) -> int:
        """The earlier values that reach ``node`` unchanged, by way of its inputs."""
        if node in self.sums:
            first, second, scaled = self.sums[node]
            kept = [each for each in (first, second)[: 1 if scaled else 2] if self._same(each, node)]
            return _either(self._carried[each] for each in kept)
        if node.op == "call_module" and node.target == CHOICE:
            one, other = node.args
            both = isinstance(one, fx.Node) and isinstance(other, fx.Node)
            return self._carried[one] & self._carried[other] if both else 0  # type: ignore[index]
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not self.is_float(source) or not self._does_nothing(node):
            return 0
        before, after = self.value[source], self.value[node]
        same = isinstance(after, torch.Tensor) and (before.dtype, before.numel()) == (after.dtype, after.numel())
        return self._carried[source] if same else 0

    def _same(self, one: fx.Node, other: fx.Node) -> bool:
        a, b = self.value[one], self.value[other]
        return (a.shape, a.dtype) == (b.shape, b.dtype)

    def _does_nothing(self, node: fx.Node) -> bool:
        """Whether a call gives the numbers that it is given, in both modes."""
        if node.op == "call_method":
            return node.target in _MOVES
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            known = name in _MOVES and getattr(node.target, "__module__", None) in (None, "torch", "torch._C._TensorBase")
            return known or (node.target in _DROPOUTS and _probability(node) == 0)
        if node.op != "call_module":
            return False
        module = fetch(self.gm, str(node.target))
        if isinstance(module, ModeSwitch):
            return module.function in _DROPOUTS and _probability(node) == 0
        return isinstance(module, nn.Identity) or (isinstance(module, _DropoutNd) and module.p == 0)

    # -- branches ------------------------------------------------------------------------------------------------------

    def candidates(self, total: fx.Node) -> Iterator[fx.Node]:
        """The operands that may be taken out of a sum."""
        first, second, scaled = self.sums[total]
        if first is not second:
            yield from (second,) if scaled else (first, second)

    def branch(self, total: fx.Node, value: fx.Node) -> Branch | None:
        """The operand ``value`` of a sum as a branch, if it is one and holds a parameter."""
        other = self.other(total, value)
        root, context = total, self._carried[other]
        beside_it = context
        while (outer := self._alone_read_by(root)) is not None:
            beside = self.other(outer, root)
            context |= self._carried[beside] if not self.sums[outer][2] or beside is self.sums[outer][0] else 0
            root = outer
        own = 1 << self.at[value]
        common = self._sources[value] & ~own & context
        if context & own or not common:
            return None
        stream = self.nodes[common.bit_length() - 1]
        body = self._between(stream, value)
        if not any(self.holds_parameters(node) for node in body | self._weights_of(body)):
            return None
        gone = self._closure(value, total, body)
        reason = self._reason(total, value, other, body, gone)
        if reason and not self._sources[value] & ~own & beside_it:
            return None  # the end of what another term adds, not a branch of its own
        return Branch(value, total, root, stream, body, gone, reason, self._written(total, other))

    def projected(self, total: fx.Node) -> Branch | None:
        """A sum of two values computed from one of another shape: a branch beside a projection, which nothing passes."""
        first, second, scaled = self.sums[total]
        if scaled or first is second:
            return None
        common = self._sources[first] & self._sources[second]
        while common and (node := self.nodes[common.bit_length() - 1]) and not (self.is_float(node) and node.op != "get_attr"):
            common &= ~(1 << self.at[node])
        if not common or self.value[node].shape == self.value[total].shape:
            return None
        ways = [(each, self._between(node, each)) for each in (first, second)]
        weights = [sum(map(self.holds_parameters, body | self._weights_of(body))) for _, body in ways]
        if not all(weights):
            return None
        long = int(weights[1] > weights[0])
        (value, body), (shortcut, _) = ways[long], ways[1 - long]
        before, after = (list(self.value[each].shape) for each in (node, total))
        reason = (
            f"its shortcut is computed too, by '{shortcut.name}': '{node.name}' of shape {before} does not reach the sum of "
            f"shape {after} unchanged"
        )
        return Branch(value, total, total, node, body, frozenset(), reason)

    def other(self, total: fx.Node, value: fx.Node) -> fx.Node:
        """The operand of a sum beside ``value``."""
        first, second, _ = self.sums[total]
        return second if value is first else first

    def _alone_read_by(self, total: fx.Node) -> fx.Node | None:
        """The sum that alone reads a sum."""
        users = list(total.users)
        known = len(users) == 1 and users[0] in self.sums and self.mode[users[0]] == self.mode[total]
        return users[0] if known and self.other(users[0], total) is not total else None

    def _between(self, stream: fx.Node, value: fx.Node) -> frozenset[fx.Node]:
        """The values that are computed from ``stream``, and from which ``value`` is."""
        first, last, sources = self.at[stream], self.at[value], self._sources[value]
        places = (k for k in range(first + 1, last + 1) if sources >> k & 1 and self._sources[self.nodes[k]] >> first & 1)
        return frozenset(self.nodes[k] for k in places)

    def holds_parameters(self, node: fx.Node) -> bool:
        """Whether a node is a parameter, or a call of a module with parameters."""
        if node.op == "get_attr":
            return isinstance(fetch(self.gm, str(node.target)), nn.Parameter)
        return node.op == "call_module" and any(True for _ in fetch(self.gm, str(node.target)).parameters())

    def _weights_of(self, body: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The stored tensors that nodes read, as they are or by way of what is computed from stored tensors alone."""
        inputs = _either(1 << self.at[node] for node in self.nodes if node.op == "placeholder")
        found, waiting = set[fx.Node](), [each for node in body for each in node.all_input_nodes]
        while waiting:
            node = waiting.pop()
            if node not in found and not self._depends[node] & inputs:
                found.add(node)
                waiting += node.all_input_nodes
        return frozenset(node for node in found if node.op == "get_attr")

    # -- removed with a branch -------------------------------------------------------------------------------------------

    def _closure(self, value: fx.Node, total: fx.Node, body: frozenset[fx.Node]) -> frozenset[fx.Node]:
        """The nodes without a consumer once ``total`` does not read ``value``; assertions about the ``body`` and about weights
        that only the branch computes with, and sizes of its values, are no consumers, nor are calls that only write to them."""
        gone: set[fx.Node] = set()
        inside = _either(1 << self.at[node] for node in body)
        given = _either(1 << self.at[node] for node in self.nodes if node.op == "placeholder")
        waiting = [value]
        while waiting:
            node = waiting.pop()
            if node in gone or node.op in ("placeholder", "output"):
                continue
            readers = set(node.users) - gone - ({total} if node is value else set())
            own = bool(self._depends[node] & inside) or not self._depends[node] & given
            dropped = {each for each in readers if self._leads_nowhere(each, own)}
            if readers - dropped:
                continue
            gone.add(node)
            waiting += node.all_input_nodes
            while dropped:
                each = dropped.pop()
                gone.add(each)
                waiting += each.all_input_nodes
                dropped |= set(each.users) - gone
        return frozenset(gone | self._counters(gone))

    def _leads_nowhere(self, node: fx.Node, asserted: bool) -> bool:
        """Whether all that becomes of a value are writes to tensors by calls that nothing reads, and assertions if these count.
        A write to what others read too makes the branch stay (:meth:`_effect`)."""
        key = (node, asserted)
        if key not in self._sinks:
            name = getattr(node.target, "__name__", "").split(".")[0]
            asserts = asserted and node.op == "call_function" and name.startswith(("_assert", "_check"))
            writes = node.op in ("call_function", "call_method") and may_write(node)
            known = asserts or writes
            self._sinks[key] = all(self._leads_nowhere(user, asserted) for user in node.users) if node.users else known
        return self._sinks[key]

    def _counters(self, gone: set[fx.Node]) -> set[fx.Node]:
        """The calls that count the batches of norms whose other buffers go."""
        owners = {_owner(node) for node in gone if node.op == "get_attr"}
        found: set[fx.Node] = set()
        for node in self.nodes if owners else ():
            if node.op == "call_module" and node.target == COUNTER and _owner(node.args[0]) in owners:
                read = {each for each in self.nodes if each.op == "get_attr" and _owner(each) == _owner(node.args[0])}
                if read - gone == {node.args[0]}:
                    found |= {node, node.args[0]}  # type: ignore[arg-type]
        return found

    def _reason(self, total: fx.Node, value: fx.Node, other: fx.Node, body: frozenset[fx.Node], gone: frozenset[fx.Node]) -> str:
        """Why a branch cannot be removed; empty if it can."""
        if self.mode[total] != "both":
            return f"'{total.name}' runs in {'training' if self.mode[total] == 'train' else 'evaluation'} alone"
        left = [node for node in self.nodes[: self.at[total]] if node in body and node not in gone]
        for node in reversed(left):
            readers = [each.name for each in node.users if each not in gone and each not in body and each is not total]
            if readers:
                return f"its value '{node.name}' is also read by '{readers[0]}'"
        if left:
            return f"its value '{left[-1].name}' also reaches '{total.name}' by another way"
        if not self._same(other, total):
            kinds = [f"{list(self.value[each].shape)} {self.value[each].dtype}" for each in (other, total)]
            return f"what is left of the sum, '{other.name}', is {kinds[0]}, and the sum is {kinds[1]}"
        return self._effect(total, value, gone) or self._shared_statistics(gone)

    def _effect(self, total: fx.Node, value: fx.Node, gone: frozenset[fx.Node]) -> str:
        """The values that the branch writes to and that are read elsewhere, in words."""
        for node in (*gone, total):
            target = node.kwargs.get("out", node.args[0] if node.args else None)
            if not isinstance(target, fx.Node) or not may_write(node, self.gm) or (node is total and target is not value):
                continue
            place = self.at[node]
            earlier = (each for k, each in enumerate(self.nodes) if each not in gone and (k < place or each.op == "get_attr"))
            seen = next((each for each in earlier if shares_memory(self.value[each], self.value[target])), None)
            if seen is not None:
                return f"its '{node.name}' writes to '{seen.name}' in place"
        return ""

    def _written(self, total: fx.Node, other: fx.Node) -> bool:
        """Whether something writes to the sum that is not to write to its operand ``other``."""
        memory = self.value[total]
        if shares_memory(memory, self.value[other]):
            return False
        for node in self.nodes[self.at[total] + 1 :]:
            target = node.kwargs.get("out", node.args[0] if node.args else None)
            if isinstance(target, fx.Node) and may_write(node, self.gm) and shares_memory(memory, self.value[target]):
                return True
        return False

    def _shared_statistics(self, gone: frozenset[fx.Node]) -> str:
        called = {str(node.target): node for node in self.nodes if node.op == "call_module" and node not in gone}
        for node in gone:
            module = fetch(self.gm, str(node.target)) if node.op == "call_module" else None
            if isinstance(module, _NormBase) and module.track_running_stats and str(node.target) in called:
                user = called[str(node.target)]
                return f"the statistics of its norm '{node.target}' are also taken by '{user.name}'"
        return ""


def _values(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    twin, given, env = meta_twin(gm).eval(), iter(example_of(gm)), dict[fx.Node, Any]()
    with torch.no_grad(), MetaRun():
        for node in gm.graph.nodes:
            try:
                env[node] = None if is_mark(node) else run_node(node, env.__getitem__, twin, given)
            except Exception as error:
                raise TraceError(f"node '{node.name}' ({node.format_node()}) does not run on meta tensors: {error}") from error
    return env


def _either(sets: Iterable[int]) -> int:
    result = 0
    for each in sets:
        result |= each
    return result


def _probability(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)


def _owner(node: Any) -> str:
    return str(node.target).rpartition(".")[0]
