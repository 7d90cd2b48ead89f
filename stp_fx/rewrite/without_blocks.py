"""Blocks are removed from a graph: sums become their other operand, and nodes without consumers are removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from stp_fx.analysis.blocks import Block, blocks_of, planned_blocks, with_inner
from stp_fx.analysis.bypass import tensor_names
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import RewriteError
from stp_fx.ir.in_place import may_write
from stp_fx.ir.modes import CHOICE, is_mark
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.ir.shapes import fetch
from stp_fx.rewrite.slicing import copied
from stp_fx.rules import TensorDims

__all__ = ["ends_of_runs", "without_blocks"]


def without_blocks(gm: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
    """A copy of ``gm`` without the named blocks: their nodes, modules, parameters and buffers, unless something else reads them.

    Every block's sum becomes its other operand, or a copy of that where a later call writes to it in place. The blocks inside are
    removed too, and the record of what was removed names them.

    Raises:
        PlanError: a block that the graph does not have, or that cannot be removed.
    """
    blocks = planned_blocks(gm, names)
    among = blocks_of(gm)
    lost = {name for block in blocks for name in block.parameters}
    shared = {id(p): p for name, p in gm.named_parameters() if name in lost}  # not worth a copy
    result = copied(gm, dict(shared))
    nodes = {node.name: node for node in result.graph.nodes}
    read = {node for node in nodes.values() if node.users}
    erased: list[fx.Node] = []
    for block in blocks:
        erased += _taken_out(result.graph, nodes, block, set(erased))
    erased += _swept(result, read)
    _tidy_marks(result.graph)
    _drop_stored(result, [str(node.target) for node in erased if node.op in ("get_attr", "call_module")], _names_read(gm, erased))
    result.graph.lint()
    result.recompile()
    return _recorded(result, PrunePlan({}, {}, with_inner(blocks, among)))


def ends_of_runs(gm: fx.GraphModule, graph: ChannelGraph, plan: PrunePlan) -> dict[str, str]:
    """By the name of a value that a run of removed blocks begins with: the sum at the end of that run, for which the value stands
    once they are removed, since nothing but the blocks reads it."""
    nodes = {node.name: node for node in gm.graph.nodes}
    next_of: dict[str, str] = {}
    for block in planned_blocks(gm, plan.blocks) if plan.blocks else ():
        others = [each for each in nodes[block.total].all_input_nodes if each.name != block.value]
        if block.root == block.total and len(others) == 1:
            readers = {each.name for each in others[0].users if isinstance(graph.value(each.name), TensorDims)}
            if readers <= {*block.nodes, block.total}:
                next_of[others[0].name] = block.total
    result = dict(next_of)
    for start in result:
        while result[start] in next_of:
            result[start] = next_of[result[start]]
    return result


def _names_read(gm: fx.GraphModule, erased: Iterable[fx.Node]) -> set[str]:
    """All names in ``gm`` of the tensors that erased nodes read."""
    ids: set[int] = set()
    for node in erased:
        if node.op in ("get_attr", "call_module"):
            ids |= _tensor_ids(fetch(gm, str(node.target)))
    named = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    return {name for name, tensor in named if id(tensor) in ids}


def _taken_out(graph: fx.Graph, nodes: dict[str, fx.Node], block: Block, before: set[fx.Node]) -> list[fx.Node]:
    """Erases a block; returns its nodes. Other blocks, with the nodes ``before``, may have been taken out of its sum already."""
    value = nodes[block.value]
    gone = {nodes[name] for name in block.nodes} - before
    [total] = [user for user in value.users if user not in gone]
    left = [each for each in total.all_input_nodes if each is not value]
    if len(left) != 1:
        raise RewriteError(f"'{total.name}' is left without an operand by removing block '{block.name}'; please report this")
    if block.written:
        total.op, total.target, total.args, total.kwargs = "call_function", torch.clone, (left[0],), {}
    else:
        total.replace_all_uses_with(left[0])
        graph.erase_node(total)
    order = [node for node in reversed(graph.nodes) if node in gone]
    for node in order:
        graph.erase_node(node)
    return [*order] if block.written else [total, *order]


def _swept(gm: fx.GraphModule, read: set[fx.Node]) -> list[fx.Node]:
    """Erases what was read before, and is not any more: what several blocks read together."""
    erased: list[fx.Node] = []
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node in read and node.op not in ("placeholder", "output") and not may_write(node, gm):
            gm.graph.erase_node(node)
            erased.append(node)
    return erased


def _tidy_marks(graph: fx.Graph) -> None:
    """Erases marks between which nothing is left."""
    previous: fx.Node | None = None
    for node in list(graph.nodes):
        if previous is not None and is_mark(node) and node.prev is previous:
            graph.erase_node(previous)
        previous = node if is_mark(node) else None
    marks = [node for node in graph.nodes if is_mark(node)]
    chosen = any(node.op == "call_module" and node.target == CHOICE for node in graph.nodes)
    if len({str(node.target) for node in marks}) == 1 and not chosen and "both" in str(marks[0].target):
        for node in marks:
            graph.erase_node(node)


def _tensor_ids(value: Any) -> set[int]:
    if isinstance(value, nn.Module):
        return {id(tensor) for tensor in (*value.parameters(), *value.buffers())}
    return {id(value)}


def _drop_stored(gm: fx.GraphModule, targets: Sequence[str], names: set[str]) -> None:
    """Takes out the modules and tensors that only erased nodes read: ``targets``, with the modules around them that hold nothing
    else, and other names of the same tensors, which are among ``names``."""
    now = [node for node in gm.graph.nodes if node.op in ("get_attr", "call_module")]
    kept = {str(node.target) for node in now}
    called = {str(node.target) for node in now if node.op == "call_module"}
    read = {each for target in kept for each in _tensor_ids(fetch(gm, target))}
    around = {".".join(target.split(".")[:k]) for target in kept for k in range(1, target.count(".") + 2)}
    for target in dict.fromkeys(targets):
        atoms = target.split(".")
        paths = [".".join(atoms[: k + 1]) for k in range(len(atoms))]
        if any(path in called for path in paths):
            continue
        path = next((path for path in paths if path not in around), None)
        if path is not None:
            _delete(gm, path)
    for name in names:
        owner = name.rpartition(".")[0]
        if any(owner == module or owner.startswith(f"{module}.") for module in called):
            continue
        try:
            tensor = fetch(gm, name)
        except AttributeError:
            continue
        if id(tensor) not in read:
            _delete(gm, name)


def _delete(gm: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    try:
        delattr(fetch(gm, owner) if owner else gm, name)
    except AttributeError:  # with a module around it
        return


def _recorded(result: fx.GraphModule, plan: PrunePlan) -> fx.GraphModule:
    """``result`` with what was done to it in its provenance, as far as that is about tensors that it has."""
    known = provenance_of(result)
    held = tensor_names(result)

    def left(each: PrunePlan) -> PrunePlan:
        axes = each.without_blocks(held)
        return PrunePlan(axes.kept, axes.sizes, each.blocks)

    masked = None if known.masked is None else left(known.masked.after(plan))
    return with_provenance(
        result,
        plan=left(plan if known.plan is None else known.plan.then(plan)),
        masked=None if masked is None or masked.is_empty else masked,
        added=tuple(name for name in known.added if name in held),
        report=None,
    )
