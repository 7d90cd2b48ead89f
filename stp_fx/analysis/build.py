"""From solved classes to units, groups and products: vectorised over axes, one hash per class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from torch import fx

from stp_fx.analysis.chosen import least_of, pin_unfit_choices
from stp_fx.analysis.elements import Note
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Axis, Group, Member, Product
from stp_fx.analysis.pins import nodes_in_words
from stp_fx.analysis.propagate import propagate
from stp_fx.analysis.propagated import AxisRecord, Propagated
from stp_fx.analysis.solve import Solution, SolvedProduct, solve
from stp_fx.analysis.solved import Solved
from stp_fx.analysis.touched import Touched
from stp_fx.ir.memo import remembered
from stp_fx.ir.provenance import structure_of
from stp_fx.rules import Factor

__all__ = ["analyze"]


def analyze(gm: fx.GraphModule) -> ChannelGraph:
    """Builds the channel graph of a captured graph, once; later calls return the same object until the graph changes.

    Raises:
        InputError: ``gm`` carries no recorded example inputs.
        TraceError: the graph cannot run on meta tensors.
    """
    return remembered(gm, "channel graph", structure_of(gm), lambda: _analyzed(gm))


def _analyzed(gm: fx.GraphModule) -> ChannelGraph:
    found = propagate(gm)
    solution = solve(found.elements)
    if _pin_what_no_parameter_has(found, solution):
        solution = solve(found.elements)
    while pin_unfit_choices(found.elements, found.axes, solution):
        solution = solve(found.elements)
    return build(found, solution, tuple(name for name, _ in gm.named_parameters()))


def build(found: Propagated, solution: Solution, parameters: tuple[str, ...]) -> ChannelGraph:
    """Groups the units of a solved run; ``parameters`` names the graph's parameters, tied ones once."""
    signature = _signatures(found.axes, solution)
    is_unit = ~solution.pinned & ~solution.derived & (signature != 0)
    classes, first = np.unique(solution.label, return_index=True)
    by_appearance = classes[np.argsort(first, kind="stable")]
    unit_class = by_appearance[is_unit[by_appearance]]
    unit_of = np.full(solution.count, -1, dtype=np.int64)
    unit_of[unit_class] = np.arange(len(unit_class))
    group_of, number = _group_numbers(signature[unit_class])
    touched = Touched(solution, unit_of)
    members = _members(found.axes, solution.label, touched, group_of, number)
    notes = _inexact(found, solution, touched, group_of)
    groups = _groups(found.axes, members, group_of, number, notes, least_of(found.elements, solution)[unit_class])
    axes = tuple(Axis(a.tensor, a.dim, len(a.ids), a.role, a.side) for a in found.axes)
    products = _products(solution, unit_of, group_of)
    return ChannelGraph(Solved(tuple(groups), products, axes, parameters, found, solution, unit_class, touched))


def _pin_what_no_parameter_has(found: Propagated, solution: Solution) -> bool:
    """Positions of buffers alone (of a table of position numbers, beyond the example's length) are no channels."""
    if all(axis.role != "buffer" for axis in found.axes):
        return False
    held = solution.pinned.copy()
    for axis in found.axes:
        if axis.role != "buffer":
            held[solution.label[axis.ids]] = True
    for product in (*reversed(solution.products), *solution.products):
        whole = held[product.classes]
        for k, factor in enumerate(product.factors):
            held[factor] |= whole.any(axis=tuple(j for j in range(whole.ndim) if j != k))
            held[product.classes] |= np.expand_dims(held[factor], tuple(j for j in range(whole.ndim) if j != k))
    pinned = False
    for axis in found.axes:
        alone = axis.ids[~held[solution.label[axis.ids]]] if axis.role == "buffer" else axis.ids[:0]
        if len(alone):
            found.elements.node = ""
            found.elements.pin((Factor(len(alone), alone),), f"only buffers such as '{axis.tensor}' have it")
            pinned = True
    return pinned


def _signatures(axes: list[AxisRecord], solution: Solution) -> np.ndarray:
    """One number per class that tells which axes it touches, and how often; zero if it touches none.

    Sums of random 64-bit numbers do not depend on order; two different sets agree with probability 2^-64.
    """
    rng = np.random.default_rng(0)
    marks = rng.integers(1, 2**63, size=len(axes) + 8, dtype=np.uint64)
    signature = np.zeros(solution.count, dtype=np.uint64)
    for axis, mark in zip(axes, marks, strict=False):
        np.add.at(signature, solution.label[axis.ids], mark)
    for product in reversed(solution.products):
        whole = signature[product.classes]
        for k, factor in enumerate(product.factors):
            others = tuple(j for j in range(whole.ndim) if j != k)
            alike = whole.max(axis=others)
            np.add.at(signature, factor, alike * (marks[-1 - min(k, 6)] | np.uint64(1)))
    return signature


