"""A network as boxes in modules in modules, for a picture that is unfolded module by module."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from stp_fx.views.drawing import Call, Drawing
from stp_fx.views.network import Calls, is_helper, together

__all__ = ["PALETTE", "Box", "Boxes", "Scope", "boxes", "colours"]

PALETTE = 10
"""Colours of the page; beyond them, the same again with a dashed edge."""
_STACK = 4
"""As many modules in a row, numbered by their container, are one box until it is unfolded."""
_FEW = 3


@dataclasses.dataclass(frozen=True)
class Box:
    """The calls of a chain (a layer, the norm and the activation after it), and the scope that they stand in (-1: none)."""

    calls: tuple[Call, ...]
    scope: int

    @property
    def first(self) -> Call:
        """The call that the box is named for: the first that is no parameter."""
        return next((call for call in self.calls if call.op.startswith("call")), self.calls[0])

    @property
    def touched(self) -> frozenset[int]:
        """The groups that any value or parameter of the box has channels of."""
        return frozenset().union(*(call.carried | call.stored for call in self.calls))

    @property
    def carried(self) -> frozenset[int]:
        """The groups of its result."""
        return self.calls[-1].carried


@dataclasses.dataclass(frozen=True)
class Scope:
    """One call of a module, whose name is ``path``; or boxes that are put together for the picture alone, and ``made_up`` says
    which. ``parent`` is the index of the scope around it, -1 for none."""

    title: str
    path: str
    parent: int
    made_up: str = ""


@dataclasses.dataclass(frozen=True)
class Boxes:
    """``edges[k]``: (source, target, groups whose channels go through), by the boxes' indices."""

    boxes: tuple[Box, ...]
    scopes: tuple[Scope, ...]
    edges: tuple[tuple[int, int, frozenset[int]], ...]


def boxes(drawing: Drawing) -> Boxes:
    """The boxes in the graph's order. A module with a single box is not a scope; four numbered modules in a row stand in one."""
    view = Calls(drawing)
    place = view.chained()
    chains = together(view.calls, place)
    number = {at: k for k, at in enumerate(chains)}
    first = [next((c for c in calls if c.op.startswith("call")), calls[0]) for calls in chains.values()]
    edges = tuple((number[s], number[t], groups) for (s, t), groups in view.edges(place).items())
    paths = _stacked(_worthwhile([call.scopes for call in first]))
    for group in _prepared(list(chains.values()), edges, paths):
        for k in group:
            paths[k] = (*paths[k], _PREPARATION)
    scopes: list[Scope] = []
    homes = _numbered(paths, scopes)
    made = tuple(Box(tuple(calls), home) for calls, home in zip(chains.values(), homes, strict=True))
    return Boxes(made, tuple(scopes), edges)


def colours(drawing: Boxes, groups: int) -> list[int]:
    """A colour for every group (0, 1, ...): no two groups that one box touches, or that an edge joins, have the same.

    Of the first ``PALETTE`` colours, all are used alike; more are only used where so many groups meet.
    """
    near: list[set[int]] = [set() for _ in range(groups)]
    touched = [box.touched for box in drawing.boxes]
    for meeting in {*touched, *(touched[s] | touched[t] for s, t, _ in drawing.edges)}:
        for group in meeting:
            near[group] |= meeting
    found = [-1] * groups
    used = [0] * PALETTE
    for group in range(groups):
        taken = {found[each] for each in near[group]}
        free = [colour for colour in range(PALETTE) if colour not in taken]
        if free:
            found[group] = min(free, key=lambda colour: used[colour])
            used[found[group]] += 1
        else:
            found[group] = next(colour for colour in itertools.count(PALETTE) if colour not in taken)
    return found


_Path = tuple[str, ...]
_PREPARATION = "\t"
"""Stands in a path for what is made of inputs and constants alone: masks, positions."""


