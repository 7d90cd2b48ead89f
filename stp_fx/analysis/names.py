"""Which groups a name stands for, and which groups a selection may cut."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Group
from stp_fx.errors import InputError, NothingToPruneError

__all__ = ["groups_named", "prunable_groups"]


def prunable_groups(gm: fx.GraphModule, graph: ChannelGraph, ignore: Iterable[Any]) -> list[Group]:
    """Groups that touch nothing named in ``ignore``, and more than buffers: the rest of a table of positions that is read in
    part costs nothing, and longer inputs will read it.

    Raises:
        InputError: an entry of ``ignore`` that matches nothing.
        NothingToPruneError: no group is left; says why.
    """
    held: set[int] = set()
    for entry in [ignore] if isinstance(ignore, (str, nn.Module)) else ignore:
        held.update(group.index for group in groups_named(gm, graph, entry, "ignore"))
    worthwhile = [group for group in graph.groups if any(member.axis.role != "buffer" for member in group.members)]
    left = [group for group in worthwhile if group.index not in held]
    if not left:
        why = "everything is in `ignore`" if worthwhile else _why_nothing(graph)
        raise NothingToPruneError(f"the graph has no channel that can be removed: {why}")
    return left


def groups_named(gm: fx.GraphModule, graph: ChannelGraph, entry: Any, argument: str) -> list[Group]:
    """Groups that touch a parameter, buffer or module (by name or object), one axis (``"conv1.weight:0"``), or so named."""
    name = _module_name(gm, entry, argument) if isinstance(entry, nn.Module) else entry
    if not isinstance(name, str):
        raise InputError(f"`{argument}` holds {entry!r}: give parameter names, module names or modules of the traced graph")
    by_group = [group for group in graph.groups if group.name == name]
    if by_group:
        return by_group
    known = {axis.tensor for axis in graph.axes} | set(graph.found.aliases)
    modules = {m for m, _ in gm.named_modules(remove_duplicate=False)}
    axis_names = {axis.name for axis in graph.axes}
    prefix = name + "."
    if name in axis_names:
        return [g for g in graph.groups if any(m.axis.name == name for m in g.members)]
    if name not in known and name not in modules and not any(k.startswith(prefix) for k in known):
        close = difflib.get_close_matches(name, sorted(known | modules), n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(f"`{argument}` names {name!r}, which the graph does not have{hint}")
    canonical = {graph.found.aliases.get(k, k) for k in known if k == name or k.startswith(prefix) or name == ""}
    return [g for g in graph.groups if any(m.axis.tensor in canonical for m in g.members)]


def _module_name(gm: fx.GraphModule, module: nn.Module, argument: str) -> str:
    """The name of a module in the graph: the module itself, or one that shares its parameters."""
    theirs = {id(t) for t in (*module.parameters(), *module.buffers())}
    for name, candidate in gm.named_modules(remove_duplicate=False):
        if candidate is module:
            return name
    for name, candidate in gm.named_modules(remove_duplicate=False):
        ours = {id(t) for t in (*candidate.parameters(), *candidate.buffers())}
        if theirs and ours == theirs:
            return name
    raise InputError(f"`{argument}` holds a {type(module).__name__} that is not part of the graph; name it instead")


def _why_nothing(graph: ChannelGraph) -> str:
    reasons = dict.fromkeys(f"{note.reason} ('{note.node}')" for note in graph.found.elements.pins if note.node)
    shown = list(reasons)[:3]
    return "; ".join(shown) if shown else "it has no parameters"
