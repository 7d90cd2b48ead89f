"""The outcome of a selection: the units to remove, and where the constraints kept the plan from what was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from stp_fx.selection.rounding import GroupLimits

__all__ = ["Selected", "Shortfall", "group_notes", "group_shortfalls", "whole_note"]

_NAMED = 3
"""How many groups a note names; the others are counted."""


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """A group, or the whole plan, that does not lose what was asked.

    ``group``: its name; None for the whole plan. ``asked``: the units to remove, or the fraction of a cost for the whole of a
    cost target; None where a group has no number of its own, yet can lose nothing. ``removed``, ``size``: the same of the plan,
    and in all. ``constraints``: the names of those that are why: "max_ratio", "round_to", "pieces", "one unit" (a group keeps
    one), and "ratios" where those alone go beyond the target. ``kept``: positions in the group of units that are each the last
    of a piece, and kept although units of higher scores are removed.
    """

    group: str | None
    asked: float | None
    removed: float
    size: float
    constraints: tuple[str, ...]
    kept: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
    """The units to remove (bool [units of the graph]), and what kept the plan from the request.

    ``shortfalls``: of the whole plan first, then of groups. ``notes``: the same in a few sentences, which name three groups
    each and count the others. Both are empty where the request is met. ``damage``: of a plan of least damage, what its damages
    add up to.
    """

    removed: np.ndarray
    shortfalls: tuple[Shortfall, ...] = ()
    notes: tuple[str, ...] = ()
    damage: float | None = None


def group_shortfalls(
    names: Sequence[str],
    limits: GroupLimits,
    counts: np.ndarray,
    wanted: np.ndarray,
    unable: np.ndarray,
    kept: Mapping[int, Sequence[int]],
) -> tuple[Shortfall, ...]:
    """The groups that lose fewer than ``wanted`` units, can lose none (``unable``), or keep units of low scores (``kept``).

    ``counts``, ``wanted``: int64 [groups]; ``unable``: bool [groups]; ``kept``: by group, positions in it.
    """
    short = wanted > counts
    reasons = limits.reasons(np.where(short, wanted, limits.sizes - 1))
    concerned = short | unable
    concerned[list(kept)] = True
    found = []
    for k in map(int, np.flatnonzero(concerned)):
        why = [name for name, groups in reasons.items() if groups[k] and (short[k] or unable[k])]
        if k in kept and "pieces" not in why:
            why.append("pieces")
        asked = None if unable[k] and not short[k] else int(wanted[k])
        found.append(Shortfall(names[k], asked, int(counts[k]), int(limits.sizes[k]), tuple(why), tuple(kept.get(k, ()))))
    return tuple(found)


def whole_note(whole: Shortfall, what: str, ratio: float, limits: GroupLimits) -> str:
    """One sentence on the whole plan; ``what`` is counted in it ("channels", "units", or the name of a cost)."""
    why = ", ".join(limits.label(name) for name in whole.constraints)
    if what not in ("channels", "units"):
        return (
            f"{why}: asked to remove {whole.asked:.4f} of the {what}, the plan removes {whole.removed:.4f}, "
            "beyond by more than one unit"
        )
    achieved = f"{whole.removed:g} of {whole.size:g} ({whole.removed / whole.size:.3g} at ratio {ratio:g})"
    return f"asked to remove {whole.asked:g} {what}, the plan removes {achieved}: {why}"


def group_notes(groups: Sequence[Shortfall], limits: GroupLimits, fixed: Collection[str]) -> tuple[str, ...]:
    """Sentences on groups left whole, groups that keep the last unit of a piece, and ``fixed`` groups short of their ratio."""
    notes = []
    for name in ("max_ratio", "round_to"):
        whole = [f"'{s.group}' ({s.size:g} units)" for s in groups if not s.removed and name in s.constraints]
        if whole:
            notes.append(f"{limits.label(name)} lets no unit be removed of {_some(whole)}")
    holding = [f"'{s.group}' ({_kept(s)})" for s in groups if "pieces" in s.constraints]
    if holding:
        notes.append(f"the last unit of a piece of a tensor is kept, whatever its score, of {_some(holding)}")
    short = [
        f"'{s.group}' loses {s.removed:g} of {s.asked:g} units ({', '.join(map(limits.label, s.constraints))})"
        for s in groups
        if s.group in fixed and s.asked is not None and s.asked > s.removed
    ]
    if short:
        notes.append(f"groups with a ratio of their own lose fewer units than asked: {_some(short)}")
    return tuple(notes)


def _kept(shortfall: Shortfall) -> str:
    if not shortfall.kept:
        return f"{shortfall.size - shortfall.removed:g} of {shortfall.size:g} units"
    return f"unit{'s' if len(shortfall.kept) > 1 else ''} {_some(shortfall.kept)}"


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(map(str, items[:_NAMED])) + more
