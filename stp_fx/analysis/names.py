"""Which groups a name stands for: of a module, a parameter, an axis or a group, exactly or by a glob."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Axis, Group
from stp_fx.checks import listed_argument
from stp_fx.errors import InputError, NothingToPruneError
from stp_fx.text import did_you_mean

__all__ = ["entries_of", "groups_named", "outputs_named", "prunable_groups"]

_DEEPEST = 32
"""Lists within lists of names."""
_GLOB = frozenset("*?[")
_WANTED = "give parameter names, module names, globs, or modules of the traced graph"


def prunable_groups(gm: fx.GraphModule, graph: ChannelGraph, ignore: Any) -> list[Group]:
    """Groups that touch nothing named in ``ignore`` (see :func:`groups_named`), and more than buffers: the rest of a table of
    positions that is read in part costs nothing, and longer inputs will read it.

    Raises:
        InputError: an entry of ``ignore`` that matches nothing, or is neither a name nor a module.
        NothingToPruneError: no group is left; says why.
    """
    held: set[int] = set()
    for entry in entries_of(ignore, "ignore"):
        held.update(group.index for group in groups_named(gm, graph, entry, "ignore"))
    worthwhile = [group for group in graph.groups if any(member.axis.role != "buffer" for member in group.members)]
    left = [group for group in worthwhile if group.index not in held]
    if not left:
        why = "everything is in `ignore`" if worthwhile else _why_nothing(graph)
        raise NothingToPruneError(f"the graph has no channel that can be removed: {why}")
    return left


def entries_of(given: Any, argument: str, depth: int = 0) -> tuple[str | nn.Module, ...]:
    """One name or module, or any nesting of sequences of them, as a flat tuple.

    Raises:
        InputError: anything else; names ``argument``.
    """
    if isinstance(given, (str, nn.Module)):
        return (given,)
    if depth > _DEEPEST:
        raise InputError(f"`{argument}` is nested deeper than {_DEEPEST} lists: {_WANTED}")
    return tuple(entry for each in listed_argument(argument, given, _WANTED) for entry in entries_of(each, argument, depth + 1))


def groups_named(gm: fx.GraphModule, graph: ChannelGraph, entry: Any, argument: str) -> list[Group]:
    """Groups that touch what ``entry`` names, in the graph's order.

    An entry is a parameter, buffer or module (by name or object), one axis (``"conv1.weight:0"``), a group, a glob over all
    these names (``"layer*.conv1"``; ``*`` matches dots too), or a sequence of entries. ``argument`` is the name of the caller's
    argument, for errors.

    Raises:
        InputError: nothing of that name, with close ones; a module that is not part of the graph; no name at all.
    """
    found = [_Named.by(gm, graph, each, argument) for each in entries_of(entry, argument)]
    return [group for group in graph.groups if any(named.touches(group) for named in found)]


def outputs_named(gm: fx.GraphModule, graph: ChannelGraph, entry: Any, argument: str) -> list[Group]:
    """As :func:`groups_named`, but a layer stands for its outputs alone: the groups whose channels it gives.

    A tensor without outputs (a norm's) stands for all that it touches.

    Raises:
        InputError: as :func:`groups_named`.
    """
    result: dict[int, Group] = {}
    for each in entries_of(entry, argument):
        named = _Named.by(gm, graph, each, argument)
        touched = [group for group in graph.groups if named.touches(group)]
        if any(named.gives(axis) for axis in graph.axes):
            touched = [g for g in touched if g.name in named.groups or any(named.gives(m.axis) for m in g.members)]
        result.update({group.index: group for group in touched})
    return [result[index] for index in sorted(result)]


@dataclasses.dataclass(frozen=True)
class _Named:
    """The meaning of one entry: tensors (first names), axes, groups; all by name."""

    tensors: frozenset[str] = frozenset()
    axes: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()

    @classmethod
    def by(cls, gm: fx.GraphModule, graph: ChannelGraph, entry: str | nn.Module, argument: str) -> _Named:
        name = _module_name(gm, entry, argument) if isinstance(entry, nn.Module) else entry
        groups, axes = {group.name for group in graph.groups}, {axis.name for axis in graph.axes}
        if name in groups:
            return cls(groups=frozenset({name}))
        tensor, _, dim = name.rpartition(":")
        axis = f"{graph.first_name(tensor)}:{dim}"
        if axis in axes:
            return cls(axes=frozenset({axis}))
        modules = {module for module, _ in gm.named_modules(remove_duplicate=False)}
        tensors = {graph.first_name(each) for each in graph.shapes if name in ("", each) or each.startswith(f"{name}.")}
        if tensors or name in modules:
            return cls(tensors=frozenset(tensors))
        known = modules | set(graph.shapes)
        if _GLOB.isdisjoint(name):
            hint = did_you_mean(name, known | axes)
            raise InputError(f"`{argument}` names {name!r}, which the graph does not have{hint}")
        groups, axes, inside = ({each for each in names if each and fnmatchcase(each, name)} for names in (groups, axes, known))
        if not (groups or axes or inside):
            hint = did_you_mean("".join(c for c in name if c not in _GLOB).strip("."), known)
            raise InputError(f"`{argument}` holds the glob {name!r}, which matches nothing in the graph{hint}")
        tensors = {graph.first_name(each) for each in graph.shapes if not inside.isdisjoint(_prefixes(each))}
        return cls(frozenset(tensors), frozenset(axes), frozenset(groups))

    def touches(self, group: Group) -> bool:
        """Whether a tensor or an axis of the group is meant, or the group itself."""
        return group.name in self.groups or any(self._holds(member.axis) for member in group.members)

    def gives(self, axis: Axis) -> bool:
        """Whether it is the output axis of a layer that is meant."""
        return axis.side in ("out", "both") and self._holds(axis)

    def _holds(self, axis: Axis) -> bool:
        return axis.tensor in self.tensors or (bool(self.axes) and axis.name in self.axes)


def _prefixes(tensor: str) -> Iterator[str]:
    """A tensor's name, and the names of the modules around it."""
    parts = tensor.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


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
    notes = graph._solved.found.elements.pins
    reasons = dict.fromkeys(f"{note.reason} ('{note.node}')" for note in notes if note.node)
    return "; ".join(list(reasons)[:3]) or "it has no parameters"
