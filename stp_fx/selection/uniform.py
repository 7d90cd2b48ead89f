"""Plans of which every group keeps the same fraction, for networks whose sizes a configuration describes by one number each."""

from __future__ import annotations

import logging

import numpy as np

from stp_fx.errors import InputError, TargetError
from stp_fx.selection.arguments import Cost
from stp_fx.selection.result import Selected, Shortfall
from stp_fx.selection.search import COUNT_SLACK, Search, first_length

__all__ = ["select_uniformly"]

_log = logging.getLogger(__name__)


def select_uniformly(search: Search, target: str, cost: Cost | None) -> Selected:
    """The plan of the largest common fraction up to the ratio, or of the smallest that meets a cost.

    Raises:
        InputError: the sizes of the groups share no divisor, or a product is to lose several factors.
        TargetError: a cost out of reach.
    """
    fractions, counts = _possible(search)
    ratio = search.task.ratio
    if cost is None or target == "channels":
        chosen = int(np.flatnonzero(fractions <= ratio + COUNT_SLACK)[-1])
        asked, removed = ratio, float(fractions[chosen])
    else:
        baseline = float(cost(np.zeros(search.task.total, dtype=bool)))
        costs = {k: float(cost(search.removed(counts[k]))) for k in (0, len(counts) - 1)}
        limit = (1.0 - ratio) * baseline * (1.0 + 1e-12)

        def meets(k: int) -> bool:
            costs[k] = costs[k] if k in costs else float(cost(search.removed(counts[k])))
            return costs[k] <= limit

        if not meets(len(counts) - 1):
            reach = 1.0 - costs[len(counts) - 1] / baseline if baseline else 0.0
            raise TargetError(
                f"target {target!r} with ratio {ratio} is out of reach with uniform=True: at most {reach:.4g} can be removed, at "
                f"{fractions[-1]:.4g} of every group; lower `ratio`, or leave out `uniform`"
            )
        chosen = first_length(len(counts) - 1, meets)
        meets(chosen)
        asked, removed = ratio, 1.0 - costs[chosen] / baseline if baseline else 0.0
    notes: tuple[str, ...] = ()
    whole = Shortfall(None, asked, removed, 1.0, ("uniform",)) if abs(asked - removed) > COUNT_SLACK else None
    if whole is not None:
        what = "channels" if cost is None or target == "channels" else target
        notes = (_note(what, whole, fractions),)
        _log.info("%s", notes[0])
    return Selected(search.removed(counts[chosen]), () if whole is None else (whole,), notes)


def _note(what: str, whole: Shortfall, fractions: np.ndarray) -> str:
    near = ", ".join(f"{each:.4g}" for each in fractions[:6]) + (", ..." if len(fractions) > 6 else "")
    return (
        f"uniform: asked to remove {whole.asked:.4g} of the {what}, the plan removes {whole.removed:.4g}; "
        f"the fractions that divide all groups are {near}"
    )


def _possible(search: Search) -> tuple[np.ndarray, list[np.ndarray]]:
    """The fractions that leave every free group a whole number of units that the constraints allow, rising from 0, and the units
    that each group then loses."""
    task, free = search.task, search.task.free
    if (task.powers[free] > 1).any():
        raise InputError("uniform=True removes one factor of a product: give products='outer', 'inner' or 'none'")
    before, sizes = task.before, search.limits.sizes
    parts = int(np.gcd.reduce(before[free])) if free.any() else 1
    found: list[tuple[float, np.ndarray]] = []
    for part in range(parts):
        wanted = np.where(free, np.maximum(before * part // parts - (before - sizes), 0), task.fixed)
        allowed = search.limits.allowed(wanted)
        if (allowed == wanted)[free].all():
            found.append((part / parts, allowed))
    if parts == 1 and task.ratio > 0 and free.any():
        least = int(np.argmin(before + np.where(free, 0, before.max(initial=0))))
        raise InputError(
            "uniform=True finds no fraction that divides all groups, since their sizes share no divisor (the smallest is "
            f"{task.groups[least].name!r} of {int(before[least])} units, the largest has {int(before[free].max())}); put those "
            "that differ in `ignore`"
        )
    return np.array([fraction for fraction, _ in found]), [counts for _, counts in found]
