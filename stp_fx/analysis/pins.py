"""Why positions are pinned: for given classes, and for the whole graph by reason."""

from __future__ import annotations

import numpy as np

from stp_fx.analysis.solved import Solved
from stp_fx.text import listed

__all__ = ["nodes_in_words", "pin_reasons", "pinned_axes"]

_SHOWN = 4


def pinned_axes(solved: Solved) -> dict[str, tuple[str, ...]]:
    """Reason to the names of the axes with a position that it pins; said of itself, not through coupling. Most axes first."""
    label = solved.label
    by_reason: dict[str, np.ndarray] = {}
    for note in solved.found.elements.pins:
        if note.node:
            by_reason.setdefault(note.reason, np.zeros(solved.solution.count, dtype=bool))[label[note.ids.ravel()]] = True
    found = {
        reason: tuple(f"{axis.tensor}:{axis.dim}" for axis in solved.found.axes if flags[label[axis.ids]].any())
        for reason, flags in by_reason.items()
    }
    return {reason: axes for reason, axes in sorted(found.items(), key=lambda item: -len(item[1])) if axes}


def pin_reasons(solved: Solved, classes: np.ndarray) -> list[str]:
    """Why the given classes are pinned: the reasons of these classes, of their factors, or of the axes they are factors of."""
    wanted = np.zeros(solved.solution.count, dtype=bool)
    wanted[classes] = True
    reasons = _said(solved, wanted)
    if reasons:
        return reasons
    for product in solved.solution.products:
        if wanted[product.classes].any():
            for factor in product.factors:
                wanted[factor] = True
        elif any(wanted[factor].any() for factor in product.factors):
            wanted[product.classes.ravel()] = True
    reasons = _said(solved, wanted)
    return [f"{reason}, through an axis it is a factor of" for reason in reasons] or [
        "coupled to positions that cannot be removed"
    ]


def _said(solved: Solved, wanted: np.ndarray) -> list[str]:
    """The reasons recorded for the flagged classes, with the nodes that recorded them; the first few."""
    nodes: dict[str, dict[str, None]] = {}
    for note in solved.found.elements.pins:
        if note.node and wanted[solved.label[note.ids.ravel()]].any():
            nodes.setdefault(note.reason, {})[note.node] = None
    return [f"{reason} ({nodes_in_words(list(names))})" for reason, names in list(nodes.items())[:_SHOWN]]


def nodes_in_words(names: list[str]) -> str:
    """The first few of them."""
    return f"node{'s' if len(names) > 1 else ''} {listed(map(repr, names))}"