def _prepared(
    chains: Sequence[Sequence[Call]], edges: Sequence[tuple[int, int, frozenset[int]]], paths: Sequence[_Path]
) -> Iterator[list[int]]:
    """Boxes of one module, three or more, that only compute with inputs and constants: no layer, no channel of a group."""
    read: dict[int, set[int]] = {}
    for source, target, _ in edges:
        read.setdefault(target, set()).add(source)
    known: set[int] = set()
    inside: dict[_Path, list[int]] = {}
    for k, calls in enumerate(chains):
        if calls[0].op == "placeholder":
            known.add(k)
        elif all(map(is_helper, calls)) and read.get(k, set()) <= known:
            known.add(k)
            inside.setdefault(paths[k], []).append(k)
    yield from (group for group in inside.values() if len(group) >= _FEW)


def _worthwhile(paths: Sequence[_Path]) -> list[_Path]:
    """The scopes of each box without those that have one box, or one scope, and nothing else."""
    inside: dict[_Path, int] = {}
    for path in paths:
        for depth in range(1, len(path) + 1):
            inside[path[:depth]] = inside.get(path[:depth], 0) + 1

    def kept(path: _Path, depth: int) -> bool:
        here = inside[path[:depth]]
        return here > 1 and (depth == len(path) or inside[path[: depth + 1]] < here)

    return [tuple(path[depth - 1] for depth in range(1, len(path) + 1) if kept(path, depth)) for path in paths]


def _stacked(paths: Sequence[_Path]) -> list[_Path]:
    """The same with one more scope, ``"first\\nlast"``, around every row of numbered modules that has neighbours."""
    children: dict[_Path, dict[_Path, None]] = {}
    for number, path in enumerate(paths):
        for depth in range(len(path)):
            children.setdefault(path[:depth], {})[path[: depth + 1]] = None
        children.setdefault(path, {})[(*path, str(number), "")] = None  # the box itself, which ends a row
    around: dict[_Path, str] = {}
    for inside in children.values():
        for row in _rows(list(inside)):
            if _STACK <= len(row) < len(inside):
                around.update(dict.fromkeys(row, f"{row[0][-1]}\n{row[-1][-1]}"))
    result = []
    for path in paths:
        longer: list[str] = []
        for depth in range(1, len(path) + 1):
            if (name := around.get(path[:depth])) is not None:
                longer.append(name)
            longer.append(path[depth - 1])
        result.append(tuple(longer))
    return result


def _rows(children: Sequence[_Path]) -> Iterator[list[_Path]]:
    """Runs of modules of one container, whose numbers rise."""
    row: list[_Path] = []
    for child in children:
        container, number = _container(child)
        if row and (container, number) != (_container(row[-1])[0], _container(row[-1])[1] + 1):
            yield row
            row = []
        if number >= 0:
            row.append(child)
    yield row


def _container(child: _Path) -> tuple[str, int]:
    """The name of a module up to its number, and the number; -1 for one that has none."""
    name, _, number = child[-1].rpartition(".")
    return (name, int(number)) if number.isdecimal() and child[-1] else ("", -1)


def _numbered(paths: Sequence[_Path], scopes: list[Scope]) -> Iterator[int]:
    """The index of the innermost scope of each path; ``scopes`` gets those that are new."""
    known: dict[_Path, int] = {(): -1}
    for path in paths:
        for depth in range(1, len(path) + 1):
            if path[:depth] not in known:
                known[path[:depth]] = len(scopes)
                scopes.append(_scope(path[depth - 1], known[path[: depth - 1]]))
        yield known[path]


def _scope(name: str, parent: int) -> Scope:
    if name == _PREPARATION:
        return Scope("preparation", "", parent, "made of inputs and constants")
    first, _, last = name.partition("\n")
    path, _, again = first.partition("@")
    if last:
        return Scope(f"{path} to {last.rpartition('.')[2]}", path, parent, "modules in a row")
    return Scope(path + (f", call {int(again) + 1}" if again else ""), path, parent)