def _group_numbers(signature: np.ndarray) -> tuple[np.ndarray, int]:
    """The group of each unit; groups are numbered by first appearance."""
    if not len(signature):
        return np.zeros(0, dtype=np.int64), 0
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse.ravel()], len(first)


def _members(
    axes: list[AxisRecord], label: np.ndarray, touched: Touched, group_of: np.ndarray, number: int
) -> list[list[tuple[AxisRecord, np.ndarray, np.ndarray]]]:
    result: list[list[tuple[AxisRecord, np.ndarray, np.ndarray]]] = [[] for _ in range(number)]
    for axis in axes:
        positions, units = touched.of(label[axis.ids])
        if not len(units):
            continue
        groups = group_of[units]
        if (groups == groups[0]).all():
            result[groups[0]].append((axis, positions, units))
            continue
        order = np.argsort(groups, kind="stable")
        cuts = np.flatnonzero(np.diff(groups[order])) + 1
        for part in np.split(order, cuts):
            result[groups[part[0]]].append((axis, positions[part], units[part]))
    return result


def _inexact(found: Propagated, solution: Solution, touched: Touched, group_of: np.ndarray) -> dict[int, tuple[str, ...]]:
    """Group to the reasons why removing from it is not masking it."""
    nodes: dict[int, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    chosen = least_of(found.elements, solution) > 0
    weighs = [Note(e.ids[~chosen[solution.label[e.ids]]], e.reason, e.node) for e in found.elements.exclusions if not e.least]
    for note in (*found.elements.notes, *weighs):
        _, units = touched.of(_present(solution.label[note.ids.ravel()], solution.count))
        for group in np.unique(group_of[units]).tolist():
            nodes[group][note.reason][note.node] = None
    return {
        group: tuple(f"{reason} ({nodes_in_words(list(names))})" for reason, names in reasons.items())
        for group, reasons in nodes.items()
    }


def _groups(
    axes: list[AxisRecord],
    members: list[list[tuple[AxisRecord, np.ndarray, np.ndarray]]],
    group_of: np.ndarray,
    number: int,
    notes: Mapping[int, tuple[str, ...]],
    least: np.ndarray,
) -> list[Group]:
    order = np.argsort(group_of, kind="stable")
    units_of = np.split(order, np.cumsum(np.bincount(group_of, minlength=number))[:-1]) if number else []
    local = np.empty(len(group_of), dtype=np.int64)
    for units in units_of:
        local[units] = np.arange(len(units))
    made: dict[int, Axis] = {}
    result = []
    taken: dict[str, int] = {}
    for k, (rows, units) in enumerate(zip(members, units_of, strict=True)):
        ordered = sorted(rows, key=lambda row: (row[0].role != "weight" or row[0].side == "in", row[0].role != "weight"))
        built = []
        for axis, positions, touched in ordered:
            made.setdefault(id(axis), Axis(axis.tensor, axis.dim, len(axis.ids), axis.role, axis.side))
            built.append(Member(made[id(axis)], positions, local[touched]))
        name = built[0].axis.name
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        why = notes.get(k, ())
        result.append(Group(k, unique, units, tuple(built), not why, why, int(least[units].max(initial=0))))
    return result


def _present(labels: np.ndarray, count: int) -> np.ndarray:
    """The different labels, ascending."""
    found = np.zeros(count, dtype=bool)
    found[labels] = True
    return np.flatnonzero(found)


def _products(solution: Solution, unit_of: np.ndarray, group_of: np.ndarray) -> tuple[Product, ...]:
    """The distinct ties between groups that are factors of one axis."""
    result: dict[tuple[tuple[int, ...], ...], Product] = {}
    composed = {product.classes.tobytes(): product for product in solution.products}
    for product in solution.products:
        factors, sizes = [], []
        for classes in _finest(product, composed):
            units = unit_of[classes]
            factors.append(tuple(np.unique(group_of[units[units >= 0]]).tolist()))
            sizes.append(len(classes))
        if sum(bool(f) for f in factors) and len(factors) > 1:
            result.setdefault(tuple(factors), Product(product.node, tuple(sizes), tuple(factors)))
    return tuple(result.values())


def _finest(product: SolvedProduct, composed: Mapping[bytes, SolvedProduct]) -> list[np.ndarray]:
    """The factors, with those that are products themselves taken apart: a 96 that is 48 x 2 has no units of its own."""
    found = []
    for classes in product.factors:
        inner = composed.get(classes.tobytes())
        found += [classes] if inner is None or inner is product else _finest(inner, composed)
    return found
